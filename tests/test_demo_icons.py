"""The demo's icons: npm tarballs, captions and concepts, what is left out, and a few real icons where npm has them."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image

from demo import data, icons, packages
from demo.icons import Drawing, concept_of, draw, make_caption, reason_to_leave_out, to_words
from demo.packages import Package, PackageError

BUILD = Path(__file__).resolve().parents[1] / "build"
SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="10" height="5" fill="{}"/></svg>'


# --- packages ---------------------------------------------------------------------------------------


def tarball(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """A .tgz with files, and with a link for each member without content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def fake_npm(monkeypatch, *members: tuple[str, bytes | None], status: int = 0) -> list[list[str]]:
    calls = []

    def run(command, cwd=None, **_):
        calls.append(command)
        if not status:
            tarball(Path(cwd) / "some-package-1.2.3.tgz", *members)
        return subprocess.CompletedProcess(command, status, "", "npm error 404" if status else "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setitem(packages.NPM_PACKAGES, "@some/package", ("1.2.3", ("package/svg/*",)))
    return calls


def test_npm_package_is_fetched_once_and_only_what_is_needed_is_kept(tmp_path, monkeypatch):
    files = [("package/svg/a/b.svg", b"<svg/>"), ("package/index.js", b"x"), ("package/package.json", b"{}")]
    calls = fake_npm(monkeypatch, *files)
    package = packages.fetch_npm("@some/package", tmp_path)
    assert (package.name, package.version, package.registry) == ("@some/package", "1.2.3", "npm")
    assert package.path.parent == tmp_path and (package.path / "package/svg/a/b.svg").read_bytes() == b"<svg/>"
    assert (package.path / "package/package.json").is_file() and not (package.path / "package/index.js").exists()
    assert packages.fetch_npm("@some/package", tmp_path) == package
    assert len(calls) == 1 and "--ignore-scripts" in calls[0] and calls[0][-1] == "@some/package@1.2.3"
    assert [path.name for path in tmp_path.iterdir()] == ["some-package-1.2.3-npm"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("package/../../escaped", b"x"),
        ("../escaped", b"x"),
        ("/tmp/escaped", b"x"),
        ("package\\..\\..\\escaped", b"x"),
        ("C:/escaped", b"x"),
        ("package/svg/link", None),
    ],
)
def test_a_tarball_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch, name, content):
    cache = tmp_path / "deep" / "cache"
    fake_npm(monkeypatch, ("package/svg/a.svg", b"<svg/>"), (name, content))
    with pytest.raises(PackageError, match="refused"):
        packages.fetch_npm("@some/package", cache)
    assert not list(cache.iterdir()) and [path.name for path in tmp_path.rglob("*")] == ["deep", "cache"]


def test_without_npm_or_without_the_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    fake_npm(monkeypatch, status=1)
    with pytest.raises(PackageError, match=r"(?s)npm pack .*@some/package@1.2.3.*404.*What to do"):
        packages.fetch_npm("@some/package", tmp_path)
    with pytest.raises(PackageError, match="no pinned version"):
        packages.fetch_npm("unheard-of", tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: None)
    with pytest.raises(PackageError, match="needs npm"):
        packages.fetch_npm("@some/package", tmp_path)
    assert not list(tmp_path.iterdir())
    assert data.main(["icons", "--out", str(tmp_path), "--cache", str(tmp_path)]) == 1


# --- captions and concepts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, concept",
    [
        ("guide-dog", "guide dog"),
        ("Guide Dog", "guide dog"),
        ("guide_dog--02", "guide dog"),
        ("guide dog: 3", "guide dog"),
        ("dog-variant", "dog"),
        ("mosquito-alt-2", "mosquito"),
        ("variant", "variant"),
        ("24-hours", "24 hours"),
        ("8", "8"),
        ("person’s hat", "person’s hat"),
    ],
)
def test_the_same_concept_in_any_spelling_is_one_group(label, concept):
    assert concept_of(label) == concept
    assert concept_of(concept) == concept


def test_caption_is_the_name_and_tags_that_each_add_a_word():
    assert (
        make_caption("dog", ["Dogs", "pet", "*", "", "dog 01", "Pet", "guide_dog", "pet-dog", "狗", "42"])
        == "dog, pet, guide dog"
    )
    assert make_caption("dog", []) == "dog"
    many = make_caption("dog", [f"tag{letter}" for letter in "abcdefghij"])
    assert many.split(", ") == ["dog", "taga", "tagb", "tagc", "tagd", "tage", "tagf"]
    assert to_words("MoneyPaymentsFinance") == "money payments finance"


@pytest.mark.parametrize(
    "name, tags, kept",
    [
        ("bell", (), True),
        ("bell-off", (), False),
        ("bell-off-outline", (), False),
        ("circle-bell", (), False),
        ("bell-2", (), True),  # another drawing of the same concept
        ("fire-extinguisher", (), True),
        ("check-off", (), True),  # there is no "check" that it could be a copy of
        ("arrow-up", (), False),
        ("arrowroot", (), True),
        ("letter-a", (), False),
        ("7", (), False),
        ("github", ("Logo",), False),
    ],
)
def test_what_shows_nothing_or_the_same_again_is_left_out(name, tags, kept):
    reason = reason_to_leave_out(Drawing(name, name, tags, (), b""), {"bell", "fire", name})
    assert (reason is None) == kept


def test_a_category_is_left_out_only_where_the_collection_says_so():
    drawing = Drawing("sigma", "sigma", (), ("Math",), b"")
    assert reason_to_leave_out(drawing, {"sigma"}) is None
    assert "category" in reason_to_leave_out(drawing, {"sigma"}, frozenset({"Math"}))


# --- pictures and the set ---------------------------------------------------------------------------


def test_colours_and_transparency_are_drawn_as_they_are():
    image = draw(SQUARE.format("#c81e0a").encode())
    assert image.mode == "RGBA" and image.size == (256, 256)
    assert image.getpixel((128, 10)) == (200, 30, 10, 255) and image.getpixel((128, 250))[3] == 0
    half = draw(SQUARE.format("rgba(200, 30, 10, 0.5)").encode()).getpixel((128, 10))
    assert half == pytest.approx((200, 30, 10, 128), abs=2)
    assert draw(SQUARE.format("currentColor").encode()).getpixel((128, 10)) == (0, 0, 0, 255)


@pytest.fixture
def two_collections(tmp_path, monkeypatch) -> Path:
    def drawings(*names_and_colours):
        return lambda package, emojibase: [
            Drawing(name, name, ("pet",), (), SQUARE.format(colour).encode() if colour else b"<svg")
            for name, colour in names_and_colours
        ]

    one = drawings(("red-cat", "red"), ("dog-2", "blue"), ("dog", "green"), ("dog-off", "white"), ("broken", None))
    two = drawings(("Dog", "black"))
    collections = [icons.Collection(*named, "MIT", "", read) for *named, read in (("one", "a", one), ("two", "b", two))]
    monkeypatch.setattr(icons, "COLLECTIONS", tuple(collections))
    monkeypatch.setattr(icons, "fetch_npm", lambda name, cache: Package(tmp_path, name, "1.0", "npm"))
    return tmp_path


def test_a_concept_drawn_by_two_collections_is_one_group_and_a_bad_drawing_is_told(two_collections, capsys):
    folder = icons.make_icons(two_collections / "out", two_collections)
    rows = load_from_disk(folder)
    assert rows["id"] == ["one/dog", "one/dog-2", "one/red-cat", "two/Dog"]
    assert rows["group"] == ["dog", "dog", "red cat", "dog"] and rows["category"] == ["one", "one", "one", "two"]
    assert rows["caption"] == ["dog, pet", "dog, pet", "red cat, pet", "dog, pet"]
    told = capsys.readouterr()
    assert "skipped one/broken" in told.err and "1 could not be drawn" in told.out
    card = (folder / "README.md").read_text()
    assert "| one | a 1.0 (npm) | MIT |  | 3 |" in card and "could not be drawn: 1" in card and "4 drawings" in card
    before = (folder / "README.md").stat().st_ino
    assert icons.make_icons(two_collections / "out", two_collections) == folder
    assert (folder / "README.md").stat().st_ino == before
    again = load_from_disk(icons.make_icons(two_collections / "again", two_collections))
    assert rows.with_format("arrow")[:].equals(again.with_format("arrow")[:])
    few = icons.make_icons(two_collections / "out", two_collections, limit=1)
    assert few.name == "icons-1" and load_from_disk(few)["category"] == ["two"]  # "one" gives its broken drawing


def test_real_icons_of_every_collection(tmp_path):
    try:
        folder = icons.make_icons(tmp_path, BUILD / "packages", limit=5)
    except PackageError as error:
        pytest.skip(f"the icon packages cannot be had: {error}")
    rows = load_from_disk(folder)
    assert set(rows["category"]) == {collection.name for collection in icons.COLLECTIONS}
    assert len(rows) >= 4 * len(icons.COLLECTIONS) and len(set(rows["id"])) == len(rows)
    for row in rows:
        image: Image.Image = row["image"]
        assert image.mode == "RGB" and image.width == image.height <= 320
        assert image.getextrema() != ((255, 255),) * 3, f"{row['id']} is blank"
        assert row["id"].startswith(f"{row['category']}/") and row["caption"].split(", ")[0] == row["group"]
        assert 0 <= row["caption"].count(",") <= data.MAX_TAGS
    listed = {}
    for collection in icons.COLLECTIONS[:4]:
        package = packages.fetch_npm(collection.package, BUILD / "packages")
        emojibase = packages.fetch_npm("emojibase-data", BUILD / "packages")
        listed[collection.name] = icons.list_icons(collection, package, emojibase)[0]
    groups = {name: {icon.group for icon in found} for name, found in listed.items()}
    assert len(listed["game-icons"]) > 3500 and len(groups["noto"] & groups["twemoji"]) > 1000
    captions = {icon.id: icon.caption for icon in listed["noto"]}
    assert captions["noto/taco"] == "taco, mexican"

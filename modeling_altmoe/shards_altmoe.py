"""The files under a LatentStore: shards that never change, marks of what was deleted, and who may write.

Comes in: Arrow tables to write, folders to read. Goes out: files that are whole or not there (written under a temporary
name, synced, renamed), and memory-mapped shards in which an id is found without reading all ids. Nothing here knows
modalities or protocols beyond the fingerprint that every shard carries.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:  # stores need them, loading a checkpoint does not
    import pyarrow as pa
    from filelock import FileLock, Timeout
except ImportError:
    pa = None

DELETED = "deleted.arrow"
INDEX_FOLDER = ".ids"
PATIENCE = 5.0  # seconds to wait for another process that only looks around; one that works is an error
# `shard-00003-<digest>.arrow`; after the second compaction `shard-2.00003-<digest>.arrow`; format 1: `shard-00003.arrow`
SHARD_NAME = re.compile(r"shard-(?:(\d+)\.)?(\d{5,})(?:-([0-9a-f]{16}))?\.arrow")


# ---------------------------------------------------------------- files that are whole or not there


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # some systems cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(folder: Path, name: str, write: Callable) -> Path:
    """Write a file whole or not at all.

    Args:
        folder: where.
        name: its name; `{digest}` in it becomes the digest of what was written.
        write: called with the open file.

    Raises:
        OSError: disk full, read-only folder, ...; one sentence, and what was there before is untouched.
    """
    temporary = folder / f"{name.replace('{digest}', '')}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        final = folder / (name.replace("{digest}", file_digest(temporary)) if "{digest}" in name else name)
        temporary.replace(final)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(folder, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return final


def cannot_write(folder: Path, error: OSError) -> OSError:
    """The error for the person whose disk is full or whose folder is read-only."""
    return type(error)(
        f"Cannot write to '{folder}': {error.strerror or error}. What was committed there is safe; make room or make the "
        "folder writable, then run the same again."
    )


# ---------------------------------------------------------------- how mapped files are read


def fits_in_memory(size: int) -> bool:
    """Whether mapped files of so many bytes may be expected to stay in memory (in half of it); True if nobody can say."""
    try:
        return size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, OSError, ValueError):
        return True


def read_ahead(array: np.ndarray, wanted: bool) -> None:
    """Tell the system whether what follows in a mapped array will be read, too; nothing where it cannot be told.

    A system reads megabytes around a page that is asked for. For rows that lie here and there that is a thousand times what
    they are, and pushes out what is needed again.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system than those that have it
        advice = mmap.MADV_NORMAL if wanted else mmap.MADV_RANDOM
        before = array.ctypes.data % mmap.PAGESIZE  # it takes whole pages
        start, size = array.ctypes.data - before, array.nbytes + before
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


# ---------------------------------------------------------------- who may write


def _held(path: Path) -> bool:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[None]:
    """Hold the store's gate: writers pass it on their way in, delete and compact stay in it."""
    gate = FileLock(folder / ".lock", thread_local=False)
    try:
        gate.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise RuntimeError(
            f"Another process is deleting from '{folder}' or compacting it. Wait for it to end, then try again."
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        gate.release()


def lock_to_append(folder: Path, rank: int, world: int) -> tuple["FileLock", bool]:
    """Become the writer `rank` of `world`; also tells whether no other rank writes now.

    Raises:
        RuntimeError: this rank is taken, ranks of another count are writing, or rows are being deleted.
        OSError: the folder cannot be written.
    """
    with _gate(folder):
        mine = folder / f".lock-{rank}-of-{world}"
        writing = [path.name for path in folder.glob(".lock-*") if path != mine and _held(path)]
        foreign = [name for name in writing if not name.endswith(f"-of-{world}")]
        lock = FileLock(mine, thread_local=False)
        try:
            if foreign:
                raise Timeout(foreign[0])
            lock.acquire(timeout=0)
        except Timeout as error:
            what = f"as {foreign[0].removeprefix('.lock-').replace('-', ' ')} ranks" if foreign else f"as rank {rank}"
            raise RuntimeError(
                f"Another process is writing to '{folder}' {what}. Wait for it to end; several processes at once need a "
                "rank each (torchrun or accelerate launch)."
            ) from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        return lock, not writing


@contextlib.contextmanager
def lock_to_change(folder: Path) -> Iterator[None]:
    """Be the only one who changes anything here.

    Raises:
        RuntimeError: another process writes.
        OSError: the folder cannot be written.
    """
    with _gate(folder):
        if any(_held(path) for path in folder.glob(".lock-*")):
            raise RuntimeError(f"Another process is writing to '{folder}'. Wait for it to end, then try again.")
        yield


def sweep(folder: Path, generation: int) -> None:
    """Remove what a killed process left: half-written files, and shards of another generation. Needs a lock."""
    keep = {path.name for path in list_shards(folder, generation)}
    for path in folder.iterdir():
        if path.name.endswith(".tmp") or (SHARD_NAME.fullmatch(path.name) and path.name not in keep):
            path.unlink(missing_ok=True)
    stems = {name.removesuffix(".arrow") for name in keep}
    for path in (folder / INDEX_FOLDER).glob("*"):
        if path.stem not in stems:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- shards


def list_shards(folder: Path, generation: int) -> list[Path]:
    """The shard files of one generation, in order."""
    found = []
    for path in folder.glob("shard-*.arrow"):
        match = SHARD_NAME.fullmatch(path.name)
        if match and int(match[1] or 0) == generation:
            found.append((int(match[2]), path.name, path))
    return [path for *_, path in sorted(found)]


def write_shard(folder: Path, generation: int, table: "pa.Table") -> Path:
    """Write a table as the next shard of a generation.

    Raises:
        OSError: see `write_file`.
    """
    before = list_shards(folder, generation)
    number = 1 + int(SHARD_NAME.fullmatch(before[-1].name)[2]) if before else 0
    name = f"shard-{f'{generation}.' if generation else ''}{number:05d}-{{digest}}.arrow"

    def write(file) -> None:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    return write_file(folder, name, write)


def hash_ids(ids: list[str]) -> np.ndarray:
    """64 bits of each id, `(n,)` uint64, the same everywhere."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8")


class Shard:
    """One shard, memory-mapped. Places count all its rows, rows only those that are not deleted.

    Args:
        path: the file.
        latent_size: width of its vectors.
        dead: places of the deleted rows, sorted.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: it is gone (the store was compacted meanwhile).
    """

    def __init__(self, path: Path, latent_size: int, dead: np.ndarray):
        self.path, self.dead = path, dead
        try:
            self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()  # maps, does not read
            latent = self.table.column("latent")  # one chunk, as we write it; combining would copy it into memory
            latent = latent.chunk(0) if latent.num_chunks == 1 else latent.combine_chunks()
            self.vectors = latent.flatten().to_numpy(zero_copy_only=True).reshape(-1, latent_size)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"Shard '{path}' is damaged ({error}). Delete it and run 'altmoe encode' again."
            ) from error
        self.fingerprint = (self.table.schema.metadata or {}).get(b"altmoe", b"").decode()
        self._live_before_dead = dead.astype(np.int64) - np.arange(len(dead))
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        self._columns: dict[str, pa.Array | pa.ChunkedArray] = {}  # that were asked for

    def __len__(self) -> int:
        return len(self.vectors) - len(self.dead)

    @property
    def file_identity(self) -> bytes:
        """What this shard's file holds, in a few bytes: its name (with the digest of its bytes)."""
        name = self.path.name.encode()
        if SHARD_NAME.fullmatch(self.path.name)[3] is None and len(self.vectors):  # format 1: no digest in the name
            ends = self.table.column("id").take([0, len(self.vectors) - 1]).to_pylist()
            name += repr([self.path.stat().st_size, ends]).encode() + self.vectors[[0, -1]].tobytes()
        return name

    @property
    def identity(self) -> bytes:
        """What this shard holds, in a few bytes: its file and what is deleted."""
        dead = hashlib.sha256(self.dead.astype("<u4").tobytes()).digest() if len(self.dead) else b""
        return self.file_identity + dead

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers among the live -> places in the file."""
        return rows + np.searchsorted(self._live_before_dead, rows, side="right") if len(self.dead) else rows

    def _column(self, name: str) -> "pa.Array | pa.ChunkedArray":
        found = self._columns.get(name)
        if found is None:
            column = self.table.column(name)
            found = self._columns[name] = column.chunk(0) if column.num_chunks == 1 else column
        return found

    def values(self, name: str, rows: np.ndarray) -> list:
        """Values of one column."""
        return self._column(name).take(pa.array(self.places(rows))).to_pylist()

    def record(self, row: int, names: Iterable[str]) -> dict[str, Any]:
        """Values of some columns in one row."""
        place = int(self.places(np.array([row]))[0]) if len(self.dead) else row
        return {name: self._column(name)[place].as_py() for name in names}

    def live(self, name: str) -> "pa.ChunkedArray":
        """One column without its deleted rows; as it lies in the file if there are none."""
        column = self.table.column(name)
        if not len(self.dead):
            return column
        mask = np.ones(len(column), dtype=bool)
        mask[self.dead] = False
        return column.filter(pa.array(mask))

    def find(self, ids: list[str], hashes: np.ndarray) -> np.ndarray:
        """Places of some ids that are not deleted, -1 where there is none; only equal hashes are read and compared."""
        order, places = self._hash_index()
        result = np.full(len(ids), -1, dtype=np.int64)
        at = np.searchsorted(order, hashes)
        open_ = np.arange(len(ids))
        while True:  # one round, and one more for each id that shares its 64 bits with another
            open_ = open_[at[open_] < len(order)]
            open_ = open_[order[at[open_]] == hashes[open_]]
            if not len(open_):
                return result
            candidates = places[at[open_]].astype(np.int64)
            names = self.table.column("id").take(pa.array(candidates)).to_pylist()
            same = np.array([name == ids[i] for name, i in zip(names, open_, strict=True)], dtype=bool)
            alive = ~np.isin(candidates, self.dead) if len(self.dead) else np.ones(len(open_), dtype=bool)
            result[open_[same & alive]] = candidates[same & alive]
            open_ = open_[~same]
            at[open_] += 1

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Places in the file -> row numbers among the live."""
        return places - np.searchsorted(self.dead, places) if len(self.dead) else places

    def _hash_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes and their places: a small file beside the shards, made again wherever it is missing."""
        if self._index is None:
            count, folder = len(self.vectors), self.path.parent / INDEX_FOLDER
            place = folder / f"{self.path.stem}.ids"
            if not place.exists():
                hashes = hash_ids(self.table.column("id").to_pylist())
                order = np.argsort(hashes, kind="stable")
                self._index = hashes[order], order.astype("<u4")
                if (
                    SHARD_NAME.fullmatch(self.path.name)[3] is None
                ):  # without a digest the name does not say what it holds
                    return self._index
                with contextlib.suppress(OSError):  # a read-only store is searched from memory
                    folder.mkdir(exist_ok=True)
                    write_file(folder, place.name, lambda file: [file.write(part.tobytes()) for part in self._index])
            if place.exists():
                content = pa.memory_map(str(place)).read_buffer()
                self._index = (
                    np.frombuffer(content, dtype="<u8", count=count),
                    np.frombuffer(content, dtype="<u4", offset=8 * count, count=count),
                )
        return self._index


# ---------------------------------------------------------------- deleted rows


def read_deleted(folder: Path) -> dict[str, np.ndarray]:
    """`{shard file: places of its deleted rows, sorted}`.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(folder / DELETED))).read_all()
    except FileNotFoundError:
        return {}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"'{folder / DELETED}' is damaged ({error}): which rows were deleted is not known.") from error
    places = zip(table.column("shard").to_pylist(), table.column("places"), strict=True)
    return {name: row.values.to_numpy() for name, row in places}


def write_deleted(folder: Path, deleted: dict[str, np.ndarray]) -> None:
    """Commit which rows are deleted.

    Raises:
        OSError: see `write_file`.
    """
    places = [np.asarray(places, dtype=np.uint32) for places in deleted.values()]
    table = pa.table({"shard": list(deleted), "places": pa.array(places, pa.list_(pa.uint32()))})

    def write(file) -> None:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    write_file(folder, DELETED, write)

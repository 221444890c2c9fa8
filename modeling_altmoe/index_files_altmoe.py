"""Search indexes kept beside their store: `STORE/index/<direction>-<hash>/`.

Comes in: a model, a store, a direction. Goes out: a backend whose vectors are memory-mapped, or an error that says what
does not fit. `index.json` names the other files and says of which store, connector and scoring they were made; it is
written last and whole, so an index that is being written, or was killed, is as it was before. An index goes on serving
when rows are deleted from its store (they are left out); rows that were added are added to it by `update`, and nothing
else is done again.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:  # searching a store needs them, loading a checkpoint does not
    import faiss
    from filelock import FileLock, Timeout
except ImportError:
    faiss = None

from .index_altmoe import EXACT_ROWS, Kept, LocalBackend, build, check_local, choose_index
from .shards_altmoe import cannot_write, write_file

FORMAT = 1
DESCRIPTION = "index.json"
# what of a configuration changes a prediction while the weights stay the same
SETTINGS = ("alpha", "base", "expert_pool", "head_scale", "hidden_act", "num_gates", "top_k")
logger = logging.getLogger(__name__)


def model_fingerprint(model, direction: str) -> dict[str, str]:
    """What an index depends on: `{"connector", "scoring"}`, each in 16 hexadecimal digits."""
    connector, scoring = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    connector.update(json.dumps({name: getattr(model.config, name) for name in SETTINGS}, default=str).encode())
    for name, tensor in sorted(model.connector.state_dict().items()):
        connector.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    post = model.postprocessing(direction)
    settings = {name: value for name, value in post.as_dict().items() if name != "validation_mean_recall"}
    scoring.update(json.dumps(settings, sort_keys=True).encode())
    banks = [*post.query_bank.items(), *post.gallery_bank.items(), *post.known.items()]
    for name, bank in sorted(banks, key=lambda item: item[0]):
        scoring.update(name.encode() + bank.detach().cpu().float().contiguous().numpy().tobytes())
    return {"connector": connector.hexdigest(), "scoring": scoring.hexdigest()}


def folder_of(model, store, direction: str, index: str) -> Path:
    """Where the index of this name is kept."""
    about = json.dumps([direction, model_fingerprint(model, direction), index])
    name = direction.replace("->", "-to-").replace("+", "-and-")
    return store.path / "index" / f"{name}-{hashlib.blake2b(about.encode(), digest_size=4).hexdigest()}"


def _read(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        sizes = description["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"The index '{folder}' is damaged ({DESCRIPTION}: {error}). {_advice(folder)}") from error
    if description.get("format") != FORMAT:
        raise ValueError(
            f"The index '{folder}' has format {description.get('format')}, this version reads {FORMAT}. {_advice(folder)}"
        )
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"The index '{folder}' is damaged ('{name}' {state}). {_advice(folder)}")
    return description


def _advice(folder: Path) -> str:
    return f"Delete the folder, and run 'altmoe index {folder.parent.parent}' with --model and --direction again."


def _alive(folder: Path, description: dict, store) -> tuple[np.ndarray, int, str]:
    """Which positions are not deleted, rows that are not in the index, and what does not fit (or nothing)."""
    layout, alive = store.layout, []
    dead = np.load(folder / description["dead"]) if description["dead"] else np.empty(0, dtype=np.int64)
    start = 0
    for number, (identity, rows, count) in enumerate(description["shards"]):
        if number >= len(layout) or layout[number][0] != identity:
            return np.empty(0, dtype=bool), 0, "the store was compacted or written anew since"
        then, now = np.ones(rows, dtype=bool), np.ones(rows, dtype=bool)
        then[dead[start : start + count]] = False
        now[layout[number][2]] = False
        if (now & ~then).any():
            return np.empty(0, dtype=bool), 0, "rows that were deleted are back in the store"
        alive.append(now[then])
        start += count
    new = sum(rows - len(gone) for _, rows, gone in layout[len(alive) :])
    return np.concatenate(alive), new, f"{new:,} rows were added to the store since" if new else ""


def _foreign(description: dict, model, store, direction: str) -> str:
    """In what an index was made for something else, or nothing."""
    if description["direction"] != direction:
        return f"it is for {description['direction']}, not {direction}"
    if description["protocol"] != store.fingerprint:
        return f"it was made of latents under protocol {description['protocol']}, the store's is {store.fingerprint}"
    found = model_fingerprint(model, direction)
    other = [name for name in found if found[name] != description["model"][name]]
    return f"it was made with another model ({' and '.join(other)} differ)" if other else ""


def _load(folder: Path, description: dict, model, store, alive: np.ndarray, mapped: bool = True) -> LocalBackend:
    flag = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    try:
        index = faiss.read_index(str(folder / description["index"]), flag)
        parts = [
            tuple(np.load(folder / name, mmap_mode="r" if mapped else None) for name in part)
            for part in description["kept"]
        ]
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"The index '{folder}' is damaged ({str(error).splitlines()[-1]}). {_advice(folder)}"
        ) from error
    kept, effort = Kept(parts), description["effort"]
    if index.ntotal != len(alive):
        raise ValueError(
            f"The index '{folder}' is damaged ({index.ntotal} vectors, not {len(alive)}). {_advice(folder)}"
        )
    backend = LocalBackend(model, store, description["direction"], description["factory"], index, kept, effort, alive)
    if mapped:  # to be searched, not to be added to
        backend.read_ahead()
    return backend


def open_local(
    model, store, direction: str, index: str = "auto", rebuild: bool = False, recall: float = 0.99
) -> LocalBackend:
    """The index kept beside the store, or, where there is none, one made in memory.

    Args:
        model, store, direction: as in `LatentIndex`.
        index: `"auto"` (any that is kept; else exact for a small store, approximate for a large one), `"exact"` or a FAISS
            factory string.
        rebuild: make one in memory where those that are kept do not fit.
        recall: of the ten best, to be reached by an approximate index that is made.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is empty, an unknown index, or kept ones that are stale, of another model, or damaged.
    """
    check_local(store)
    problems = []
    name = direction.replace("->", "-to-").replace("+", "-and-")
    for place in sorted(store.path.glob(f"index/{name}-*/{DESCRIPTION}")):
        folder = place.parent
        try:
            description = _read(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        if index not in ("auto", description["name"], description["factory"]):
            continue
        alive, _, problem = _alive(folder, description, store)
        problem = _foreign(description, model, store, direction) or problem
        if not problem:
            return _load(folder, description, model, store, alive)
        problems.append(f"The index '{folder}' does not fit: {problem}.")
    if problems and not rebuild:
        raise ValueError(
            f"{problems[0]} Run 'altmoe index {store.path} --model MODEL --direction \"{direction}\"' with this model, or "
            "pass rebuild=True (--rebuild) to make an index in memory."
        )
    if len(store) > EXACT_ROWS and index != "exact":
        logger.warning(
            "An index of %s rows is made in memory; 'altmoe index %s' makes it once and keeps it.",
            f"{len(store):,}",
            store.path,
        )
    return build(model, store, direction, index, recall)


class _Files:
    """New files of one index, under names that no other has; all are removed where one cannot be written."""

    def __init__(self, folder: Path):
        self.folder, self.token, self.names = folder, secrets.token_hex(4), []

    def name(self, stem: str) -> str:
        self.names.append(stem.replace(".", f"-{self.token}."))
        return self.names[-1]

    def array(self, shape: tuple, kind) -> np.ndarray:
        """An array in a file whose room on the disk is taken at once: a map of a full disk would kill the process."""
        path = self.folder / self.name("predicted.npy" if len(shape) > 1 else "hubness.npy")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def write(self, stem: str, write: Callable[[str], None]) -> str:
        name = self.name(stem)
        try:
            write(str(self.folder / name))
        except RuntimeError as error:  # so FAISS says that the disk is full
            raise OSError(str(error).splitlines()[-1]) from error
        return name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is not None:
            for name in self.names:
                (self.folder / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(self.folder, error) from error


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", thread_local=False)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"Another process is making the index '{folder}'. Wait for it to end.") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def update(
    model,
    store,
    direction: str,
    index: str = "auto",
    recall: float = 0.99,
    fresh: bool = False,
    progress: Callable = iter,
) -> tuple[LocalBackend, Path, str]:
    """Make an index and keep it beside the store; where one is kept, only add the rows that it has not.

    Args:
        model, store, direction, index, recall: as in `open_local`.
        fresh: make it anew in any case.
        progress: wraps the iteration over batches of rows.

    Returns:
        The backend, its folder, and what was done, in a few words.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is empty, or an unknown index.
        RuntimeError: another process makes this index.
        OSError: the folder cannot be written; the index is as it was.
    """
    check_local(store)
    folder = folder_of(model, store, direction, index)
    with _only_writer(folder):
        kept, alive, done = None, None, "made"
        if (folder / DESCRIPTION).exists():
            done = "made anew"
            with contextlib.suppress(ValueError):  # a damaged one is made anew
                kept = _read(folder)
            if kept and not fresh and kept["factory"] == choose_index(index, len(store)):
                alive, new, problem = _alive(folder, kept, store)
                if not problem:
                    return _load(folder, kept, model, store, alive), folder, "up to date"
                done = f"{new:,} rows added" if new else f"made anew, because {problem}"
                kept = kept if new else None
            else:
                kept = None
        with _Files(folder) as files:
            if kept:
                backend = _load(folder, kept, model, store, alive, mapped=False)
                backend.add(len(backend), files.array, progress=progress)
            else:
                backend = build(model, store, direction, index, recall, files.array, progress)
            description = _describe(backend, index, kept, files)
            write_file(folder, DESCRIPTION, lambda file: file.write(json.dumps(description, indent=1).encode()))
        for path in folder.iterdir():  # of the one before
            if path.name not in (*description["files"], DESCRIPTION, ".lock"):
                path.unlink()
        alive, _, _ = _alive(folder, description, store)
        return _load(folder, description, model, store, alive), folder, done


def _describe(backend: LocalBackend, name: str, before: dict | None, files: _Files) -> dict:
    """Write what is not written yet; what `index.json` says."""
    store = backend.store
    shards, dead = list(before["shards"]) if before else [], []
    if before and before["dead"]:
        dead.append(np.load(files.folder / before["dead"]))
    for identity, rows, gone in store.layout[len(shards) :]:
        shards.append([identity, rows, len(gone)])
        dead.append(np.asarray(gone, dtype=np.int64))
    dead = np.concatenate([np.empty(0, dtype=np.int64), *dead])
    arrays = [path for path in files.names if path.endswith(".npy")]
    for part in backend.kept.parts:
        for array in part:
            if isinstance(array, np.memmap):
                array.flush()
    kept = [*(before["kept"] if before else []), *([arrays] if arrays else [])]
    gone = files.write("deleted.npy", lambda path: np.save(path, dead)) if len(dead) else None
    vectors = files.write("vectors.faiss", lambda path: faiss.write_index(backend.index, path))
    all_files = [vectors, *(name for part in kept for name in part), *([gone] if gone else [])]
    return {
        "format": FORMAT,
        "name": name,
        "factory": backend.factory,
        "direction": backend.direction,
        "protocol": store.fingerprint,
        "model": model_fingerprint(backend.model, backend.direction),
        "effort": backend.effort,
        "shards": shards,
        "index": vectors,
        "kept": kept,
        "dead": gone,
        "files": {file: (files.folder / file).stat().st_size for file in all_files},
    }

"""LatentStore: latents computed once, kept for ever. One folder, one modality, one protocol.

Comes in: ids, latents `(n, size)` and metadata columns. Goes out: the same, memory-mapped; memory does not grow with the
number of rows. On disk: `store.json` (modality, protocol, encoder) and Arrow shards that `datasets` opens directly; every
shard carries the protocol's fingerprint in its schema. `writing_altmoe` is the half of the class that writes, and
`shards_altmoe` knows the files. A crash loses at most the rows not yet flushed and never leaves half a shard. No vector here
is ever changed by training a connector.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:  # stores need them, loading a checkpoint does not
    import filelock  # noqa: F401 - writing needs it; said when a store is opened
    import pyarrow as pa
except ImportError:
    pa = None

from .encoding_altmoe import LatentProtocol
from .shards_altmoe import Shard, cannot_write, hash_ids, list_shards, read_ahead, read_deleted, write_file
from .sharing_altmoe import push_folder, shareable, store_card
from .writing_altmoe import DESCRIPTION, DTYPES, FORMAT, StoreWriter

FEW = 32  # rows that are read one by one faster than together


class LatentStore(StoreWriter):
    """Latents of one modality under one protocol; open with [`LatentStore.open`], make with [`LatentStore.create`].

    Example:

    ```python
    with LatentStore.create("stores/image", "image", encoder_entry, columns={"path": "string"}) as store:
        store.append(ids, latents, path=paths)
    store = LatentStore.open("stores/image")
    store.take([0, 5, 7])                                   # (3, latent_size) float32
    store.columns_of(5)                                     # {"path": "..."}
    store.take(store.rows_of(["cat.png"]))
    for ids, latents, columns in store.batches():           # all rows, a few at a time
        ...
    ```

    Row numbers count the rows that are not deleted, in order. They, and `content`, are those of the moment the store was
    opened, flushed or reloaded; what other processes commit meanwhile is seen after `reload()`.
    """

    def __init__(self, path: str | os.PathLike, description: dict[str, Any], *, rank: int = 0, world: int = 1):
        if pa is None:
            raise ImportError("A LatentStore needs pyarrow and filelock: pip install pyarrow filelock.")
        self.path = Path(path)
        self.description = description
        self.modality: str = description["modality"]
        self.latent_size: int = description["encoder"]["latent_size"]
        self.dtype: str = description["dtype"]
        self.columns: dict[str, str] = description["columns"]
        self.protocol = LatentProtocol.from_dict(description["encoder"].get("protocol") or {})
        self._start_writing(rank, world)
        self.reload()

    # ---------------------------------------------------------------- make and open

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        modality: str,
        encoder: dict[str, Any],
        *,
        dtype: str = "float32",
        columns: dict[str, str] | None = None,
        shard_rows: int = 50_000,
        rank: int = 0,
        world: int = 1,
    ) -> "LatentStore":
        """Make a store, or reopen the same one to go on writing.

        Args:
            path: folder.
            modality: e.g. `"image"`.
            encoder: entry of `AltMoEConfig.encoders`: at least `latent_size`; usually `protocol`, `name_or_path`, ...
            dtype: `"float32"` or `"float16"`.
            columns: metadata columns beside `id`, `{name: Arrow type}`, e.g. `{"caption": "string"}`.
            shard_rows: rows a shard.
            rank: number of this writer among `world` that write into this folder at once. They must not give the same
                id; `altmoe encode` shares the ids out by their hash.
            world: how many writers there are; a later run may have another number.

        Raises:
            ValueError: if a store of another protocol, modality, width or layout is there already.
            OSError: the folder cannot be written.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}.")
        description = {
            "format": FORMAT,
            "modality": modality,
            "dtype": dtype,
            "columns": dict(columns or {}),
            "shard_rows": shard_rows,
            "encoder": encoder,
        }
        folder = Path(path)
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} of world={world}: expected 0 to {world - 1}.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        if not (folder / DESCRIPTION).exists():
            text = json.dumps(description, indent=2) + "\n"
            write_file(folder, DESCRIPTION, lambda file: file.write(text.encode()))
        store = cls.open(path, rank=rank, world=world)
        store.check(modality, encoder)
        for field in ("dtype", "columns"):
            if store.description[field] != description[field]:
                raise ValueError(
                    f"{path} exists with {field}={store.description[field]}, not {description[field]}. "
                    "Choose another folder, or delete this one."
                )
        return store

    @classmethod
    def open(cls, path: str | os.PathLike, *, rank: int = 0, world: int = 1) -> "LatentStore":
        """Open an existing store. Neither vectors nor ids are read.

        Raises:
            FileNotFoundError: there is no store; the message says how to make one.
            ValueError: damaged, or written by a newer version.
        """
        return cls(path, cls._read_description(Path(path)), rank=rank, world=world)

    @staticmethod
    def _read_description(folder: Path) -> dict[str, Any]:
        place = folder / DESCRIPTION
        if not place.exists():
            raise FileNotFoundError(f"No LatentStore at '{folder}' (no {DESCRIPTION}). Make one with 'altmoe encode'.")
        try:
            description = json.loads(place.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"'{place}' is damaged ({error}). Restore it or encode again.") from error
        if description.get("format") not in range(1, FORMAT + 1):
            raise ValueError(
                f"'{folder}' has store format {description.get('format')}, this version reads 1 to {FORMAT}."
            )
        return description

    @property
    def encoder(self) -> dict[str, Any]:
        """The encoder's entry for `AltMoEConfig.encoders`."""
        return self.description["encoder"]

    @property
    def fingerprint(self) -> str:
        """The protocol's fingerprint."""
        return self.protocol.fingerprint

    def check(self, modality: str, encoder: dict[str, Any]) -> None:
        """Raise if this store is of another modality, width or protocol than a model or encoder expects.

        Raises:
            ValueError: naming what differs.
        """
        if modality != self.modality:
            raise ValueError(f"'{self.path}' holds '{self.modality}' latents, expected '{modality}'.")
        if encoder["latent_size"] != self.latent_size:
            raise ValueError(
                f"'{self.path}' holds latents of width {self.latent_size}, expected {encoder['latent_size']}: "
                "they are from another encoder."
            )
        expected = LatentProtocol.from_dict(encoder.get("protocol") or {})
        expected.check_same(self.protocol, f"The latents in '{self.path}'")

    # ---------------------------------------------------------------- read

    def reload(self) -> None:
        """See what other processes have committed since this store was opened.

        Raises:
            ValueError: a damaged shard, or one of another protocol.
        """
        for attempt in range(3):
            self.description = self._read_description(self.path)
            deleted, self._shards = read_deleted(self.path), []
            try:
                for path in list_shards(self.path, self.generation):
                    self._open_shard(path, deleted.get(path.name, np.empty(0, dtype=np.uint32)))
                return
            except FileNotFoundError:  # compacted between listing and opening
                if attempt == 2:
                    raise

    def _open_shard(self, path: Path, dead: np.ndarray) -> None:
        shard = Shard(path, self.latent_size, dead)
        if shard.fingerprint != self.fingerprint:
            raise ValueError(
                f"Shard '{path}' was made under protocol {shard.fingerprint or 'unknown'}, the store's is "
                f"{self.fingerprint}. Move it to a store of its own."
            )
        self._shards.append(shard)
        self._ends = np.cumsum([len(shard) for shard in self._shards]).tolist()

    def read_ahead(self, wanted: bool) -> None:
        """Whether the system should read on after rows that are read (as it does from the start), see `shards_altmoe`."""
        for shard in self._shards:
            read_ahead(shard.vectors, wanted)

    @property
    def generation(self) -> int:
        """How often the store was compacted."""
        return self.description.get("generation", 0)

    @property
    def deleted(self) -> int:
        """How many deleted rows still lie on the disk."""
        return sum(len(shard.dead) for shard in self._shards)

    @property
    def shards(self) -> list[Path]:
        """The shard files, in order."""
        return [shard.path for shard in self._shards]

    def __len__(self) -> int:
        return self._ends[-1] if self._shards else 0

    def _contents(self) -> Iterator[tuple[str, int]]:
        """`(content, rows)` of the first 0, 1, 2, ... shards."""
        digest, rows = hashlib.sha256(f"{self.fingerprint} {self.dtype}".encode()), 0
        yield digest.hexdigest()[:32], rows
        for shard in self._shards:
            digest.update(shard.identity)
            rows += len(shard)
            yield digest.hexdigest()[:32], rows

    @property
    def content(self) -> str:
        """What the store holds, in 32 hexadecimal digits: another string after every committed write, the same one after
        reopening or copying."""
        return list(self._contents())[-1][0]

    def rows_at(self, content: str) -> int | None:
        """For an index that was made when `content` was another: how many of the first rows are those it was made of.

        None if more than appending happened since (rows were deleted, the store was compacted, or it is another one).
        """
        return dict(self._contents()).get(content)

    @property
    def layout(self) -> list[tuple[str, int, np.ndarray]]:
        """For an index that outlives deletions, a shard each: `(what its file holds, rows in it, places of the deleted)`."""
        return [(shard.file_identity.hex(), len(shard.vectors), shard.dead) for shard in self._shards]

    @property
    def dataset(self):
        """All rows as a memory-mapped `datasets.Dataset` (columns `id`, `latent`, and the metadata).

        Raises:
            ImportError: datasets is not installed.
        """
        try:  # half a second, which a search does without
            from datasets import Dataset, concatenate_datasets
        except ImportError as error:
            raise ImportError("A data set of the rows needs datasets: pip install datasets.") from error
        if not len(self):
            return Dataset.from_dict({name: [] for name in ("id", "latent", *self.columns)})
        parts = []
        for shard in self._shards:
            part = Dataset.from_file(str(shard.path))
            parts.append(part.select(shard.places(np.arange(len(shard)))) if len(shard.dead) else part)
        return concatenate_datasets(parts)

    @property
    def ids(self) -> list[str]:
        """The id of each row, all in memory."""
        return self.column("id")

    def _parts(self, rows) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """For each shard that has some of `rows`: the shard, which of `rows` they are (a slice of rows that are in order, else
        their places), and their numbers in the shard."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if not len(rows):
            return
        order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
        sorted_rows = rows if order is None else rows[order]
        if not 0 <= sorted_rows[0] <= sorted_rows[-1] < len(self):
            raise IndexError(f"Rows {sorted_rows[0]} to {sorted_rows[-1]}, but '{self.path}' has {len(self)}.")
        stops = np.searchsorted(sorted_rows, self._ends).tolist()
        for number, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            if start < stop:
                shard, here = self._shards[number], slice(start, stop)
                numbers = sorted_rows[here] - (self._ends[number] - len(shard))
                yield shard, here if order is None else order[here], numbers

    def _check_column(self, name: str) -> None:
        if name != "id" and name not in self.columns:
            raise ValueError(f"'{self.path}' has no column '{name}'. Columns: id, {', '.join(self.columns)}.")

    def column(self, name: str, rows=None) -> list:
        """One metadata column (or `"id"`), of all rows or of some; only these are read.

        Raises:
            ValueError: there is no such column.
            IndexError: a row out of range.
        """
        self._check_column(name)
        if rows is None:
            return self.arrow(name).to_pylist()
        result = [None] * len(np.asarray(rows).reshape(-1))
        for shard, here, numbers in self._parts(rows):
            for place, value in zip(np.arange(len(result))[here], shard.values(name, numbers), strict=True):
                result[place] = value
        return result

    def arrow(self, name: str) -> "pa.ChunkedArray":
        """One column of all rows as it lies on the disk, memory-mapped (deleted rows left out): for filters.

        Raises:
            ValueError: there is no such column.
        """
        self._check_column(name)
        chunks = [chunk for shard in self._shards for chunk in shard.live(name).chunks]
        return pa.chunked_array(chunks, self._schema().field(name).type)

    def id_of(self, row: int) -> str:
        """The id of one row."""
        return self.column("id", [row])[0]

    def columns_of(self, row: int) -> dict[str, Any]:
        """The metadata of one row."""
        return self._record(row, self.columns)

    def records(self, rows) -> list[dict[str, Any]]:
        """Id and metadata of some rows, `[{"id": ..., column: value, ...}, ...]`; only these are read, all columns at once.

        Raises:
            IndexError: a row out of range.
        """
        rows, names = np.asarray(rows).reshape(-1), ("id", *self.columns)
        if len(rows) <= FEW:
            return [self._record(row, names) for row in rows.tolist()]
        result = [{}] * len(rows)
        for shard, here, numbers in self._parts(rows):
            columns = [shard.values(name, numbers) for name in names]
            places = range(here.start, here.stop) if isinstance(here, slice) else here.tolist()
            for place, values in zip(places, zip(*columns, strict=True), strict=True):
                result[place] = dict(zip(names, values, strict=True))
        return result

    def _record(self, row: int, names: Iterable[str]) -> dict[str, Any]:
        """Some columns of one row, without an array that is made for it: a search asks for a few hits' every time."""
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row}, but '{self.path}' has {len(self)}.")
        number = bisect.bisect_right(self._ends, row)
        shard = self._shards[number]
        return shard.record(row - (self._ends[number] - len(shard)), names)

    def rows_of(self, ids: list[str]) -> np.ndarray:
        """Row numbers of some ids, `(len(ids),)` int64; -1 for an id that is not there."""
        names = list(map(str, ids))
        hashes = hash_ids(names)
        order = np.argsort(hashes)  # sorted needles are found several times faster in sorted shards
        names, hashes, result = [names[i] for i in order], hashes[order], np.full(len(names), -1, dtype=np.int64)
        for shard, end in zip(self._shards, self._ends if self._shards else (), strict=True):
            places = shard.find(names, hashes)
            here = places >= 0
            result[order[here]] = shard.rows(places[here]) + end - len(shard)
        return result

    def has(self, ids: list[str]) -> np.ndarray:
        """Which ids are there, written or pending: `(len(ids),)` boolean."""
        return (self.rows_of(ids) >= 0) | np.array([str(name) in self._pending_ids for name in ids], dtype=bool)

    def take(self, rows) -> torch.Tensor:
        """Latents of some rows, `(len(rows), latent_size)` float32.

        Raises:
            IndexError: a row out of range.
        """
        result = np.empty((len(np.asarray(rows).reshape(-1)), self.latent_size), dtype=self.dtype)
        for shard, here, numbers in self._parts(rows):
            result[here] = shard.vectors.take(shard.places(numbers), axis=0)  # several times faster than [...]
        return torch.from_numpy(result).float()  # and torch than numpy, from float16

    def batches(self, rows: int = 16384, start: int = 0) -> Iterator[tuple[list[str], torch.Tensor, dict[str, list]]]:
        """All rows in order, a few at a time: `(ids, latents, columns)`.

        Args:
            rows: how many at a time.
            start: the first row.
        """
        for first in range(start, len(self), rows):
            wanted = np.arange(first, min(first + rows, len(self)))
            columns = {name: self.column(name, wanted) for name in self.columns}
            yield self.column("id", wanted), self.take(wanted), columns

    def latents(self) -> torch.Tensor:
        """All latents, `(n, latent_size)` float32, in memory."""
        return self.take(np.arange(len(self)))

    # ---------------------------------------------------------------- share

    def push_to_hub(self, repo_id: str, *, license: str | None = None, data: str | None = None, **kwargs) -> str:
        """Send the store with a card of its own to the Hub, as a data set; the commit's address.

        Args:
            repo_id: `name` or `owner/name`; made if it does not exist.
            license: of the latents, e.g. `"cc-by-4.0"`.
            data: what was encoded, for the card: the name of a data set, or words.
            kwargs: `private`, `token`, `revision`, `commit_message`.

        Raises:
            ValueError: nothing written yet.
            PermissionError: the token may not write there.
        """
        if not len(self):
            raise ValueError(f"'{self.path}' is empty: nothing to push. Call flush() after append().")
        if self.deleted:
            raise ValueError(
                f"'{self.path}' still holds deleted rows, which would be sent as well: call compact() first."
            )
        description = json.dumps(shareable(self.description), indent=2) + "\n"
        replace = {DESCRIPTION: description.encode(), "README.md": store_card(self, repo_id, license, data).encode()}
        kwargs.setdefault("commit_message", f"{len(self)} latents")
        # shards of before a compaction go: whoever opens the data set with `datasets` would read their rows as well
        return push_folder(self.path, repo_id, "dataset", replace=replace, mirror="shard-*.arrow", **kwargs)

    @classmethod
    def from_hub(cls, repo_id: str, **kwargs) -> "LatentStore":
        """Open a store on the Hub, downloaded once into the cache. Read it; to add rows, copy the folder first.

        Args:
            repo_id: name of the data set.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: no such data set, or no access.
            ValueError: it is not a store.
        """
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo_id, repo_type="dataset", allow_patterns=[DESCRIPTION, "shard-*.arrow"], **kwargs
        )
        if not (Path(folder) / DESCRIPTION).exists():
            raise ValueError(f"The data set '{repo_id}' is not a LatentStore (no {DESCRIPTION}).")
        return cls.open(folder)

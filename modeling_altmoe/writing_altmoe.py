"""The half of LatentStore that writes: append, delete, compact, each committed whole or not at all.

Comes in: ids, latents and metadata. Goes out: shards and marks of deleted rows on the disk, through `shards_altmoe`. What a
reader sees is not decided here.
"""

import contextlib
import json
import time
from collections.abc import Iterator

import numpy as np
import torch

try:  # stores need them, loading a checkpoint does not
    import pyarrow as pa
    from filelock import FileLock
except ImportError:
    pa = None

from .shards_altmoe import (
    DELETED,
    hash_ids,
    lock_to_append,
    lock_to_change,
    sweep,
    write_deleted,
    write_file,
    write_shard,
)

FORMAT = 2  # 1 had no digest in the names of its shards, no generations and no deleted rows
DTYPES = {"float32": np.float32, "float16": np.float16}
DESCRIPTION = "store.json"
LARGEST = 256 << 20  # bytes a shard holds at most, so that wide vectors need no more memory than narrow ones


class StoreWriter:
    """What a [`LatentStore`] does to its folder; see there for an example.

    Attributes:
        rank, world: which writer this is, of how many.
        shard_seconds: write what is pending at least this often (seconds; None: only full shards).
    """

    def _start_writing(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.shard_seconds: float | None = None
        self._pending: list[pa.Table] = []
        self._pending_ids: set[str] = set()
        self._pending_since = 0.0
        self._lock: FileLock | None = None

    def _schema(self) -> "pa.Schema":
        try:  # half a second, which a search does without
            from datasets import Features, List, Value
        except ImportError as error:
            raise ImportError("Writing a LatentStore needs datasets: pip install datasets.") from error
        features = {"id": Value("string"), "latent": List(Value(self.dtype), length=self.latent_size)}
        features.update({name: Value(kind) for name, kind in self.columns.items()})
        schema = Features(features).arrow_schema
        return schema.with_metadata({**(schema.metadata or {}), b"altmoe": self.fingerprint.encode()})

    def lock(self) -> None:
        """Become the writer now (`append` does it too), and see everything that was committed before.

        Raises:
            RuntimeError: another process writes here, as this rank or with another number of ranks.
            OSError: the folder cannot be written.
        """
        if self._lock is None:
            self._lock, alone = lock_to_append(self.path, self.rank, self.world)
            self.reload()
            if alone:
                sweep(self.path, self.generation)
            if (self.rows_of(list(self._pending_ids)) >= 0).any():  # a flush had failed, and others have come since
                self._unlock()
                raise RuntimeError(f"Another process has written the rows that were pending for '{self.path}'.")

    def append(self, ids: list[str], latents: torch.Tensor | np.ndarray, **columns: list) -> None:
        """Add rows. Full shards are written at once; call `flush` for the rest (or use `with store:`).

        Args:
            ids: one unique string a row.
            latents: `(n, latent_size)`.
            columns: the metadata columns the store was made with.

        Raises:
            ValueError: wrong width or length, NaN, missing or unknown columns, an id that is already there.
            RuntimeError: another process is writing here.
            OSError: disk full or folder read-only; rows that are not written yet stay pending, `flush` tries again.
        """
        if isinstance(latents, torch.Tensor):  # torch rounds to float16 many times faster than numpy
            rows = latents.detach().cpu().to(getattr(torch, self.dtype)).numpy()
        else:
            rows = np.asarray(latents)
        if rows.ndim != 2 or rows.shape[1] != self.latent_size:
            raise ValueError(f"Latents of shape {rows.shape}, expected (n, {self.latent_size}) for '{self.path}'.")
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused below
            rows = rows.astype(DTYPES[self.dtype])
        ids = [str(name) for name in ids]
        if set(columns) != set(self.columns):
            raise ValueError(f"Columns {sorted(columns)} given, the store has {sorted(self.columns)}.")
        lengths = {name: len(values) for name, values in {"id": ids, **columns}.items()}
        if set(lengths.values()) != {len(rows)}:
            raise ValueError(f"{len(rows)} latents, but columns of length {lengths}.")
        if not np.isfinite(rows).all():
            bad = [ids[i] for i in np.flatnonzero(~np.isfinite(rows).all(1))[:5]]
            raise ValueError(f"Latents contain NaN or infinity (as {self.dtype}), ids {bad}.")
        self.lock()
        repeated = [ids[i] for i in np.flatnonzero(self.has(ids))] or ([] if len(set(ids)) == len(ids) else ids)
        if repeated:
            raise ValueError(f"Ids must be unique; already in '{self.path}' or given twice: {repeated[:5]}.")
        latent = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.latent_size)
        schema = self._schema()
        data = [pa.array(ids), latent, *(pa.array(columns[name], schema.field(name).type) for name in self.columns)]
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(pa.Table.from_arrays(data, schema=schema))
        self._pending_ids.update(ids)
        while sum(map(len, self._pending)) >= self._rows_a_shard:
            self._write_shard(self._rows_a_shard)
        late = self.shard_seconds is not None and time.monotonic() - self._pending_since >= self.shard_seconds
        if self._pending and late:
            self._write_shard(self._rows_a_shard)

    @property
    def _rows_a_shard(self) -> int:
        width = self.latent_size * np.dtype(DTYPES[self.dtype]).itemsize
        return min(self.description["shard_rows"], max(1, LARGEST // width))

    def _write_shard(self, rows: int) -> None:
        table = pa.concat_tables(self._pending)
        shard, rest = table.slice(0, rows), table.slice(rows)
        path = write_shard(self.path, self.generation, shard)  # if it fails, everything stays pending
        self._open_shard(path, np.empty(0, dtype=np.uint32))
        self._pending = [rest] if len(rest) else []
        self._pending_ids.difference_update(shard.column("id").to_pylist())
        self._pending_since = time.monotonic()

    def flush(self) -> None:
        """Write what is pending, release the writer's lock and make the new rows readable.

        Raises:
            OSError: disk full or folder read-only; what is pending stays so.
        """
        if self._pending:
            self.lock()
        while self._pending:  # several shards if writing had failed before
            self._write_shard(self._rows_a_shard)
        self._unlock()
        self.reload()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self):
        self.lock()
        return self

    def __exit__(self, kind, *_):
        try:
            with (
                contextlib.suppress(OSError) if kind else contextlib.nullcontext()
            ):  # the first error is the one to read
                self.flush()
        finally:
            self._unlock()

    def delete(self, ids: list[str], *, missing_ok: bool = False) -> int:
        """Delete rows by id, at once and for good: they are never read again, and `compact` removes them from the disk.

        Args:
            ids: what to delete.
            missing_ok: leave out ids that are not there; else they are an error, and nothing is deleted.

        Returns:
            How many rows were deleted.

        Raises:
            ValueError: ids that are not there.
            RuntimeError: another process writes here.
            OSError: the folder cannot be written.
        """
        ids = list(dict.fromkeys(map(str, ids)))
        with self._alone():
            hashes, found = hash_ids(ids), np.zeros(len(ids), dtype=bool)
            deleted = {shard.path.name: shard.dead for shard in self._shards if len(shard.dead)}
            for shard in self._shards:
                places = shard.find(ids, hashes)
                found |= places >= 0
                if (places >= 0).any():
                    deleted[shard.path.name] = np.union1d(shard.dead, places[places >= 0])
            if not found.all() and not missing_ok:
                missing = [name for name, here in zip(ids, found, strict=True) if not here]
                raise ValueError(f"'{self.path}' has no ids {missing[:5]}; nothing was deleted.")
            if found.any():
                if self.description["format"] < FORMAT:  # a version that knows no deleted rows must not open this
                    self._describe(format=FORMAT)
                write_deleted(self.path, deleted)
        return int(found.sum())

    def compact(self) -> None:
        """Write all rows into full shards, without the deleted ones. Killed at any moment, the old store or the new is whole.

        Needs room for a second copy while it runs, memory for one shard, and nobody else who writes.

        Raises:
            RuntimeError: another process writes here.
            OSError: disk full or folder read-only; the store is as it was.
        """
        with self._alone():
            following = self.generation + 1
            try:
                parts, rows = [], 0
                for shard in self._shards:
                    live = pa.table([shard.live(name) for name in shard.table.column_names], schema=self._schema())
                    while len(live):
                        part, live = live.slice(0, self._rows_a_shard - rows), live.slice(self._rows_a_shard - rows)
                        parts, rows = [*parts, part], rows + len(part)
                        if rows == self._rows_a_shard:
                            write_shard(self.path, following, pa.concat_tables(parts))
                            parts, rows = [], 0
                if rows:
                    write_shard(self.path, following, pa.concat_tables(parts))
            except BaseException:
                sweep(self.path, self.generation)
                raise
            self._describe(format=FORMAT, generation=following)  # from here on the new shards are the store
            (self.path / DELETED).unlink(missing_ok=True)
            sweep(self.path, following)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """With what is pending written, and nobody else writing."""
        self.flush()
        with lock_to_change(self.path):
            self.reload()
            sweep(self.path, self.generation)
            yield
        self.reload()

    def _describe(self, **changes) -> None:
        text = json.dumps({**self.description, **changes}, indent=2) + "\n"
        write_file(self.path, DESCRIPTION, lambda file: file.write(text.encode()))

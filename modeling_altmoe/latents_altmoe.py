"""LatentStore: latents computed once, kept for ever. One folder, one modality, one protocol.

Comes in: ids, latents `(n, size)` and metadata columns. Goes out: the same, memory-mapped. On disk: `store.json`
(modality, protocol, encoder) and Arrow shards that `datasets` opens directly; every shard carries the protocol's
fingerprint in its schema. A shard is written under a temporary name and renamed, so that a crash loses at most the
rows not yet flushed and never leaves half a shard. No vector here is ever changed by training a connector.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:  # stores need them, loading a checkpoint does not
    import pyarrow as pa
    from datasets import Dataset, Features, List, Value, concatenate_datasets
    from filelock import FileLock, Timeout
except ImportError:
    pa = None

from .encoding_altmoe import LatentProtocol
from .sharing_altmoe import push_folder, shareable, store_card

FORMAT = 1
DTYPES = {"float32": np.float32, "float16": np.float16}
DESCRIPTION = "store.json"


class LatentStore:
    """Latents of one modality under one protocol; open with [`LatentStore.open`], make with [`LatentStore.create`].

    Example:

    ```python
    store = LatentStore.create("stores/image", "image", encoder_entry, columns={"path": "string"})
    store.append(ids, latents, path=paths)
    store.flush()
    LatentStore.open("stores/image").take([0, 5, 7])        # (3, latent_size) float32
    ```
    """

    def __init__(self, path: str | os.PathLike, description: dict[str, Any]):
        if pa is None:
            raise ImportError("A LatentStore needs datasets and filelock: pip install datasets filelock.")
        self.path = Path(path)
        self.description = description
        self.modality: str = description["modality"]
        self.latent_size: int = description["encoder"]["latent_size"]
        self.dtype: str = description["dtype"]
        self.columns: dict[str, str] = description["columns"]
        self.protocol = LatentProtocol.from_dict(description["encoder"].get("protocol") or {})
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._lock: FileLock | None = None
        self._load()

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
    ) -> "LatentStore":
        """Make a store, or reopen the same one to go on writing.

        Args:
            path: folder.
            modality: e.g. `"image"`.
            encoder: entry of `AltMoEConfig.encoders`: at least `latent_size`; usually `protocol`, `name_or_path`, ...
            dtype: `"float32"` or `"float16"`.
            columns: metadata columns beside `id`, `{name: Arrow type}`, e.g. `{"caption": "string"}`.
            shard_rows: rows a shard.

        Raises:
            ValueError: if a store of another protocol, modality, width or layout is there already.
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
        place = Path(path) / DESCRIPTION
        if place.exists():
            store = cls.open(path)
            store.check(modality, encoder)
            for field in ("dtype", "columns"):
                if store.description[field] != description[field]:
                    raise ValueError(
                        f"{path} exists with {field}={store.description[field]}, not {description[field]}. "
                        "Choose another folder, or delete this one."
                    )
            return store
        Path(path).mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(description, indent=2) + "\n")
        temporary.rename(place)
        return cls(path, description)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "LatentStore":
        """Open an existing store.

        Raises:
            FileNotFoundError: there is no store; the message says how to make one.
            ValueError: damaged, or written by a newer version.
        """
        place = Path(path) / DESCRIPTION
        if not place.exists():
            raise FileNotFoundError(f"No LatentStore at '{path}' (no {DESCRIPTION}). Make one with 'altmoe encode'.")
        try:
            description = json.loads(place.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"'{place}' is damaged ({error}). Restore it or encode again.") from error
        if description.get("format") != FORMAT:
            raise ValueError(f"'{path}' has store format {description.get('format')}, this version reads {FORMAT}.")
        return cls(path, description)

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

    # ---------------------------------------------------------------- write

    def _schema(self) -> "pa.Schema":
        features = {"id": Value("string"), "latent": List(Value(self.dtype), length=self.latent_size)}
        features.update({name: Value(kind) for name, kind in self.columns.items()})
        schema = Features(features).arrow_schema
        return schema.with_metadata({**(schema.metadata or {}), b"altmoe": self.fingerprint.encode()})

    def append(self, ids: list[str], latents: torch.Tensor | np.ndarray, **columns: list) -> None:
        """Add rows. Full shards are written at once; call `flush` for the rest (or use `with store:`).

        Args:
            ids: one unique string a row.
            latents: `(n, latent_size)`.
            columns: the metadata columns the store was made with.

        Raises:
            ValueError: wrong width or length, NaN, missing or unknown columns, an id that is already there.
            RuntimeError: another process is writing here.
        """
        rows = latents.detach().cpu().float().numpy() if isinstance(latents, torch.Tensor) else np.asarray(latents)
        if rows.ndim != 2 or rows.shape[1] != self.latent_size:
            raise ValueError(f"Latents of shape {rows.shape}, expected (n, {self.latent_size}) for '{self.path}'.")
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused below
            rows = rows.astype(DTYPES[self.dtype])
        if not np.isfinite(rows).all():
            bad = [ids[i] for i in np.flatnonzero(~np.isfinite(rows).all(1))[:5]]
            raise ValueError(f"Latents contain NaN or infinity (as {self.dtype}), ids {bad}.")
        if set(columns) != set(self.columns):
            raise ValueError(f"Columns {sorted(columns)} given, the store has {sorted(self.columns)}.")
        lengths = {name: len(values) for name, values in {"id": ids, **columns}.items()}
        if set(lengths.values()) != {len(rows)}:
            raise ValueError(f"{len(rows)} latents, but columns of length {lengths}.")
        ids = [str(name) for name in ids]
        repeated = [name for name in ids if name in self.known_ids] or ([] if len(set(ids)) == len(ids) else ids)
        if repeated:
            raise ValueError(f"Ids must be unique; already in '{self.path}' or given twice: {repeated[:5]}.")
        self._acquire()
        latent = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.latent_size)
        schema = self._schema()
        data = [pa.array(ids), latent, *(pa.array(columns[name], schema.field(name).type) for name in self.columns)]
        self._pending.append(pa.Table.from_arrays(data, schema=schema))
        self._pending_rows += len(rows)
        self.known_ids.update(ids)
        while self._pending_rows >= self.description["shard_rows"]:
            self._write_shard(self.description["shard_rows"])

    def _acquire(self) -> None:
        if self._lock is None:
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RuntimeError(f"Another process is writing to '{self.path}'. Wait for it to end.") from error
            self._lock = lock

    def _write_shard(self, rows: int) -> None:
        table = pa.concat_tables(self._pending)
        shard, rest = table.slice(0, rows), table.slice(rows)
        self._pending, self._pending_rows = ([rest] if len(rest) else []), len(rest)
        number = 1 + max((int(p.stem.split("-")[1]) for p in self.shards), default=-1)
        final = self.path / f"shard-{number:05d}.arrow"
        temporary = final.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            with pa.ipc.new_stream(file, shard.schema) as writer:
                writer.write_table(shard.combine_chunks())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(final)

    def flush(self) -> None:
        """Write what is pending, release the writer's lock and make the new rows readable."""
        if self._pending_rows:
            self._write_shard(self._pending_rows)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._load()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flush()

    # ---------------------------------------------------------------- read

    @property
    def shards(self) -> list[Path]:
        """The shard files, in order."""
        return sorted(self.path.glob("shard-*.arrow"))

    def _load(self) -> None:
        self._known: set[str] | None = None
        self._tables: list[pa.Table] = []
        self._views: list[np.ndarray] = []
        for shard in self.shards:
            try:
                table = pa.ipc.open_stream(pa.memory_map(str(shard))).read_all()  # maps, does not read
                written = (table.schema.metadata or {}).get(b"altmoe", b"").decode()
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"Shard '{shard}' is damaged ({error}). Delete it and run 'altmoe encode' again."
                ) from error
            if written != self.fingerprint:
                raise ValueError(
                    f"Shard '{shard}' was made under protocol {written or 'unknown'}, the store's is "
                    f"{self.fingerprint}. Move it to a store of its own."
                )
            self._tables.append(table)
            for chunk in table.column("latent").chunks:
                self._views.append(chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.latent_size))
        self._ends = np.cumsum([len(view) for view in self._views])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def dataset(self) -> "Dataset":
        """All rows as a memory-mapped `datasets.Dataset` (columns `id`, `latent`, and the metadata)."""
        if not self.shards:
            return Dataset.from_dict({name: [] for name in ("id", "latent", *self.columns)})
        return concatenate_datasets([Dataset.from_file(str(shard)) for shard in self.shards])

    @property
    def ids(self) -> list[str]:
        """The id of each row."""
        return self.column("id")

    @property
    def known_ids(self) -> set[str]:
        """All ids, written or pending."""
        if self._known is None:
            self._known = set(self.ids)
        return self._known

    def column(self, name: str) -> list:
        """One metadata column.

        Raises:
            ValueError: there is no such column.
        """
        if name != "id" and name not in self.columns:
            raise ValueError(f"'{self.path}' has no column '{name}'. Columns: id, {', '.join(self.columns)}.")
        return [value for table in self._tables for value in table.column(name).to_pylist()]

    def take(self, rows) -> torch.Tensor:
        """Latents of some rows, `(len(rows), latent_size)` float32.

        Raises:
            IndexError: a row out of range.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"Rows {rows.min()} to {rows.max()}, but '{self.path}' has {len(self)}.")
        result = np.empty((len(rows), self.latent_size), dtype=np.float32)
        shard = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(shard):
            here = shard == number
            start = self._ends[number] - len(self._views[number])
            result[here] = self._views[number][rows[here] - start]
        return torch.from_numpy(result)

    def id_of(self, row: int) -> str:
        """The id of one row."""
        return self._cell("id", row)

    def columns_of(self, row: int) -> dict:
        """The metadata of one row, read from disk now."""
        return {name: self._cell(name, row) for name in self.columns}

    def _cell(self, name: str, row: int):
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._tables[shard].column(name)[row - (self._ends[shard] - len(self._views[shard]))].as_py()

    @property
    def tables(self) -> "list[pa.Table]":
        """All rows in order, memory-mapped."""
        return self._tables

    def latents(self) -> torch.Tensor:
        """All latents, `(n, latent_size)` float32, in memory."""
        return self.take(np.arange(len(self)))

    # ---------------------------------------------------------------- share

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **kwargs) -> str:
        """Send the store with a card of its own to the Hub, as a data set; the commit's address.

        Args:
            repo_id: `name` or `owner/name`; made if it does not exist.
            license: of the latents, e.g. `"cc-by-4.0"`.
            kwargs: `private`, `token`, `revision`, `commit_message`.

        Raises:
            ValueError: nothing written yet.
            PermissionError: the token may not write there.
        """
        if not len(self):
            raise ValueError(f"'{self.path}' is empty: nothing to push. Call flush() after append().")
        description = json.dumps(shareable(self.description), indent=2) + "\n"
        replace = {DESCRIPTION: description.encode(), "README.md": store_card(self, repo_id, license).encode()}
        kwargs.setdefault("commit_message", f"{len(self)} latents")
        return push_folder(self.path, repo_id, "dataset", replace=replace, **kwargs)

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

"""Raw items on their way to an encoder: opened, numbered, shared out among ranks, cut into batches, decoded.

Comes in: the name of a data set (saved folder, folder of pictures or sounds, JSONL/CSV/Parquet file, Hub name), streamed or
not. Goes out: batches of input tensors, decoded in worker processes if asked for. Nothing here runs an encoder, and no
more than a window of items is ever in memory.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)

from modeling_altmoe import AltMoEProcessor
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.processing_altmoe import ItemError
from modeling_altmoe.sharing_altmoe import is_folder

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
BLOCK = 256  # items looked up at a time
FIRST = 8  # items by which a column of the wrong type is known
WINDOW = 8192  # texts sorted by length at a time
RESERVED = ("id", "latent")  # names of a store's own columns


def _saved(name: str) -> bool:
    """Whether this is a folder that `save_to_disk` wrote."""
    return any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))


def open_data(name: str, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Open a data set by folder, file or Hub name.

    Raises:
        FileNotFoundError, ValueError: nothing usable there, or no such split.
    """
    path = Path(name)
    if _saved(name):
        data = load_from_disk(str(path))
    elif path.is_dir() and (sounds := [str(p) for p in sorted(path.rglob("*")) if p.suffix.lower() in SOUNDS]):
        # `datasets` would want to decode them, with a package that nothing else here needs
        data = Dataset.from_dict({"audio": [{"bytes": None, "path": sound} for sound in sounds]})
        data = data.cast_column("audio", Audio(decode=False))
    elif path.is_dir():
        data = load_dataset(str(path), streaming=streaming)
    elif path.suffix in FILE_KINDS:
        if not path.is_file():
            raise FileNotFoundError(f"No data file at '{name}'.")
        extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
        data = load_dataset(FILE_KINDS[path.suffix], data_files=str(path), streaming=streaming, **extra)
    else:
        is_folder(name, "a data set", "dataset")
        try:
            data = load_dataset(name, streaming=streaming)
        except Exception as error:  # the Hub's client raises many kinds
            raise FileNotFoundError(
                f"'{name}' is neither a folder nor a data file here, and loading it from the Hub failed: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        if split not in data:
            raise ValueError(unknown_name_message("split", split, data))
        data = data[split]
    return data.to_iterable_dataset() if streaming and isinstance(data, Dataset) else data


class Item(NamedTuple):
    """One raw item: where it stands in the data, its id, itself (not decoded), and its metadata."""

    position: int
    id: str
    raw: Any
    columns: dict[str, Any]


@dataclass
class Block:
    """Items that stand together: their first position, their ids, and how to read some of them."""

    start: int
    ids: list[str]
    read: Callable[[list[int]], list[Item]]


class RawItems:
    """One column of a data set, not decoded, with ids and metadata.

    Args:
        name: as for `open_data`.
        column: what to encode.
        split: of a data set that has several.
        streaming: read from first to last, without downloading or indexing all of it.
        id_column: unique ids. Without such a column, the file's place below a folder of files, else the position.
        keep: metadata columns (None: all plain ones, labels by name, and for a folder of files the `path` of each).
        limit: only the first so many.

    Raises:
        ValueError: a column that is not there.
        FileNotFoundError: no such data.
    """

    def __init__(self, name, column, split="train", streaming=False, id_column="id", keep=None, limit=None):
        data = open_data(name, split, streaming)
        features = data.features
        if features is None:  # a stream tells its types only by its rows
            features = Dataset.from_list(list(data.take(BLOCK))).features
        for wanted in [column, *(keep or []), *([id_column] if id_column != "id" else [])]:
            if wanted not in features:
                raise ValueError(f"{name}: {unknown_name_message('column', wanted, list(features))}")
        self.count = len(data) if isinstance(data, Dataset) else None
        if limit:
            data = data.select(range(min(limit, len(data)))) if self.count is not None else data.take(limit)
            self.count = None if self.count is None else len(data)
        elif self.count is None and data.info.splits and split in data.info.splits:
            self.count = data.info.splits[split].num_examples
        self.column, self.id_column = column, id_column if id_column in features else None
        kinds = {n: _kind(f) for n, f in features.items() if n not in (*RESERVED, id_column, column) or n == column}
        self.kinds = {n: kind for n, kind in kinds.items() if kind and (keep is None or n in keep)}
        self._labels = {n: features[n].int2str for n in self.kinds if isinstance(features[n], ClassLabel)}
        media = isinstance(features[column], (Image, Audio))
        # a saved data set holds the bytes of its items; of their places only file names are left, which may be the same
        files = media and os.path.isdir(name) and not _saved(name)
        self._root = os.path.abspath(name) if files else None
        self._path = self._root is not None and "path" not in features and (keep is None or "path" in keep)
        self.holds = type(features[column]).__name__.lower() if media else None  # "image", "audio", or plain values
        if media:  # decode item by item, so that one bad file does not end the run
            data = data.cast_column(column, type(features[column])(decode=False))
        self._data = data.select_columns([n for n in features if n in {column, self.id_column, *self.kinds}])

    @property
    def columns(self) -> dict[str, str]:
        """Metadata columns and their Arrow types."""
        return {**self.kinds, **({"path": "string"} if self._path else {})}

    def blocks(self) -> Iterator[Block]:
        """All items in order, `BLOCK` at a time."""
        if self.count is None or isinstance(self._data, IterableDataset):
            start = 0
            for rows in self._data.iter(batch_size=BLOCK):
                yield Block(
                    start,
                    self._ids(rows, start),
                    lambda places, rows=rows, start=start: self._items(rows, start, places),
                )
                start += len(rows[self.column])
            return
        named = self.id_column or self.column  # only what the ids need is read of items that are there already
        for start in range(0, len(self._data), BLOCK):
            stop = min(start + BLOCK, len(self._data))
            rows = self._data.select_columns([named])[start:stop] if self.id_column or self._root else {}
            ids = self._ids(rows, start) if rows else [str(i) for i in range(start, stop)]

            def read(places: list[int], start: int = start, ids: list[str] = ids) -> list[Item]:
                wanted = self._data[[start + place for place in places]]
                return [
                    Item(start + place, ids[place], wanted[self.column][i], self._columns(wanted, i))
                    for i, place in enumerate(places)
                ]

            yield Block(start, ids, read)

    def unlike(self, kind: str) -> str | None:
        """What the first items are, in words, if none of them can be what an encoder takes; None if one may be.

        Args:
            kind: "text", "image" or "audio".
        """
        if self.holds is not None:
            return None if self.holds == kind else f"{self.holds}s"
        block = next(self.blocks(), None)
        items = block.read(list(range(min(FIRST, len(block.ids))))) if block else []
        raws = [item.raw for item in items if item.raw is not None]
        if not raws or any(_may_be(raw, kind) for raw in raws):
            return None
        if isinstance(raws[0], str):
            return f"texts ('{shorten(raws[0], 60, placeholder=' ...')}')"
        return f"values of type {type(raws[0]).__name__}"

    def _ids(self, rows: dict[str, list], start: int) -> list[str]:
        if self.id_column:
            return [str(value) for value in rows[self.id_column]]
        raws = rows[self.column]
        paths = [(raw or {}).get("path") for raw in raws] if self._root else []
        if paths and all(paths):
            return [os.path.relpath(path, self._root) for path in paths]
        return [str(start + i) for i in range(len(raws))]

    def _columns(self, rows: dict[str, list], i: int) -> dict[str, Any]:
        values = {name: rows[name][i] for name in self.kinds}
        for name, label in self._labels.items():
            values[name] = None if values[name] is None else label(values[name])
        if self._path:
            values["path"] = (rows[self.column][i] or {}).get("path")
        return values

    def _items(self, rows: dict[str, list], start: int, places: list[int]) -> list[Item]:
        ids = self._ids(rows, start)
        return [Item(start + i, ids[i], rows[self.column][i], self._columns(rows, i)) for i in places]


def _kind(feature) -> str | None:
    """The Arrow type of a plain column, None for others."""
    if isinstance(feature, ClassLabel):
        return "string"
    if isinstance(feature, Value):
        return "string" if feature.dtype == "null" else feature.dtype  # a column of nothing yet
    return None


def _may_be(raw, kind: str) -> bool:
    """Whether an item may be what an encoder takes. A file that is missing may: that is told item by item."""
    if kind == "text":
        return isinstance(raw, str)
    if isinstance(raw, str):  # a file's name, or what is in it as letters and digits
        return os.path.isfile(raw) or bool(re.search(r"://|\.\w{2,5}$", raw)) or len(raw) > 1000
    return not isinstance(raw, (bool, int, float))


class Decoded(NamedTuple):
    """A batch on its way to the encoder: the good items, their input tensors (None if all were bad), the bad ones."""

    items: list[Item]
    tensors: dict[str, Any] | None
    bad: list[tuple[Item, str]]


class Decoder:
    """The data set that worker processes hold: it turns a batch of items into tensors (`batch_sampler` brings the items)."""

    def __init__(self, processor: AltMoEProcessor, modality: str):
        self.processor, self.modality = processor, modality

    def __getitems__(self, items: list[Item]) -> Decoded:
        good, read, bad = [], [], []
        for item in items:
            try:
                read.append(self.processor.read(self.modality, item.raw))
                good.append(item._replace(raw=None))  # tensors go back, raw bytes do not
            except ItemError as error:
                bad.append((item._replace(raw=None), str(error)))
        return Decoded(good, self.processor.batch(self.modality, read) if read else None, bad)


def cut(blocks: Iterator[list[Item]], size: int, by_length: bool) -> Iterator[list[Item]]:
    """Batches of `size` items; texts are sorted by length within a window, so that batches waste no padding."""
    waiting: list[Item] = []

    def full(last: bool) -> Iterator[list[Item]]:
        if by_length:
            waiting.sort(key=lambda item: len(str(item.raw)))
        stop = len(waiting) if last else len(waiting) // size * size
        for start in range(0, stop, size):
            yield waiting[start : min(start + size, stop)]
        del waiting[:stop]

    for block in blocks:
        waiting += block
        if len(waiting) >= (WINDOW if by_length else size):
            yield from full(last=False)
    yield from full(last=True)

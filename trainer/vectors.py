"""Vectors that somebody has already, wherever they lie: opened as a stream of `(ids, vectors, columns)`.

Comes in: a file (.npy, .npz, .safetensors, .parquet, a FAISS index), a data set (folder or Hub name), or an address such as
`milvus://...`. Goes out: a `VectorSource`. Nothing here knows protocols or stores; a new kind of source is one function
under `@source(...)`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, Value

from modeling_altmoe.configuration_altmoe import unknown_name_message
from trainer.items import open_data

ROWS = 8192  # rows read at a time
Batch = tuple[list[str] | None, np.ndarray, dict[str, list]]


@dataclass
class VectorSource:
    """Vectors and what is known of them before they are read.

    Attributes:
        name: for messages.
        size: width of a vector.
        read: starts from the first row each time; gives `(ids or None, (n, size) floats, {column: n values})`.
        rows: how many, None if unknown.
        dtype: `"float16"` or `"float32"`.
        columns: metadata, `{name: Arrow type}`.
        warning: what the user must know, e.g. that a quantised index only has approximate vectors.
        reads_twice: whether a first look at all rows is cheap (a file) or not (a database).
    """

    name: str
    size: int
    read: Callable[[], Iterator[Batch]]
    rows: int | None = None
    dtype: str = "float32"
    columns: dict[str, str] = field(default_factory=dict)
    warning: str | None = None
    reads_twice: bool = True


KINDS: dict[str, Callable[..., VectorSource]] = {}


def source(*names: str):
    """Register a function `(name, vectors=None) -> VectorSource` for file endings (`".npy"`) or schemes (`"milvus"`)."""

    def register(function):
        KINDS.update(dict.fromkeys(names, function))
        return function

    return register


def open_source(name: str, vectors: str | None = None, **options: Any) -> VectorSource:
    """Open vectors by file, folder, Hub name or address.

    Args:
        name: where they are.
        vectors: which array, tensor or column holds them; not needed where only one can.
        options: passed on, e.g. `split` of a data set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing there that could be a matrix of vectors, or several.
    """
    scheme, suffix = name.split("://")[0] if "://" in name else "", Path(name).suffix
    if scheme and scheme not in KINDS:
        raise ValueError(f"'{scheme}://...' is an unknown kind of source. Known: {', '.join(sorted(KINDS))}.")
    kind = KINDS.get(scheme or suffix)
    if kind and not scheme and not Path(name).is_file():
        raise FileNotFoundError(f"No file '{name}'.")
    return (kind or open_dataset)(name, vectors, **options)


def _choose(name: str, given: str | None, candidates: list[str], others: list[str]) -> str:
    if given is not None:
        if given not in candidates:
            raise ValueError(f"'{name}': {unknown_name_message('vectors', given, candidates)} Others: {others}.")
        return given
    if len(candidates) != 1:
        found = (
            f"several could be the vectors ({', '.join(candidates)}): choose with --vectors"
            if candidates
            else (f"nothing in it is a matrix of floating-point numbers (found {', '.join(others) or 'nothing'})")
        )
        raise ValueError(f"'{name}': {found}.")
    return candidates[0]


def _of_arrays(name: str, vectors: str | None, arrays: dict[str, np.ndarray]) -> VectorSource:
    """Named arrays: one matrix, and vectors of its length as metadata."""
    matrices = [key for key, array in arrays.items() if array.ndim == 2 and array.dtype.kind == "f"]
    key = _choose(name, vectors, matrices, [f"{key} {array.dtype}{list(array.shape)}" for key, array in arrays.items()])
    matrix = arrays[key]
    plain = {"f": None, "i": "int64", "u": "int64", "U": "string", "b": "bool"}
    columns = {}
    for other, array in arrays.items():
        if array.ndim == 1 and len(array) == len(matrix) and array.dtype.kind in plain:
            columns[other] = plain[array.dtype.kind] or "float64"

    def read() -> Iterator[Batch]:
        for start in range(0, len(matrix), ROWS):
            part = slice(start, start + ROWS)
            yield None, np.asarray(matrix[part]), {column: arrays[column][part].tolist() for column in columns}

    dtype = "float16" if matrix.dtype == np.float16 else "float32"
    return VectorSource(name, matrix.shape[1], read, len(matrix), dtype, columns)


@source(".npy")
def open_npy(name: str, vectors: str | None = None) -> VectorSource:
    """One matrix, memory-mapped."""
    return _of_arrays(name, None, {"the array": np.load(name, mmap_mode="r")})


@source(".npz")
def open_npz(name: str, vectors: str | None = None) -> VectorSource:
    """Named arrays, in memory."""
    with np.load(name) as archive:  # refuses pickled objects
        return _of_arrays(name, vectors, {key: archive[key] for key in archive.files})


@source(".safetensors")
def open_safetensors(name: str, vectors: str | None = None) -> VectorSource:
    """Named tensors, in memory."""
    import torch
    from safetensors.torch import load_file  # also knows bfloat16, which numpy does not

    tensors = load_file(name)
    return _of_arrays(
        name, vectors, {k: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for k, t in tensors.items()}
    )


@source(".faiss", ".index")
def open_faiss(name: str, vectors: str | None = None) -> VectorSource:
    """A FAISS index, memory-mapped; its own ids where it has them. Quantised vectors come back as an approximation."""
    import faiss

    try:
        index = faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"'{name}' cannot be read as a FAISS index: {str(error).splitlines()[0]}") from error
    inner, names = index, None
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        inner, names = faiss.downcast_index(index.index), faiss.vector_to_array(index.id_map)
    numbers, inverted = np.arange(inner.ntotal), faiss.try_extract_index_ivf(inner)
    if inverted is not None:  # its vectors lie in lists, each with an id
        inverted = faiss.downcast_index(inverted)
        lists = [
            faiss.rev_swig_ptr(inverted.invlists.get_ids(i), inverted.invlists.list_size(i)).copy()
            for i in range(inverted.nlist)
        ]
        numbers = np.sort(np.concatenate(lists))
        inverted.set_direct_map_type(faiss.DirectMap.Hashtable)
    names = numbers if names is None else names[numbers]

    def read(owner=index) -> Iterator[Batch]:  # `inner` is a part of `index` and does not keep it alive
        for start in range(0, len(numbers), ROWS):
            part = slice(start, start + ROWS)
            yield [str(i) for i in names[part]], inner.reconstruct_batch(numbers[part]), {}

    try:
        inner.reconstruct_batch(numbers[:1])
    except RuntimeError as error:
        raise ValueError(
            f"'{name}' is a {type(inner).__name__}, which cannot give its vectors back. Import what it was built from."
        ) from error
    exact = isinstance(inner, (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat, faiss.IndexNSGFlat))
    warning = None if exact else f"a {type(inner).__name__} keeps its vectors approximately: so will the store"
    return VectorSource(name, inner.d, read, len(numbers), warning=warning)


@source(".parquet")
def open_parquet(name: str, vectors: str | None = None) -> VectorSource:
    """A Parquet file, read a few rows at a time."""
    file = pq.ParquetFile(name)

    def tables(columns: list[str]) -> Iterator[pa.Table]:
        for batch in file.iter_batches(ROWS, columns=columns):
            yield pa.Table.from_batches([batch])

    return _of_arrow(name, vectors, file.schema_arrow, file.metadata.num_rows, tables)


@source("milvus", "postgresql", "postgres")
def open_database_table(name: str, vectors: str | None = None) -> VectorSource:
    """A Milvus collection or a pgvector table, a page at a time; the address is explained by `serving.databases.parse_url`.
    Rows without a vector are left out."""
    from serving.databases import open_table, parse_url

    address = parse_url(name)
    address.vector = vectors or address.vector
    table = open_table(address)
    if table.width is None:
        raise ValueError(f"{address} does not exist.")
    plain = re.compile("u?int|float|bool")  # a database keeps the other types as text
    columns = {column: kind if plain.match(kind) else "string" for column, kind in table.columns.items()}
    rows = table.count()
    return VectorSource(
        str(address), table.width, lambda: table.pages(ROWS), rows, table.dtype, columns, reads_twice=False
    )


def open_dataset(name: str, vectors: str | None = None, split: str = "train") -> VectorSource:
    """A data set as `datasets` opens it: a folder, a file or a Hub name."""
    data = open_data(name, split)

    def tables(columns: list[str]) -> Iterator[pa.Table]:
        chosen = data.select_columns(columns).with_format("arrow")
        for start in range(0, len(chosen), ROWS):
            yield chosen[start : start + ROWS]

    return _of_arrow(name, vectors, data.features.arrow_schema, len(data), tables)


def _of_arrow(name: str, vectors: str | None, schema: pa.Schema, rows: int, tables) -> VectorSource:
    """A table with one column of lists of floats; its plain columns are metadata."""
    lists = [field.name for field in schema if _float_list(field.type)]
    key = _choose(name, vectors, lists, [f"{field.name} {field.type}" for field in schema])
    plain = [field for field in schema if not pa.types.is_nested(field.type) and not pa.types.is_null(field.type)]
    features = Features.from_arrow_schema(pa.schema(plain))
    columns = {column: feature.dtype for column, feature in features.items() if isinstance(feature, Value)}
    kind, size = schema.field(key).type, None
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
    else:
        size = next((len(row) for table in tables([key]) for row in table.column(key) if row.is_valid), None)
    if not size:
        raise ValueError(f"'{name}': the column '{key}' is empty.")

    def read() -> Iterator[Batch]:
        start = 0
        for table in tables([key, *columns]):
            column = table.column(key)
            flat = pc.list_flatten(column).to_numpy()
            if column.null_count or len(flat) != len(table) * size:
                lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
                place = int(np.flatnonzero(lengths != size)[0])
                raise ValueError(
                    f"'{name}': the vector in row {start + place} is {lengths[place]} long, the others are {size} long."
                )
            yield None, flat.reshape(-1, size), {column: table.column(column).to_pylist() for column in columns}
            start += len(table)

    dtype = "float16" if pa.types.is_float16(kind.value_type) else "float32"
    return VectorSource(name, size, read, rows, dtype, columns)


def _float_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)

"""Latents in Milvus, through pymilvus: a cluster, a single server, or a Milvus Lite file. See `Table` in `serving/databases.py`.

Latents are a FLOAT_VECTOR field under an HNSW index over their cosine. Milvus builds its index a segment at a time while
data comes in, so there is nothing to build afterwards.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from .databases import Address, Row, hubness_column

COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!=", "eq": "=="}
PROPERTY = "altmoe"  # the collection's property that holds its description
MAX_NEAREST = 16_384  # results or rows of one question, Milvus's own limit
MAX_TEXT = 65_535  # bytes in a VARCHAR, Milvus's own limit
PAGE_BYTES = 16_000_000  # of latents in one answer
TYPES = {"VARCHAR": "string", "BOOL": "bool", "DOUBLE": "float64", "FLOAT": "float64"} | dict.fromkeys(
    ("INT8", "INT16", "INT32", "INT64"), "int64"
)

# it prints a traceback for each answer that is an error, which we tell in one sentence
for _name in ("pymilvus", "milvus_lite"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def field_type(kind: str) -> DataType:
    """Arrow type of a store's column -> type in Milvus; what has no counterpart is kept as text."""
    if re.match(r"u?int\d+$", kind):
        return DataType.INT64
    return {"bool": DataType.BOOL}.get(kind) or (DataType.DOUBLE if kind.startswith("float") else DataType.VARCHAR)


def literal(value: Any) -> str:
    """A value as Milvus writes it; a text can end its quotes no more than it can in Python.

    (Not the client's own templates: Milvus Lite does not know them, and the client itself quotes ids without escaping.)
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def among(name: str, values: list[Any]) -> str:
    """A condition: one of these."""
    return f"{name} in [{', '.join(map(literal, values))}]"


class MilvusTable:
    """One collection, see `Table`."""

    dtype = "float32"

    def __init__(self, address: Address):
        self.address, self.name = address, address.table
        with self._clear():
            self.client = self._connect()
            self._look()

    # ---------------------------------------------------------------- connection

    def _connect(self) -> MilvusClient:
        options, known = self.address.options, {"db", "secure", "timeout"}
        if set(options) - known:
            raise ValueError(f"{self.address}: unknown {sorted(set(options) - known)} in it. Known: {sorted(known)}.")
        settings: dict[str, Any] = {"timeout": float(options.get("timeout", 10))}
        # the client pings an idle connection every ten seconds, for which Milvus Lite's server ends it now and then
        settings["grpc_options"] = {"grpc.keepalive_permit_without_calls": False}
        parts = urlsplit(self.address.url)
        login, _, host = parts.netloc.rpartition("@")
        if host in ("", "."):  # a file of Milvus Lite
            file = unquote(host + parts.path)
            if not os.path.isdir(os.path.dirname(file)):
                raise ValueError(f"{self.address}: there is no folder '{os.path.dirname(file)}'.")
            return MilvusClient(file, **settings)
        settings["token"] = unquote(login).removeprefix(":") or os.environ.get("MILVUS_TOKEN", "")
        if "db" in options:
            settings["db_name"] = options["db"]
        scheme = "https" if options.get("secure", "").lower() in ("1", "true") else "http"
        return MilvusClient(f"{scheme}://{host}", **settings)

    @contextmanager
    def _clear(self):
        """Errors of the client in one sentence, without the trail that may show the token."""
        try:
            yield
        except (MilvusException, grpc.RpcError) as error:
            message = self.address.redact(getattr(error, "message", "") or error)
            kind = RuntimeError
            if re.search("connect|unavailable|auth|denied|privilege|timeout|deadline", message, re.IGNORECASE):
                kind = ConnectionError
            raise kind(f"{self.address}: {message}") from None

    def close(self) -> None:
        """See `Table`."""
        self.client.close()

    # ---------------------------------------------------------------- what is there

    def look(self) -> None:
        """See `Table`; all stays None where there is no collection."""
        with self._clear():
            self._look()

    def _look(self) -> None:
        address = self.address
        self.width = self.key = self.vector = self.description = None
        self.columns: dict[str, str] = {}
        if not self.client.has_collection(self.name):
            return
        found = self.client.describe_collection(self.name)
        fields = {field["name"]: field for field in found["fields"]}
        described = (found.get("properties") or {}).get(PROPERTY)
        self.description = json.loads(described) if described else None
        vectors = [name for name, field in fields.items() if field["type"] == DataType.FLOAT_VECTOR]
        self.vector = address.vector or ("latent" if self.description else vectors[0] if len(vectors) == 1 else None)
        if self.vector not in vectors:
            raise ValueError(
                f"{address} has float vector fields {vectors}, not {self.vector!r}: say which with vector=NAME in the address."
            )
        self.width = int(fields[self.vector]["params"]["dim"])
        self.key = next(name for name, field in fields.items() if field.get("is_primary"))
        if address.key not in (None, self.key):
            raise ValueError(
                f"{address}: the primary key is '{self.key}'; items are named by it, not by '{address.key}'."
            )
        self.key_kind = TYPES[fields[self.key]["type"].name]
        kinds = {name: TYPES.get(field["type"].name) for name, field in fields.items() if name != self.key}
        self.columns = {name: kind for name, kind in kinds.items() if kind}
        if self.description is not None:
            self.columns = self.description["columns"]
        elif address.columns:
            unknown = sorted(set(address.columns) - set(self.columns))
            if unknown:
                raise ValueError(f"{address} has no column {unknown}. Columns: {', '.join(self.columns)}.")
            self.columns = {name: self.columns[name] for name in address.columns}
        names = self.client.list_indexes(self.name, field_name=self.vector)
        self.graph = bool(names) and "HNSW" in self.client.describe_index(self.name, names[0])["index_type"]
        self.client.load_collection(self.name)

    # ---------------------------------------------------------------- writing

    def create(self, description: dict[str, Any]) -> None:
        """See `Table`."""
        bad = [name for name in description["columns"] if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]
        if bad:
            raise ValueError(f"{self.address}: a field here has a name of letters, digits and _, not {bad[0]!r}.")
        with self._clear():
            if self.width is not None:
                self._keep(description)
                return
            # later directions' scalars go into the dynamic field: a collection's own fields are fixed
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=True)
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MAX_TEXT)
            schema.add_field("latent", DataType.FLOAT_VECTOR, dim=description["encoder"]["latent_size"])
            schema.add_field("altmoe_digest", DataType.INT64)
            for name, kind in description["columns"].items():
                kind = field_type(kind)
                extra = {"max_length": MAX_TEXT} if kind == DataType.VARCHAR else {}
                schema.add_field(name, kind, nullable=True, **extra)
            for direction in description["hubness"]:
                schema.add_field(hubness_column(direction), DataType.FLOAT, nullable=True)
            index = self.client.prepare_index_params()
            parameters = {"M": 16, "efConstruction": 200}
            index.add_index("latent", index_type="HNSW", metric_type="COSINE", params=parameters)
            self.client.create_collection(
                self.name, schema=schema, index_params=index, properties={PROPERTY: json.dumps(description)}
            )
            self._look()

    def describe(self, description: dict[str, Any]) -> None:
        """See `Table`."""
        with self._clear():
            self._keep(description)

    def _keep(self, description: dict[str, Any]) -> None:
        self.client.alter_collection_properties(self.name, properties={PROPERTY: json.dumps(description)})
        self.description = description

    def digests(self, ids: list[str]) -> dict[str, int]:
        """See `Table`."""
        found = self._query(among(self.key, ids), ["altmoe_digest"])
        return {row[self.key]: row["altmoe_digest"] for row in found}

    def write(self, rows: list[dict[str, Any]]) -> None:
        """See `Table`."""
        texts = [name for name, kind in self.columns.items() if field_type(kind) == DataType.VARCHAR]
        for row in rows:
            row.update({name: str(row[name]) for name in texts if row[name] is not None})
            long = [name for name in ("id", *texts) if len((row[name] or "").encode()) > MAX_TEXT]
            if long:
                raise ValueError(f"{self.address}: '{long[0]}' of item {row['id'][:80]!r} is over {MAX_TEXT} bytes.")
        if rows:
            with self._clear():
                self.client.upsert(self.name, rows)

    def delete(self, ids: list[str]) -> None:
        """See `Table`."""
        if ids:
            with self._clear():
                self.client.delete(self.name, filter=among(self.key, ids))

    def finish(self) -> None:
        """See `Table`."""
        with self._clear():
            self.client.flush(self.name)

    # ---------------------------------------------------------------- reading

    def _query(self, condition: str, fields: list[str], **settings) -> list[dict[str, Any]]:
        """All that was written before is seen."""
        settings["consistency_level"] = "Strong"
        with self._clear():
            return self.client.query(self.name, filter=condition, output_fields=[self.key, *fields], **settings)

    def _where(self, where: dict[str, Any] | None) -> str:
        parts = []
        for column, condition in (where or {}).items():
            name, kind = (self.key, self.key_kind) if column == "id" else (column, self.columns[column])
            if isinstance(condition, list):
                parts.append(among(name, [self._value(kind, value) for value in condition]))
                continue
            pairs = condition.items() if isinstance(condition, dict) else [("eq", condition)]
            parts += [f"{name} {COMPARISONS[sign]} {literal(self._value(kind, value))}" for sign, value in pairs]
        return " and ".join(parts)

    @staticmethod
    def _value(kind: str, value: Any) -> Any:
        if field_type(kind) == DataType.VARCHAR:
            return str(value)
        return int(value) if isinstance(value, str) else value

    def count(self, where: dict[str, Any] | None = None) -> int:
        """See `Table`."""
        settings = {"output_fields": ["count(*)"], "consistency_level": "Strong"}
        with self._clear():
            return self.client.query(self.name, filter=self._where(where), **settings)[0]["count(*)"]

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> list[list[Any]]:
        """See `Table`."""
        k = min(k, MAX_NEAREST)
        with self._clear():
            found = self.client.search(
                self.name,
                list(vectors),
                anns_field=self.vector,
                limit=k,
                filter=self._where(where),
                output_fields=[self.key],
                search_params={"params": {"ef": 2 * k} if self.graph else {}},
            )
        return [list(hits.ids) for hits in found]

    def matching(self, where: dict[str, Any]) -> list[Any]:
        """See `Table`."""
        return [row[self.key] for row in self._query(self._where(where), [])]

    def fetch(self, keys: list[Any], hubness: str | None, latents: bool) -> dict[Any, Row]:
        """See `Table`."""
        fields = [*self.columns, *([self.vector] if latents else []), *([hubness] if hubness else [])]
        rows, step = {}, self._page_rows()
        for start in range(0, len(keys), step):
            for found in self._query(among(self.key, keys[start : start + step]), fields):
                latent = np.asarray(found[self.vector], dtype=np.float32) if latents else None
                scalar = found[hubness] if hubness else None
                rows[found[self.key]] = Row(latent, scalar, {name: found.get(name) for name in self.columns})
        return rows

    def _page_rows(self) -> int:
        return max(1, min(MAX_NEAREST, PAGE_BYTES // (4 * self.width)))

    def _read(self, fields: list[str], rows: int) -> Iterator[list[dict[str, Any]]]:
        """The whole collection, a page at a time, in the order of the keys (which `iterator` asks for).

        The client's own iterator writes the last key into its next question without escaping it.
        """
        settings = {"iterator": "True", "reduce_stop_for_best": "True", "limit": rows}
        condition = ""
        while page := self._query(condition, fields, **settings):
            yield page
            condition = f"{self.key} > {literal(page[-1][self.key])}"

    def ids(self, rows: int) -> Iterator[list[str]]:
        """See `Table`."""
        for page in self._read([], rows):
            yield [str(row[self.key]) for row in page]

    def pages(self, rows: int) -> Iterator[tuple[list[str], np.ndarray, dict[str, list]]]:
        """See `Table`."""
        for page in self._read([self.vector, *self.columns], min(rows, self._page_rows())):
            latents = np.asarray([row[self.vector] for row in page], dtype=np.float32)
            columns = {name: [row.get(name) for row in page] for name in self.columns}
            yield [str(row[self.key]) for row in page], latents, columns

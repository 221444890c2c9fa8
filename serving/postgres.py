"""Latents in PostgreSQL with pgvector, through psycopg. One table a store; see `Table` in `serving/databases.py`.

Latents are `vector(n)` (float32) or `halfvec(n)` (a float16 store), as exact as in the store. The index is HNSW over their
cosine, in half precision where pgvector has it (0.7): half the size, and the short list is ranked again anyway.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector, Vector
from pgvector.psycopg import register_vector
from psycopg import sql

from .databases import Address, Row, hubness_column

OPERATORS = {"cosine": "<=>", "ip": "<#>", "l2": "<->"}
COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "<>", "eq": "="}
INDEXED = {"vector": 2000, "halfvec": 4000}  # dimensions an index of pgvector can have
MAX_EF = 1000  # pgvector's own limit


def column_type(kind: str) -> str:
    """Arrow type of a store's column -> type in PostgreSQL; what has no counterpart is kept as text."""
    if re.match(r"u?int\d+$", kind):
        return "bigint"
    return {"bool": "boolean"}.get(kind) or ("double precision" if kind.startswith("float") else "text")


def arrow_type(kind: str) -> str:
    """Type in PostgreSQL -> Arrow type."""
    known = {"bigint": "int64", "integer": "int64", "smallint": "int64", "boolean": "bool", "numeric": "float64"}
    return known.get(kind) or ("float64" if kind in ("double precision", "real") else "string")


class PostgresTable:
    """One table, see `Table`."""

    def __init__(self, address: Address):
        self.address = address
        self.name = sql.Identifier(*address.table.split("."))
        self._connection: psycopg.Connection | None = None
        self.look()

    # ---------------------------------------------------------------- connection

    @contextmanager
    def _session(self):
        """A transaction; connects, or connects again after the server went away."""
        try:
            if self._connection is None or self._connection.closed:
                wait = {"connect_timeout": self.address.options.get("connect_timeout", 10)}
                self._connection = psycopg.connect(self.address.url, autocommit=True, **wait)
                self._prepare(self._connection)
            with self._connection.transaction():
                yield self._connection
        except psycopg.OperationalError as error:
            raise ConnectionError(f"{self.address}: {self.address.redact(error)}") from None
        except psycopg.errors.InsufficientPrivilege as error:
            raise PermissionError(f"{self.address}: {self.address.redact(error)}") from None
        except psycopg.Error as error:
            raise RuntimeError(f"{self.address}: {self.address.redact(error)}") from None

    def _prepare(self, connection: psycopg.Connection) -> None:
        found = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        if found is None:
            connection.close()
            raise RuntimeError(
                f"{self.address}: this database has no pgvector. Install it on the server (Debian: postgresql-NN-pgvector), "
                "then let an administrator run 'CREATE EXTENSION vector' in this database."
            )
        self.version = tuple(int(part) for part in found[0].split(".")[:2])
        register_vector(connection)

    def close(self) -> None:
        """See `Table`."""
        if self._connection is not None:
            self._connection.close()

    # ---------------------------------------------------------------- what is there

    def look(self) -> None:
        """See `Table`; all stays None where there is no table."""
        address = self.address
        self.width = self.key = self.vector = self.description = None
        self.columns: dict[str, str] = {}
        with self._session() as connection:
            name = self.name.as_string(connection)
            found = connection.execute(
                """SELECT a.attname, format_type(a.atttypid, NULL), a.atttypmod, obj_description(a.attrelid, 'pg_class'),
                          ARRAY(SELECT unnest(i.indkey) FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary)
                          = ARRAY[a.attnum]
                   FROM pg_attribute a WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
                   ORDER BY a.attnum""",
                [name],
            ).fetchall()
            if not found:
                return
            types = {column: kind.rpartition(".")[2].strip('"') for column, kind, *_ in found}
            self.description = self._described(found[0][3])
            vectors = [column for column, kind in types.items() if kind in INDEXED]
            self.vector = address.vector or (
                "latent" if self.description else vectors[0] if len(vectors) == 1 else None
            )
            if self.vector not in vectors:
                raise ValueError(
                    f"{address} has vector columns {vectors}, not {self.vector!r}: say which with vector=NAME in the address."
                )
            self.kind = types[self.vector]
            keys = [address.key] if address.key else [column for column, *_, primary in found if primary]
            if len(keys) != 1 or keys[0] not in types:
                raise ValueError(
                    f"{address} has columns {list(types)} and no single primary key among them that could name an item"
                    f"{f' ({keys[0]!r} is none)' if keys else ''}: say which with id=NAME in the address."
                )
            self.key = keys[0]
            self.types = types
            self.width = next(modifier for column, _, modifier, *_ in found if column == self.vector)
            if self.width < 0:  # a column of vectors of any width: what the first one has
                first = sql.SQL("SELECT vector_dims({v}) FROM {t} WHERE {v} IS NOT NULL LIMIT 1")
                self.width = (connection.execute(self._compose(first)).fetchone() or [0])[0]
            self.columns = self._columns()
            self._find_index(connection, name)

    @staticmethod
    def _described(comment: str | None) -> dict[str, Any] | None:
        try:
            description = json.loads(comment or "")
        except json.JSONDecodeError:
            return None
        return description if isinstance(description, dict) and "altmoe" in description else None

    def _columns(self) -> dict[str, str]:
        if self.description is not None:
            return self.description["columns"]
        offered = {n: arrow_type(kind) for n, kind in self.types.items() if n != self.key and kind not in INDEXED}
        unknown = sorted(set(self.address.columns or ()) - set(offered))
        if unknown:
            raise ValueError(f"{self.address} has no column {unknown}. Columns: {', '.join(offered)}.")
        return {name: offered[name] for name in self.address.columns or offered}

    def _find_index(self, connection: psycopg.Connection, name: str) -> None:
        """How the table's own index measures: a search has to ask in the same way to be served by it."""
        self.half = self.version >= (0, 7)
        self.operator, self.index, self.lists = OPERATORS["cosine"], None, 0
        definitions = connection.execute(
            "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = to_regclass(%s) AND indisvalid", [name]
        ).fetchall()
        quoted = re.escape(sql.Identifier(self.vector).as_string(connection))
        for (definition,) in definitions:
            found = re.search(
                rf"USING (hnsw|ivfflat) \(\(?\(?(?:{quoted}|{re.escape(self.vector)})(?!\w)(.*?) (?:\S+\.)?"
                r"(vector|halfvec)_(cosine|ip|l2)_ops\)(?:.*lists='?(\d+))?",
                definition,
            )
            if found:
                self.index, self.half = found[1], "halfvec" in found[2] or self.kind == "halfvec"
                self.operator, self.lists = OPERATORS[found[4]], int(found[5] or 0)
                return

    def _compose(self, query: sql.SQL, **names) -> sql.Composed:
        """`{t}` the table, `{v}` its vectors, `{k}` its keys."""
        return query.format(t=self.name, v=sql.Identifier(self.vector), k=sql.Identifier(self.key), **names)

    def _searched(self) -> sql.Composable:
        """What the index is over: the vectors, in half precision where they can be."""
        if self.half and self.kind == "vector" and self.width <= INDEXED["halfvec"]:
            return sql.SQL("({}::halfvec({}))").format(sql.Identifier(self.vector), sql.Literal(self.width))
        return sql.Identifier(self.vector)

    @property
    def dtype(self) -> str:
        """See `Table`."""
        return "float16" if self.kind == "halfvec" else "float32"

    # ---------------------------------------------------------------- writing

    def create(self, description: dict[str, Any]) -> None:
        """See `Table`."""
        bad = [name for name in description["columns"] if len(name.encode()) > 63 or "%" in name]
        if bad:
            raise ValueError(f"{self.address}: a column here has a name of at most 63 bytes without %, not {bad[0]!r}.")
        kind = "halfvec" if description["dtype"] == "float16" else "vector"
        with self._session() as connection:
            if kind == "halfvec" and self.version < (0, 7):
                kind = "vector"
            columns = [
                ("id", "text PRIMARY KEY"),
                ("latent", f"{kind}({description['encoder']['latent_size']}) NOT NULL"),
            ]
            columns += [(name, column_type(arrow)) for name, arrow in description["columns"].items()]
            columns += [("altmoe_digest", "bigint NOT NULL")]
            parts = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(type_)) for name, type_ in columns]
            connection.execute(
                sql.SQL("CREATE TABLE IF NOT EXISTS {} ({})").format(self.name, sql.SQL(", ").join(parts))
            )
            for direction in description["hubness"]:
                add = sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} real")
                connection.execute(add.format(self.name, sql.Identifier(hubness_column(direction))))
            self._comment(connection, description)
        self.look()

    def describe(self, description: dict[str, Any]) -> None:
        """See `Table`."""
        with self._session() as connection:
            self._comment(connection, description)
        self.description = description

    def _comment(self, connection: psycopg.Connection, description: dict[str, Any]) -> None:
        comment = sql.SQL("COMMENT ON TABLE {} IS {}")
        connection.execute(comment.format(self.name, sql.Literal(json.dumps(description))))

    def digests(self, ids: list[str]) -> dict[str, int]:
        """See `Table`."""
        with self._session() as connection:
            query = sql.SQL("SELECT {k}, altmoe_digest FROM {t} WHERE {k} = ANY(%s)")
            return dict(connection.execute(self._compose(query), [ids]).fetchall())

    def write(self, rows: list[dict[str, Any]]) -> None:
        """See `Table`."""
        if not rows:
            return
        names = list(rows[0])
        listed = sql.SQL(", ").join(map(sql.Identifier, names))
        types = [self.types[name] for name in names]
        as_text = [name not in ("id", "latent") and kind == "text" for name, kind in zip(names, types, strict=True)]
        vector = HalfVector if self.kind == "halfvec" else Vector
        with self._session() as connection:
            connection.execute(
                sql.SQL("CREATE TEMP TABLE altmoe_new (LIKE {} INCLUDING DEFAULTS) ON COMMIT DROP").format(self.name)
            )
            with connection.cursor().copy(
                sql.SQL("COPY altmoe_new ({}) FROM STDIN (FORMAT BINARY)").format(listed)
            ) as copy:
                copy.set_types(types)
                for row in rows:
                    values = [row[name] for name in names]
                    for place, name in enumerate(names):
                        if name == "latent":
                            values[place] = vector(values[place])
                        elif as_text[place] and values[place] is not None:
                            values[place] = str(values[place])
                    copy.write_row(values)
            replaced = [sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in names if name != "id"]
            connection.execute(
                sql.SQL("INSERT INTO {t} ({c}) SELECT {c} FROM altmoe_new ON CONFLICT (id) DO UPDATE SET {r}").format(
                    t=self.name, c=listed, r=sql.SQL(", ").join(replaced)
                )
            )

    def delete(self, ids: list[str]) -> None:
        """See `Table`."""
        if ids:
            with self._session() as connection:
                connection.execute(self._compose(sql.SQL("DELETE FROM {t} WHERE {k} = ANY(%s)")), [ids])

    def finish(self) -> None:
        """See `Table`."""
        limit = INDEXED["halfvec" if self.half else "vector"]
        if self.index is None and self.width <= limit:  # wider ones are searched exactly, row by row
            kind = sql.SQL("halfvec_cosine_ops" if self.half else "vector_cosine_ops")
            with self._session() as connection:
                connection.execute(
                    sql.SQL("CREATE INDEX ON {} USING hnsw ({} {})").format(self.name, self._searched(), kind)
                )
                connection.execute(sql.SQL("ANALYZE {}").format(self.name))
            self.look()

    # ---------------------------------------------------------------- reading

    def _where(self, where: dict[str, Any] | None) -> tuple[sql.Composable, list[Any]]:
        """Conditions as SQL and its parameters; no value is ever part of the text."""
        parts, values = [], []
        for column, condition in (where or {}).items():
            kind = "string" if column == "id" else self.columns[column]
            name = self._readable(self.key if column == "id" else column, text=column == "id")
            if isinstance(condition, list):
                parts.append(sql.SQL("{} = ANY(%s)").format(name))
                values.append([self._value(kind, value) for value in condition])
                continue
            pairs = condition.items() if isinstance(condition, dict) else [("eq", condition)]
            for sign, value in pairs:
                values.append(self._value(kind, value))
                order = sql.SQL(' COLLATE "C"' if isinstance(values[-1], str) and sign not in ("eq", "ne") else "")
                parts.append(sql.SQL("{}{} " + COMPARISONS[sign] + " %s").format(name, order))
        return sql.SQL(" AND ").join([sql.SQL("{} IS NOT NULL").format(sql.Identifier(self.vector)), *parts]), values

    def _readable(self, column: str, text: bool = False) -> sql.Composable:
        """A column as it is read and compared: what is no number and no truth value is text."""
        name, kind = sql.Identifier(column), self.types[column]
        if kind == "numeric" and not text:
            return sql.SQL("{}::float8").format(name)
        return sql.SQL("{}::text").format(name) if kind != "text" and (text or arrow_type(kind) == "string") else name

    @staticmethod
    def _value(kind: str, value: Any) -> Any:
        return value if kind == "bool" or re.match("u?int|float", kind) else str(value)

    def count(self, where: dict[str, Any] | None = None) -> int:
        """See `Table`."""
        conditions, values = self._where(where)
        with self._session() as connection:
            return connection.execute(
                self._compose(sql.SQL("SELECT count(*) FROM {t} WHERE {w}"), w=conditions), values
            ).fetchone()[0]

    def _nearest_query(self, k: int, conditions: sql.Composable | None) -> sql.Composed:
        """Its parameters: the conditions' values, then the vector."""
        half = self.half and self.width <= INDEXED["halfvec"]
        wanted = sql.SQL("%s::{}({})").format(sql.SQL("halfvec" if half else self.kind), sql.Literal(self.width))
        return self._compose(
            sql.SQL("SELECT {k} FROM {t} WHERE {w} ORDER BY {s} " + self.operator + " {q} LIMIT {n}"),
            **{"w": conditions or self._where(None)[0], "s": self._searched(), "q": wanted, "n": sql.Literal(k)},
        )

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> list[list[Any]]:
        """See `Table`."""
        conditions, values = self._where(where)
        query = self._nearest_query(k, conditions)
        settings = {"hnsw.ef_search": min(MAX_EF, 2 * k), "ivfflat.probes": max(1, 2 * math.isqrt(self.lists))}
        if self.index:  # the planner takes a long short list for a reason to read the whole table
            settings |= {"enable_seqscan": "off"}
        if self.version >= (0, 8):  # under a condition the index goes on until it has found enough
            settings |= {"hnsw.iterative_scan": "strict_order", "ivfflat.iterative_scan": "relaxed_order"}
        with self._session() as connection:
            found = self._ask(connection, query, settings, vectors, values)
            if min(map(len, found)) < k:  # an index may miss what a rare condition leaves: look at every row
                found = self._ask(
                    connection, query, {"enable_indexscan": "off", "enable_seqscan": "on"}, vectors, values
                )
        return found

    @staticmethod
    def _ask(connection, query, settings: dict[str, Any], vectors: np.ndarray, values: list) -> list[list[Any]]:
        for name, value in settings.items():
            connection.execute("SELECT set_config(%s, %s, true)", [name, str(value)])
        with connection.cursor() as cursor:  # all questions in one go
            cursor.executemany(query, [[*values, Vector(vector)] for vector in vectors], returning=True)
            found = []
            while True:
                found.append([key for (key,) in cursor.fetchall()])
                if not cursor.nextset():
                    return found

    def matching(self, where: dict[str, Any]) -> list[Any]:
        """See `Table`."""
        conditions, values = self._where(where)
        with self._session() as connection:
            query = self._compose(sql.SQL("SELECT {k} FROM {t} WHERE {w}"), w=conditions)
            return [key for (key,) in connection.execute(query, values)]

    def fetch(self, keys: list[Any], hubness: str | None, latents: bool) -> dict[Any, Row]:
        """See `Table`."""
        read = [sql.Identifier(self.key), sql.Identifier(self.vector) if latents else sql.SQL("NULL")]
        read += [sql.Identifier(hubness) if hubness else sql.SQL("NULL"), *map(self._readable, self.columns)]
        query = self._compose(sql.SQL("SELECT {c} FROM {t} WHERE {k} = ANY(%s)"), c=sql.SQL(", ").join(read))
        rows = {}
        with self._session() as connection, connection.cursor(binary=True) as cursor:
            for key, vector, scalar, *values in cursor.execute(query, [keys]) if keys else ():
                latent = None if vector is None else vector.to_numpy().astype(np.float32)
                rows[key] = Row(latent, scalar, dict(zip(self.columns, values, strict=True)))
        return rows

    def _read(self, what: list[sql.Composable], rows: int) -> Iterator[list[tuple]]:
        """The whole table, a page at a time from a cursor that stays in the server: one moment's state, little memory."""
        query = self._compose(sql.SQL("SELECT {c} FROM {t} WHERE {v} IS NOT NULL"), c=sql.SQL(", ").join(what))
        with self._session() as connection, connection.cursor(name="altmoe", binary=True) as cursor:
            cursor.execute(query)
            while page := cursor.fetchmany(rows):
                yield page

    def ids(self, rows: int) -> Iterator[list[str]]:
        """See `Table`."""
        for page in self._read([sql.Identifier(self.key)], rows):
            yield [str(key) for (key,) in page]

    def pages(self, rows: int) -> Iterator[tuple[list[str], np.ndarray, dict[str, list]]]:
        """See `Table`."""
        what = [sql.Identifier(self.key), sql.Identifier(self.vector), *map(self._readable, self.columns)]
        for page in self._read(what, rows):
            keys, vectors, *values = zip(*page, strict=True)
            latents = np.stack([vector.to_numpy() for vector in vectors]).astype(np.float32)
            yield [str(key) for key in keys], latents, dict(zip(self.columns, map(list, values), strict=True))

"""Latents in a database: its address, what an adapter does, and a search's short list.

Comes in: an address (`postgresql://...`, `milvus://...`) and query vectors. Goes out: the short list, which `search_altmoe`
ranks again. What the two databases do differently lies in `serving/postgres.py` and `serving/milvus.py`; each is one class
with the methods of `Table`. Writing into them is `serving/ingest.py`.

What is stored of an item: its id, its latent exactly as the encoder made it, the columns of the store, one hubness scalar
a direction, and a digest of it all. The database's own index searches those raw latents by cosine. They are not centred,
as the score's are, and that is on purpose: a query vector's cosine with a raw latent ranks the short list as well (see
README.md, "Past one machine"), another model searches the same rows, and so does a table somebody else has filled.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import numpy as np
import torch

from modeling_altmoe import AltMoEModel, LatentProtocol, LatentStore
from modeling_altmoe.backend_altmoe import ShortList
from modeling_altmoe.index_files_altmoe import model_fingerprint

OWN_OPTIONS = ("table", "collection", "vector", "id", "columns", "protocol")
FEW = 1000  # items left by a condition, which are then all in the short list: a graph may miss some of them
AS_OF = 60.0  # seconds for which counts and a table's description are believed


@dataclass
class Address:
    """Where the vectors lie. Printed, it shows no user, password or token.

    Attributes:
        scheme: `"postgresql"` or `"milvus"`.
        url: the address without this project's own options, for the database's client; holds the secrets.
        table: name of the table or collection.
        vector, key: columns of the latents and ids; None: found out.
        columns: metadata columns; None: all.
        protocol: fingerprint under which the vectors were made, where the table does not say it itself.
        options: what else the address said.
    """

    scheme: str
    url: str = field(repr=False)
    table: str
    shown: str
    vector: str | None = None
    key: str | None = None
    columns: list[str] | None = None
    protocol: str | None = None
    options: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.shown

    def redact(self, error: object) -> str:
        """The first line of a client's message, without any secret of this address."""
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        for secret in (self.url, *self._secrets()):
            text = text.replace(secret, "***")
        return text

    def _secrets(self) -> list[str]:
        found = [value for name, value in self.options.items() if re.search("password|token|key", name)]
        parts = urlsplit(self.url)
        # Milvus may have a token alone where PostgreSQL has a user's name
        found += [parts.password, parts.netloc.rpartition("@")[0] if self.scheme == "milvus" else None]
        secrets = [secret for secret in found if secret]
        return [*secrets, *map(unquote, secrets)]  # as written, with percent signs, and as meant


def parse_url(url: str) -> Address:
    """Read `postgresql://user:password@host:port/database?table=NAME` or `milvus://user:password@host:port/COLLECTION`.

    A Milvus Lite file is `milvus:///folder/file.db?collection=NAME`. Further options: `vector`, `id`, `columns=a,b` name
    the columns of a table that this project did not make, `protocol` its latents' fingerprint. What remains is for the
    client (`sslmode=require`, ...).

    Raises:
        ValueError: another scheme, or no table; the message shows no secret.
    """
    scheme, _, _ = url.partition("://")
    kind = {"postgresql": "postgresql", "postgres": "postgresql", "milvus": "milvus"}.get(scheme)
    if kind is None:
        raise ValueError(f"'{scheme}://...' is no database known here: expected postgresql://... or milvus://...")
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
    table, path = own.get("table") or own.get("collection"), parts.path
    hosts = parts.netloc.rpartition("@")[2]
    if kind == "milvus" and not table and hosts:
        table, path = unquote(parts.path.strip("/")), ""
    if not table:
        wanted = "postgresql://HOST:PORT/DATABASE?table=NAME"
        if kind == "milvus":
            wanted = "milvus://HOST:PORT/COLLECTION or milvus:///FOLDER/FILE.db?collection=NAME"
        raise ValueError(f"The address {kind}://{hosts}{path} names no table: expected {wanted}.")
    return Address(
        scheme=kind,
        url=parts._replace(scheme=kind, path=path, query=urlencode(options, quote_via=quote), fragment="").geturl(),
        table=table,
        shown=f"{kind}://{hosts}{path} ({'table' if kind == 'postgresql' else 'collection'} '{table}')",
        vector=own.get("vector"),
        key=own.get("id"),
        columns=own["columns"].split(",") if own.get("columns") else None,
        protocol=own.get("protocol"),
        options=options,
    )


@dataclass
class Row:
    """One stored item, as `Table.fetch` reads it."""

    latent: np.ndarray | None
    hubness: float | None
    columns: dict[str, Any]


class Table(Protocol):
    """What each database does in its own way. A key is an item's id in the database's own type."""

    address: Address
    description: dict[str, Any] | None  # what `ingest` wrote; None for a table of somebody else
    width: int | None
    dtype: str  # "float16" or "float32"
    columns: dict[str, str]  # metadata columns, {name: Arrow type}

    def look(self) -> None:
        """Read what is there again."""

    def create(self, description: dict[str, Any]) -> None:
        """Make the table, or what it lacks of `description`; nothing happens to one that has all."""

    def describe(self, description: dict[str, Any]) -> None:
        """Keep `description` with the table."""

    def digests(self, ids: list[str]) -> dict[str, int]:
        """The digests of those items that are there."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows, or replace those with the same id: all of them or none."""

    def delete(self, ids: list[str]) -> None:
        """Remove items."""

    def finish(self) -> None:
        """Build the index over what is there, if there is none yet."""

    def count(self, where: dict[str, Any] | None = None) -> int:
        """Items that meet the (checked) conditions."""

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> list[list[Any]]:
        """For each vector the keys of the `k` nearest items, nearest first."""

    def matching(self, where: dict[str, Any]) -> list[Any]:
        """The keys of all items that meet the conditions."""

    def fetch(self, keys: list[Any], hubness: str | None, latents: bool) -> dict[Any, Row]:
        """Those items that are there; `hubness` is a column's name."""

    def pages(self, rows: int) -> Iterator[tuple[list[str], np.ndarray, dict[str, list]]]:
        """All items, a page at a time: ids, latents, columns."""

    def ids(self, rows: int) -> Iterator[list[str]]:
        """All ids, a page at a time."""

    def close(self) -> None:
        """End the connection."""


def open_table(url: str | Address) -> Table:
    """Connect; the table need not exist yet (its `description` and `width` are None then).

    Raises:
        ImportError: the client is not installed.
        ConnectionError: nothing answers there, or it does not let us in.
        ValueError: an address of another kind.
    """
    address = parse_url(url) if isinstance(url, str) else url
    try:
        if address.scheme == "milvus":
            from .milvus import MilvusTable as kind
        else:
            from .postgres import PostgresTable as kind
    except ImportError as error:
        raise ImportError(f"{address.scheme}:// needs {error.name}: pip install 'altmoe[databases]'.") from error
    return kind(address)


def hubness_column(direction: str) -> str:
    """The column of a direction's hubness scalars; both databases take the name as it is."""
    return "altmoe_hubness_" + re.sub(r"\W+", "_", direction.replace("->", "_to_"))


def identity(model: AltMoEModel, direction: str) -> str:
    """Changes with everything that an item's hubness scalar depends on."""
    return "-".join(model_fingerprint(model, direction).values())


class Description:
    """What a table's latents are, as a search asks it of a LatentStore.

    Raises:
        ValueError: there is no such table.
    """

    check = LatentStore.check

    def __init__(self, table: Table, model: AltMoEModel | None = None, target: str | None = None):
        _exists(table)
        self.path, self.columns, self.latent_size = table.address, table.columns, table.width
        if table.description is not None:
            self.modality, self.encoder = table.description["modality"], table.description["encoder"]
        else:
            self.modality, self.encoder = target, self._declared(table, model.config.encoders[target])
        self.protocol = LatentProtocol.from_dict(self.encoder.get("protocol") or {})

    @staticmethod
    def _declared(table: Table, encoder: dict[str, Any]) -> dict[str, Any]:
        """A table of somebody else does not say what made its vectors: the address has to."""
        expected = LatentProtocol.from_dict(encoder.get("protocol") or {})
        if table.address.protocol != expected.fingerprint:
            says = f"the address says {table.address.protocol}" if table.address.protocol else "nothing says which one"
            raise ValueError(
                f"The vectors of {table.address} must be made under the protocol {expected.to_dict()} to be searched with "
                f"this model, and {says}. If they were, add protocol={expected.fingerprint} to the address."
            )
        return encoder


class DatabaseBackend:
    """Candidates in a database, see `modeling_altmoe.backend_altmoe.Backend`.

    Args:
        table: an open table.
        description: of it.
        store: where the latents and columns of the short list are read instead, by id.
    """

    def __init__(self, table: Table, model: AltMoEModel, direction: str, store: LatentStore | None = None):
        _, target = model.config.resolve(direction)
        self.table, self.store = table, store
        self.description = Description(table, model, target)
        self.description.check(target, model.config.encoders[target])
        self._model, self._direction = identity(model, direction), direction
        self._lock = threading.RLock()  # one question at a time on one connection
        self._looked = -np.inf
        if not len(self):
            raise ValueError(f"{table.address} is empty: nothing can be found in it.")

    def _look(self) -> None:
        """Once a minute: somebody may have added rows, or another model's scalars."""
        if time.monotonic() - self._looked > AS_OF:
            if self._looked > 0:
                self.table.look()
                _exists(self.table)
            kept = (self.table.description or {}).get("hubness", {}).get(self._direction)
            self.hubness = hubness_column(self._direction) if kept == self._model else None
            self._counts: dict[str, int] = {}
            self._looked = time.monotonic()

    def __len__(self) -> int:
        with self._lock:
            self._look()
            return self._count(None)

    def _count(self, where: dict[str, Any] | None) -> int:
        """Items that meet the conditions; kept, because a database counts by looking at each row."""
        condition = repr(where)
        if condition not in self._counts:
            self._counts[condition] = self.table.count(where)
        return self._counts[condition]

    def describe(self) -> str:
        """What kind of index this is, in a few words."""
        return f"{self.table.address}, {len(self):,} rows"

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> ShortList:
        """See `Backend`."""
        with self._lock:
            self._look()
            candidates = self._count(where)
            if where is not None and candidates <= max(k, FEW):
                found = [self.table.matching(where)] * len(vectors)
            else:
                k = min(k, candidates)
                found = self.table.nearest(np.ascontiguousarray(vectors, dtype=np.float32), k, where)
            keys = list(dict.fromkeys(key for row in found for key in row))
            column = self.hubness
            rows = self.table.fetch(keys, column, self.store is None)
        keys = [key for key in keys if key in rows]  # without what was deleted between the two questions
        place = {key: number for number, key in enumerate(keys)}
        places = np.full((len(found), max(map(len, found), default=0)), -1, dtype=np.int64)
        for number, row in enumerate(found):
            row = [place[key] for key in row if key in place]
            places[number, : len(row)] = row
        ids, items = [str(key) for key in keys], [rows[key] for key in keys]
        local = None if self.store is None else self._local_rows(ids)
        if local is None:
            stacked = (
                np.stack([item.latent for item in items]) if items else np.empty((0, self.table.width), np.float32)
            )
            latents = torch.from_numpy(stacked)
        else:
            latents = self.store.take(local)
        scalars = [item.hubness for item in items]
        return ShortList(
            ids=ids,
            latents=latents,
            places=places,
            read_columns=lambda at: items[at].columns if local is None else self.store.columns_of(int(local[at])),
            hubness=None if column is None or None in scalars else torch.tensor(scalars),
            rows=local,
            candidates=candidates,
        )

    def _local_rows(self, ids: list[str]) -> np.ndarray:
        rows = self.store.rows_of(ids)
        if (rows < 0).any():
            missing = [name for name, row in zip(ids, rows, strict=True) if row < 0]
            raise ValueError(
                f"{self.table.address} holds items that '{self.store.path}' does not ({missing[:3]}): "
                "run 'altmoe index' on the store again."
            )
        return rows


def look(url: str) -> tuple[str | None, dict[str, str]]:
    """What a table holds: its modality (None for a table of somebody else) and its metadata columns `{name: Arrow type}`.

    Raises:
        ImportError, ConnectionError, ValueError: as `open_database`.
    """
    with closing(open_table(url)) as table:
        if table.description is None:
            _exists(table)
            return None, table.columns
        return table.description["modality"], table.columns


def _exists(table: Table) -> None:
    if table.width is None:
        raise ValueError(
            f"{table.address} does not exist. Make it with 'altmoe index STORE --model M --index ADDRESS'."
        )


def open_database(model: AltMoEModel, store: LatentStore | None, direction: str, url: str) -> DatabaseBackend:
    """The backend of a search in a database.

    Args:
        model: with the direction.
        store: the same latents in this process, read instead of the database's; None: the database holds everything.
        direction: e.g. `"text->image"`.
        url: see `parse_url`.

    Raises:
        ImportError: the client is not installed.
        ConnectionError: nothing answers there, or it does not let us in.
        ValueError: no such table, another modality, width or protocol (naming the fields that differ), or nothing in it.
    """
    return DatabaseBackend(open_table(url), model, direction, store)

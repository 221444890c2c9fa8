"""The backend of a search in this process: FAISS over vectors that are derived from a LatentStore.

Comes in: a model, a store, a direction. Goes out: a backend; the store itself is never changed. A small store is searched
exactly: the both-direction score with its hubness correction is one inner product (see `scoring_altmoe`), so one pass over
whole item vectors finds the best. For a large store an approximate index over the same vectors, without their last
component, gives a list, which that component (hubness) shortens, and which is ranked again with what is stored: the
store's latents, and beside the index what the connector predicts from each item and its hubness, computed once. So no
search runs the connector on items, and every score is the whole score. Filters look exactly where few rows meet them, and
inside the index otherwise.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

try:  # searching a store needs it, loading a checkpoint does not
    import faiss
except ImportError:
    faiss = None

from .backend_altmoe import ShortList
from .effort_altmoe import (
    TUNING_K,
    WIDER,
    Best,
    bank_queries,
    choose_effort,
    highest,
    knob_of,
    search_parameters,
    shorten,
)
from .scoring_altmoe import item_parts, item_vectors
from .shards_altmoe import fits_in_memory, read_ahead
from .where_altmoe import rows_where

EXACT_ROWS = 20_000  # up to here "auto" is exact: a few milliseconds and about 100 MB
EXACT_MATCHES = 20_000  # rows that meet a condition are searched one by one up to here
BATCH_ROWS = 16_384  # added at a time
DERIVED_ROWS = 512  # through the connector at a time: what it makes of them stays in the processor's cache
TRAINING_ROWS, TRAINING_ROUNDS = 20, 5  # rows a list; with more it only takes longer
logger = logging.getLogger(__name__)


def choose_index(index: str, rows: int) -> str:
    """`"exact"` or a FAISS factory string: what `"auto"` means for this many rows, else what was asked for."""
    if index != "auto":
        return index
    if rows <= EXACT_ROWS:
        return "exact"
    lists = 2 ** min(12, round(math.log2(2 * rows**0.5)))
    # turned at random (RR) first, codes of one bit are off by half as much (measured), and a quarter need be ranked again
    return f"RR,IVF{lists},RaBitQ"


class Kept:
    """What is kept of each item beside an approximate index: `(n, d_source)` float16 predictions (width 0 where only one
    direction counts) and `(n,)` float32 hubness, in the order in which items were added."""

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]] | None = None):
        self.parts = list(parts or [])

    def _parts(self, positions: np.ndarray):
        start = 0
        for vectors, scalars in self.parts:
            if len(self.parts) == 1:
                yield slice(None), vectors, scalars, positions
                return
            here = np.flatnonzero((positions >= start) & (positions < start + len(scalars)))
            yield here, vectors, scalars, positions[here] - start
            start += len(scalars)

    def predicted(self, positions: np.ndarray) -> torch.Tensor:
        """Predictions of some items, float16."""
        result = np.empty((len(positions), self.parts[0][0].shape[1]), dtype=np.float16)
        for here, vectors, _, numbers in self._parts(positions):
            result[here] = vectors.take(numbers, axis=0)  # several times faster than [...]
        return torch.from_numpy(result)

    def hubness(self, positions: np.ndarray) -> np.ndarray:
        """Hubness of items at positions of any shape."""
        result = np.empty(positions.size, dtype=np.float32)
        for here, _, scalars, numbers in self._parts(positions.reshape(-1)):
            result[here] = scalars.take(numbers)
        return result.reshape(positions.shape)


class LocalBackend:
    """
    A FAISS index of one store for one direction. Positions count what was added to it, rows what the store holds now;
    they differ by what was deleted since.

    Args:
        model, store, direction: as in `LatentIndex`.
        factory: `"exact"` or a FAISS factory string.
        index: a FAISS index to go on with; None makes an empty one.
        kept: what lies beside an approximate index.
        effort: how hard an approximate index looks: `nprobe` or `efSearch`, `short_list` (for ten results), and the
            `recall` of the ten best that was measured with them.
        alive: `(positions,)` which are not deleted; None: all.
    """

    whole = True

    def __init__(self, model, store, direction: str, factory: str, index=None, kept=None, effort=None, alive=None):
        self.model, self.store, self.direction, self.factory = model, store, direction, factory
        self.post = model.postprocessing(direction)
        self.index, self.kept, self.effort = index, kept or Kept(), dict(effort or {})
        self.alive = None if alive is None or alive.all() else alive
        self._positions = None if self.alive is None else np.flatnonzero(self.alive)
        self._selected: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
        self._lock = threading.Lock()  # a service searches from several threads

    def __len__(self) -> int:
        return self.index.ntotal if self._positions is None else len(self._positions)

    def describe(self) -> str:
        """What kind of index this is, in a few words."""
        text = f"{self.factory}, {len(self):,} rows"
        if "recall" in self.effort:
            text += f", recall@{TUNING_K} {self.effort['recall']:.3f} by queries like new ones"
        settings = [
            f"{name} {self.effort[name]}" for name in ("nprobe", "efSearch", "short_list") if name in self.effort
        ]
        if settings:
            text += f" ({', '.join(settings)})"
        return text + ("" if self.alive is None else f", {self.index.ntotal - len(self):,} deleted rows left out")

    def read_ahead(self, wanted: bool | None = None) -> None:
        """Whether the system should read on after rows that are ranked again; default: where all of it fits in memory."""
        vectors = [part for part, _ in self.kept.parts]
        if wanted is None:
            row = self.store.latent_size * np.dtype(self.store.dtype).itemsize
            wanted = fits_in_memory(row * len(self.store) + sum(part.nbytes for part in vectors))
        self.store.read_ahead(wanted)
        for part in vectors:
            read_ahead(part, wanted)

    # ---------------------------------------------------------------- search

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> ShortList:
        """The `k` best items of each whole query vector, with their whole scores; see `search_altmoe.Backend`."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        matching, selector = self._select(where)
        candidates = len(self) if matching is None else len(matching)
        wanted = min(k, candidates)
        if not wanted:
            nothing = np.empty((len(vectors), 0))
            return self._short_list(nothing.astype(np.int64), nothing.astype(np.float32), candidates)
        if self.factory == "exact":
            parameters = None if selector is None else faiss.SearchParameters(sel=selector)
            scores, positions = self.index.search(vectors, wanted, params=parameters)
        elif matching is not None and (candidates <= EXACT_MATCHES or knob_of(self.index) is None):
            positions, scores = self._scan(vectors, wanted, matching)
        else:
            found = self._approximate(vectors, wanted, candidates, selector, where is not None)
            positions, scores = self.rank(vectors, wanted, found)
        return self._short_list(positions, scores, candidates)

    def _select(self, where: dict | None):
        """Positions that can be found, in order, and FAISS's selector of them; `(None, None)` for all that there are."""
        if where is None and self.alive is None:
            return None, None
        key = repr(where)
        with self._lock:
            entry = self._selected.get(key)
        if entry is None:
            if where is None:
                matching, mask = None, self.alive
            else:
                matching = rows_where(self.store, where)
                matching = matching if self._positions is None else self._positions[matching]
                mask = np.zeros(self.index.ntotal, dtype=bool)
                mask[matching] = True
            entry = matching, np.packbits(mask, bitorder="little")
            with self._lock:
                while len(self._selected) >= 8:  # the same conditions come again and again
                    self._selected.pop(next(iter(self._selected)))
                self._selected[key] = entry
        matching, bits = entry
        selector = faiss.IDSelectorBitmap(bits)
        selector.bits = bits  # it points there
        return matching, selector

    def _approximate(self, vectors: np.ndarray, k: int, candidates: int, selector, filtered: bool) -> np.ndarray:
        """A short list of positions a query, by the index; it looks further where a condition hides much."""
        margin = 2 if filtered else 1  # what meets a condition may lie apart from where the index was tuned
        short = min(candidates, max(margin * self.effort["short_list"] * k // TUNING_K, k))
        knob = knob_of(self.index)
        if knob is None:
            return shorten(self.index, vectors, short, None, self.kept.hubness)
        most = highest(self.index)
        effort = min(most, max(1, round(margin * self.effort[knob] * self.index.ntotal / candidates)))
        effort = max(effort, WIDER * short) if knob == "efSearch" else effort
        while True:
            parameters = search_parameters(self.index, effort, selector)
            found = shorten(self.index, vectors, short, parameters, self.kept.hubness)
            if effort >= most or (found >= 0).sum(1).min() >= k:
                return found
            effort = min(most, 4 * effort)

    def _parts(self, positions: np.ndarray) -> list[torch.Tensor]:
        """Whole item vectors from what is stored, in parts side by side: `(m, ...)` float32. Positions are in order."""
        rows = positions if self._positions is None else np.searchsorted(self._positions, positions)
        predicted, hubness = self.kept.predicted(positions), torch.from_numpy(self.kept.hubness(positions))
        given = (one.to(self.model.device) for one in (self.store.take(rows), hubness, predicted))
        return [part.float().cpu() for part in item_parts(self.model, self.post, self.direction, *given)]

    def rank(self, vectors: np.ndarray, k: int, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best of a short list of positions `(queries, short)` by the whole score, with their scores."""
        positions = np.full((len(found), min(k, found.shape[1])), -1, dtype=np.int64)
        scores = np.full(positions.shape, -np.inf, dtype=np.float32)
        for number, query in enumerate(torch.from_numpy(vectors)):  # one at a time stays in the processor's cache
            short = np.sort(found[number])
            short = short[np.searchsorted(short, 0) :]  # -1 stands for "fewer were found"
            if not len(short):
                continue
            parts = self._parts(short)
            score = sum(part @ some for part, some in zip(parts, query.split([p.shape[1] for p in parts]), strict=True))
            best, order = score.topk(min(k, len(short)))
            positions[number, : len(best)], scores[number, : len(best)] = short[order.numpy()], best.numpy()
        return positions, scores

    def _scan(self, vectors: np.ndarray, k: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best of some positions by the whole score, exactly."""
        best = Best(torch.from_numpy(vectors), k)
        for start in range(0, len(positions), DERIVED_ROWS):
            part = positions[start : start + DERIVED_ROWS]
            best.see(torch.cat(self._parts(part), dim=1), torch.from_numpy(part))
        return best.positions.numpy(), best.scores.numpy()

    def _short_list(self, positions: np.ndarray, scores: np.ndarray, candidates: int) -> ShortList:
        if len(positions) == 1 and -1 not in positions:  # nothing can be twice
            found, places = positions[0], np.arange(positions.shape[1])
        else:
            found, places = np.unique(positions, return_inverse=True)
            missing = int(len(found) > 0 and found[0] < 0)  # -1 stands for "fewer were found"
            found, places = found[missing:], places - missing
        rows = found if self._positions is None else np.searchsorted(self._positions, found)
        records = self.store.records(rows)
        return ShortList(
            ids=[record.pop("id") for record in records],
            latents=None,
            places=places.reshape(positions.shape),
            read_columns=records.__getitem__,
            rows=rows,
            scores=scores,
            candidates=candidates,
        )

    # ---------------------------------------------------------------- build

    def train(self) -> None:
        """Make an empty index, trained on a seeded sample of the store's rows.

        Raises:
            ValueError: a factory string that FAISS does not take, or that is not for inner products.
        """
        first = item_vectors(self.model, self.post, self.direction, self.store.take([0]).to(self.model.device))
        if self.factory == "exact":
            self.index = faiss.IndexFlatIP(first.shape[1])
            return
        try:
            self.index = faiss.index_factory(first.shape[1] - 1, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"Unknown index '{self.factory}': expected auto, exact, a FAISS factory string such as IVF1024,RaBitQ or "
                f"HNSW16, or a database's address. FAISS says: {str(error).splitlines()[-1].rpartition(': ')[2]}"
            ) from error
        if not self.index.is_trained:
            inverted = faiss.try_extract_index_ivf(self.index)
            lists = inverted.nlist if inverted is not None else 1024
            if inverted is not None:
                if lists > len(self.store):
                    raise ValueError(
                        f"'{self.factory}' has {lists} lists, '{self.store.path}' only {len(self.store)} rows."
                    )
                inverted.cp.min_points_per_centroid = 1  # it would warn below 39
                inverted.cp.niter = TRAINING_ROUNDS
                with contextlib.suppress(AttributeError):  # a graph over the lists: look well for each item's
                    faiss.downcast_index(inverted.quantizer).hnsw.efSearch = 32
            count = min(len(self.store), max(TRAINING_ROWS * lists, 10_240))
            rows = np.sort(np.random.default_rng(0).choice(len(self.store), count, replace=False))
            self.index.train(np.ascontiguousarray(self._derive(rows)[:, :-1]))

    def _derive(self, rows: np.ndarray) -> np.ndarray:
        """Whole item vectors by the model: `(m, d)` float32."""
        result = None
        for start in range(0, len(rows), DERIVED_ROWS):
            latents = self.store.take(rows[start : start + DERIVED_ROWS]).to(self.model.device)
            items = item_vectors(self.model, self.post, self.direction, latents).float().cpu().numpy()
            if result is None:
                result = np.empty((len(rows), items.shape[1]), dtype=np.float32)
            result[start : start + len(items)] = items
        return result

    def add(
        self, start: int, allocate: Callable = np.empty, best: Best | None = None, progress: Callable = iter
    ) -> None:
        """Add the store's rows from `start` on.

        Args:
            allocate: makes an array of `(shape, dtype)`, in memory or in a file.
            best: is shown every item, for `tune`.
            progress: wraps the iteration over batches.
        """
        size, kept = len(self.store) - start, None
        with ThreadPoolExecutor(1) as other:  # FAISS adds one batch while the connector works on the next
            adding = None
            for first in progress(range(start, len(self.store), BATCH_ROWS)):
                rows = np.arange(first, min(first + BATCH_ROWS, len(self.store)))
                vectors = self._derive(rows)
                if best is not None:
                    best.see(torch.from_numpy(vectors), torch.from_numpy(rows))
                exact = self.factory == "exact"
                if not exact:
                    if kept is None:
                        width = vectors.shape[1] - 1 - self.store.latent_size
                        kept = allocate((size, width), np.float16), allocate((size,), np.float32)
                        self.kept.parts.append(kept)
                    here = slice(first - start, first - start + len(rows))
                    kept[0][here] = torch.from_numpy(vectors[:, self.store.latent_size : -1]).half().numpy()
                    kept[1][here] = vectors[:, -1]
                if adding is not None:
                    adding.result()
                adding = other.submit(self.index.add, vectors if exact else np.ascontiguousarray(vectors[:, :-1]))
            if adding is not None:
                adding.result()

    def tune(self, best: Best | None, recall: float) -> None:
        """Choose how hard to look, see `effort_altmoe.choose_effort`.

        Args:
            best: the true ones of the bank's queries; None (no bank): a setting by size, not measured.
            recall: share to reach.
        """
        if self.factory == "exact":
            return
        if best is None:
            knob, most = knob_of(self.index), highest(self.index)
            usual = {"nprobe": max(1, most // 16), "efSearch": 128, None: 0}[knob]
            self.effort = {**({knob: usual} if knob else {}), "short_list": 400}
        else:
            self.effort = choose_effort(self.index, self.kept.hubness, best, recall)


def build(
    model,
    store,
    direction: str,
    index: str = "auto",
    recall: float = 0.99,
    allocate: Callable = np.empty,
    progress: Callable = iter,
) -> LocalBackend:
    """Make a backend in this process.

    Args:
        model, store, direction: as in `LatentIndex`.
        index: `"auto"`, `"exact"` or a FAISS factory string.
        recall: of the ten best, to be reached by an approximate index.
        allocate, progress: as in `LocalBackend.add`.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is empty, an unknown index, or a recall that is no share.
    """
    check_local(store)
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall}: expected a share above 0 and up to 1, e.g. 0.99.")
    backend = LocalBackend(model, store, direction, choose_index(index, len(store)))
    backend.train()
    queries = None if backend.factory == "exact" else bank_queries(model, direction)
    best = None if queries is None else Best(queries, TUNING_K)
    backend.add(0, allocate, best, progress)
    backend.tune(best, recall)
    backend.read_ahead()
    return backend


def check_local(store) -> None:
    """Raise if nothing can be searched in this process (see `build`)."""
    if faiss is None:
        raise ImportError("Searching a LatentStore needs faiss: pip install faiss-cpu.")
    if not len(store):
        raise ValueError(f"'{store.path}' is empty: nothing can be found in it.")

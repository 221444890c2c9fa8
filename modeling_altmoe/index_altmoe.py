"""The backend of a search in this process: FAISS over vectors that are derived from a LatentStore.

Comes in: a model, a store, a direction. Goes out: a backend; the store itself is never changed. A small store is searched
exactly: the both-direction score with its hubness correction is one inner product (see `scoring_altmoe`), so one pass over
whole item vectors finds the best. For a large store an approximate index over the same vectors, without their last
component, gives a short list, which is ranked again with what is stored: the store's latents, and beside the index what
the connector predicts from each item and its hubness, computed once. So no search runs the connector on items, and every
score is the whole score. Filters look exactly where few rows meet them, and inside the index otherwise.
"""

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

try:  # searching a store needs it, loading a checkpoint does not
    import faiss
except ImportError:
    faiss = None

from .backend_altmoe import ShortList
from .scoring_altmoe import item_vectors
from .where_altmoe import rows_where

EXACT_ROWS = 20_000  # up to here "auto" is exact: a few milliseconds and about 100 MB
EXACT_MATCHES = 20_000  # rows that meet a condition are searched one by one up to here
BATCH_ROWS = 16_384  # worked on at a time
TUNING_QUERIES = 128  # of the training bank
TUNING_K = 10  # recall is measured of the ten best
SHORT_LISTS = (50, 100, 200, 400, 800)
RANKED_ROW = 32  # ranking a row again costs about as much as scanning this many codes
logger = logging.getLogger(__name__)


def choose_index(index: str, rows: int) -> str:
    """`"exact"` or a FAISS factory string: what `"auto"` means for this many rows, else what was asked for."""
    if index != "auto":
        return index
    if rows <= EXACT_ROWS:
        return "exact"
    lists = 2 ** min(13, round(math.log2(2 * rows**0.5)))
    return f"IVF{lists},RaBitQ"


class Kept:
    """What is kept of each item beside an approximate index: `(n, d_source)` float16 predictions (width 0 where only one
    direction counts) and `(n,)` float32 hubness, in the order in which items were added."""

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]] | None = None):
        self.parts = list(parts or [])

    def take(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of some items, as float32."""
        predicted = np.empty((len(positions), self.parts[0][0].shape[1]), dtype=np.float16)
        hubness = np.empty(len(positions), dtype=np.float32)
        start = 0
        for vectors, scalars in self.parts:
            here = np.flatnonzero((positions >= start) & (positions < start + len(scalars)))
            predicted[here], hubness[here] = vectors[positions[here] - start], scalars[positions[here] - start]
            start += len(scalars)
        return torch.from_numpy(predicted.astype(np.float32)), torch.from_numpy(hubness)


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
        elif matching is not None and (candidates <= EXACT_MATCHES or self._knob() is None):
            positions, scores = self._scan(vectors, wanted, matching)
        else:
            found = self._approximate(vectors, wanted, candidates, selector, where is not None)
            positions, scores = self._rank(vectors, wanted, found)
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
        coarse = np.ascontiguousarray(vectors[:, :-1])
        knob = self._knob()
        if knob is None:
            return self.index.search(coarse, short)[1]
        highest = _highest(self.index)
        effort = min(highest, max(1, round(margin * self.effort[knob] * self.index.ntotal / candidates)))
        effort = max(effort, short) if knob == "efSearch" else effort
        while True:
            found = self.index.search(coarse, short, params=_parameters(self.index, effort, selector))[1]
            if effort >= highest or (found >= 0).sum(1).min() >= k:
                return found
            effort = min(highest, 4 * effort)

    def _knob(self) -> str | None:
        """What makes this index look harder."""
        return _knob(self.index)

    def _vectors(self, positions: np.ndarray) -> torch.Tensor:
        """Whole item vectors from what is stored: `(m, d)` float32."""
        rows = positions if self._positions is None else np.searchsorted(self._positions, positions)
        predicted, hubness = self.kept.take(positions)
        latents = self.store.take(rows).to(self.model.device)
        with torch.no_grad():
            return item_vectors(self.model, self.post, self.direction, latents, hubness, predicted).float().cpu()

    def _rank(self, vectors: np.ndarray, k: int, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best of a short list of positions `(queries, short)` by the whole score."""
        distinct, places = np.unique(np.maximum(found, 0), return_inverse=True)
        items, places = self._vectors(distinct), torch.from_numpy(places.reshape(found.shape))
        scores = torch.stack(
            [items[of] @ query for of, query in zip(places, torch.from_numpy(vectors), strict=True)]
        )  # (queries, short)
        scores = scores.masked_fill(torch.from_numpy(found) < 0, -torch.inf)
        best, order = scores.topk(min(k, scores.shape[1]), dim=1)
        return np.take_along_axis(found, order.numpy(), 1), best.numpy()

    def _scan(self, vectors: np.ndarray, k: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best of some positions by the whole score, exactly."""
        best = Best(torch.from_numpy(vectors), k)
        for start in range(0, len(positions), BATCH_ROWS):
            part = positions[start : start + BATCH_ROWS]
            best.see(self._vectors(part), torch.from_numpy(part))
        return best.positions.numpy(), best.scores.numpy()

    def _short_list(self, positions: np.ndarray, scores: np.ndarray, candidates: int) -> ShortList:
        found, places = np.unique(positions, return_inverse=True)
        missing = int(len(found) > 0 and found[0] < 0)  # -1 stands for "fewer were found"
        found = found[missing:]
        rows = found if self._positions is None else np.searchsorted(self._positions, found)
        records = self.store.records(rows)
        return ShortList(
            ids=[record.pop("id") for record in records],
            latents=None,
            places=places.reshape(positions.shape).astype(np.int64) - missing,
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
            if inverted is not None and lists > len(self.store):
                raise ValueError(
                    f"'{self.factory}' has {lists} lists, '{self.store.path}' only {len(self.store)} rows."
                )
            count = min(len(self.store), max(40 * lists, 10_240))  # FAISS asks for 39 a centroid
            rows = np.sort(np.random.default_rng(0).choice(len(self.store), count, replace=False))
            sample = [self._derive(rows[i : i + BATCH_ROWS])[:, :-1] for i in range(0, count, BATCH_ROWS)]
            self.index.train(np.ascontiguousarray(np.concatenate(sample)))

    def _derive(self, rows: np.ndarray) -> np.ndarray:
        """Whole item vectors by the model: `(m, d)` float32."""
        latents = self.store.take(rows).to(self.model.device)
        with torch.no_grad():
            return item_vectors(self.model, self.post, self.direction, latents).float().cpu().numpy()

    def add(
        self, start: int, allocate: Callable = np.empty, best: "Best | None" = None, progress: Callable = iter
    ) -> None:
        """Add the store's rows from `start` on.

        Args:
            allocate: makes an array of `(shape, dtype)`, in memory or in a file.
            best: is shown every item, for `tune`.
            progress: wraps the iteration over batches.
        """
        size, kept = len(self.store) - start, None
        for first in progress(range(start, len(self.store), BATCH_ROWS)):
            rows = np.arange(first, min(first + BATCH_ROWS, len(self.store)))
            vectors = self._derive(rows)
            if best is not None:
                best.see(torch.from_numpy(vectors), torch.from_numpy(rows))
            if self.factory == "exact":
                self.index.add(vectors)
                continue
            self.index.add(np.ascontiguousarray(vectors[:, :-1]))
            if kept is None:
                width = vectors.shape[1] - 1 - self.store.latent_size
                kept = allocate((size, width), np.float16), allocate((size,), np.float32)
                self.kept.parts.append(kept)
            here = slice(first - start, first - start + len(rows))
            kept[0][here], kept[1][here] = vectors[:, self.store.latent_size : -1], vectors[:, -1]

    def tune(self, best: "Best | None", recall: float) -> None:
        """Choose how hard to look: the least work that finds `recall` of the true ten best.

        Args:
            best: the true ones of the bank's queries; None (no bank): a setting by size, not measured.
            recall: share to reach; where nothing does, the hardest look is taken.
        """
        if self.factory == "exact":
            return
        knob, highest = self._knob(), _highest(self.index)
        if best is None:
            usual = {"nprobe": max(1, highest // 16), "efSearch": 128, None: 0}[knob]
            self.effort = {**({knob: usual} if knob else {}), "short_list": 400}
            return
        truth = best.positions.numpy()
        coarse = np.ascontiguousarray(best.queries.numpy()[:, :-1])
        scanned = self.index.ntotal / highest if knob == "nprobe" else 32  # codes a unit of effort
        tried, enough = [], math.inf
        efforts = {"nprobe": range(highest.bit_length()), "efSearch": range(4, 13), None: range(1)}[knob]
        efforts = [2**power for power in efforts]
        longest = min(SHORT_LISTS[-1], self.index.ntotal)
        for effort in efforts:
            if effort * scanned >= enough:
                break
            parameters = _parameters(self.index, effort, None) if knob else None
            found = self.index.search(coarse, longest, params=parameters)[1]
            for short in SHORT_LISTS:
                hits = (truth[:, :, None] == found[:, None, :short]).any(2).mean()
                work = effort * scanned + short * RANKED_ROW
                tried.append((bool(hits < recall), work, effort, short, float(hits)))
                enough = enough if hits < recall else min(enough, work)
        reached = [one for one in tried if not one[0]]
        _, _, effort, short, hits = min(reached) if reached else max(tried, key=lambda one: (one[-1], -one[1]))
        self.effort = {**({knob: effort} if knob else {}), "short_list": short, "recall": round(hits, 4)}


class Best:
    """The `k` best items of each query among all that were seen."""

    def __init__(self, queries: torch.Tensor, k: int):
        self.queries, self.k = queries, k
        self.scores = torch.empty(len(queries), 0)
        self.positions = torch.empty(len(queries), 0, dtype=torch.int64)

    def see(self, items: torch.Tensor, positions: torch.Tensor) -> None:
        """Take more items into account: `(m, d)` and `(m,)`."""
        scores = torch.cat([self.scores, self.queries @ items.T], dim=1)
        positions = torch.cat([self.positions, positions.expand(len(self.queries), -1)], dim=1)
        self.scores, order = scores.topk(min(self.k, scores.shape[1]), dim=1)
        self.positions = positions.gather(1, order)


def bank_queries(model, direction: str) -> torch.Tensor | None:
    """Whole query vectors to measure recall with: `(n, d)`; None without a bank of training items.

    What the connector predicts from an item it was trained on lies close to the answer, and is found more easily than what
    new queries ask for. So each has the prediction halfway between two other items, with its own latent for the other
    direction. Measured on stamps, 20,000 rows: nprobe 1 finds 0.996 for trained items, 0.69 for held-out captions and 0.63
    for these; nprobe 32 finds 1.0, 0.988 and 0.987.
    """
    post = model.postprocessing(direction)
    bank = post.query_bank.get(direction)
    if bank is None or not len(bank):
        return None
    random = np.random.default_rng(0)
    own, one, two = (torch.from_numpy(random.permutation(len(bank))[:TUNING_QUERIES]) for _ in range(3))
    parts = [F.normalize(bank[one] + bank[two], dim=-1) / post.scales[direction]]
    source, _, target = direction.partition("->")
    reverse = f"{target}->{source}"
    if post.reverse_weight and reverse in model.directions:
        if len(post.gallery_bank.get(reverse, ())) != len(bank):
            return None
        parts.append(post.gallery_bank[reverse][own] * (post.reverse_weight / post.scales[reverse]))
    return torch.cat([*parts, bank.new_ones(len(own), 1)], dim=1).float().cpu()


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
    return backend


def check_local(store) -> None:
    """Raise if nothing can be searched in this process (see `build`)."""
    if faiss is None:
        raise ImportError("Searching a LatentStore needs faiss: pip install faiss-cpu.")
    if not len(store):
        raise ValueError(f"'{store.path}' is empty: nothing can be found in it.")


# ---------------------------------------------------------------- FAISS's kinds of index


def _knob(index) -> str | None:
    if faiss.try_extract_index_ivf(index) is not None:
        return "nprobe"
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return "efSearch" if isinstance(index, faiss.IndexHNSW) else None


def _highest(index) -> int:
    """The most an index can be asked to do."""
    inverted = faiss.try_extract_index_ivf(index)
    return index.ntotal if inverted is None else inverted.nlist


def _parameters(index, effort: int, selector):
    """Search parameters of an index: how hard to look, and where."""
    index, more = faiss.downcast_index(index), {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, effort, selector))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort, **more)
    return faiss.SearchParametersIVF(nprobe=effort, **more)

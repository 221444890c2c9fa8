"""The backend of a search in this process: FAISS over vectors that are derived from a LatentStore.

Comes in: a model, a store, a direction. Goes out: a backend. The store itself is never changed.
"""

from typing import Any

import numpy as np

try:  # searching a store needs it, loading a checkpoint does not
    import faiss
except ImportError:
    faiss = None

from .backend_altmoe import ShortList
from .scoring_altmoe import item_vectors
from .where_altmoe import rows_where

BATCH_ROWS = 16384


def open_local(model, store, direction: str, index: str = "auto") -> "ExactBackend":
    """A backend in this process.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is empty, or an unknown index.
    """
    if faiss is None:
        raise ImportError("Searching a LatentStore needs faiss: pip install faiss-cpu.")
    if not len(store):
        raise ValueError(f"'{store.path}' is empty: nothing can be found in it.")
    if index not in ("auto", "exact"):
        raise ValueError(f"Unknown index '{index}': expected auto or exact.")
    return ExactBackend(model, store, direction)


class ExactBackend:
    """All whole item vectors in memory: the both-direction score with its hubness correction is one inner product (see
    `scoring_altmoe`), so one pass finds it exactly."""

    whole = True

    def __init__(self, model, store, direction: str):
        self.store = store
        post = model.postprocessing(direction)
        self.index = None
        for start in range(0, len(store), BATCH_ROWS):
            latents = store.take(np.arange(start, min(start + BATCH_ROWS, len(store)))).to(model.device)
            vectors = item_vectors(model, post, direction, latents).cpu().numpy().astype(np.float32)
            if self.index is None:
                self.index = faiss.IndexFlatIP(vectors.shape[1])
            self.index.add(vectors)

    def __len__(self) -> int:
        return self.index.ntotal

    def describe(self) -> str:
        """What kind of index this is, in a few words."""
        return f"exact, {len(self):,} rows"

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None):
        """See `search_altmoe.Backend`."""
        candidates, parameters = len(self), None
        if where is not None:
            matching = rows_where(self.store, where)
            candidates = len(matching)
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(matching))
        scores, rows = self.index.search(np.ascontiguousarray(vectors), max(1, min(k, candidates)), params=parameters)
        return short_list(self.store, rows, candidates, scores=scores)


def short_list(store, rows: np.ndarray, candidates: int, **kept) -> ShortList:
    """Found rows `(queries, k)`, -1 for none, as a short list without latents."""
    found, places = np.unique(rows, return_inverse=True)
    missing = int(len(found) > 0 and found[0] < 0)
    found = found[missing:]
    return ShortList(
        ids=[store.id_of(row) for row in found.tolist()],
        latents=None,
        places=places.reshape(rows.shape).astype(np.int64) - missing,
        read_columns=lambda place: store.columns_of(int(found[place])),
        rows=found,
        candidates=candidates,
        **kept,
    )

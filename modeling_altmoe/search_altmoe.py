"""Search a LatentStore from another modality.

Comes in: a model, a store of target latents, a direction; then source latents. Goes out: the best rows with scores.
The both-direction score with its hubness correction is one inner product (see `scoring_altmoe`), so FAISS finds it
exactly in one pass over vectors that are derived from the store; the store itself is never changed.
"""

from dataclasses import dataclass

import numpy as np
import torch

try:  # searching a store needs it, loading a checkpoint does not
    import faiss
except ImportError:
    faiss = None

from .confidence_altmoe import SHORT_LIST
from .latents_altmoe import LatentStore
from .modeling_altmoe import AltMoEModel
from .scoring_altmoe import item_vectors, query_vectors


@dataclass
class Hit:
    """One result: `row` in the store, its `id`, `score` (larger is better) and metadata."""

    row: int
    id: str
    score: float
    columns: dict


class Hits(list):
    """The hits of one query, best first.

    Attributes:
        confidence: calibrated probability that the first hit is a true match; None if the model has no calibration.
        threshold: the model's own; None likewise.
    """

    confidence: float | None = None
    threshold: float | None = None

    @property
    def found(self) -> bool:
        """Whether the first hit is confident enough to be called a match (True without a calibration)."""
        return self.confidence is None or self.confidence >= self.threshold


class LatentIndex:
    """
    An exact in-memory index of one store for one direction.

    Args:
        model: an [`AltMoEModel`] with the direction.
        store: latents of the direction's target, under the model's protocol.
        direction: e.g. `"text->image"`.
        rows: only these rows of the store can be found (default: all).
        batch_rows: rows converted at a time.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is of another modality or protocol (naming the fields that differ), or empty.
    """

    def __init__(self, model: AltMoEModel, store: LatentStore, direction: str, rows=None, batch_rows: int = 16384):
        if faiss is None:
            raise ImportError("Searching a LatentStore needs faiss: pip install faiss-cpu.")
        _, target = model.config.resolve(direction)
        store.check(target, model.config.encoders[target])
        if not len(store):
            raise ValueError(f"'{store.path}' is empty: nothing can be found in it.")
        self.model, self.store, self.direction = model, store, direction
        self.post, self.calibration = model.postprocessing(direction), model.calibration(direction)
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows, dtype=np.int64)
        self._names = store.ids
        self._columns = {name: store.column(name) for name in store.columns}
        self.index = None
        for start in range(0, len(self.rows), batch_rows):
            latents = store.take(self.rows[start : start + batch_rows]).to(model.device)
            vectors = item_vectors(model, self.post, direction, latents).cpu().numpy().astype(np.float32)
            if self.index is None:
                self.index = faiss.IndexFlatIP(vectors.shape[1])
            self.index.add(vectors)

    def search(self, latents: dict[str, torch.Tensor] | torch.Tensor, k: int = 10) -> list[Hits]:
        """The `k` best items for each query.

        Args:
            latents: source latents `{modality: (n, latent_size)}`, or the tensor alone for one source.
            k: results a query.

        Returns:
            For each query its hits, best first, with the confidence that the first one is a match.

        Raises:
            ValueError: wrong width or NaN in the latents, or k below 1.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        if isinstance(latents, torch.Tensor):
            latents = {self.model.config.resolve(self.direction)[0][0]: latents}
        latents = {modality: tensor.to(self.model.device) for modality, tensor in latents.items()}
        queries = query_vectors(self.model, self.post, self.direction, latents).cpu().numpy().astype(np.float32)
        asked = min(max(k, SHORT_LIST if self.calibration else 1), len(self.rows))
        scores, places = self.index.search(np.ascontiguousarray(queries), asked)
        results = []
        for row, values in zip(places, scores, strict=True):
            results.append(
                Hits(self._hit(self.rows[place], score) for place, score in zip(row[:k], values, strict=False))
            )
        if self.calibration and len(results):
            confidence = self.calibration.confidence(torch.from_numpy(scores), len(self.rows))
            for hits, value in zip(results, confidence.tolist(), strict=True):
                hits.confidence, hits.threshold = value, self.calibration.threshold
        return results

    def _hit(self, row: int, score: float) -> Hit:
        columns = {name: values[row] for name, values in self._columns.items()}
        return Hit(int(row), self._names[row], float(score), columns)

"""Search a LatentStore from another modality.

Comes in: a model, a store of target latents, a direction; then source latents. Goes out: the best rows with scores.
Where the candidates' vectors lie is a *backend*: this process (`index_altmoe`) or a database. Everything else is one class
for all of them: a backend that only ranks coarsely gives a short list with the stored latents, and the list is ranked
again with the whole score (both directions and hubness, see `scoring_altmoe`), so every backend returns the same scores.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .backend_altmoe import Backend, ShortList
from .confidence_altmoe import SHORT_LIST
from .index_files_altmoe import open_local
from .latents_altmoe import LatentStore
from .modeling_altmoe import AltMoEModel
from .scoring_altmoe import item_vectors, query_vectors
from .sharing_altmoe import is_folder
from .where_altmoe import check_where, parse_where

QUERIES = 64  # of one batch are worked on at a time, which bounds the memory of their short lists


@dataclass
class Hit:
    """One result: `row` in the store (None for a database), its `id`, `score` (larger is better) and metadata."""

    row: int | None
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
        """Whether the first hit is confident enough to be called a match (without a calibration: there is a hit)."""
        return bool(self) and (self.confidence is None or self.confidence >= self.threshold)


class LatentIndex:
    """
    What can be found in one store in one direction.

    Args:
        model: an [`AltMoEModel`] with the direction.
        store: latents of the direction's target, under the model's protocol.
        direction: e.g. `"text->image"`.
        backend: a [`Backend`], or what `open_index` takes for one in this process: `"auto"`, `"exact"`, a FAISS factory string.
        short_list: items a query that a database gives to be ranked again; default: the larger of 10 k and 400.
        rebuild: make an index in memory where those that are kept beside the store do not fit.
        recall: of the ten best, to be reached by an approximate index that is made.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is of another modality or protocol (naming the fields that differ), or empty; the index that
            is kept beside it is stale, of another model, or damaged.
    """

    def __init__(
        self,
        model: AltMoEModel,
        store: LatentStore,
        direction: str,
        backend: Backend | str = "auto",
        short_list: int | None = None,
        rebuild: bool = False,
        recall: float = 0.99,
    ):
        self.sources, target = model.config.resolve(direction)
        store.check(target, model.config.encoders[target])
        self.model, self.store, self.direction, self.short_list = model, store, direction, short_list
        self.post, self.calibration = model.postprocessing(direction), model.calibration(direction)
        self.backend = (
            open_local(model, store, direction, backend, rebuild, recall) if isinstance(backend, str) else backend
        )

    def __len__(self) -> int:
        return len(self.backend)

    def describe(self) -> str:
        """What kind of index this is, in a few words."""
        return self.backend.describe()

    @torch.no_grad()
    def search(
        self, latents: dict[str, torch.Tensor] | torch.Tensor, k: int = 10, where: dict[str, Any] | None = None
    ) -> list[Hits]:
        """The `k` best items for each query.

        Args:
            latents: source latents `{modality: (n, latent_size)}`, or the tensor alone for one source.
            k: results a query.
            where: conditions on the store's columns, `{column: value | [values] | {"ge"|"gt"|"le"|"lt"|"ne": value}}`.

        Returns:
            For each query its hits, best first, with the confidence that the first one is a match.

        Raises:
            ValueError: wrong width or NaN in the latents, k below 1, or a condition that does not fit the columns.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        where = check_where(where, self.store.columns)
        if isinstance(latents, torch.Tensor):
            latents = {self.sources[0]: latents}
        device = self.model.device
        latents = {modality: tensor.to(device) for modality, tensor in latents.items()}
        queries = query_vectors(self.model, self.post, self.direction, latents).float()
        return [hits for part in queries.split(QUERIES) for hits in self._search(part, k, where)]

    def _search(self, queries: torch.Tensor, k: int, where: dict | None) -> list[Hits]:
        wanted = max(k, SHORT_LIST if self.calibration else 1)
        if getattr(self.backend, "whole", False):
            found = self.backend.nearest(queries.cpu().numpy(), wanted, where)
            places, scores = found.places, found.scores
        else:
            coarse = F.normalize(queries[:, : self.store.latent_size], dim=-1)
            found = self.backend.nearest(coarse.cpu().numpy(), max(self.short_list or max(10 * k, 400), wanted), where)
            places, scores = self._rank_again(queries, found)
        rows = [None] * len(found.ids) if found.rows is None else found.rows.tolist()
        size, results = len(self) if found.candidates is None else found.candidates, []
        for best, values in zip(places[:, :wanted].tolist(), scores[:, :wanted].tolist(), strict=True):
            if -1 in best:  # fewer were found
                best = best[: best.index(-1)]
            hits = Hits(
                Hit(rows[place], found.ids[place], score, found.columns(place))
                for place, score in zip(best[:k], values, strict=False)
            )
            if self.calibration:
                hits.confidence = self.calibration.sure(values[: len(best)], size) if best else 0.0
                hits.threshold = self.calibration.threshold
            results.append(hits)
        return results

    def _rank_again(self, queries: torch.Tensor, found: ShortList) -> tuple[np.ndarray, np.ndarray]:
        """The short list by the whole score: places and scores `(queries, k)`, best first."""
        places = torch.from_numpy(found.places)
        if not len(found.ids):
            return found.places, np.full(places.shape, -np.inf, dtype=np.float32)
        device = queries.device
        hubness = None if found.hubness is None else found.hubness.to(device)
        items = item_vectors(self.model, self.post, self.direction, found.latents.to(device), hubness)
        some = places.clamp(min=0).to(device)  # a query at a time, which needs little memory
        scores = torch.stack([items[of] @ query for of, query in zip(some, queries, strict=True)]).cpu()  # (queries, k)
        scores, order = scores.masked_fill(places < 0, -torch.inf).sort(dim=1, descending=True, stable=True)
        return places.gather(1, order).numpy(), scores.numpy()


def open_store(name: str) -> LatentStore:
    """Open a LatentStore by its folder or its name on the Hub.

    Raises:
        OSError: it is neither here nor there; the message says how to make one.
        ValueError: it is not a store, or a damaged one.
    """
    return (
        LatentStore.open(name)
        if is_folder(name, "a LatentStore ('altmoe encode' makes one)", "dataset")
        else LatentStore.from_hub(name)
    )


def open_index(
    model: AltMoEModel, store: LatentStore | None, direction: str, index: str = "auto", **options
) -> LatentIndex:
    """What can be found in a store, by the name of an index.

    Args:
        model: an [`AltMoEModel`] with the direction.
        store: latents of the direction's target, under the model's protocol; None where a database holds everything.
        direction: e.g. `"text->image"`.
        index: `"auto"` (exact for a small store, approximate for a large one), `"exact"`, a FAISS factory string, or the
            address of a database: `milvus://...`, `postgresql://...`.
        options: as in `LatentIndex`.

    Raises:
        ImportError: what the index needs is not installed.
        ValueError: the store is of another modality or protocol, or empty; an unknown index.
    """
    if "://" in index:
        try:  # by name: the service's code does not travel with a checkpoint
            databases = importlib.import_module("serving.databases")
        except ImportError as error:
            scheme = index.partition("://")[0]  # what follows may hold a password
            raise ImportError(f"{scheme}:// is a database, which needs the altmoe package installed.") from error
        backend = databases.open_database(model, store, direction, index)
        return LatentIndex(model, backend.description if store is None else store, direction, backend, **options)
    return LatentIndex(model, store, direction, index, **options)


__all__ = ["Backend", "Hit", "Hits", "LatentIndex", "ShortList", "open_index", "parse_where"]

"""The pipeline `cross-modal-retrieval`: rank items of one modality for queries of another.

Comes in: queries and candidates as raw items (captions, pictures, sounds), or candidates as a LatentStore. Goes out: for
each query its best candidates as plain dictionaries. Scores are those of `AltMoEModel.score`.
"""

import os
from collections.abc import Sequence, Sized

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .confidence_altmoe import SHORT_LIST
from .processing_altmoe import ItemError
from .scoring_altmoe import item_vectors, query_vectors

TASK = "cross-modal-retrieval"
BATCH_SIZE = 16  # candidates encoded at a time where no batch_size is given


def _label(item) -> dict:
    """What a result says of a raw item besides its place: a caption or a file name; nothing for what has no name."""
    if isinstance(item, dict):
        item = item.get("path")
    return {"item": os.fspath(item)} if isinstance(item, (str, os.PathLike)) else {}


def _judged(results: list[dict], confidence: float | None, threshold: float | None) -> list[dict]:
    """The first result says how sure the model is of it, where the model was calibrated."""
    if confidence is not None and results:
        results[0].update(confidence=float(confidence), found=bool(confidence >= threshold))
    return results


class Candidates:
    """Items of one modality, encoded once and ranked for any number of queries.

    Args:
        model: the [`AltMoEModel`] that encoded them.
        modality: e.g. `"image"`.
        latents: `(n, latent_size)`.
        labels: what a result says of each item.
    """

    def __init__(self, model, modality: str, latents: torch.Tensor, labels: list[dict]):
        self.model, self.modality, self.latents, self.labels = model, modality, latents, labels
        self._vectors: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.latents)

    def rank(self, direction: str, latents: dict[str, torch.Tensor], top_k: int) -> list[list[dict]]:
        """The best candidates for each query, best first (the earlier of equal ones first).

        Args:
            latents: source latents `{modality: (queries, latent_size)}`.
        """
        post, calibration = self.model.postprocessing(direction), self.model.calibration(direction)
        if direction not in self._vectors:
            self._vectors[direction] = item_vectors(self.model, post, direction, self.latents)
        scores = query_vectors(self.model, post, direction, latents) @ self._vectors[direction].T
        scores, places = (tensor.cpu() for tensor in scores.sort(dim=1, descending=True, stable=True))
        sure = (
            calibration.confidence(scores[:, :SHORT_LIST], len(self)).tolist() if calibration else [None] * len(scores)
        )
        rankings = []
        for row, found, confidence in zip(scores.tolist(), places.tolist(), sure, strict=True):
            best = [
                {"score": score, "index": place, "modality": self.modality, **self.labels[place]}
                for score, place in zip(row[:top_k], found[:top_k], strict=True)
            ]
            rankings.append(_judged(best, confidence, calibration and calibration.threshold))
        return rankings


class StoredCandidates:
    """A LatentStore as candidates: an index a direction, the one kept beside it or one made when it is first asked for.

    Args:
        model: an [`AltMoEModel`].
        store: a `LatentStore`.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the store is of another modality or protocol, or empty; a kept index does not fit.
    """

    def __init__(self, model, store):
        self.model, self.store, self.modality = model, store, store.modality
        self._indexes = {}

    def __len__(self) -> int:
        return len(self.store)

    def rank(self, direction: str, latents: dict[str, torch.Tensor], top_k: int) -> list[list[dict]]:
        """As [`Candidates.rank`], with `id` and `columns` of the store in place of `item`."""
        from .search_altmoe import LatentIndex

        if direction not in self._indexes:
            self._indexes[direction] = LatentIndex(self.model, self.store, direction)
        rankings = []
        for hits in self._indexes[direction].search(latents, top_k):
            best = [
                {"score": hit.score, "index": hit.row, "modality": self.modality, "id": hit.id, "columns": hit.columns}
                for hit in hits
            ]
            rankings.append(_judged(best, hits.confidence, hits.threshold))
        return rankings


class CrossModalRetrievalPipeline(Pipeline):
    """
    Rank candidates of one modality for queries of another, with an [`AltMoEModel`] and its [`AltMoEProcessor`].

    Example:

    ```python
    pipe = pipeline("cross-modal-retrieval", model=repo, trust_remote_code=True)
    pipe("a green frog", candidates={"image": ["frog.png", "dog.png"]}, top_k=1)
    # [{"score": 3.1, "index": 0, "modality": "image", "item": "frog.png"}]
    pipe([{"image": "frog.png"}, {"image": "dog.png"}], candidates=["a frog", "a dog"], batch_size=2)
    pipe("a green frog", candidates="stores/image")                            # a LatentStore: folder, Hub name or object
    kept = pipe.encode_candidates({"image": pictures}); pipe("a dog", candidates=kept)    # encoded once for all calls
    ```

    A query is `{modality: item}` (several modalities for a direction that fuses them), or the item alone where its type
    tells the modality: a string is text, a PIL image an image, `{"array", "sampling_rate"}` or a one-dimensional array
    a sound. Candidates are `{modality: list of items}`, a list of items whose types tell, a LatentStore (or its folder, or
    its name on the Hub), or what `encode_candidates` returned. Candidates given to `pipeline(...)` itself serve every call.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, model, processor=None, **kwargs):
        if processor is None:
            raise ValueError(f"{TASK} needs a processor: pass processor=AltMoEProcessor.from_pretrained(...).")
        super().__init__(model=model, processor=processor, **kwargs)

    def __call__(self, inputs, candidates=None, batch_size: int | None = None, **kwargs):
        """Rank.

        Args:
            inputs: one query or a list of them (also a `Dataset` or a generator, which are streamed).
            candidates: what is ranked; default: what the pipeline was made with.
            batch_size: queries, and candidates, encoded at a time.
            top_k: results a query (default: 5; None: all).

        Returns:
            For one query a list of dictionaries, best first: `score` (larger is better), `index` among the candidates,
            `modality`, then `item` (caption or file name) for raw items, `id` and `columns` for a store. The first has
            `confidence` (that it is a true match) and `found` where the direction was calibrated. For a list of
            queries, a list of such lists.

        Raises:
            ValueError: no candidates, a direction the model does not have, a bad item, a modality that must be named.
            FileNotFoundError: there is no LatentStore in that folder.
            ImportError: a store is given, and faiss or datasets is not installed.
        """
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        if candidates is not None:
            kwargs["candidates"] = self.encode_candidates(candidates, batch_size)
        elif "candidates" not in self._forward_params:
            raise ValueError('Nothing to rank: pass candidates, e.g. candidates={"image": ["a.png", "b.png"]}.')
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, batch_size=batch_size, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save model, code and processor, as their own `save_pretrained` do (transformers' leaves the processor out)."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, candidates=None, **kwargs):
        forward = {}
        if candidates is not None:
            forward["candidates"] = self.encode_candidates(candidates)
        if "top_k" in kwargs:
            top_k = kwargs.pop("top_k")
            if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
                raise ValueError(f"top_k={top_k!r}: expected at least 1, or None for all candidates.")
            forward["top_k"] = top_k
        if kwargs:
            raise ValueError(f"Unknown arguments {sorted(kwargs)}. Known: candidates, top_k, batch_size, num_workers.")
        return {}, forward, {}

    # ---------------------------------------------------------------- modalities

    def _of_kind(self, kind: str, item) -> str:
        found = [m for m in self.processor.processors if self.processor.kind(m) == kind]
        if len(found) != 1:
            raise ValueError(
                f"A {type(item).__name__} is taken for {kind}, and the model has {', '.join(found) or 'none'} of that kind: "
                "name the modality, {modality: item}. " + f"Modalities: {', '.join(self.processor.processors)}."
            )
        return found[0]

    def modality_of(self, item) -> str:
        """The modality of an item whose type tells it.

        Raises:
            ValueError: it does not, or the model has several modalities (or none) of that kind.
        """
        if isinstance(item, str):
            return self._of_kind("text", item)
        if isinstance(item, Image.Image):
            return self._of_kind("image", item)
        if (isinstance(item, dict) and "array" in item) or (isinstance(item, np.ndarray) and item.ndim == 1):
            return self._of_kind("audio", item)
        raise ValueError(
            f"The modality of a {type(item).__name__} cannot be told: name it, {{modality: item}}. "
            f"Modalities: {', '.join(self.processor.processors)}."
        )

    def _named(self, query) -> dict:
        named = isinstance(query, dict) and query and set(query) <= set(self.processor.processors)
        return dict(query) if named else {self.modality_of(query): query}

    def direction(self, sources, target: str) -> str:
        """The model's direction from these source modalities to the target.

        Raises:
            ValueError: it has none; the message lists those it has.
        """
        for direction in self.model.directions:
            found, to = self.model.config.resolve(direction)
            if set(found) == set(sources) and to == target:
                return direction
        raise ValueError(
            f"This model cannot rank {target} for {'+'.join(sources)}. Known directions: {', '.join(self.model.directions)}."
        )

    # ---------------------------------------------------------------- latents

    def _read(self, modality: str, item, what: str):
        try:
            return self.processor.read(modality, item)
        except ItemError as error:
            raise ItemError(f"{what} ({modality}): {error}.") from error

    def _latents(self, modality: str, items: list, adapted: bool) -> torch.Tensor:
        inputs = self.processor.batch(modality, items)
        return self.model.encode(modality, self._ensure_tensor_on_device(inputs, self.device), adapted=adapted)

    @torch.no_grad()
    def encode_candidates(self, candidates, batch_size: int | None = None) -> Candidates | StoredCandidates:
        """Encode candidates once, for use in any number of calls.

        Args:
            candidates: `{modality: list of items}`, a list of items whose types tell, a LatentStore, its folder or its
                name on the Hub.
            batch_size: items encoded at a time.

        Raises:
            ValueError: as in `__call__`; a bad item is named by its position.
        """
        if isinstance(candidates, (Candidates, StoredCandidates)):
            if candidates.model is not self.model:
                raise ValueError("These candidates were encoded with another pipeline's model: encode them again.")
            return candidates
        if isinstance(candidates, (str, os.PathLike)):
            from .search_altmoe import open_store

            candidates = open_store(candidates)
        if hasattr(candidates, "take") and hasattr(candidates, "protocol"):  # by remote code its class is another one
            self.model.config.latent_size(candidates.modality)
            candidates.check(candidates.modality, self.model.config.encoders[candidates.modality])
            return StoredCandidates(self.model, candidates)
        if isinstance(candidates, dict):
            if len(candidates) != 1:
                raise ValueError(
                    f"Candidates of {sorted(candidates) or 'no modality'}: give one modality a call, because scores of "
                    "different directions cannot be compared."
                )
            ((modality, items),) = candidates.items()
            self.processor.kind(modality)
        else:
            items, modality = candidates, None
        if isinstance(items, str) or not isinstance(items, Sequence) or not len(items):
            given = (
                "an empty one" if isinstance(items, Sequence) and not isinstance(items, str) else type(items).__name__
            )
            raise ValueError(
                f"Candidates: expected a list of items, {{modality: list of items}} or a LatentStore, got {given}."
            )
        modality = modality or self.modality_of(items[0])
        size = batch_size or self._batch_size or BATCH_SIZE
        latents, labels = [], []
        for start in range(0, len(items), size):
            some = [items[place] for place in range(start, min(start + size, len(items)))]
            read = [self._read(modality, item, f"candidate {start + place}") for place, item in enumerate(some)]
            latents.append(self._latents(modality, read, adapted=False))
            labels += [_label(item) for item in some]
        return Candidates(self.model, modality, torch.cat(latents), labels)

    # ---------------------------------------------------------------- the pipeline's steps

    def preprocess(self, query):
        """One query -> its checked items, `{modality: item}`."""
        return {modality: self._read(modality, item, "query") for modality, item in self._named(query).items()}

    def _forward(self, queries: list[dict], candidates, top_k: int | None = 5) -> list[list[dict]]:
        """Checked queries -> their rankings; queries of the same modalities are encoded together."""
        groups: dict[str, list[int]] = {}
        for place, items in enumerate(queries):
            groups.setdefault(self.direction(items, candidates.modality), []).append(place)
        rankings: list[list[dict]] = [[]] * len(queries)
        for direction, places in groups.items():
            sources, _ = self.model.config.resolve(direction)
            latents = {m: self._latents(m, [queries[place][m] for place in places], adapted=True) for m in sources}
            ranked = candidates.rank(direction, latents, len(candidates) if top_k is None else top_k)
            for place, ranking in zip(places, ranked, strict=True):
                rankings[place] = ranking
        return rankings

    def postprocess(self, ranking: list[dict]) -> list[dict]:
        """Rankings are plain already."""
        return ranking

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """As transformers' own, but a batch stays a list: its queries may be of different modalities."""
        kind = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        dataset = kind(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        for queries in loader:
            for ranking in self.forward(queries, **forward_params):
                yield self.postprocess(ranking, **postprocess_params)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        """One query."""
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

"""What the service does, without HTTP: a batch of queries in, an answer or an error for each out.

Comes in: texts, uploaded bytes of pictures and sounds, latents. Goes out: hits with confidence, and seconds a stage. What
came in is never taken for a file name or a URL. Nothing here may be called from two threads at once but `prepare`.
"""

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from model_cards.endpoint import handler
from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.search_altmoe import Hits, LatentIndex, open_index, open_store
from modeling_altmoe.where_altmoe import check_where

STAGES = ("encode", "connector", "search")
# sorted by length, texts are encoded together while the longest has at most this many times the letters of the shortest
SPREAD = 3
# so many texts are worth one picture or sound on a CPU: with more than a few in one call, activations leave the cache
# (EfficientNet-Lite0: 40 ms a picture with 4, 88 ms with 32), and all would wait for the last
ON_CPU = 8


@dataclass
class Query:
    """One query, checked: nothing that it asks for can fail for another reason than the machine.

    Attributes:
        direction: e.g. `"text->image"`.
        sources: `{modality: text, prepared tensors with a batch of one, or a latent (latent_size,)}`.
        k: results.
        where: checked conditions.
    """

    direction: str
    sources: dict[str, Any]
    k: int = 10
    where: dict[str, Any] | None = None


@dataclass
class Answer:
    """The hits of one query, seconds of each stage of the batch that it was in, and that batch's size."""

    direction: str
    hits: Hits
    seconds: dict[str, float]
    batch: int


class Engine:
    """
    Everything that is loaded once.

    Args:
        model: folder or Hub name of a trained model.
        stores: `{modality: folder, Hub name or a database's address}` of what can be found.
        index: as `open_index` takes it, for every store.
        device: `"cpu"`, `"cuda"`, ...; default: a GPU where there is one.

    Raises:
        ValueError: no stores, a store of another protocol or an empty one, or no direction that leads to a store.
        OSError: something is not there.
        ImportError: what the index needs is not installed.
    """

    def __init__(self, model: str, stores: dict[str, str], index: str = "auto", device: str | None = None):
        if not stores:
            raise ValueError("No store to search: give --store MODALITY=STORE.")
        self.name = (
            os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
        )  # no path of this machine
        self.model = AltMoEModel.from_pretrained(model).eval()
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = AltMoEProcessor.from_pretrained(model, trust_remote_code=True)
        self.indexes: dict[str, LatentIndex] = {}
        for modality, name in stores.items():
            self.model.config.latent_size(modality)
            store, where = None, name  # a database, which holds everything
            if "://" not in name:
                store, where = open_store(name), index
            for direction in self.model.directions:
                if self.model.config.resolve(direction)[1] == modality:
                    self.indexes[direction] = open_index(self.model, store, direction, where)
        if not self.indexes:
            raise ValueError(f"No direction of {self.model.directions} leads to one of {', '.join(stores)}.")
        # a modality without an encoder or a processor can be asked with latents only
        self.kinds = {m: self.processor.kind(m) for m in self.processor.processors if m in self.model.encoders}
        self.texts = [m for m in self.sources() if self.kinds.get(m) == "text"]
        self._started, self._connector = 0.0, 0.0
        self.model.connector.register_forward_pre_hook(self._connector_starts)
        self.model.connector.register_forward_hook(self._connector_ends)

    def _connector_starts(self, *_) -> None:
        self._started = time.perf_counter()

    def _connector_ends(self, *_) -> None:
        self._connector += time.perf_counter() - self._started

    # ---------------------------------------------------------------- what can be asked

    def sources(self) -> list[str]:
        """Modalities that a query may consist of."""
        return list(dict.fromkeys(m for direction in self.indexes for m in self.model.config.resolve(direction)[0]))

    def about(self) -> dict:
        """What this service holds: directions, items, and for those who encode elsewhere widths and protocols."""
        latents = {
            modality: {
                "size": self.model.config.latent_size(modality),
                "protocol": self.model.protocol(modality).fingerprint,
                "takes": self.kinds.get(modality, "latents only"),
            }
            for modality in self.sources()
        }
        indexes = {
            direction: {"items": len(index), "columns": index.store.columns}
            for direction, index in self.indexes.items()
        }
        return {"model": self.name, "directions": indexes, "sources": latents}

    # ---------------------------------------------------------------- reading a query

    def kind(self, modality: str) -> str:
        """`"text"`, `"image"` or `"audio"`.

        Raises:
            ValueError: an unknown modality, or one that only latents are taken of.
        """
        if modality not in self.sources():
            raise ValueError(unknown_name_message("modality", modality, self.sources()))
        if modality not in self.kinds:
            raise ValueError(f"There is no encoder for '{modality}' here: send a latent of it.")
        return self.kinds[modality]

    def direction(self, sources: dict, target: str | None) -> str:
        """The direction from these modalities to the target; without a target the only one there is.

        Raises:
            ValueError: there is none, or several.
        """
        from_here = {
            self.model.config.resolve(direction)[1]: direction
            for direction in self.indexes
            if set(self.model.config.resolve(direction)[0]) == set(sources)
        }
        if target is None and len(from_here) == 1:
            return next(iter(from_here.values()))
        if target is None and from_here:
            raise ValueError(f"Name the target: {', '.join(from_here)}.")
        if target not in from_here:
            wanted = f"{'+'.join(sorted(sources))}->{target or '...'}"
            raise ValueError(f"Cannot search {wanted}. Known: {', '.join(self.indexes)}.")
        return from_here[target]

    def prepare(self, modality: str, data: bytes) -> dict[str, torch.Tensor]:
        """Bytes of a picture or sound -> the encoder's tensors, a batch of one. Decoding and resizing happen here, so
        that many pictures are never held at full size; may run in several threads at once.

        Raises:
            handler.RequestError: not a picture or sound, or too large; its `status` says which.
            ValueError: a bad item, or a modality of another kind.
        """
        kind = self.kind(modality)
        if kind == "text":
            raise ValueError(f"'{modality}' is text: send it as a plain field.")
        if kind == "image":
            item = handler.read_image(data)
        else:
            item = handler.read_sound(data, self.processor.processors[modality].sampling_rate)
        tensors = self.processor.batch(modality, [self.processor.read(modality, item)])
        return {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}

    def latent(self, modality: str, numbers: list[float]) -> torch.Tensor:
        """A latent that was encoded elsewhere, checked: `(latent_size,)`.

        Raises:
            ValueError: an unknown modality, a wrong width, or a number that is not finite.
        """
        if modality not in self.sources():
            raise ValueError(unknown_name_message("modality", modality, self.sources()))
        size = self.model.config.latent_size(modality)
        if len(numbers) != size:
            raise ValueError(f"A latent of '{modality}' has {size} numbers, got {len(numbers)}.")
        array = np.asarray(numbers, dtype=np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"The latent of '{modality}' contains NaN or infinity (in 32 bits).")
        return torch.from_numpy(array)

    def query(self, sources: dict[str, Any], target: str | None, k: int, where: dict | None) -> Query:
        """Put a query together.

        Args:
            sources: as [`Query`] has them.

        Raises:
            ValueError: no such direction, or a condition that does not fit the store's columns.
        """
        direction = self.direction(sources, target)
        return Query(direction, sources, k, check_where(where, self.indexes[direction].store.columns))

    def weight(self, query: Query) -> int:
        """How much of a batch a query takes; a text takes 1."""
        uploaded = any(isinstance(item, dict) for item in query.sources.values())
        return ON_CPU if uploaded and self.model.device.type == "cpu" else 1

    # ---------------------------------------------------------------- answering

    def answer(self, queries: list[Query]) -> list[Answer | Exception]:
        """One answer, or what went wrong, for each query of a batch. One that fails does not harm the others: the batch
        is halved until it stands alone."""
        try:
            return self._answer(queries)
        except Exception as error:
            if len(queries) == 1 or isinstance(error, OSError):  # a database that cannot be reached: for all of them
                return [error] * len(queries)
            half = len(queries) // 2
            return self.answer(queries[:half]) + self.answer(queries[half:])

    @torch.inference_mode()
    def _answer(self, queries: list[Query]) -> list[Answer]:
        start, self._connector = time.perf_counter(), 0.0
        latents = self._encode(queries)
        encoded = time.perf_counter()
        found: list[Hits | None] = [None] * len(queries)
        # k and where belong to the group: an approximate index may answer a larger k otherwise
        keys = [(q.direction, q.k, json.dumps(q.where, sort_keys=True, default=str)) for q in queries]
        for places in _groups(keys).values():
            first = queries[places[0]]
            stacked = {m: torch.stack([latents[place, m] for place in places]) for m in first.sources}
            hits = self.indexes[first.direction].search(stacked, first.k, first.where)
            for place, own in zip(places, hits, strict=True):
                found[place] = own
        search = time.perf_counter() - encoded - self._connector
        seconds = dict(zip(STAGES, (encoded - start, self._connector, search), strict=True))
        return [Answer(q.direction, hits, seconds, len(queries)) for q, hits in zip(queries, found, strict=True)]

    def _encode(self, queries: list[Query]) -> dict[tuple[int, str], torch.Tensor]:
        """Latents `(latent_size,)` of every source by query and modality: one encoder call a modality for all that may
        share one."""
        latents, waiting = {}, {}
        for place, query in enumerate(queries):
            for modality, item in query.sources.items():
                if isinstance(item, torch.Tensor):
                    latents[place, modality] = item.to(self.model.device)
                else:
                    waiting.setdefault(modality, []).append((place, item))
        for modality, given in waiting.items():
            for group in _together(given):
                items = [item for _, item in group]
                if isinstance(items[0], str):
                    tensors = self.processor.batch(modality, items)
                else:
                    tensors = {name: torch.cat([item[name] for item in items]) for name in items[0]}
                tensors = {name: _laid_out(tensor.to(self.model.device)) for name, tensor in tensors.items()}
                encoded = self.model.encode(modality, tensors, adapted=True)
                latents.update({(place, modality): row for (place, _), row in zip(group, encoded, strict=True)})
        return latents

    def warm_up(self) -> None:
        """Encode and search once with each modality, so that no client waits for what is made at first use.

        Raises:
            Exception: what a query would have failed with.
        """
        examples = {"text": "a", "image": Image.new("RGB", (64, 64), "gray"), "audio": np.zeros(16_000, np.float32)}
        for direction in self.indexes:
            sources = {}
            for modality in self.model.config.resolve(direction)[0]:
                kind = self.kinds.get(modality)
                if kind is None:
                    sources[modality] = torch.ones(self.model.config.latent_size(modality))
                    continue
                sources[modality] = self.processor.read(modality, examples[kind])
                if kind != "text":
                    sources[modality] = dict(self.processor.batch(modality, [sources[modality]]))
            self._answer([Query(direction, sources)])


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """Pictures channels last, which convolutions take a fifth less time for, and no other encoder minds."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _groups(keys) -> dict[Any, list[int]]:
    """Places by key, in order."""
    groups: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return groups


def _together(given: list[tuple[int, Any]]) -> list[list[tuple[int, Any]]]:
    """Items that one encoder call takes: tensors of equal shapes, or texts of similar length (a short one would be padded
    to the longest)."""
    if not isinstance(given[0][1], str):
        shapes = [tuple((name, tuple(tensor.shape)) for name, tensor in item.items()) for _, item in given]
        return [[given[place] for place in places] for places in _groups(shapes).values()]
    groups: list[list[tuple[int, Any]]] = []
    for place, text in sorted(given, key=lambda pair: len(pair[1])):
        if not groups or len(text) > SPREAD * max(len(groups[-1][0][1]), 32):
            groups.append([])
        groups[-1].append((place, text))
    return groups

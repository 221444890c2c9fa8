"""What the Space does, without its page: open everything once, then answer one query at a time.

Comes in: a model, stores by modality, a data set whose `id` column matches the stores' ids. Goes out: hits with captions
and pictures, how sure the model is, milliseconds a stage, and which experts each gate chose.
"""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.search_altmoe import LatentIndex, open_store

try:
    from handler import read_image, read_sound  # in a Space: the endpoint's file lies beside this one
except ImportError:
    from model_cards.endpoint.handler import read_image, read_sound

MAX_CHARACTERS = 500  # of a typed query
MAX_BYTES = 10_000_000  # of an uploaded file
THUMBNAIL = 320  # pixels


@dataclass
class Found:
    """One result: `picture` is None where the data set has none for its id."""

    id: str
    score: float
    caption: str
    picture: Image.Image | None


@dataclass
class Answer:
    """What one query brought.

    Attributes:
        direction: e.g. `"text->image"`.
        found: best first.
        confidence, threshold: None where the model is not calibrated.
        sure: whether the first result is confident enough to be called a match.
        milliseconds: `{"encode", "connector", "search"}`.
        gates: `{gate: [weight of each expert]}`; an expert that was not chosen has 0.
        trust: how far the experts' correction counts in this direction, from 0 to 1.
    """

    direction: str
    found: list[Found]
    confidence: float | None
    threshold: float | None
    sure: bool
    milliseconds: dict[str, float]
    gates: dict[str, list[float]]
    trust: float


def open_pictures(name: str) -> Dataset:
    """The data set beside the stores: a saved folder or a Hub name; of several splits the first."""
    data = load_from_disk(name) if os.path.isdir(name) else load_dataset(name)
    return next(iter(data.values())) if isinstance(data, DatasetDict) else data


class Engine:
    """
    Everything that is loaded once.

    Args:
        model: folder or Hub name of a trained model with its encoders.
        stores: `{modality: folder or Hub name}` of what can be found.
        data: data set with columns `id`, a picture, `caption`; None shows the stores' own columns only.
        caption_column: where captions are.

    Raises:
        ValueError: no stores, a store of another protocol, or no direction that leads to a store.
        OSError: something is not there.
    """

    def __init__(self, model: str, stores: dict[str, str], data: str | None = None, caption_column: str = "caption"):
        if not stores:
            raise ValueError("No store to search: give --store MODALITY=NAME.")
        self.name, self.caption_column = model, caption_column
        self.model = AltMoEModel.from_pretrained(model).eval()
        self.processor = AltMoEProcessor.from_pretrained(model, trust_remote_code=True)
        self.indices: dict[str, LatentIndex] = {}
        for modality, name in stores.items():
            store = open_store(name)
            for direction in self.model.directions:
                sources, target = self.model.config.resolve(direction)
                if target == modality and len(sources) == 1 and sources[0] in self.processor.processors:
                    self.indices[direction] = LatentIndex(self.model, store, direction)
        if not self.indices:
            raise ValueError(f"No direction of {self.model.directions} leads to one of {', '.join(stores)}.")
        self.data = open_pictures(data) if data else None
        self.picture_column = None
        if self.data is not None:
            columns = self.data.features.items()
            self.picture_column = next((name for name, kind in columns if isinstance(kind, ImageFeature)), None)
            self._row = {str(name): row for row, name in enumerate(self.data["id"])}
        self._lock = threading.Lock()

    def kinds(self) -> dict[str, str]:
        """`{modality: "text", "image" or "audio"}` of what can be asked with."""
        sources = [direction.partition("->")[0] for direction in self.indices]
        return {modality: self.processor.kind(modality) for modality in dict.fromkeys(sources)}

    def targets(self, modality: str) -> list[str]:
        """Modalities that a query of this one can find."""
        return [d.partition("->")[2] for d in self.indices if d.partition("->")[0] == modality]

    def sizes(self) -> dict[str, int]:
        """`{modality: number of items that can be found}`."""
        return {direction.partition("->")[2]: len(index) for direction, index in self.indices.items()}

    def read(self, modality: str, query: str):
        """A typed text, or the file name of an upload, which is read as a picture or sound and nothing else.

        Raises:
            ValueError: empty, too long, too large or unreadable.
        """
        kind = self.processor.kind(modality)
        if not query or not query.strip():
            raise ValueError(
                {"text": "Type a few words first.", "image": "Choose a picture first."}.get(kind, "No sound.")
            )
        if kind == "text":
            if len(query) > MAX_CHARACTERS:
                raise ValueError(f"The text has {len(query)} characters, at most {MAX_CHARACTERS} are taken.")
            return self.processor.read(modality, query.strip())
        path = Path(query)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
        content = path.read_bytes()
        if kind == "image":
            return self.processor.read(modality, read_image(content))
        return self.processor.read(modality, read_sound(content, self.processor.processors[modality].sampling_rate))

    @torch.inference_mode()
    def search(self, modality: str, query: str, target: str, k: int = 12) -> Answer:
        """The `k` best items of the target's store for one query.

        Raises:
            ValueError: a bad query, or no such direction.
        """
        direction = f"{modality}->{target}"
        if direction not in self.indices:
            raise ValueError(f"Cannot search {direction}. Known: {', '.join(self.indices)}.")
        item, index = self.read(modality, query), self.indices[direction]
        with self._lock:
            start = time.perf_counter()
            latents = self.model.encode(modality, self.processor.batch(modality, [item]), adapted=True)
            encoded = time.perf_counter()
            seen = {}
            hooks = [
                self.model.connector.register_forward_pre_hook(lambda *_: seen.update(start=time.perf_counter())),
                self.model.connector.register_forward_hook(
                    lambda module, given, output: seen.update(output=output, end=time.perf_counter())
                ),
            ]
            try:  # copies of one caption or picture are shown once, so more are asked for
                hits = index.search(latents, 3 * k)[0]
            finally:
                for hook in hooks:
                    hook.remove()
            end = time.perf_counter()
        connector = seen["end"] - seen["start"]
        times = {"encode": encoded - start, "connector": connector, "search": end - encoded - connector}
        return Answer(
            direction=direction,
            found=self._show(hits, k),
            confidence=hits.confidence,
            threshold=hits.threshold,
            sure=hits.found,
            milliseconds={name: 1000 * seconds for name, seconds in times.items()},
            gates=self._gates(seen["output"]),
            trust=float(self.model.connector.trust[self.model.directions.index(direction)]),
        )

    def _gates(self, output) -> dict[str, list[float]]:
        """Router outputs `(1, gates, k)` -> weights of all experts, by gate."""
        dense = torch.zeros(output.router_logits.shape[1:])  # (gates, experts)
        dense.scatter_(1, output.router_indices[0].cpu(), output.router_weights[0].float().cpu())
        names = ["contrastive gate", "regression gate"] if len(dense) > 1 else ["the one gate"]
        return dict(zip(names, dense.tolist(), strict=False))

    def _show(self, hits, k: int) -> list[Found]:
        found = {}
        for hit in hits:
            row = self._row.get(hit.id) if self.data is not None else None
            item = self.data[row] if row is not None else {}
            caption = str(item.get(self.caption_column) or hit.columns.get(self.caption_column) or hit.id)
            picture = item.get(self.picture_column) if self.picture_column else None
            if picture is not None:
                picture = picture.convert("RGBA")
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
            one = Found(hit.id, hit.score, caption, picture)
            # two items with one score and one caption are copies
            found.setdefault((caption, round(hit.score, 4)), one)
        return list(found.values())[:k]

    def examples(self, count: int = 6) -> list[tuple[str, Image.Image | None]]:
        """Captions and pictures, spread evenly over the data set."""
        if self.data is None:
            return []
        rows = [len(self.data) * (2 * i + 1) // (2 * count) for i in range(min(count, len(self.data)))]
        items = [self.data[row] for row in dict.fromkeys(rows)]
        picture = self.picture_column
        return [(str(item.get(self.caption_column, "")), item[picture] if picture else None) for item in items]

"""AltMoEProcessor: raw items of any modality in, the encoders' input tensors out, behind one call.

Comes in: captions, images (PIL, file, array), sounds. Goes out: one `BatchFeature` whose names `AltMoEModel` sorts by
modality. Every item is checked first; a bad one gets an error that says which item, what was wrong and what to do.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from .configuration_altmoe import check_modality, unknown_name_message
from .encoding_altmoe import join_items
from .sharing_altmoe import upload_saved

CONFIG_NAME = "processor_config.json"
LOADERS = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}
PLURALS = {"images": "image", "texts": "text", "audios": "audio"}


class ItemError(ValueError):
    """One raw item that cannot be used; the message says why and what to do."""


def kind_of(processor) -> str:
    """`"text"` for tokenizers, `"image"` for image processors, `"audio"` for feature extractors."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return "text"
    return "image" if isinstance(processor, ImageProcessingMixin) else "audio"


def read_text(item, prompt: str = "") -> str:
    """A checked caption, with the prompt in front.

    Raises:
        ItemError: not a string, or nothing but white space.
    """
    if not isinstance(item, str):
        raise ItemError(f"expected a string, got {type(item).__name__}")
    if not item.strip():
        raise ItemError("empty caption: give it some text or leave the item out")
    return prompt + item


def read_image(item) -> Image.Image:
    """A checked RGB image; transparency is laid on white.

    Args:
        item: a PIL image, a file name, bytes of an image file, `{"bytes", "path"}` as in `datasets`, or an array
            `(height, width, 3)`.

    Raises:
        ItemError: missing, zero-byte, unreadable or zero-size image.
    """
    name = "image"
    try:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, (str, os.PathLike)):
            name = f"'{item}'"
            if not os.path.isfile(item):
                raise ItemError(f"no image file {name}: check the path")
            if os.path.getsize(item) == 0:
                raise ItemError(f"image file {name} has zero bytes: restore it or leave it out")
            item = Image.open(item)
        elif isinstance(item, (bytes, bytearray)):
            import io

            if not item:
                raise ItemError("image of zero bytes: restore it or leave it out")
            item = Image.open(io.BytesIO(item))
        elif isinstance(item, np.ndarray):
            item = Image.fromarray(item)
        if not isinstance(item, Image.Image):
            raise ItemError(f"expected an image or the name of an image file, got {type(item).__name__}")
        item.load()
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ItemError(f"{name} cannot be read as an image ({error}): convert it to PNG or JPEG") from error
    if min(item.size) == 0:
        raise ItemError(f"{name} has size {item.size}")
    if item.mode in ("RGBA", "LA", "PA") or "transparency" in item.info:
        item = item.convert("RGBA")
        white = Image.new("RGBA", item.size, (255, 255, 255, 255))
        item = Image.alpha_composite(white, item)
    return item.convert("RGB")


def read_audio(item, sampling_rate: int) -> np.ndarray:
    """A checked mono signal `(samples,)` at the encoder's rate.

    Args:
        item: an array, `{"array", "sampling_rate"}` or `{"bytes", "path"}` as in `datasets`, or a file name (decoded by
            transformers' `load_audio`).
        sampling_rate: Hz that the encoder expects.

    Raises:
        ItemError: empty, not finite, of another rate, or unreadable.
    """
    if isinstance(item, dict) and "array" not in item:
        item = item.get("bytes") or item.get("path")
    if isinstance(item, (str, os.PathLike, bytes)):
        from transformers.audio_utils import load_audio

        name = "the sound" if isinstance(item, bytes) else f"'{item}'"
        encoded = base64.b64encode(item).decode() if isinstance(item, bytes) else str(item)
        try:
            item = load_audio(encoded, sampling_rate=sampling_rate)
        except Exception as error:  # decoders differ in what they raise
            raise ItemError(f"{name} cannot be read as sound ({error})") from error
    if isinstance(item, dict):
        if item.get("sampling_rate") != sampling_rate:
            raise ItemError(
                f"sampling rate {item.get('sampling_rate')} Hz, the encoder expects {sampling_rate} Hz: resample first, "
                f"e.g. with datasets.Audio(sampling_rate={sampling_rate})"
            )
        item = item["array"]
    signal = np.asarray(item, dtype=np.float32)
    if signal.ndim == 2:
        signal = signal.mean(0 if signal.shape[0] < signal.shape[1] else 1)
    if signal.size == 0 or not np.isfinite(signal).all():
        raise ItemError("empty sound" if signal.size == 0 else "sound contains NaN or infinity")
    return signal


class AltMoEProcessor(ProcessorMixin):
    """
    One processor a modality behind one call.

    Args:
        processors (`dict[str, Any]`): `{modality: tokenizer, image processor or feature extractor}`. Names as
            everywhere: lower-case letters, digits and underscores.
        prompts (`dict[str, str]`, *optional*): text put before every item of a text modality.

    Example:

    ```python
    inputs = processor(image=["cat.png"], text=["a cat", "a dog"])   # plural names work as well
    model(**inputs).logits_per_image                                  # (1, 2)
    ```
    """

    def __init__(self, processors: dict[str, Any] | None = None, prompts: dict[str, str] | None = None, **kwargs):
        self.processors = dict(sorted((processors or {}).items()))  # as the model and a saved processor have them
        self.prompts = dict(prompts or {})
        self.chat_template = None
        for modality in self.processors:
            check_modality(modality)  # it names a folder
        for modality in self.prompts:
            self.kind(modality)

    @classmethod
    def get_attributes(cls):
        return []

    @property
    def tokenizer(self):
        """The first tokenizer, as pipelines look for it."""
        return next((p for p in self.processors.values() if kind_of(p) == "text"), None)

    @property
    def image_processor(self):
        """The first image processor, as pipelines look for it."""
        return next((p for p in self.processors.values() if kind_of(p) == "image"), None)

    @property
    def feature_extractor(self):
        """The first feature extractor, as pipelines look for it."""
        return next((p for p in self.processors.values() if kind_of(p) == "audio"), None)

    @property
    def model_input_names(self) -> list[str]:
        return [name for modality, p in self.processors.items() for name in self._names(modality, p.model_input_names)]

    def kind(self, modality: str) -> str:
        """`"text"`, `"image"` or `"audio"`.

        Raises:
            ValueError: unknown modality.
        """
        if modality not in self.processors:
            raise ValueError(unknown_name_message("modality", modality, self.processors))
        return kind_of(self.processors[modality])

    def _names(self, modality: str, names) -> list[str]:
        first = next(m for m, p in self.processors.items() if kind_of(p) == self.kind(modality))
        # two tokenizers would give two `input_ids`; and audio's `attention_mask` must not be taken for the text's
        plain = first == modality and self.kind(modality) != "audio"
        return [name if plain else f"{modality}__{name}" for name in names]

    def read(self, modality: str, item):
        """Check and decode one raw item: caption -> string, image -> RGB, sound -> signal.

        Raises:
            ItemError: the item cannot be used.
            ValueError: unknown modality.
        """
        kind = self.kind(modality)
        if kind == "text":
            return read_text(item, self.prompts.get(modality, ""))
        if kind == "image":
            return read_image(item)
        return read_audio(item, self.processors[modality].sampling_rate)

    def batch(self, modality: str, items: list) -> dict[str, Any]:
        """Items that `read` returned -> the encoder's own input tensors, unprefixed.

        Sounds of different lengths get `item_lengths` beside them, so that each is encoded without its padding.
        """
        processor, kind = self.processors[modality], self.kind(modality)
        if kind == "text":
            return dict(processor(list(items), padding=True, truncation=True, return_tensors="pt"))
        if kind == "image":
            return dict(processor(list(items), return_tensors="pt"))
        rate = {"sampling_rate": processor.sampling_rate, "return_tensors": "pt"}
        return join_items([dict(processor(item, **rate)) for item in items])

    def __call__(self, images=None, text=None, audio=None, **modalities) -> BatchFeature:
        """Raw items -> input tensors of every modality given.

        Args:
            images, text, audio: items of the modalities of these names (`image=` works as well); one or a list.
            modalities: items of further modalities by name. `return_tensors` is accepted and always `"pt"`.

        Raises:
            ValueError: an unknown modality, nothing given, or bad items, each named by its position.
        """
        for common in ("return_tensors", "padding", "truncation"):
            modalities.pop(common, None)
        given = {"image": images, "text": text, "audio": audio}
        given = {name: items for name, items in given.items() if items is not None}
        given.update({PLURALS.get(name, name): items for name, items in modalities.items() if items is not None})
        if not given:
            raise ValueError(f"Nothing to process. Give one of: {', '.join(self.processors)}.")
        features: dict[str, Any] = {}
        for modality, items in given.items():
            self.kind(modality)
            items = list(items) if isinstance(items, (list, tuple)) else [items]
            if not items:
                raise ValueError(f"{modality}: the list is empty.")
            read, bad = [], []
            for position, item in enumerate(items):
                try:
                    read.append(self.read(modality, item))
                except ItemError as error:
                    bad.append(f"item {position}: {error}")
            if bad:
                more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
                raise ItemError(f"{modality}: {'; '.join(bad[:3])}{more}.")
            tensors = self.batch(modality, read)
            features.update(zip(self._names(modality, tensors), tensors.values(), strict=True))
        return BatchFeature(features)

    # ---------------------------------------------------------------- save and load

    def _folders(self) -> dict[str, str]:
        """Where each one is saved. Root for the first tokenizer and the first image processor, so that transformers'
        own pipelines find them; a folder for each of the others."""
        taken, folders = set(), {}
        for modality, processor in self.processors.items():
            kind = kind_of(processor)
            slot = "text" if kind == "text" else "preprocessor"
            at_root = slot not in taken and (kind != "audio" or self.image_processor is None)
            folders[modality] = "" if at_root else f"processor_{modality}"
            if at_root:
                taken.add(slot)
        return folders

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds: for each modality its kind, folder and prompt."""
        modalities = {
            modality: {"kind": self.kind(modality), "folder": folder, "prompt": self.prompts.get(modality, "")}
            for modality, folder in self._folders().items()
        }
        result = {"processor_class": type(self).__name__, "modalities": modalities}
        folder = next((entry["folder"] for entry in modalities.values() if entry["kind"] == "audio"), "")
        if folder:  # AutoFeatureExtractor looks here first, then at the root, where the image processor lies
            result["feature_extractor"] = self.feature_extractor.to_dict()
        if self._auto_class is not None:
            result["auto_map"] = {"AutoProcessor": f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"}
        return result

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save every processor, the code and `processor_config.json`."""
        os.makedirs(save_directory, exist_ok=True)
        before = self._get_files_timestamps(save_directory)
        if self._auto_class is not None:
            custom_object_save(self, save_directory)
        for modality, folder in self._folders().items():
            self.processors[modality].save_pretrained(os.path.join(save_directory, folder))
        path = Path(save_directory) / CONFIG_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            hub = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")
            upload_saved(self, save_directory, before, **{key: kwargs[key] for key in hub if key in kwargs})
        return [str(path)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "AltMoEProcessor":
        """Load from a Hub repository or a local folder.

        Raises:
            OSError: there is no `processor_config.json`.
            ValueError: it was written for another processor.
        """
        name = pretrained_model_name_or_path
        passed = ("revision", "token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
        hub = {key: kwargs[key] for key in passed if kwargs.get(key) is not None}
        cached = {key: value for key, value in hub.items() if key != "trust_remote_code"}
        fields = json.loads(Path(cached_file(name, CONFIG_NAME, **cached)).read_text())
        if "modalities" not in fields:
            raise ValueError(f"'{name}' holds a {fields.get('processor_class')}, not an AltMoEProcessor.")
        processors, prompts = {}, {}
        for modality, entry in fields["modalities"].items():
            check_modality(modality)
            if entry["kind"] not in LOADERS or entry["folder"] not in ("", f"processor_{modality}"):
                raise ValueError(f"'{name}': processor_config.json has an unusable entry for '{modality}': {entry}.")
            loader = LOADERS[entry["kind"]]
            processors[modality] = loader.from_pretrained(name, subfolder=entry["folder"], **hub)
            if entry.get("prompt"):
                prompts[modality] = entry["prompt"]
        return cls(processors, prompts)

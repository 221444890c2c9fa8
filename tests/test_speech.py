"""The third modality: Whisper's encoder read from CTranslate2's format, recordings, translations and their concepts."""

import struct

import numpy as np
import pytest
import torch
from transformers import WhisperModel

from demo import speech
from demo.encoders import ConversionError

soundfile = pytest.importorskip("soundfile")


def ctranslate2_file(variables: dict[str, np.ndarray], version: int = 6) -> bytes:
    """The format of the package, written by hand."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        content += text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", {"float16": 4, "float32": 0}[array.dtype.name], array.nbytes) + array.tobytes()
    return content + struct.pack("<I", 0)


@pytest.fixture(scope="module")
def source():
    """Random weights of the right shapes, by transformers' own names turned round."""
    torch.manual_seed(0)
    state = {k: v.detach().numpy() for k, v in WhisperModel(speech.whisper_config()).encoder.state_dict().items()}
    found = {"encoder/num_heads": np.array(6, dtype=np.float16)}
    for name in ("conv1", "conv2"):
        found[f"encoder/{name}/weight"], found[f"encoder/{name}/bias"] = state[f"{name}.weight"], state[f"{name}.bias"]
    positions = np.zeros((1500, speech.WIDTH), dtype=np.float32)
    positions[: speech.SECONDS * 50] = state["embed_positions.weight"]
    found["encoder/position_encodings/encodings"] = positions
    norms = {"encoder/layer_norm": "layer_norm"}
    for i in range(speech.LAYERS):
        there, here = f"encoder/layer_{i}", f"layers.{i}"
        norms[f"{there}/self_attention/layer_norm"] = f"{here}.self_attn_layer_norm"
        norms[f"{there}/ffn/layer_norm"] = f"{here}.final_layer_norm"
        attention = f"{here}.self_attn"
        found[f"{there}/self_attention/linear_0/weight"] = np.concatenate(
            [state[f"{attention}.{part}_proj.weight"] for part in "qkv"]
        )
        biases = [state[f"{attention}.q_proj.bias"], np.zeros(384, np.float32), state[f"{attention}.v_proj.bias"]]
        found[f"{there}/self_attention/linear_0/bias"] = np.concatenate(biases)
        pairs = {"self_attention/linear_1": f"{attention}.out_proj", "ffn/linear_0": f"{here}.fc1"}
        for name, other in {**pairs, "ffn/linear_1": f"{here}.fc2"}.items():
            found[f"{there}/{name}/weight"], found[f"{there}/{name}/bias"] = (
                state[f"{other}.weight"],
                state[f"{other}.bias"],
            )
    for there, here in norms.items():
        found[f"{there}/gamma"], found[f"{there}/beta"] = state[f"{here}.weight"], state[f"{here}.bias"]
    return state, found


def test_the_file_is_read_and_every_weight_finds_its_place(source):
    state, found = source
    read = speech.read_ctranslate2(ctranslate2_file(found))
    assert all(np.array_equal(read[name], array) for name, array in found.items())
    converted = speech.convert_whisper(read).encoder.state_dict()
    assert set(converted) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(converted[name], torch.from_numpy(value), msg=lambda m, name=name: f"{name}: {m}")


def test_a_file_that_is_something_else_is_refused(source):
    _, found = source
    with pytest.raises(ConversionError, match="version 6"):
        speech.read_ctranslate2(ctranslate2_file(found, version=5))
    with pytest.raises(ConversionError, match="damaged"):
        speech.read_ctranslate2(ctranslate2_file(found)[:-1000])
    with pytest.raises(ConversionError, match="does not have"):
        speech.convert_whisper({**found, "encoder/layer_9/ffn/linear_0/bias": np.zeros(3)})
    with pytest.raises(ConversionError, match="keys have no bias"):
        broken = found["encoder/layer_0/self_attention/linear_0/bias"] + 1
        speech.convert_whisper({**found, "encoder/layer_0/self_attention/linear_0/bias": broken})
    with pytest.raises(ConversionError, match="has no"):
        speech.convert_whisper({k: v for k, v in found.items() if "conv2" not in k})


def test_recordings_are_mono_at_the_encoders_rate_and_cut(tmp_path):
    time = np.arange(6 * 44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    soundfile.write(tmp_path / "a.ogg", np.stack([tone, tone], axis=1), 44_100)
    signal = speech.read_recording(tmp_path / "a.ogg")
    assert signal.dtype == np.float32 and signal.shape == (speech.SECONDS * speech.RATE,)
    spectrum = np.abs(np.fft.rfft(signal))
    assert spectrum.argmax() * speech.RATE / len(signal) == pytest.approx(440, abs=2)


def test_translations_are_read_line_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("A red  apple.\nfr.utf8=Une pomme  rouge.\nes.utf8=\nde.utf8=Ein roter Apfel.\n")
    assert speech.translations(tmp_path / "a.txt") == {"fr": "Une pomme rouge.", "de": "Ein roter Apfel."}


def test_items_that_share_a_caption_a_translation_or_a_sound_are_one_concept():
    def row(english, french, sound):
        return {"caption": english, "caption_fr": french, "speech": np.full(4, sound, np.float32)}

    rows = [
        row("A mouse.", "Une souris.", 1),
        row("A computer mouse.", "Une souris!", 2),
        row("A cat.", "Un chat.", 3),
        row("The mouse", "La souris", 2),
        row("a cat", "Un chaton", 4),
    ]
    assert speech.concepts(rows) == ["a mouse", "a mouse", "a cat", "a mouse", "a cat"]

"""The processor: names, prompts, round trips, and what it says of bad items."""

import numpy as np
import pytest
import torch
from conftest import tiny_processors
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.encoding_altmoe import settings_identity
from modeling_altmoe.processing_altmoe import ItemError, read_audio, read_image


def test_names_are_those_of_the_encoders(processor, pictures):
    inputs = processor(image=pictures, text=["a cat"])
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert {"input_ids", "attention_mask"} <= set(inputs)


def test_a_second_text_modality_gets_its_own_names(tmp_path, pictures):
    own = tiny_processors(tmp_path)
    both = AltMoEProcessor({"question": own["text"], "answer": own["text"]})
    inputs = both(question=["a cat"], answer=["dog", "tree"])
    assert inputs["question__input_ids"].shape[0] == 1 and inputs["input_ids"].shape[0] == 2
    both.save_pretrained(tmp_path / "saved")
    assert set(AltMoEProcessor.from_pretrained(tmp_path / "saved")(question=["a cat"], answer=["dog"])) == set(inputs)


def test_transparency_is_laid_on_white():
    glass = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(read_image(glass)).min() == 255
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert read_image(palette).mode == "RGB"


def test_prompt_stands_before_every_caption(tmp_path):
    own = tiny_processors(tmp_path)
    plain = AltMoEProcessor({"text": own["text"]})
    prompted = AltMoEProcessor({"text": own["text"]}, {"text": "a red "})
    assert torch.equal(prompted(text=["dog"])["input_ids"], plain(text=["a red dog"])["input_ids"])


def test_round_trip(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AltMoEProcessor.from_pretrained(tmp_path)
    given = {"images": pictures, "text": ["a cat", "dog"]}
    for name, tensor in processor(**given).items():
        assert torch.equal(tensor, again(**given)[name])
    for modality in processor.processors:
        assert settings_identity(processor.processors[modality]) == settings_identity(again.processors[modality])


def test_image_and_sound_processors_do_not_overwrite_each_other(processor, tmp_path):
    sound = ASTFeatureExtractor(max_length=64)
    both = AltMoEProcessor({**processor.processors, "audio": sound})
    both.save_pretrained(tmp_path)
    again = AltMoEProcessor.from_pretrained(tmp_path)
    assert again.kind("audio") == "audio" and again.kind("image") == "image"
    signal = np.sin(np.arange(16000) / 50).astype(np.float32)
    assert "audio__input_values" in again(audio=[{"array": signal, "sampling_rate": 16000}])


def test_identity_follows_settings(tmp_path):
    one, other = tiny_processors(tmp_path), tiny_processors(tmp_path)
    other["image"].size = {"height": 64, "width": 64}
    assert settings_identity(one["image"]) != settings_identity(other["image"])
    one["text"](["a cat"], padding=True, truncation=True, max_length=4)  # use does not change identity
    assert settings_identity(one["text"]) == settings_identity(other["text"])


@pytest.mark.parametrize("bad", ["", "   \n", None, 3])
def test_bad_captions_are_named_by_position(processor, bad):
    with pytest.raises(ItemError, match=r"text: item 1: (empty caption|expected a string)"):
        processor(text=["a cat", bad])


def test_bad_images_are_named_by_position(processor, pictures, tmp_path):
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "noise.png").write_bytes(b"not an image at all")
    pictures[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name, message in (
        ("zero.png", "has zero bytes"),
        ("noise.png", "cannot be read as an image"),
        ("half.png", "cannot be read as an image"),
        ("none.png", "no image file"),
    ):
        with pytest.raises(ItemError, match=f"image: item 1: .*{message}"):
            processor(images=[pictures[0], str(tmp_path / name)])


def test_sound_of_another_rate_is_refused():
    with pytest.raises(ItemError, match=r"8000 Hz, the encoder expects 16000 Hz: resample"):
        read_audio({"array": np.zeros(10), "sampling_rate": 8000}, 16000)
    with pytest.raises(ItemError, match="empty sound"):
        read_audio(np.zeros(0), 16000)


def tiny_wav2vec2(norm: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    extra = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": norm}
    masks = norm == "layer"  # as the published ones
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **layers, **extra)), Wav2Vec2FeatureExtractor(
        return_attention_mask=masks
    )


def tiny_w2v_bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes)), SeamlessM4TFeatureExtractor()


def tiny_whisper():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    marks = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**sizes, **heads, **marks)), WhisperFeatureExtractor()


def tiny_ast():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ASTModel(ASTConfig(num_mel_bins=32, max_length=48, **sizes)), ASTFeatureExtractor(
        num_mel_bins=32, max_length=48
    )


@pytest.mark.parametrize("make, fixed", [
    (lambda: tiny_wav2vec2("group"), False), (lambda: tiny_wav2vec2("layer"), False),
    (tiny_w2v_bert, False), (tiny_whisper, True), (tiny_ast, True),
], ids=["wav2vec2, group norm", "wav2vec2, layer norm", "w2v-bert", "whisper", "ast"])  # fmt: skip
def test_a_batch_of_sounds_of_different_lengths_gives_the_latents_of_each_alone(make, fixed):
    torch.manual_seed(0)
    encoder, extractor = make()
    model = AltMoEModel.from_encoders({"sound": encoder}, [], hidden_size=8, moe_intermediate_size=8).eval()
    processor = AltMoEProcessor({"sound": extractor})
    noise = np.random.default_rng(0)
    items = [noise.standard_normal(samples).astype(np.float32) for samples in (9000, 4001, 9000, 6100)]
    batch = processor.batch("sound", items)
    assert ("item_lengths" in batch) != fixed  # encoders with a window of their own need none
    alone = torch.cat([model.encode("sound", processor.batch("sound", [item])) for item in items])
    torch.testing.assert_close(model.encode("sound", batch), alone, atol=1e-5, rtol=1e-4)
    through_call = processor(sound=items)
    torch.testing.assert_close(model(**through_call).latents["sound"], alone, atol=1e-5, rtol=1e-4)
    expected = extractor(items[1], sampling_rate=16000, return_tensors="pt")  # and alone is as the extractor has it
    for name, tensor in processor.batch("sound", [items[1]]).items():
        assert torch.equal(tensor, expected[name])


def test_unknown_modality_and_nothing_given(processor):
    with pytest.raises(ValueError, match=r"Unknown modality 'vidio'. Known: image, text"):
        processor(vidio=[1])
    with pytest.raises(ValueError, match="Nothing to process"):
        processor()
    with pytest.raises(ValueError, match="the list is empty"):
        processor(text=[])


def test_a_config_cannot_reach_outside_its_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace('"folder": ""', '"folder": "../../elsewhere"'))
    with pytest.raises(ValueError, match="unusable entry"):
        AltMoEProcessor.from_pretrained(tmp_path)

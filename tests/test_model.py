"""The model as a user meets it: encoders, latents, predictions, save and load, and clear refusals."""

import json
import shutil

import pytest
import torch
from conftest import paired_latents, small_config, small_model, tiny_bert, tiny_vit
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from modeling_altmoe import AltMoEConfig, AltMoEModel, LatentProtocol
from modeling_altmoe.encoding_altmoe import pool

PROTOCOLS = {"image": {"pooling": "cls"}, "text": {"pooling": "mean"}}
SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}


@pytest.fixture
def joined(encoder_folders):
    torch.manual_seed(0)
    return AltMoEModel.from_encoders(encoder_folders, protocols=PROTOCOLS, **SIZES).eval()


@pytest.fixture
def inputs(processor, pictures):
    return processor(images=pictures, text=["a red square", "a green tree", "dog"])


# ---------------------------------------------------------------- encoders and forward


def test_from_encoders_makes_every_ordered_pair_by_default(joined):
    assert joined.directions == ["image->text", "text->image"]
    assert joined.config.latent_size("image") == 32 and joined.config.latent_size("text") == 24


def test_frozen_encoders_rest(joined, inputs):
    joined.train()
    assert joined.connector.training and not joined.encoders["image"].training
    assert not any(p.requires_grad for p in joined.encoders.parameters())
    joined(**inputs).loss.backward()
    assert joined.connector.project["image"].weight.grad is not None


@torch.no_grad()
def test_forward_from_raw_inputs_equals_forward_from_latents(joined, inputs):
    raw = joined(**inputs)
    stored = joined(latents=raw.latents)
    assert torch.equal(raw.logits_per_image, stored.logits_per_image)
    assert torch.equal(raw.logits_per_text, raw.logits_per_image.T)
    assert raw.logits_per_image.shape == (3, 3) and raw.loss is None


@torch.no_grad()
def test_images_and_texts_of_different_number_can_be_scored_but_not_trained(joined, processor, pictures):
    inputs = processor(images=pictures[:1], text=["a", "cat"])
    assert joined(**inputs).logits_per_image.shape == (1, 2)
    with pytest.raises(ValueError, match="1 source items and 2 target items"):
        joined(**inputs, direction="image->text")


@torch.no_grad()
def test_padding_does_not_change_a_text_latent(joined, processor):
    alone = joined.encode("text", processor.batch("text", ["cat"]))
    padded = joined.encode("text", processor.batch("text", ["cat", "a red square circle tree house"]))
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-5)


WITHOUT_PADDING = {
    "mean": lambda real: real.mean(0),
    "last_token": lambda real: real[-1],
    "max": lambda real: real.amax(0),
    "std": lambda real: real.std(0, correction=0),
}


@pytest.mark.parametrize("pooling", WITHOUT_PADDING)
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_sees_real_tokens_only(pooling, side):
    tokens = torch.randn(1, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0]] if side == "right" else [[0, 0, 1, 1, 1]])
    real = tokens[0][mask[0].bool()]
    outputs = type("Outputs", (), {"last_hidden_state": tokens})()
    latent = pool(outputs, mask, LatentProtocol(pooling=pooling, normalize=False))
    torch.testing.assert_close(latent[0], WITHOUT_PADDING[pooling](real))
    outputs.last_hidden_state = real[None]
    torch.testing.assert_close(pool(outputs, None, LatentProtocol(pooling=pooling, normalize=False)), latent)


@torch.no_grad()
def test_layers_are_averaged(processor):
    encoder, texts = tiny_bert(), processor.batch("text", ["a cat", "a red dog"])
    model = AltMoEModel.from_encoders(
        {"text": encoder, "image": tiny_vit()}, protocols={"text": {"layers": (-2, -1), "normalize": False}}, **SIZES
    )
    states = encoder(**texts, output_hidden_states=True).hidden_states
    mask = texts["attention_mask"].unsqueeze(-1)
    expected = ((states[-1] + states[-2]) / 2 * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(model.encode("text", texts), expected)


@torch.no_grad()
def test_layers_side_by_side_count_equally_and_widths_may_differ():
    first, last = torch.randn(2, 3, 5), torch.randn(2, 7, 2, 2) * 100  # a map with another width, as in convolutions
    outputs = type("Outputs", (), {"hidden_states": (first,), "last_hidden_state": last})()
    latent = pool(outputs, None, LatentProtocol(layers=(-2, -1), combine="concat"))
    parts = [F.normalize(first.mean(1), dim=-1), F.normalize(last.flatten(2).mean(2), dim=-1)]
    torch.testing.assert_close(latent, torch.cat(parts, -1) / 2**0.5)
    with pytest.raises(ValueError, match=r"widths \[5, 7\].*combine='concat'"):
        pool(outputs, None, LatentProtocol(layers=(-2, -1)))
    with pytest.raises(ValueError, match="has 2 hidden states"):
        pool(outputs, None, LatentProtocol(layers=(-3,), combine="concat"))


@torch.no_grad()
def test_poolings_side_by_side_count_equally():
    first, last = torch.randn(2, 3, 5), torch.randn(2, 5, 5) * 100
    outputs = type("Outputs", (), {"hidden_states": (first, last), "last_hidden_state": last})()
    mean, std = (F.normalize(x, dim=-1) for x in (last.mean(1), last.std(1, correction=0)))
    latent = pool(outputs, None, LatentProtocol(pooling="mean+std"))
    torch.testing.assert_close(latent, torch.cat([mean, std], -1) / 2**0.5)
    both = pool(outputs, None, LatentProtocol(pooling="mean+std", layers=(-2, -1), combine="concat"))
    assert both.shape == (2, 20) and torch.allclose(both[:, 5:10], mean / 2)
    averaged = pool(outputs, None, LatentProtocol(pooling="mean+std", layers=(-2, -1)))
    torch.testing.assert_close(averaged[:, :5], F.normalize((first.mean(1) + last.mean(1)) / 2, dim=-1) / 2**0.5)


@torch.no_grad()
def test_several_poolings_make_a_latent_wider(processor):
    pooled = {"text": {"pooling": "mean+std"}, "image": {"pooling": "cls+mean"}}
    model = AltMoEModel.from_encoders({"text": tiny_bert(), "image": tiny_vit()}, protocols=pooled, **SIZES)
    single = AltMoEModel.from_encoders({"text": tiny_bert(), "image": tiny_vit()}, **SIZES)
    for modality in pooled:
        assert model.config.latent_size(modality) == 2 * single.config.latent_size(modality)
    texts = processor.batch("text", ["a cat", "a red dog"])
    assert model.encode("text", texts).shape == (2, model.config.latent_size("text"))


def test_combining_belongs_to_the_identity_and_old_fingerprints_stay():
    plain, beside = LatentProtocol(layers=(-2, -1)), LatentProtocol(layers=(-2, -1), combine="concat")
    assert "combine" not in plain.to_dict() and LatentProtocol.from_dict(plain.to_dict()) == plain
    assert LatentProtocol().fingerprint == "027ae9cd3b1cad1f"  # as it was written before there was a choice
    assert LatentProtocol.from_dict(beside.to_dict()) == beside and beside.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="combine: expected 'mean', got 'concat'"):
        plain.check_same(beside, "These")
    for fields in ({"combine": "sum"}, {"combine": "concat", "pooling": "pooler"}, {"pooling": "mean+pooler"}):
        with pytest.raises(ValueError, match="combine="):
            LatentProtocol(**fields)
    for pooling, message in (("mean+sdt", "'sdt'.*mean\\+std"), ("mean+mean", "twice")):
        with pytest.raises(ValueError, match=message):
            LatentProtocol(pooling=pooling)


@torch.no_grad()
def test_predictions_live_in_the_targets_own_space():
    model, latents = small_model(), paired_latents(50)
    for modality in latents:
        model.connector.frames[modality].fit(latents[modality] * 7 + 3)
    moved = {modality: x * 7 + 3 for modality, x in latents.items()}
    prediction = model.predict(moved, "image->text")
    assert prediction.shape == (50, 16)
    with pytest.raises(ValueError, match="term"):
        model.predict(moved, "image->text", term="generative")
    framed = model.connector.frames["text"](prediction)
    torch.testing.assert_close(framed, model.connector(moved, "image->text").regression, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_score_is_the_centred_cosine():
    model, latents = small_model(), paired_latents(20)
    model.connector.frames["text"].fit(latents["text"])
    scores = model.queries("image->text", latents) @ model.gallery("image->text", latents["text"]).T
    mean = latents["text"].mean(0)
    prediction = model.predict(latents, "image->text", "contrastive")
    expected = torch.cosine_similarity((prediction - mean)[:, None], (latents["text"] - mean)[None], dim=-1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- save and load


def test_round_trip_keeps_every_output(joined, inputs, tmp_path):
    joined.save_pretrained(tmp_path / "model")
    again = AltMoEModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(joined(**inputs).logits_per_image, again(**inputs).logits_per_image)
    assert not any(name.startswith("encoders.") for name in load_file(tmp_path / "model" / "model.safetensors"))


@torch.no_grad()
def test_a_base_of_many_landmarks_is_half_as_large_and_says_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr("modeling_altmoe.connector_altmoe.HALF_FROM", 7)
    model, latents = small_model(base="kernel"), paired_latents(10)
    for direction, (width, size, factor) in {"image->text": (24, 16, 1.0), "text->image": (16, 24, 1e6)}.items():
        landmarks = F.normalize(torch.randn(7, width), dim=-1)
        model.connector.set_base(direction, factor * torch.randn(7, size), torch.zeros(size), landmarks, gamma=2.0)
    model.save_pretrained(tmp_path)
    found = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    for name in ("landmarks", "weight"):
        assert found[f"connector.base.image->text.{name}"] == torch.float16
        assert found[f"connector.base.text->image.{name}"] == torch.float32  # too large a number for half precision
    loaded = AltMoEModel.from_pretrained(tmp_path)
    assert {buffer.dtype for buffer in loaded.connector.base.buffers()} == {torch.float32}
    for direction in model.directions:
        assert torch.equal(loaded.predict(latents, direction), model.predict(latents, direction))


@pytest.mark.parametrize("expert_pool", ["shared", "per_modality"])
@torch.no_grad()
def test_round_trip_keeps_modalities_in_any_order(expert_pool, tmp_path):
    encoders = {name: {"latent_size": 16} for name in ("text", "image", "audio")}
    model = small_model(encoders=encoders, directions=["text->audio", "image->text"], expert_pool=expert_pool)
    torch.nn.init.normal_(model.connector.router.source_embedding)
    torch.nn.init.normal_(model.connector.router.target_embedding)
    model.save_pretrained(tmp_path)
    again, latents = AltMoEModel.from_pretrained(tmp_path), torch.randn(9, 16)
    for direction in model.directions:
        assert torch.equal(model.queries(direction, latents), again.queries(direction, latents))


def test_self_contained_needs_no_other_folder(encoder_folders, inputs, tmp_path):
    copies = {m: shutil.copytree(folder, tmp_path / m) for m, folder in encoder_folders.items()}
    model = AltMoEModel.from_encoders(copies, protocols=PROTOCOLS, **SIZES).eval()
    model.save_pretrained(tmp_path / "model", self_contained=True)
    for copy in copies.values():
        shutil.rmtree(copy)
    again = AltMoEModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits_per_image, again(**inputs).logits_per_image)


def test_connector_alone(joined, tmp_path):
    joined.save_pretrained(tmp_path)
    alone = AltMoEModel.from_pretrained(tmp_path, load_encoders=False)
    assert not alone.encoders
    with pytest.raises(ValueError, match="No image encoder is attached"):
        alone.encode("image", {})
    assert list(AltMoEModel.from_pretrained(tmp_path, load_encoders=["text"]).encoders) == ["text"]
    with pytest.raises(ValueError, match="'txt'"):
        AltMoEModel.from_pretrained(tmp_path, load_encoders=["txt"])


def test_lora_round_trip(encoder_folders, inputs, tmp_path):
    lora = {"text": LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)}
    torch.manual_seed(1)
    model = AltMoEModel.from_encoders(encoder_folders, protocols=PROTOCOLS, lora=lora, **SIZES)
    names = [name for name, p in model.encoders.named_parameters() if p.requires_grad]
    assert names and all("lora" in name for name in names)
    model.train()
    model(**inputs, direction="text->image").loss.backward()
    assert any(p.grad is not None for p in model.encoders["text"].parameters())
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits_per_image
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "adapter_text" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model" / "adapter_config.json").exists()  # at the root it would redirect loading
    again = AltMoEModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(before, again(**inputs).logits_per_image)
    model.save_pretrained(tmp_path / "whole", self_contained=True)
    whole = AltMoEModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(before, whole(**inputs).logits_per_image)


@torch.no_grad()
def test_targets_are_the_base_encoders_latents_even_with_lora(encoder_folders, inputs, joined):
    lora = {"text": LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)}
    adapted = AltMoEModel.from_encoders(encoder_folders, protocols=PROTOCOLS, lora=lora, **SIZES).eval()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(adapted.encode("text", texts), joined.encode("text", texts))
    assert not torch.equal(adapted.encode("text", texts, adapted=True), joined.encode("text", texts))


# ---------------------------------------------------------------- refusals


def test_unknown_names_are_refused_with_the_nearest_known():
    model = small_model()
    with pytest.raises(ValueError, match=r"Unknown direction 'image->txt'|Unknown modality 'txt'.*Did you mean 'text'"):
        model.predict(torch.zeros(1, 24), "image->txt")
    with pytest.raises(ValueError, match="is not a direction"):
        model.predict(torch.zeros(1, 24), "image-text")
    with pytest.raises(ValueError, match="Unknown direction 'text->text'"):
        model.predict(torch.zeros(1, 16), "text->text")


def test_bad_latents_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"shape \(2, 23\), expected \(batch, 24\)"):
        model.predict(torch.zeros(2, 23), "image->text")
    latents = torch.zeros(3, 24)
    latents[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 rows, first: \[1\]"):
        model.predict(latents, "image->text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 7}, "top_k=7 with num_experts=6"),
        ({"top_k": 0}, "top_k must lie between 1"),
        ({"hidden_size": 20}, "hidden_size=20.*multiple of 8. Try 24"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"expert_pool": "per_modal"}, "Did you mean 'per_modality'"),
        ({"directions": ["image->audio"]}, "Unknown modality 'audio'"),
        ({"base": "rigde"}, "Did you mean 'ridge'"),
        ({"encoders": {"im age": {"latent_size": 3}}, "directions": []}, "cannot name a modality"),
        ({"encoders": {"image": {}}, "directions": []}, "latent_size"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_config(**change)


def test_missing_encoder_is_named(tmp_path):
    with pytest.raises(OSError, match=r"image encoder '.*nowhere' .*a local folder or a loaded model"):
        AltMoEModel.from_encoders({"image": str(tmp_path / "nowhere"), "text": tiny_bert()}, **SIZES)


def test_mistakes_are_found_before_weights_are_loaded(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'image'"):
        AltMoEModel.from_encoders(
            {"image": str(tmp_path / "no"), "text": str(tmp_path / "no")}, ["imag->text"], **SIZES
        )


def test_an_encoder_with_random_weights_is_refused(tmp_path):
    encoder = tiny_bert()
    encoder.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("encoder.layer.1.output.dense.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="would be random"):
        AltMoEModel.from_encoders({"text": str(tmp_path), "image": tiny_vit()}, **SIZES)


def test_another_encoder_is_refused(joined, tmp_path, encoder_folders):
    joined.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights are not those"):
        AltMoEModel.from_pretrained(tmp_path, encoders={"image": tiny_vit(seed=5)})
    with pytest.raises(ValueError, match="should be a 'vit' model, got 'bert'"):
        AltMoEModel.from_pretrained(tmp_path, encoders={"image": tiny_bert()})
    assert AltMoEModel.from_pretrained(tmp_path, encoders={"image": encoder_folders["image"]}).encoders


def test_truncated_and_foreign_checkpoints_are_refused(joined, tmp_path):
    joined.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        AltMoEModel.from_pretrained(tmp_path / "model")
    BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="holds a 'bert' model"):
        AltMoEModel.from_pretrained(tmp_path / "bert")


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("connector.router.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a complete altmoe checkpoint: missing"):
        AltMoEModel.from_pretrained(tmp_path)


def test_missing_checkpoint_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        AltMoEModel.from_pretrained(tmp_path / "nothing")


def test_config_round_trip_through_json(joined, tmp_path):
    joined.config.save_pretrained(tmp_path)
    again = AltMoEConfig.from_pretrained(tmp_path)
    assert json.loads(again.to_json_string())["encoders"] == json.loads(joined.config.to_json_string())["encoders"]
    assert again.encoder_config("image").model_type == "vit"

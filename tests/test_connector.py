"""Identities of the connector: what must hold whatever the weights are."""

import pytest
import torch
from conftest import paired_latents, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_altmoe.connector_altmoe import Frame


def predict_all(model, latents):
    return [model.predict(latents, d, t) for d in model.directions for t in ("regression", "contrastive")]


@torch.no_grad()
def test_all_experts_chosen_equals_the_dense_mixture():
    model, latents = small_model(top_k=6, num_experts=6), paired_latents(7)
    connector = model.connector
    output = connector(latents, "image->text")
    seen = F.layer_norm(connector.frames["image"].unit(latents["image"]), (24,))
    hidden = connector.project["image"](seen)
    dense = torch.zeros(7, 2, 16)
    weights = output.router_logits.softmax(-1)  # (b, l, e) over all experts
    for expert in range(6):
        gate, up = F.linear(hidden, connector.experts.gate_up_proj[expert]).chunk(2, -1)
        answer = F.linear(F.silu(gate) * up, connector.experts.down_proj[expert])
        dense += weights[:, :, expert, None] * answer[:, None]
    mixed = connector.norm(hidden[:, None] + dense)
    expected = [head(mixed[:, term]) for term, head in enumerate(connector.heads["text"])]
    torch.testing.assert_close(output.contrastive, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.regression, expected[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_permuting_experts_changes_nothing():
    model, latents = small_model(), paired_latents(9)
    before = predict_all(model, latents)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    experts, router = model.connector.experts, model.connector.router
    experts.gate_up_proj.copy_(experts.gate_up_proj[order])
    experts.down_proj.copy_(experts.down_proj[order])
    router.weight.copy_(router.weight[:, order])
    for a, b in zip(before, predict_all(model, latents), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_implementations_of_the_experts_agree_forward_and_backward(implementation):
    model, latents = small_model(), paired_latents(11)
    assert model.config._experts_implementation == "grouped_mm"
    results = []
    for name in ("grouped_mm", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        loss = model(latents=latents, direction="image->text").loss
        loss.backward()
        results.append((loss.detach(), model.connector.experts.gate_up_proj.grad.clone()))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_router_weights_are_renormalised_over_the_chosen():
    output = small_model().connector(paired_latents(20), "image->text")
    torch.testing.assert_close(output.router_weights.sum(-1), torch.ones(20, 2))
    chosen = output.router_logits.softmax(-1).gather(-1, output.router_indices)
    torch.testing.assert_close(output.router_weights, chosen / chosen.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_expert_pools_of_modalities_are_apart():
    model = small_model(expert_pool="per_modality")
    latents = paired_latents(30)
    for direction, pool in (("image->text", range(6)), ("text->image", range(6, 12))):
        used = model.connector(latents, direction).router_indices.unique().tolist()
        assert set(used) <= set(pool)


@torch.no_grad()
def test_the_target_decides_the_route():
    encoders = {m: {"latent_size": 16} for m in ("text", "image", "audio")}
    model = small_model(encoders=encoders, directions=["text->image", "text->audio"])
    model.connector.router.target_embedding.mul_(100)
    text = {"text": torch.randn(4, 16)}
    logits = [model.connector(text, d).router_logits for d in model.directions]
    assert not torch.allclose(*logits)


@torch.no_grad()
def test_one_gate_gives_both_terms_the_same_mixture():
    output = small_model(num_gates=1).connector(paired_latents(5), "image->text")
    assert output.router_logits.shape == (5, 1, 6)


@torch.no_grad()
def test_rows_do_not_see_each_other():
    model, latents = small_model(), paired_latents(12)
    whole = model.predict(latents, "image->text")
    alone = model.predict(latents["image"][3:4], "image->text")
    torch.testing.assert_close(whole[3:4], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_sources():
    encoders = {"image": {"latent_size": 24}, "question": {"latent_size": 16}, "answer": {"latent_size": 8}}
    model = small_model(encoders=encoders, directions=["image+question->answer"])
    latents = {"image": torch.randn(3, 24), "question": torch.randn(3, 16)}
    first = model.predict(latents, "image+question->answer")
    assert first.shape == (3, 8)
    other = model.predict({**latents, "question": -latents["question"]}, "image+question->answer")
    assert not torch.allclose(first, other)
    with pytest.raises(ValueError, match="needs latents of 'question'"):
        model.predict({"image": latents["image"]}, "image+question->answer")


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_frame_inverse_is_exact(scale, shift, seed):
    latents = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) * scale + shift
    frame = Frame(5)
    frame.fit(latents)
    framed = frame(latents)
    torch.testing.assert_close(frame.inverse(framed), latents, atol=1e-3 * (scale + abs(shift)), rtol=1e-3)
    assert abs(framed.square().sum(-1).mean().item() - 1) < 1e-2


@torch.no_grad()
def test_with_a_base_training_starts_at_the_base():
    model, latents = small_model(base="ridge"), paired_latents(10)
    weight, bias = torch.randn(24, 16), torch.randn(16)
    model.connector.set_base("image->text", weight, bias)
    output = model.connector(latents, "image->text")
    expected = model.connector.source(latents, "image->text") @ weight + bias
    torch.testing.assert_close(output.contrastive, expected)
    replaced = model.connector(latents, "image->text", base_prediction=torch.ones(10, 16))
    torch.testing.assert_close(replaced.regression, torch.ones(10, 16))


@torch.no_grad()
def test_target_metric_changes_the_score_and_not_the_estimate():
    model, latents = small_model(base="ridge", target_metric=True), paired_latents(10)
    weight, metric = torch.randn(24, 16), torch.randn(16, 16)
    model.connector.set_base("image->text", weight, torch.zeros(16))
    plain = model.connector(latents, "image->text")
    torch.testing.assert_close(plain.contrastive, plain.regression)  # the identity until one is fitted
    model.connector.set_base("image->text", weight, torch.zeros(16), metric=metric)
    output = model.connector(latents, "image->text")
    torch.testing.assert_close(output.regression, plain.regression)
    torch.testing.assert_close(output.contrastive, plain.regression @ metric)
    given = model.connector(latents, "image->text", base_prediction=torch.ones(10, 16))
    torch.testing.assert_close(given.contrastive, torch.ones(10, 16) @ metric)


@torch.no_grad()
def test_kernel_base_is_the_gaussian_kernel_on_unit_vectors(monkeypatch):
    model, latents = small_model(base="kernel"), paired_latents(10)
    landmarks = F.normalize(torch.randn(7, 24), dim=-1)
    weight = torch.randn(7, 16)
    model.connector.set_base("image->text", weight, torch.zeros(16), landmarks, gamma=3.0)
    unit = model.connector.source(latents, "image->text")
    gaussian = torch.exp(-3.0 * torch.cdist(unit, landmarks).square() / 2)
    expected = gaussian @ weight
    torch.testing.assert_close(model.connector(latents, "image->text").contrastive, expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("modeling_altmoe.connector_altmoe.BASE_ROWS", 4)  # ten sources, four at a time and a rest
    torch.testing.assert_close(model.connector(latents, "image->text").contrastive, expected, atol=1e-5, rtol=1e-4)
    nothing = {modality: rows[:0] for modality, rows in latents.items()}
    assert model.connector.base["image->text"](model.connector.source(nothing, "image->text")).shape == (0, 16)


def test_noise_and_dropout_act_in_training_only():
    model, latents = small_model(latent_noise=1.0), paired_latents(6)
    assert torch.equal(model.predict(latents, "image->text"), model.predict(latents, "image->text"))
    model.train()
    assert not torch.equal(model.predict(latents, "image->text"), model.predict(latents, "image->text"))


def test_trust_zero_leaves_the_base_alone():
    model, latents = small_model(base="ridge"), paired_latents(6)
    model.connector.set_base("image->text", torch.randn(24, 16), torch.zeros(16))
    with torch.no_grad():
        model.connector.heads["text"][0].weight.normal_()
        before = model.connector(latents, "image->text").contrastive
        model.connector.trust.fill_(0.5)
        half = model.connector(latents, "image->text").contrastive
        assert torch.equal(model.connector.predictions(latents, "image->text")[0], half)
        model.connector.trust.zero_()
        after = model.connector(latents, "image->text").contrastive
        model.connector.experts.forward = None  # not even called
        alone = model.connector.predictions(latents, "image->text")
        base = model.connector.base["image->text"](model.connector.source(latents, "image->text"))
    assert not torch.allclose(before, base)
    torch.testing.assert_close(half - base, (before - base) / 2)  # trust is the factor on the correction
    torch.testing.assert_close(after, base)
    assert all(torch.equal(said, base) for said in alone)

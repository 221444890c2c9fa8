"""Identities of the loss terms and their readings."""

import math

import pytest
import torch
from conftest import paired_latents, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_altmoe.loss_altmoe import (
    conditional_entropy,
    contrastive_loss,
    info_nce,
    information_bound,
    load_balance_loss,
    regression_loss,
    router_z_loss,
    sigmoid_loss,
)


def test_one_positive_a_row_is_cross_entropy():
    logits = torch.randn(8, 12)
    positives = torch.zeros(8, 12, dtype=torch.bool)
    answer = torch.randint(0, 12, (8,))
    positives[torch.arange(8), answer] = True
    torch.testing.assert_close(info_nce(logits, positives), F.cross_entropy(logits, answer))


def test_a_duplicate_of_the_positive_is_never_pushed_away():
    logits = torch.randn(1, 5, requires_grad=True)
    positives = torch.tensor([[True, True, False, False, False]])
    info_nce(logits, positives).backward()
    assert (logits.grad[0, :2] < 0).all() and (logits.grad[0, 2:] > 0).all()


def test_all_positive_means_no_loss():
    assert info_nce(torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)).abs() < 1e-6


def test_symmetric_loss_of_a_square_batch_is_its_own_transpose():
    logits, eye = torch.randn(6, 6), torch.eye(6, dtype=torch.bool)
    one = contrastive_loss(logits, eye, "infonce", torch.zeros(()), symmetric=True)
    other = contrastive_loss(logits.T, eye, "infonce", torch.zeros(()), symmetric=True)
    torch.testing.assert_close(one, other)


def test_sigmoid_loss_against_its_definition():
    logits, positives = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    bias = torch.tensor(-1.0)
    total = 0.0
    for i in range(3):
        for j in range(4):
            z = 1 if positives[i, j] else -1
            total += math.log(1 + math.exp(-z * (logits[i, j].item() - 1)))
    torch.testing.assert_close(sigmoid_loss(logits, positives, bias), torch.tensor(total / 3))


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_regression_is_zero_only_at_the_target(kind):
    target = torch.randn(5, 7)
    assert regression_loss(target, target, kind) < 1e-6
    assert regression_loss(-target, target, kind) > 0.1


def test_alpha_one_is_pure_regression_and_alpha_zero_pure_contrast():
    latents = paired_latents(10)
    quiet = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    for alpha, term in ((1.0, "regression"), (0.0, "contrastive")):
        model = small_model(alpha=alpha, **quiet)
        output = model(latents=latents, direction="image->text")
        torch.testing.assert_close(output.loss.detach(), output.loss_terms[term])
        output.loss.backward()
        other = 0 if term == "regression" else 1
        assert model.connector.heads["text"][other].weight.grad.abs().sum() == 0  # the other term's head rests


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(2, 10), seed=st.integers(0, 100))
def test_load_balance_is_one_when_even_and_larger_when_collapsed(experts, seed):
    generator = torch.Generator().manual_seed(seed)
    even = torch.zeros(experts, 1, experts)
    indices = torch.arange(experts).view(experts, 1, 1)
    torch.testing.assert_close(load_balance_loss(even, indices), torch.tensor(1.0))
    collapsed = torch.randn(experts, 1, experts, generator=generator) * 0.01
    collapsed[..., 0] += 10
    chosen = torch.zeros(experts, 1, 1, dtype=torch.long)
    assert load_balance_loss(collapsed, chosen) > experts * 0.9


def test_unreachable_experts_do_not_count_in_the_balance():
    logits = torch.zeros(4, 1, 8)
    logits[..., 4:] = float("-inf")
    indices = torch.arange(4).view(4, 1, 1)
    torch.testing.assert_close(load_balance_loss(logits, indices), torch.tensor(1.0))
    assert torch.isfinite(router_z_loss(logits))


def test_information_bound_is_log_n_for_a_perfect_match_and_zero_for_none():
    eye = torch.eye(16, dtype=torch.bool)
    perfect = info_nce(torch.eye(16) * 1000, eye)
    torch.testing.assert_close(information_bound(perfect, eye), torch.tensor(math.log(16)))
    nothing = info_nce(torch.zeros(16, 16), eye)
    torch.testing.assert_close(information_bound(nothing, eye), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_conditional_entropy_of_a_gaussian_residual():
    residual = 0.3 * torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.09)
    assert abs(conditional_entropy(torch.zeros_like(residual), residual).item() - expected) < 0.01


def test_more_candidates_cannot_lower_the_contrastive_loss():
    model, latents = small_model(), paired_latents(40)
    batch = {m: x[:8] for m, x in latents.items()}
    positives = torch.eye(8, 40, dtype=torch.bool)
    few = model(latents=batch, direction="image->text").loss_terms["contrastive"]
    many = model(latents=batch, direction="image->text", candidates=latents["text"], positives=positives)
    assert many.loss_terms["contrastive"] > few

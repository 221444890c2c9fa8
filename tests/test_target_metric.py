"""The target metric: what it must find where the truth is known, what must not matter, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from trainer.closed_form import retrieval_criterion
from trainer.target_metric import CHOICES, fit_target_metric


def loud_and_telling(n=400, d=24, seed=0):
    """Targets whose loud half is hardly predictable and whose quiet half is; predictions shrink neither."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, d, generator=generator)
    size = torch.cat([torch.full((d // 2,), 3.0), torch.full((d // 2,), 0.5)])
    error = torch.cat([torch.full((d // 2,), 2.0), torch.full((d // 2,), 0.3)])
    targets = signal * size
    predictions = (signal + torch.randn(n, d, generator=generator) * error) * size
    return predictions, F.normalize(targets, dim=1), torch.arange(n)


def test_quiet_but_telling_directions_are_listened_to():
    predictions, targets, groups = loud_and_telling()
    metric, chosen = fit_target_metric(predictions[:200], targets[:200], groups[:200])
    assert chosen["power"] >= 0.5 and chosen["criterion"] > chosen["plain_criterion"]
    held_out = [
        retrieval_criterion(p, targets[200:], groups[200:]) for p in (predictions[200:] @ metric, predictions[200:])
    ]
    assert held_out[0] > 1.5 * held_out[1]


def test_the_plain_inner_product_is_the_identity():
    predictions, targets, groups = loud_and_telling(60)
    metric, chosen = fit_target_metric(predictions, targets, groups, choices=[(0.0, 1.0)])
    torch.testing.assert_close(metric, torch.eye(24), atol=1e-5, rtol=0)
    assert chosen["power"] == 0 and chosen["criterion"] == chosen["plain_criterion"]


def test_metric_is_the_formula_keeps_length_and_follows_a_rotation():
    predictions, targets, groups = loud_and_telling(80)
    metric, _ = fit_target_metric(predictions, targets, groups, choices=[(0.5, 0.3)])
    centred = targets - targets.mean(0)
    energy, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = vectors @ torch.diag((energy / energy.mean() + 0.3) ** -0.5) @ vectors.T
    torch.testing.assert_close(metric / metric.norm(), expected / expected.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close((predictions @ metric).norm(), predictions.norm())
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))[0]
    turned, _ = fit_target_metric(predictions @ turn, targets @ turn, groups, choices=[(0.5, 0.3)])
    torch.testing.assert_close(turn.T @ metric @ turn, turned, atol=1e-4, rtol=0)


def test_order_of_rows_does_not_matter_to_the_metric():
    predictions, targets, groups = loud_and_telling(80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    first, chosen = fit_target_metric(predictions, targets, groups)
    second, again = fit_target_metric(predictions[order], targets[order], groups[order])
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert chosen["power"] == again["power"] and chosen["criterion"] == pytest.approx(again["criterion"])


def test_large_sets_choose_on_a_sample():
    predictions, targets, groups = loud_and_telling(300)
    _, chosen = fit_target_metric(predictions, targets, groups // 2, max_selection_rows=100)
    assert (chosen["power"], chosen["ridge"]) in CHOICES and chosen["power"] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"predictions": torch.zeros(3, 4)}, "same rows"),
        ({"groups": torch.zeros(6, dtype=torch.long)}, "two groups"),
        ({"choices": []}, "at least one pair"),
        ({"choices": [(1.0, 0.0)]}, "ridge above 0"),
        ({"folds": 1}, "two folds"),
    ],
)
def test_bad_input(change, message):
    given = {"predictions": torch.randn(6, 4), "targets": torch.randn(6, 4), "groups": torch.arange(6), **change}
    with pytest.raises(ValueError, match=message):
        fit_target_metric(given.pop("predictions"), given.pop("targets"), given.pop("groups"), **given)

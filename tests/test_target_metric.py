"""The target metric: what it must find where the truth is known, what must not matter, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from trainer.closed_form import retrieval_criterion
from trainer.target_metric import CHOICES, Compared, _spectrum, fit_target_metrics


def loud_and_telling(n=400, d=24, seed=0):
    """Targets whose loud half is hardly predictable and whose quiet half is; predictions shrink neither."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, d, generator=generator)
    size = torch.cat([torch.full((d // 2,), 3.0), torch.full((d // 2,), 0.5)])
    error = torch.cat([torch.full((d // 2,), 2.0), torch.full((d // 2,), 0.3)])
    targets = signal * size
    predictions = (signal + torch.randn(n, d, generator=generator) * error) * size
    return predictions, F.normalize(targets, dim=1), torch.arange(n)


def fit(predictions, targets, groups, **options):
    """One direction."""
    folds = options.pop("folds", 5)
    items, parts = {"x": groups, "y": groups}, {"x": groups % folds, "y": groups % folds}
    metrics, chosen = fit_target_metrics({("x", "y"): predictions}, {"y": targets}, parts, items, **options)
    return metrics["x", "y"], chosen


def test_quiet_but_telling_directions_are_listened_to():
    predictions, targets, groups = loud_and_telling()
    metric, chosen = fit(predictions[:200], targets[:200], groups[:200])
    assert chosen["power"] >= 0.5 and chosen["criterion"] > chosen["plain_criterion"]
    held_out = [
        retrieval_criterion(p, targets[200:], groups[200:]) for p in (predictions[200:] @ metric, predictions[200:])
    ]
    assert held_out[0] > 1.5 * held_out[1]


def test_the_plain_inner_product_is_the_identity():
    predictions, targets, groups = loud_and_telling(60)
    metric, chosen = fit(predictions, targets, groups, choices=[(0.0, 1.0)])
    torch.testing.assert_close(metric, torch.eye(24), atol=1e-5, rtol=0)
    assert chosen["power"] == 0 and chosen["criterion"] == chosen["plain_criterion"]


def test_metric_is_the_formula_keeps_length_and_follows_a_rotation():
    predictions, targets, groups = loud_and_telling(80)
    metric, _ = fit(predictions, targets, groups, choices=[(0.5, 0.3)])
    centred = targets - targets.mean(0)
    energy, vectors = torch.linalg.eigh(centred.T @ centred)
    expected = vectors @ torch.diag((energy / energy.mean() + 0.3) ** -0.5) @ vectors.T
    torch.testing.assert_close(metric / metric.norm(), expected / expected.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close((predictions @ metric).norm(), predictions.norm())
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))[0]
    turned, _ = fit(predictions @ turn, targets @ turn, groups, choices=[(0.5, 0.3)])
    torch.testing.assert_close(turn.T @ metric @ turn, turned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [12, 24, 40])
def test_fewer_targets_than_dimensions_give_the_same_metric_and_scores(rows):
    predictions, targets, groups = (x[:rows].double() for x in loud_and_telling())
    centred = targets - targets.mean(0)
    covariance = centred.T @ centred
    for power, ridge in ((0.5, 0.3), (1.0, 1.0)):
        energy, vectors = torch.linalg.eigh(covariance / covariance.diagonal().mean())
        whole = (vectors * (energy.clamp_min(0) + ridge) ** -power) @ vectors.T
        metric, _ = fit(predictions, targets, groups, choices=[(power, ridge)])
        torch.testing.assert_close(metric / metric.norm(), whole / whole.norm())
        found = Compared(predictions, targets, *_spectrum(targets)).scores(power, ridge)
        torch.testing.assert_close(found, F.normalize(predictions @ whole, dim=1) @ targets.T)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_a_gain_within_one_standard_error_is_left(seed):
    """Where all directions of the targets tell the same, some metric is ahead by chance."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(120, 24, generator=generator)
    predictions = targets + 3 * torch.randn(120, 24, generator=generator)
    targets, groups = F.normalize(targets, dim=1), torch.arange(120)
    _, ahead = fit(predictions, targets, groups, choices=CHOICES[1:])
    metric, chosen = fit(predictions, targets, groups)
    assert ahead["criterion"] > chosen["plain_criterion"] and chosen["power"] == 0
    torch.testing.assert_close(metric, torch.eye(24), atol=1e-5, rtol=0)


def test_order_of_rows_does_not_matter_to_the_metric():
    predictions, targets, groups = loud_and_telling(80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    first, chosen = fit(predictions, targets, groups)
    second, again = fit(predictions[order], targets[order], groups[order])
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert chosen["power"] == again["power"] and chosen["criterion"] == pytest.approx(again["criterion"])


def test_large_sets_choose_on_a_sample():
    predictions, targets, groups = loud_and_telling(300)
    _, chosen = fit(predictions, targets, groups // 2, max_selection_rows=100)
    assert (chosen["power"], chosen["ridge"]) in CHOICES and chosen["power"] > 0


def test_two_directions_are_chosen_together_and_rows_need_no_common_order():
    predictions, targets, groups = loud_and_telling(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    said = {("x", "y"): predictions, ("y", "x"): predictions[order]}
    sides, ids = {"y": targets[order], "x": targets}, {"x": groups, "y": groups[order]}
    metrics, chosen = fit_target_metrics(said, sides, {side: rows % 5 for side, rows in ids.items()}, ids)
    assert chosen["power"] > 0
    torch.testing.assert_close(metrics["x", "y"], metrics["y", "x"], atol=1e-4, rtol=1e-4)  # a problem of one kind
    alone, _ = fit(predictions, targets, groups, choices=[(chosen["power"], chosen["ridge"])])
    torch.testing.assert_close(metrics["x", "y"], alone, atol=1e-4, rtol=1e-4)


def test_several_targets_of_one_source():
    predictions, targets, groups = loud_and_telling(100)
    items = {"x": groups, "y": groups.repeat(3)}
    folds = {side: rows % 5 for side, rows in items.items()}
    metrics, chosen = fit_target_metrics({("x", "y"): predictions}, {"y": targets.repeat(3, 1)}, folds, items)
    assert metrics["x", "y"].shape == (24, 24) and 0 < chosen["criterion"] <= 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"predictions": torch.zeros(3, 4)}, "expected predictions"),
        ({"choices": []}, "at least one pair"),
        ({"choices": [(1.0, 0.0)]}, "ridge above 0"),
        ({"folds": 1}, "two folds"),
    ],
)
def test_bad_input(change, message):
    given = {"predictions": torch.randn(6, 4), "targets": torch.randn(6, 4), "groups": torch.arange(6), **change}
    with pytest.raises(ValueError, match=message):
        fit(given.pop("predictions"), given.pop("targets"), given.pop("groups"), **given)


def test_directions_that_are_no_pair():
    with pytest.raises(ValueError, match="between a pair"):
        fit_target_metrics({("x", "y"): torch.zeros(2, 2), ("z", "y"): torch.zeros(2, 2)}, {}, {}, {})

"""Closed forms: the leave-group-out identity against refitting, Nyström against the exact kernel, and equivariances."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.closed_form import closed_form_path, fit_closed_form, retrieval_criterion

KINDS = ("ridge", "kernel")


def unit_rows(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def pairs(n=30, d_source=6, d_target=4, n_groups=12, seed=0):
    """Sources, targets that follow from them with noise, and groups of unequal size (0 always the largest)."""
    generator = torch.Generator().manual_seed(seed + 1000)
    x = unit_rows(n, d_source, seed)
    mix = torch.randn(d_source, d_target, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d_target, generator=generator, dtype=torch.float64)
    groups = torch.cat([torch.arange(n_groups), torch.randint(0, n_groups, (n - n_groups,), generator=generator)])
    groups[groups == n_groups - 1] = 0
    return x, F.normalize(torch.tanh(2 * x @ mix) + 0.3 * noise, dim=1), groups


def features(fit, sources):
    if fit.kind == "ridge":
        return sources
    return torch.exp(fit.gamma * (F.normalize(sources, dim=1) @ fit.landmarks.T - 1))


def refit_and_predict(fit, sources, targets, weights, queries):
    """Penalised least squares with an intercept, straight from the normal equations."""
    phi = torch.cat([features(fit, sources), torch.ones(len(sources), 1, dtype=torch.float64)], dim=1)
    penalty = torch.zeros(phi.shape[1], phi.shape[1], dtype=torch.float64)
    p = phi.shape[1] - 1
    penalty[:p, :p] = torch.eye(p, dtype=torch.float64) if fit.kind == "ridge" else features(fit, fit.landmarks)
    solution = torch.linalg.solve(
        phi.T @ (weights[:, None] * phi) + fit.lam * penalty, phi.T @ (weights[:, None] * targets)
    )
    return torch.cat([features(fit, queries), torch.ones(len(queries), 1, dtype=torch.float64)], dim=1) @ solution


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    d_source=st.sampled_from([3, 8, 40]),  # fewer and more features than rows: primal and dual
    max_landmarks=st.sampled_from([7, 1000]),
    gamma=st.sampled_from([1.0, 4.0, 12.0]),
    lam=st.sampled_from([0.01, 0.3, 5.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_leave_group_out_equals_refitting_without_the_group(kind, d_source, max_landmarks, gamma, lam, weighted, seed):
    x, y, groups = pairs(d_source=d_source, seed=seed)
    weights = 0.2 + x[:, 0].abs() * 3 if weighted else torch.ones(len(x), dtype=torch.float64)
    fit = fit_closed_form(
        x, y, groups, kind=kind, gammas=(gamma,), lambdas=(lam,), max_landmarks=max_landmarks, weights=weights
    )
    if kind == "kernel" and max_landmarks > len(x) and d_source == 3:
        tolerance = 1e-4  # the reference solves with a nearly singular Gram matrix there
    else:
        tolerance = 1e-7
    for group in groups.unique():
        out = groups == group
        expected = refit_and_predict(fit, x[~out], y[~out], weights[~out], x[out])
        torch.testing.assert_close(fit.out_of_sample[out], expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(fit.predict(x), refit_and_predict(fit, x, y, weights, x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("copies", [1, 2])  # 1: dual path, 2: more rows than landmarks, Nyström path
def test_all_landmarks_equal_exact_kernel_ridge(copies):
    x, y, groups = pairs(n=25)
    x, groups = x.repeat(copies, 1), groups.repeat(copies)
    y = torch.cat([y, F.normalize(y + 0.3 * unit_rows(*y.shape, 5), dim=1)])[: len(x)]
    fit = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.1,))
    assert fit.landmarks.shape == (25, x.shape[1])
    n = len(x)
    ones = torch.ones(n, 1, dtype=torch.float64)
    kernel = torch.exp(4.0 * (x @ x.T - 1))
    saddle = torch.cat([torch.cat([kernel + 0.1 * torch.eye(n), ones], 1), torch.cat([ones.T, torch.zeros(1, 1)], 1)])
    solution = torch.linalg.solve(saddle, torch.cat([y, torch.zeros(1, y.shape[1])]))
    queries = unit_rows(9, x.shape[1], 77)
    expected = torch.exp(4.0 * (queries @ x.T - 1)) @ solution[:n] + solution[n]
    torch.testing.assert_close(fit.predict(queries), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_integer_weights_equal_repeated_rows(kind):
    x, y, groups = pairs()
    weights = torch.randint(1, 4, (len(x),), generator=torch.Generator().manual_seed(1))
    options = {"kind": kind, "gammas": (4.0,), "lambdas": (0.1,)}
    weighted = fit_closed_form(x, y, groups, weights=weights, **options)
    repeated = fit_closed_form(*(t.repeat_interleave(weights, dim=0) for t in (x, y, groups)), **options)
    queries = unit_rows(5, x.shape[1], 3)
    torch.testing.assert_close(weighted.predict(queries), repeated.predict(queries), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        weighted.out_of_sample.repeat_interleave(weights, dim=0), repeated.out_of_sample, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_rows_and_names_of_groups_do_not_matter(kind):
    x, y, groups = pairs()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    first = fit_closed_form(x, y, groups, kind=kind)
    second = fit_closed_form(x[order], y[order], 1000 - 7 * groups[order], kind=kind)
    assert (first.gamma, first.lam) == (second.gamma, second.lam)
    torch.testing.assert_close(first.out_of_sample[order], second.out_of_sample, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_shifting_the_targets_shifts_only_the_bias(kind):
    x, y, groups = pairs()
    options = {"kind": kind, "gammas": (2.0,), "lambdas": (0.3,)}
    first, shifted = (fit_closed_form(x, target, groups, **options) for target in (y, y + 5.0))
    torch.testing.assert_close(first.weight, shifted.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(first.out_of_sample + 5.0, shifted.out_of_sample, atol=1e-6, rtol=0)


def test_a_huge_penalty_predicts_the_mean_of_the_other_groups():
    x, y, groups = pairs()
    fit = fit_closed_form(x, y, groups, kind="ridge", lambdas=(1e12,))
    for group in groups.unique():
        expected = y[groups != group].mean(0).expand(int((groups == group).sum()), -1)
        torch.testing.assert_close(fit.out_of_sample[groups == group], expected, atol=1e-8, rtol=0)


def test_the_best_point_of_the_grid_is_chosen_and_fitted():
    x, y, groups = pairs(n=60, n_groups=40)
    fit = fit_closed_form(x, y, groups, gammas=(1.0, 4.0), lambdas=(0.01, 0.1, 1.0))
    assert [(row["gamma"], row["lam"]) for row in fit.grid] == [(g, v) for g in (1.0, 4.0) for v in (0.01, 0.1, 1.0)]
    best = max(fit.grid, key=lambda row: row["criterion"])
    assert (fit.gamma, fit.lam) == (best["gamma"], best["lam"])
    assert best["criterion"] == pytest.approx(retrieval_criterion(fit.out_of_sample, y, groups))
    alone = fit_closed_form(x, y, groups, gammas=(fit.gamma,), lambdas=(fit.lam,))
    torch.testing.assert_close(fit.weight, alone.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_holds_the_fit_of_every_grid_point(kind):
    x, y, groups = pairs()
    path = list(closed_form_path(x, y, kind=kind, gammas=(1.0, 4.0), lambdas=(0.1, 1.0)))
    assert len(path) == (4 if kind == "kernel" else 2)
    for fit in path:
        alone = fit_closed_form(x, y, groups, kind=kind, gammas=(fit.gamma or 1.0,), lambdas=(fit.lam,))
        torch.testing.assert_close(fit.predict(x), alone.predict(x))


def test_selection_on_a_subset_still_fits_every_row():
    x, y, groups = pairs(n=80, n_groups=60)
    some = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.1,), max_selection_rows=20)
    every = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.1,))
    torch.testing.assert_close(some.weight, every.weight)
    torch.testing.assert_close(some.out_of_sample, every.out_of_sample)
    assert some.grid[0]["criterion"] != every.grid[0]["criterion"]


def test_landmark_subset_is_seeded_and_distinct():
    x, y, groups = pairs(n=50, n_groups=20)
    x = torch.cat([x, x])
    fits = [fit_closed_form(x, y.repeat(2, 1), groups.repeat(2), max_landmarks=10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(fits[0].landmarks, fits[1].landmarks)
    assert not torch.equal(fits[0].landmarks, fits[2].landmarks)
    assert len(torch.unique(fits[0].landmarks, dim=0)) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64(kind):
    x, y, groups = (t.float() if t.is_floating_point() else t for t in pairs(n=80, n_groups=60))
    options = {"kind": kind, "gammas": (4.0,), "lambdas": (0.1,), "max_landmarks": 40}
    double, single = (fit_closed_form(x, y, groups, dtype=d, **options) for d in (torch.float64, torch.float32))
    assert single.weight.dtype == double.weight.dtype == torch.float32
    torch.testing.assert_close(single.out_of_sample, double.out_of_sample, atol=1e-3, rtol=0)


def test_criterion_is_one_when_perfect_and_counts_ties_against():
    y, groups = unit_rows(12, 5, 0), torch.arange(12)
    assert retrieval_criterion(y, y, groups) == pytest.approx(1.0)
    assert retrieval_criterion(y, y[:1].expand(12, -1), groups) == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": torch.zeros(30, dtype=torch.long)}, "two groups"),
        ({"groups": torch.arange(29)}, "one id a row"),
        ({"targets": torch.zeros(29, 4)}, "same rows"),
        ({"sources": torch.full((30, 6), torch.nan)}, "finite"),
        ({"kind": "cubic"}, "kind"),
        ({"lambdas": (0.0, 1.0)}, "lambdas"),
        ({"gammas": ()}, "gammas"),
        ({"max_landmarks": 0}, "max_landmarks"),
        ({"weights": torch.zeros(30)}, "positive"),
    ],
)
def test_bad_input_is_named(change, message):
    x, y, groups = pairs()
    with pytest.raises(ValueError, match=message):
        fit_closed_form(**{"sources": x, "targets": y, "groups": groups, **change})


def test_predict_names_a_wrong_width():
    fit = fit_closed_form(*pairs(), gammas=(2.0,), lambdas=(0.1,))
    with pytest.raises(ValueError, match="6-d sources"):
        fit.predict(torch.zeros(2, 5))
    assert fit.predict(torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 4)


def test_out_of_fold_is_leave_group_out_with_folds_as_groups():
    x, y, groups = pairs(n=40, n_groups=12)
    fit = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.3,), folds=groups % 3)
    by_fold = fit_closed_form(x, y, groups % 3, gammas=(4.0,), lambdas=(0.3,))
    torch.testing.assert_close(fit.out_of_fold, by_fold.out_of_sample)
    assert not torch.allclose(fit.out_of_fold, fit.out_of_sample)


def test_items_may_be_finer_than_groups():
    x, y, groups = pairs(n=40, n_groups=6)
    coarse = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.3,))
    fine = fit_closed_form(x, y, groups, gammas=(4.0,), lambdas=(0.3,), items=torch.arange(40))
    torch.testing.assert_close(coarse.out_of_sample, fine.out_of_sample)
    assert fine.grid[0]["criterion"] < coarse.grid[0]["criterion"]  # fewer positives to be found

"""Kernel ridge on many rows: the same as by eigendecomposition, whatever the chunks, and its own choice of the penalty."""

import pytest
import torch
from test_closed_form import pairs, unit_rows

from trainer import closed_form, solvers
from trainer.baselines import TRIALS, KernelRidge
from trainer.closed_form import closed_form_path, fit_closed_form
from trainer.evaluation import RetrievalData


def world():
    """60 rows, ten sources twice, groups of unequal size (the largest of 35 rows), weights."""
    x, y, groups = pairs(n=60, n_groups=25)
    x[50:] = x[:10]
    groups[25:] = groups[25:].clamp_max(4)
    return x, y, groups, 0.2 + x[:, 0].abs() * 3


@pytest.fixture
def large(monkeypatch):
    """From now on, more than five landmarks are too many for an eigendecomposition, and eleven rows make a chunk."""

    def switch():
        monkeypatch.setattr(closed_form, "EIGEN_LANDMARKS", 5)
        monkeypatch.setattr(closed_form, "SCREEN_ROWS", 40)
        monkeypatch.setattr(solvers, "CHUNK", 11)

    return switch


@pytest.mark.parametrize("max_landmarks", [1000, 20, 8])  # every row; fewer; fewer than the rows of a group
@pytest.mark.parametrize("weighted", [True, False])
def test_cholesky_factors_say_what_the_eigendecomposition_says(large, max_landmarks, weighted):
    x, y, groups, weights = world()
    options = {"gammas": (2.0,), "lambdas": (0.1,), "max_landmarks": max_landmarks, "folds": groups % 3, "seed": 3}
    options["weights"] = weights if weighted else None
    expected = fit_closed_form(x, y, groups, **options)
    large()
    found = fit_closed_form(x, y, groups, **options)
    assert torch.equal(found.landmarks, expected.landmarks)
    queries = unit_rows(9, x.shape[1], 1)
    torch.testing.assert_close(found.predict(queries), expected.predict(queries), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.out_of_sample, expected.out_of_sample, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.out_of_fold, expected.out_of_fold, atol=1e-8, rtol=0)
    assert found.grid[0]["criterion"] == pytest.approx(expected.grid[0]["criterion"])


def test_the_penalty_goes_down_while_that_helps_on_all_rows(large):
    x, y, groups, _ = world()
    large()
    lambdas = (0.001, 0.01, 0.1, 1.0, 10.0)
    told = []
    fit = fit_closed_form(x, y, groups, gammas=(1.0, 4.0), lambdas=lambdas, told=told.append)
    screened = [row for row in fit.grid if "rows" not in row]
    tried = [row for row in fit.grid if "rows" in row]
    assert len(screened) == 10 and {row["rows"] for row in tried} == {60}
    assert told == ["gamma 1", "gamma 4", *(f"lambda {row['lam']:g}" for row in tried)]
    best = max(screened, key=lambda row: row["criterion"])
    assert fit.gamma == best["gamma"] and tried[0]["lam"] == best["lam"]
    criteria = [row["criterion"] for row in tried]
    chosen = [row["lam"] for row in tried].index(fit.lam)
    assert criteria[: chosen + 1] == sorted(criteria[: chosen + 1]) and criteria[chosen] == max(criteria)
    assert chosen == len(tried) - 2 or (chosen == len(tried) - 1 and fit.lam == min(lambdas))
    alone = fit_closed_form(x, y, groups, gammas=(fit.gamma,), lambdas=(fit.lam,))
    torch.testing.assert_close(fit.weight, alone.weight)


def test_a_penalty_that_is_too_small_is_left_out(large, monkeypatch):
    x, y, groups, _ = world()
    large()
    lambdas = (0.001, 0.01, 0.1, 1.0, 10.0)

    def singular_below(limit):
        class Picky(solvers.Dual):
            def __init__(self, cosines, targets, weights, gamma, lam):
                if lam < limit:
                    raise torch.linalg.LinAlgError("not positive-definite")
                super().__init__(cosines, targets, weights, gamma, lam)

        monkeypatch.setattr(closed_form, "Dual", Picky)
        return fit_closed_form(x, y, groups, gammas=(1.0,), lambdas=lambdas)

    free = fit_closed_form(x, y, groups, gammas=(1.0,), lambdas=lambdas)
    start = next(row["lam"] for row in free.grid if "rows" in row)
    assert singular_below(start).lam == start  # nothing lower works
    assert singular_below(2 * start).lam == min(lam for lam in lambdas if lam > start)
    with pytest.raises(ValueError, match="large enough"):
        singular_below(100.0)


def test_the_path_holds_the_fit_of_every_grid_point(large):
    x, y, _, _ = world()
    expected = list(closed_form_path(x, y, gammas=(1.0, 4.0), lambdas=(0.1, 1.0)))
    large()
    found = list(closed_form_path(x, y, gammas=(1.0, 4.0), lambdas=(0.1, 1.0)))
    assert [(fit.gamma, fit.lam) for fit in found] == [(fit.gamma, fit.lam) for fit in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.predict(x), other.predict(x), atol=1e-8, rtol=0)


def test_the_baseline_compares_every_kernel_first_with_few_landmarks(large, monkeypatch):
    x, y, groups, _ = world()
    train, validation = {"image": x, "text": y}, RetrievalData.from_groups({"image": x, "text": y}, groups)
    monkeypatch.setattr("trainer.baselines.EIGEN_LANDMARKS", 5)
    monkeypatch.setattr("trainer.baselines.SCREEN_ROWS", 4)
    large()
    method = KernelRidge()
    fit = method.fit(train, validation, groups)
    assert method.trials == TRIALS
    assert len(fit.maps["image->text"].landmarks) == 50  # all that differ


def test_more_rows_get_fewer_landmarks_for_the_same_work():
    rows = [10, 16384, 20000, 100000, 10**6, 10**8]
    landmarks = [closed_form.default_landmarks(n) for n in rows]
    assert landmarks[0] >= 10 and landmarks[1] == 16384
    assert landmarks[1:] == sorted(landmarks[1:], reverse=True) and landmarks[-1] == closed_form.MIN_LANDMARKS
    assert landmarks[3] ** 2 * rows[3] == pytest.approx(16384**3, rel=1e-3)

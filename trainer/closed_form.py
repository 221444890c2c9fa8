"""Closed-form maps from one latent space to another: ridge and (Nyström) kernel ridge with an honest training error.

In: centred-unit latents of paired rows and a group id per row. Out: a `ClosedFormFit` with the map, and with a
prediction for every training row made *without* that row's group. No data is loaded and nothing is evaluated here; the
only randomness is the seeded choice of landmarks and of selection rows.

The problem solved, with features phi (n, p), an unpenalised intercept b and row weights w, is

    min_{A, b}  sum_i w_i || y_i - b - phi_i A ||^2  +  lambda * tr(A^T R A)

    ridge    phi(u) = u                                        R = I
    kernel   phi(u)_l = exp(gamma * (cos(u, landmark_l) - 1))   R = K_LL (landmark Gram matrix)

With every training row a landmark this *is* kernel ridge regression with an intercept (representer theorem:
Schölkopf and Smola 2002, section 4.2); with fewer it is Nyström / subset-of-regressors (Williams and Seeger 2001).
Targets and features are centred on their weighted training means, which solves for b exactly; so a left-out group
also leaves the means, and the identity used for it,

    e_G = (I - H_GG)^{-1} (y_G - yhat_G),   H the hat matrix including the intercept,

is exact for groups of any size (block form of PRESS: Cook and Weisberg 1982, section 3.6). One eigendecomposition per
gamma serves every lambda: `Spectrum` keeps H = 1 1^T / n + U diag(s^2 / (s^2 + lambda)) U^T. More landmarks than that
can take (`EIGEN_LANDMARKS`) are solved by `trainer.solvers`, one gamma and lambda at a time: gamma is chosen on a
part of the rows, lambda on all of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.solvers import Dual, Nystroem, Spectrum, choose_landmarks

KERNEL_GAMMAS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
KERNEL_LAMBDAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RIDGE_LAMBDAS = (0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
DOUBLE_ROWS = 4096
EIGEN_LANDMARKS = 2048  # more are factorised for one gamma and lambda at a time
SCREEN_ROWS = 2048  # on which gamma is chosen then
MAX_LANDMARKS = 16384  # so many rows are all landmarks
MIN_LANDMARKS = 2048


@dataclass
class ClosedFormFit:
    """A fitted map. `predict(u) = phi(u) @ weight + bias`.

    Attributes:
        kind: `"kernel"` or `"ridge"`.
        gamma: kernel sharpness; `None` for ridge.
        lam: the chosen ridge penalty.
        landmarks: `(L, d_source)` unit rows; `None` for ridge.
        weight: `(L, d_target)` for a kernel, `(d_source, d_target)` for ridge.
        bias: `(d_target,)`; the intercept, that is mean target minus mean feature times `weight`.
        out_of_sample: `(n, d_target)`; for each training row, the prediction of the fit that never saw its group
            (landmarks, gamma and lambda are held fixed); `None` from `closed_form_path`.
        out_of_fold: the same, made without the row's whole fold, where `folds` were given.
        grid: one `{"gamma", "lam", "criterion"}` per tried pair.
    """

    kind: str
    gamma: float | None
    lam: float
    landmarks: Tensor | None
    weight: Tensor
    bias: Tensor
    out_of_sample: Tensor | None = None
    out_of_fold: Tensor | None = None
    grid: list[dict] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "ClosedFormFit":
        """Moves its tensors, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def predict(self, sources: Tensor, chunk: int = 8192) -> Tensor:
        """Predicts targets, in chunks of rows: `(m, d_source) -> (m, d_target)` in the dtype of the fit."""
        sources = sources.to(self.weight.dtype)
        if sources.ndim != 2:
            raise ValueError(f"sources must be (rows, d_source), got shape {tuple(sources.shape)}")
        width = (self.weight if self.landmarks is None else self.landmarks.T).shape[0]
        if sources.shape[1] != width:
            raise ValueError(f"this map was fitted on {width}-d sources, got {sources.shape[1]}-d ones")
        parts = [_features(part, self.landmarks, self.gamma) @ self.weight + self.bias for part in sources.split(chunk)]
        return torch.cat(parts) if parts else self.weight.new_zeros(0, self.weight.shape[1])


def fit_closed_form(
    sources: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    kind: str = "kernel",
    gammas: Sequence[float] = KERNEL_GAMMAS,
    lambdas: Sequence[float] | None = None,
    max_landmarks: int | None = None,
    max_selection_rows: int = 4096,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
    items: Tensor | None = None,
    folds: Tensor | None = None,
    told: Callable[[str], None] = lambda what: None,
) -> ClosedFormFit:
    """Fits sources to targets and chooses (gamma, lambda) by leave-group-out retrieval on the training rows.

    Args:
        sources: `(n, d_source)` centred-unit latents.
        targets: `(n, d_target)` centred-unit latents of the same rows.
        groups: `(n,)` integer ids; rows of one group are left out together.
        kind: `"kernel"` or `"ridge"`.
        gammas: kernel sharpness values to try; ignored for ridge.
        lambdas: penalties to try; default `KERNEL_LAMBDAS` or `RIDGE_LAMBDAS`.
        max_landmarks: all distinct sources are landmarks up to this number, a seeded random subset above it. Default:
            `default_landmarks`.
        max_selection_rows: rows (whole groups, seeded) the criterion is measured on. Every row is always fitted.
        seed: for the two subsets.
        dtype: of the computation; default float64, but float32 above `DOUBLE_ROWS` rows, which halves the time and
            agrees to about 1e-3 at the chosen point (measured). The result has the dtype of `sources`.
        weights: `(n,)` positive row weights, default 1.
        items: `(n,)` integer ids; rows of one item are each other's positives. Default: the groups.
        folds: `(n,)` integer ids of large parts of the rows, whole groups each. For what is judged by retrieval within
            a fold: there no candidate has been a training target of the prediction that searches for it.
        told: called with what is tried next, for a progress bar.

    Raises:
        ValueError: shapes that do not fit together, fewer than two groups, an unknown kind, an empty or
            non-positive grid, non-finite values, weights that are not positive; penalties that are all too small for
            many rows in `dtype`.
    """
    lambdas = tuple(lambdas if lambdas is not None else (KERNEL_LAMBDAS if kind == "kernel" else RIDGE_LAMBDAS))
    problem = _Problem(sources, targets, groups, kind, gammas, lambdas, max_landmarks, seed, dtype, weights)
    items = problem.groups if items is None else items.to(problem.x.device)
    selection = selection_rows(problem.groups, max_selection_rows, problem.generator)
    if problem.is_large:
        return _fit_large(problem, lambdas, items, folds, selection, told)
    grid, gamma, lam, spectrum = _search(problem, lambdas, items, selection, told)
    fit = problem.fit(gamma, lam, *spectrum.solution(lam))
    every_row = torch.arange(len(sources), device=problem.x.device)
    fit.out_of_sample = spectrum.leave_group_out(problem.groups, every_row)(lam).to(sources.dtype)
    if folds is not None:
        fit.out_of_fold = spectrum.leave_group_out(folds.to(problem.x.device), every_row)(lam).to(sources.dtype)
    fit.grid = grid
    return fit


def closed_form_path(
    sources: Tensor,
    targets: Tensor,
    *,
    kind: str = "kernel",
    gammas: Sequence[float] = KERNEL_GAMMAS,
    lambdas: Sequence[float] = KERNEL_LAMBDAS,
    max_landmarks: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Iterator[ClosedFormFit]:
    """Every fit of a grid, lambda fastest, one decomposition per gamma; for a choice that is made elsewhere.

    Arguments and errors are those of `fit_closed_form`; `out_of_sample` stays `None`.
    """
    rows = torch.arange(len(sources), device=sources.device)
    problem = _Problem(sources, targets, rows, kind, gammas, tuple(lambdas), max_landmarks, seed, dtype, None)
    if problem.is_large:
        for gamma, lam in itertools.product(gammas, lambdas):
            solved = problem.solved(gamma, lam)
            yield problem.fit(gamma, lam, solved.weight, solved.bias)
        return
    for gamma, spectrum in problem.spectra():
        for lam in lambdas:
            yield problem.fit(gamma, lam, *spectrum.solution(lam))


def _search(problem: "_Problem", lambdas: Sequence[float], items: Tensor, selection: Tensor, told: Callable) -> tuple:
    """`(grid, gamma, lambda, spectrum)`: every pair by its leave-group-out criterion, and the first of the best."""
    grid, best = [], None
    for gamma, spectrum in problem.spectra(told):
        held_out = spectrum.leave_group_out(problem.groups, selection)
        for lam in lambdas:
            value = retrieval_criterion(held_out(lam), problem.y[selection], items[selection])
            grid.append({"gamma": gamma, "lam": lam, "criterion": value})
            if best is None or value > best[0]:
                best = (value, gamma, lam, spectrum)
    return grid, *best[1:]


def _fit_large(
    problem: "_Problem",
    lambdas: Sequence[float],
    items: Tensor,
    folds: Tensor | None,
    selection: Tensor,
    told: Callable[[str], None],
) -> ClosedFormFit:
    """`fit_closed_form` where there are too many landmarks for an eigendecomposition.

    Gamma is the best on `SCREEN_ROWS` rows. The best lambda there is where the search on all rows starts; it goes down
    while that helps, since more rows need less of a penalty, and up where the problem is singular with it.
    """
    gamma, lam, grid = problem.gammas[0], lambdas[0], []
    if len(problem.gammas) * len(lambdas) > 1:
        rows = selection_rows(problem.groups, SCREEN_ROWS, problem.generator)
        part = problem.x[rows].double(), problem.y[rows].double(), problem.groups[rows]
        small = _Problem(
            *part, "kernel", problem.gammas, lambdas, len(rows), 0, torch.float64, problem.weights[rows].double()
        )
        grid, gamma, lam, _ = _search(small, lambdas, items[rows], torch.arange(len(rows), device=rows.device), told)
    best, larger = None, sorted(value for value in lambdas if value > lam)
    for tried in [*sorted((value for value in lambdas if value <= lam), reverse=True), *larger]:
        if tried > lam and best is not None:
            break
        told(f"lambda {tried:g}")
        try:
            solved = problem.solved(gamma, tried)
        except torch.linalg.LinAlgError:  # so small a penalty leaves it singular in this precision
            continue
        said = solved.leave_group_out(problem.groups)
        value = retrieval_criterion(said[selection], problem.y[selection], items[selection])
        grid = [*grid, {"gamma": gamma, "lam": tried, "criterion": value, "rows": len(said)}]
        if best is not None and value <= best[0]:
            break
        best = value, tried, solved, said
    if best is None:
        raise ValueError(f"no penalty in {lambdas} is large enough for gamma={gamma:g} on {len(problem.x)} rows")
    _, lam, solved, said = best
    fit = problem.fit(gamma, lam, solved.weight, solved.bias)
    fit.out_of_sample = said.to(problem.out_dtype)
    if folds is not None:
        fit.out_of_fold = solved.leave_group_out(folds.to(problem.x.device)).to(problem.out_dtype)
    fit.grid = grid
    return fit


def default_landmarks(rows: int) -> int:
    """Every row up to `MAX_LANDMARKS`; of more rows so many that the work, rows times landmarks squared, is the same, but at
    least `MIN_LANDMARKS`: 9,400 of 50,000, 2,100 of a million."""
    if rows <= MAX_LANDMARKS:
        return MAX_LANDMARKS
    return max(MIN_LANDMARKS, round((MAX_LANDMARKS**3 / rows) ** 0.5))


def retrieval_criterion(predictions: Tensor, targets: Tensor, items: Tensor) -> float:
    """Inverse geometric mean rank, exp(-mean log rank): 1 is perfect.

    Each prediction `(m, d)` searches the targets `(m, d)` by cosine; targets of its item are positives, ties count
    against it. Of recall@k, their mean, MRR, cosine, squared error, InfoNCE and this one, this one followed test recall
    most closely over the grid (correlation 0.97-0.99 in every data set and direction measured): recall@k moves in
    steps of whole rows, squared error rewards shrinking everything towards the mean.
    """
    predictions, targets = F.normalize(predictions, dim=1).float(), F.normalize(targets, dim=1).float()
    ranks = []
    for part, own in zip(predictions.split(1024), items.split(1024), strict=True):
        scores, relevant = part @ targets.T, own[:, None] == items[None, :]
        best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~relevant).sum(dim=1))
    return float(torch.cat(ranks).double().log().mean().neg().exp())


class _Problem:
    """Checked data in the dtype of the computation, with its landmarks; hands out one spectrum per gamma."""

    def __init__(self, sources, targets, groups, kind, gammas, lambdas, max_landmarks, seed, dtype, weights):
        _check(sources, targets, groups, kind, gammas, lambdas, max_landmarks, weights)
        dtype = dtype or (torch.float64 if len(sources) <= DOUBLE_ROWS else torch.float32)
        self.kind, self.out_dtype = kind, sources.dtype
        self.gammas = tuple(gammas) if kind == "kernel" else (None,)
        self.x, self.y = sources.detach().to(dtype), targets.detach().to(dtype)
        self.groups = torch.unique(groups.to(self.x.device), return_inverse=True)[1]
        self.weights = torch.ones_like(self.x[:, 0]) if weights is None else weights.to(self.x)
        self.generator = torch.Generator().manual_seed(seed)
        max_landmarks = self.max_landmarks = max_landmarks or default_landmarks(len(sources))
        self.landmarks = choose_landmarks(self.x, max_landmarks, self.generator) if kind == "kernel" else None

    def spectra(self, told: Callable[[str], None] = lambda what: None) -> Iterator[tuple[float | None, Spectrum]]:
        cosines = None if self.landmarks is None else F.normalize(self.x, dim=1) @ self.landmarks.T
        for gamma in self.gammas:
            if gamma is not None:
                told(f"gamma {gamma:g}")
            yield gamma, Spectrum(self.x, self.y, self.weights, self.landmarks, cosines, gamma)

    @property
    def is_large(self) -> bool:
        """Whether there are more landmarks than an eigendecomposition should take."""
        return self.landmarks is not None and len(self.landmarks) > EIGEN_LANDMARKS

    def solved(self, gamma: float, lam: float) -> Dual | Nystroem:
        """The problem at one gamma and lambda; exact where the limit of landmarks allows it."""
        if len(self.x) > self.max_landmarks:
            return Nystroem(F.normalize(self.x, dim=1), self.y, self.weights, self.landmarks, gamma, lam)
        return Dual(self.cosines, self.y, self.weights, gamma, lam)

    @cached_property
    def cosines(self) -> Tensor:
        """Of every row with every row, `(n, n)`."""
        x = F.normalize(self.x, dim=1)
        return x @ x.T

    @cached_property
    def places(self) -> Tensor:
        """The landmark of every row, where all that differ are landmarks: `(n,)`."""
        return (F.normalize(self.x, dim=1) @ self.landmarks.T).argmax(1)

    def fit(self, gamma: float | None, lam: float, weight: Tensor, bias: Tensor) -> ClosedFormFit:
        if self.landmarks is not None and len(weight) > len(
            self.landmarks
        ):  # rows with the same source share a landmark
            weight = weight.new_zeros(len(self.landmarks), weight.shape[1]).index_add(0, self.places, weight)
        landmarks = None if self.landmarks is None else self.landmarks.to(self.out_dtype)
        return ClosedFormFit(self.kind, gamma, lam, landmarks, weight.to(self.out_dtype), bias.to(self.out_dtype))


def _features(sources: Tensor, landmarks: Tensor | None, gamma: float | None) -> Tensor:
    """`(m, d_source) -> (m, p)`."""
    if landmarks is None:
        return sources
    return torch.exp(gamma * (F.normalize(sources, dim=1) @ landmarks.T - 1))


def selection_rows(groups: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Rows of whole groups, at most `limit` of them (but never fewer than two groups)."""
    if len(groups) <= limit:
        return torch.arange(len(groups), device=groups.device)
    sizes = torch.bincount(groups)
    order = torch.randperm(len(sizes), generator=generator).to(groups.device)
    count = max(2, int((sizes[order].cumsum(0) <= limit).sum()))
    return torch.isin(groups, order[:count]).nonzero()[:, 0]


def _check(sources, targets, groups, kind, gammas, lambdas, max_landmarks, weights) -> None:
    if kind not in ("kernel", "ridge"):
        raise ValueError(f'kind must be "kernel" or "ridge", got {kind!r}')
    if sources.ndim != 2 or targets.ndim != 2 or len(sources) != len(targets):
        raise ValueError(
            "sources and targets must be (n, d) of the same rows, "
            f"got {tuple(sources.shape)} and {tuple(targets.shape)}"
        )
    if groups.shape != (len(sources),):
        raise ValueError(f"groups must be ({len(sources)},), one id a row, got {tuple(groups.shape)}")
    if len(torch.unique(groups)) < 2:
        raise ValueError("at least two groups are needed: leaving the only group out leaves nothing to fit")
    if not torch.isfinite(sources).all() or not torch.isfinite(targets).all():
        raise ValueError("sources and targets must be finite, got NaN or infinity")
    if not lambdas or min(lambdas) <= 0:
        raise ValueError(f"lambdas must be positive and at least one, got {lambdas}")
    if kind == "kernel" and (not gammas or min(gammas) <= 0):
        raise ValueError(f"gammas must be positive and at least one, got {gammas}")
    if max_landmarks is not None and max_landmarks < 1:
        raise ValueError(f"max_landmarks must be at least 1, got {max_landmarks}")
    if weights is not None and (weights.shape != (len(sources),) or not (weights > 0).all()):
        raise ValueError(f"weights must be ({len(sources)},) and all positive")

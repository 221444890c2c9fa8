"""A metric of the target space, in closed form: which directions of the target latents a score should listen to.

In: leave-group-out predictions of a closed form and the targets they aim at. Out: one symmetric matrix M such that
`(prediction @ M) . target` ranks better than `prediction . target`.

Least squares predicts best where targets vary most, and what varies most is often what all items of a kind share. With
C the covariance of the targets and c its mean eigenvalue,

    M = (C / c + ridge I)^(-power)

power 0 is the plain inner product; power 1 is Mahalanobis' (Fisher's discriminant direction, Fisher 1936), shrunken by
`ridge`; between them lies canonical correlation analysis, which whitens the targets by the power 1/2. Power and ridge
are chosen on the training rows alone, by folds of whole groups: a fold's targets have no part in the C they are judged
with. Nothing stored changes: M acts on the query's side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.closed_form import retrieval_criterion, selection_rows

POWERS = (0.25, 0.5, 0.75, 1.0)
RIDGES = (0.1, 0.3, 1.0, 3.0)
CHOICES = ((0.0, 1.0), *((power, ridge) for power in POWERS for ridge in RIDGES))


def fit_target_metric(
    predictions: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    choices: Sequence[tuple[float, float]] = CHOICES,
    folds: int = 5,
    max_selection_rows: int = 4096,
    seed: int = 0,
) -> tuple[Tensor, dict]:
    """Chooses (power, ridge) on training rows and returns the metric fitted on all of them.

    Args:
        predictions: `(n, d)`, each made without the row's own group (`ClosedFormFit.out_of_sample`).
        targets: `(n, d)` centred-unit latents.
        groups: `(n,)` integer ids; a group lies in one fold.
        choices: `(power, ridge)` pairs; the first of equals wins.
        folds: at least 2; fewer groups than folds: one group a fold.
        max_selection_rows: rows (whole groups, seeded) the choice is made on. The covariance is of all rows.
        seed: for folds and rows.

    Returns:
        `(M (d, d), {"power", "ridge", "criterion", "plain_criterion"})`; M keeps the predictions' overall length.

    Raises:
        ValueError: shapes that do not fit together, fewer than two groups or folds, no choices, or a choice with a
            negative power or a ridge that is not positive.
    """
    if predictions.shape != targets.shape or groups.shape != targets.shape[:1]:
        raise ValueError(
            "predictions and targets must be (n, d) of the same rows with one group each, got "
            f"{tuple(predictions.shape)}, {tuple(targets.shape)} and {tuple(groups.shape)}"
        )
    if not choices or any(power < 0 or ridge <= 0 for power, ridge in choices):
        raise ValueError(f"choices need a power from 0 and a ridge above 0, at least one pair, got {choices}")
    groups = torch.unique(groups, return_inverse=True)[1]
    count = int(groups.max()) + 1
    if count < 2 or folds < 2:
        raise ValueError(f"at least two groups and two folds are needed, got {count} and {folds}")
    generator = torch.Generator().manual_seed(seed)
    fold_of_row = (torch.randperm(count, generator=generator) % folds)[groups]
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    chosen[selection_rows(groups, max_selection_rows, generator)] = True
    criteria = torch.zeros(len(choices), dtype=torch.float64)
    for fold in fold_of_row[chosen].unique():
        energy, vectors = _spectrum(targets[fold_of_row != fold])
        here = chosen & (fold_of_row == fold)
        # a rotation of both sides changes no inner product, and makes every choice a weighting of columns
        said, true = predictions[here] @ vectors, targets[here] @ vectors
        for place, (power, ridge) in enumerate(choices):
            value = retrieval_criterion(said * (energy + ridge) ** -power, true, groups[here])
            criteria[place] += torch.tensor(value).log() * here.sum() / chosen.sum()
    best = int(criteria.argmax())  # the first of equals
    power, ridge = choices[best]
    energy, vectors = _spectrum(targets)
    metric = (vectors * (energy + ridge) ** -power) @ vectors.T
    metric *= predictions.norm() / (predictions @ metric).norm().clamp_min(1e-12)
    plain = choices.index((0.0, 1.0)) if (0.0, 1.0) in choices else best
    values = {"criterion": float(criteria[best].exp()), "plain_criterion": float(criteria[plain].exp())}
    return metric, {"power": power, "ridge": ridge, **values}


def _spectrum(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues over their mean `(d,)` and eigenvectors `(d, d)` of the targets' covariance."""
    centred = (targets - targets.mean(0)).double()
    energy, vectors = torch.linalg.eigh(centred.T @ centred)
    energy = energy.clamp_min(0)
    return (energy / energy.mean().clamp_min(1e-30)).to(targets.dtype), vectors.to(targets.dtype)

"""A metric of the target space, in closed form: which directions of the target latents a score should listen to.

In: out-of-fold predictions of closed forms and the targets they aim at. Out: for each direction one symmetric matrix
M such that `(prediction @ M) . target` ranks better than `prediction . target`.

Least squares predicts best where targets vary most, and what varies most is often what all items of a kind share. With
C the covariance of the targets and c its mean eigenvalue,

    M = (C / c + ridge I)^(-power)

power 0 is the plain inner product; power 1 is Mahalanobis' (Fisher's discriminant direction, Fisher 1936), shrunken by
`ridge`; between them lies canonical correlation analysis, which whitens the targets by the power 1/2. Power and ridge
are chosen on the training rows alone, by folds: the targets of a fold have no part in the C they are judged with, nor
in the closed form that searches among them (negatives that a closed form has seen look too much like what it predicts,
and the sharper M, the more). Where both directions between two modalities are trained, they are chosen together, for
the score that both vote in. Nothing stored changes: M acts on the query's side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

POWERS = (0.25, 0.5, 0.75, 1.0)
RIDGES = (0.1, 0.3, 1.0, 3.0)
PLAIN = (0.0, 1.0)
CHOICES = (PLAIN, *((power, ridge) for power in POWERS for ridge in RIDGES))


def fit_target_metrics(
    predictions: dict[tuple[str, str], Tensor],
    targets: dict[str, Tensor],
    folds: dict[str, Tensor],
    items: dict[str, Tensor],
    *,
    choices: Sequence[tuple[float, float]] = CHOICES,
    max_selection_rows: int = 4096,
    seed: int = 0,
) -> tuple[dict[tuple[str, str], Tensor], dict]:
    """Chooses (power, ridge) on training rows and returns the metrics fitted on all of them.

    Args:
        predictions: `{(source, target): (n_source, d_target)}` for one direction or for the two between a pair, each
            row made without its own fold (`ClosedFormFit.out_of_fold`).
        targets: `{modality: (n, d)}` centred-unit latents of every modality that is a target.
        folds: `{modality: (n,)}` integer ids for the rows of sources and targets.
        items: `{modality: (n,)}` integer ids for the same rows; equal ids match, and lie in one fold.
        choices: `(power, ridge)` pairs; the first of equals wins, and the plain inner product, where it is among
            them, unless the best is ahead of it by more than one standard error (of the paired difference).
        max_selection_rows: rows a side (whole items, seeded) that the choice is made on. Covariances are of all rows.
        seed: for those rows.

    Returns:
        `({(source, target): M (d_target, d_target)}, {"power", "ridge", "criterion", "plain_criterion"})`. M keeps the
        predictions' overall length. The criterion is the mean reciprocal rank over queries of all directions: a
        sharper M gains at the top of a list and loses at its end, so the mean log rank (measured) would choose too
        weak a one for recall.

    Raises:
        ValueError: shapes that do not fit together, fewer than two folds, no choices, or a choice with a
            negative power or a ridge that is not positive.
    """
    _check(predictions, targets, folds, items, choices)
    every, inverse = torch.unique(torch.cat(list(items.values())), return_inverse=True)
    items = dict(zip(items, inverse.split([len(rows) for rows in items.values()]), strict=True))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    most = torch.stack([torch.bincount(rows, minlength=len(every)) for rows in items.values()]).amax(0)
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[order[: max(2, int((most[order].cumsum(0) <= max_selection_rows).sum()))]] = True

    found = [[] for _ in choices]  # reciprocal ranks of all queries, under each choice
    for fold in torch.cat(list(folds.values())).unique():
        here = {m: (chosen[rows] & (folds[m] == fold)).nonzero()[:, 0] for m, rows in items.items()}
        parts = []
        for (source, target), said in predictions.items():
            spectrum = _spectrum(targets[target][folds[target] != fold])
            parts.append(Compared(said[here[source]], targets[target][here[target]], *spectrum))
        source, target = next(iter(predictions))
        match = items[source][here[source]][:, None] == items[target][here[target]][None, :]
        if match.any() and not match.all():
            for place, choice in enumerate(choices):
                found[place].append(reciprocal_ranks(parts, match, *choice))
    values = torch.stack([torch.cat(ranks or [torch.zeros(1)]) for ranks in found])  # (choices, queries)
    criteria = values.mean(1)
    best = int(criteria.argmax())  # the first of equals
    plain = choices.index(PLAIN) if PLAIN in choices else best
    gain = values[best] - values[plain]
    if gain.mean() <= gain.std(correction=0) / len(gain) ** 0.5:
        best = plain
    power, ridge = choices[best]
    metrics = {}
    for (source, target), said in predictions.items():
        energy, vectors = _spectrum(targets[target])
        metric = (vectors * ((energy + ridge) ** -power - ridge**-power)) @ vectors.T
        metric.diagonal().add_(ridge**-power)
        metrics[source, target] = metric * (said.norm() / (said @ metric).norm().clamp_min(1e-12))
    about = {"criterion": float(criteria[best]), "plain_criterion": float(criteria[plain])}
    return metrics, {"power": power, "ridge": ridge, **about}


class Compared:
    """Predictions and targets of one direction, whose inner products under any metric are cheap.

    In the targets' eigenbasis a metric weighs columns. Where there are fewer targets than dimensions, the basis spans
    what they vary in; outside it every energy is 0, and all a metric needs of it are the plain inner products and lengths.

    Args:
        said: `(n, d)`.
        true: `(m, d)`.
        energy: `(k,)`; None with `vectors` None compares under the plain inner product only.
        vectors: `(d, k)` orthonormal columns.
    """

    def __init__(self, said: Tensor, true: Tensor, energy: Tensor | None = None, vectors: Tensor | None = None):
        vectors = said.new_zeros(said.shape[1], 0) if vectors is None else vectors
        self.energy = said.new_zeros(0) if energy is None else energy
        self.said, self.true = said @ vectors, true @ vectors
        self.outside, self.lengths = None, 0.0
        if vectors.shape[1] < vectors.shape[0]:
            self.outside = said @ true.T - self.said @ self.true.T
            self.lengths = (said.square().sum(1) - self.said.square().sum(1)).clamp_min(0)

    def scores(self, power: float, ridge: float) -> Tensor:
        """Cosines of the predictions under the metric with the targets as they are, `(n, m)`."""
        weighted, rest = self.said * (self.energy + ridge) ** -power, ridge**-power
        table = weighted @ self.true.T
        if self.outside is not None:
            table = table + rest * self.outside
        lengths = (weighted.square().sum(1) + rest**2 * self.lengths).sqrt()
        return table / lengths.clamp_min(1e-12)[:, None]


def reciprocal_ranks(parts: list[Compared], match: Tensor, power: float, ridge: float) -> Tensor:
    """1 / rank of every query's best match, of both directions' standardised scores where there are two.

    Args:
        parts: a direction and its reverse, if there is one.
        match: `(n, m)` boolean, for the first direction.
    """
    scores = 0
    for place, part in enumerate(parts):
        found = part.scores(power, ridge)
        found = found.T if place else found
        scores = scores + found / found[~match].std(correction=0).clamp_min(1e-12)
    result = []
    for table, right in ((scores, match), (scores.T, match.T))[: len(parts)]:
        answered = right.any(1)
        table, right = table[answered], right[answered]
        best = table.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        result.append(1 / (1 + ((table >= best) & ~right).sum(1)).double())
    return torch.cat(result)


def _spectrum(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues over their mean `(k,)` and eigenvectors `(d, k)` of the targets' covariance; fewer targets than
    dimensions have `k < d`, and the eigenvalues that are left out are 0."""
    centred = (targets - targets.mean(0)).double()
    n, d = centred.shape
    if n >= d:
        energy, vectors = torch.linalg.eigh(centred.T @ centred)
        energy = energy.clamp_min(0)
    else:
        energy, left = torch.linalg.eigh(centred @ centred.T)
        keep = energy > energy[-1] * torch.finfo(energy.dtype).eps * d
        energy = energy[keep]
        vectors = centred.T @ left[:, keep] / energy.sqrt()
    return (energy * d / energy.sum().clamp_min(1e-30)).to(targets.dtype), vectors.to(targets.dtype)


def _check(predictions, targets, folds, items, choices) -> None:
    ways = list(predictions)
    if not ways or len(ways) > 2 or (len(ways) == 2 and ways[0] != ways[1][::-1]):
        raise ValueError(f"predictions are for one direction, or for the two between a pair, got {ways}")
    for (source, target), said in predictions.items():
        expected = (len(items[source]), targets[target].shape[-1])
        if tuple(said.shape) != expected or len(targets[target]) != len(items[target]):
            raise ValueError(
                f"{source}->{target}: expected predictions {expected} and one item id a target row, got "
                f"{tuple(said.shape)} and {len(items[target])} ids for {len(targets[target])} targets"
            )
    for side, ids in items.items():
        if folds[side].shape != ids.shape:
            raise ValueError(f"{side}: {len(folds[side])} fold ids for {len(ids)} rows")
    if not choices or any(power < 0 or ridge <= 0 for power, ridge in choices):
        raise ValueError(f"choices need a power from 0 and a ridge above 0, at least one pair, got {choices}")
    count = len(torch.cat(list(folds.values())).unique())
    if count < 2:
        raise ValueError(f"at least two folds are needed, got {count}")

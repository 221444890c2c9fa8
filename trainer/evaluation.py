"""Retrieval evaluation that every method shares: splits, one post-processing, one set of metrics, one table.

In: a fitted `Retriever` (our model or any baseline), latents and which items belong together. Out: metrics. Nothing is
trained here, and nothing ever looks at test queries except to score each of them on its own: scales, the hubness bank
and its strength come from training and validation data only (`fit_postprocessing`). The scoring rule itself is
`modeling_altmoe/scoring_altmoe.py`, because search uses the same one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling_altmoe.scoring_altmoe import (
    Postprocessing,
    Retriever,
    item_vectors,
    query_vectors,
    score_matrix,
)
from trainer.metrics.cross_modal_retrieval.cross_modal_retrieval import retrieval_metrics

KS = (1, 5, 10)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIR = ("image", "text")
# the columns of every table: what `fit_postprocessing` is asked for
VARIANTS = {
    "one_direction": {"both_directions": False, "correct_hubness": False},
    "both_directions": {"correct_hubness": False},
    "both_directions+hubness": {},
}


@dataclass(frozen=True)
class RetrievalData:
    """Items of two modalities to be matched.

    Attributes:
        latents: `{modality: (n_modality, d_modality)}`; the two sides may differ in length (five captions an image).
        relevant: boolean `(n_x, n_y)` for `pair = (x, y)`.
        pair: the two modalities, in the order of `relevant`.
    """

    latents: dict[str, Tensor]
    relevant: Tensor
    pair: tuple[str, str] = PAIR

    def __post_init__(self):
        missing = [modality for modality in self.pair if modality not in self.latents]
        if missing:
            raise ValueError(f"no latents for {missing}: got {sorted(self.latents)}")
        expected = tuple(len(self.latents[modality]) for modality in self.pair)
        if tuple(self.relevant.shape) != expected or self.relevant.dtype != torch.bool:
            raise ValueError(
                f"relevant must be boolean {expected} for {self.pair}, "
                f"got {self.relevant.dtype} {tuple(self.relevant.shape)}"
            )

    @classmethod
    def from_groups(cls, latents: dict[str, Tensor], groups: Tensor, pair: tuple[str, str] = PAIR) -> "RetrievalData":
        """Paired rows: items of one group `(n,)` are each other's positives."""
        return cls(latents, groups[:, None] == groups[None, :], pair)

    def directions(self) -> tuple[str, str]:
        x, y = self.pair
        return f"{x}->{y}", f"{y}->{x}"

    def relevant_for(self, direction: str) -> Tensor:
        """`(n_queries, n_gallery)`."""
        if direction not in self.directions():
            raise ValueError(f"this data is for {self.directions()}, got direction {direction!r}")
        return self.relevant if direction == self.directions()[0] else self.relevant.T


@torch.no_grad()
def evaluate_retrieval(
    retriever: Retriever, data: RetrievalData, post: Postprocessing | None = None, ks: Sequence[int] = KS
) -> dict:
    """Metrics of each direction of the pair that the retriever serves, and `mean_recall` over all their recall@k.

    Returns:
        `{"image->text": {...}, "text->image": {...}, "mean_recall": float}`, fractions.

    Raises:
        ValueError: the retriever serves neither direction, or the metric's own errors.
    """
    result = {}
    for direction in data.directions():
        if direction in retriever.directions:
            source, _, target = direction.partition("->")
            scores = score_matrix(retriever, post, direction, {source: data.latents[source]}, data.latents[target])
            result[direction] = _metrics(scores, data.relevant_for(direction), ks)
    return _with_mean(result, retriever, data)


def _metrics(scores: Tensor, relevant: Tensor, ks: Sequence[int]) -> dict:
    return retrieval_metrics(scores.float().cpu().numpy(), relevant.cpu().numpy(), ks)


def _with_mean(result: dict, retriever: Retriever, data: RetrievalData) -> dict:
    if not result:
        raise ValueError(f"the retriever serves {retriever.directions}, the data is for {data.directions()}")
    return {**result, "mean_recall": float(np.mean([metrics["mean_recall"] for metrics in result.values()]))}


@torch.no_grad()
def fit_postprocessing(
    retriever: Retriever,
    train: dict[str, Tensor],
    validation: RetrievalData,
    *,
    both_directions: bool = True,
    correct_hubness: bool = True,
    betas: Sequence[float] = BETAS,
    reverse_weights: Sequence[float] = (1.0,),
    top_k: int = 10,
    max_bank: int = 4096,
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> Postprocessing:
    """Measures the scales on validation pairs, fills the hubness bank from training items, chooses beta (and w).

    Args:
        train: latents `{modality: (n, d)}` of training items of both sides; at most `max_bank` seeded rows are kept.
        validation: calibration data; its queries set the scales and choose beta and w by mean recall.
        both_directions: `False` scores with w = 0.
        correct_hubness: `False` keeps beta at 0 and no bank.
        betas, reverse_weights: what to choose from; the first of equals wins, so put the simplest first.

    Raises:
        ValueError: validation without any non-matching pair, missing training modalities, or empty choices.
    """
    directions = [d for d in validation.directions() if d in retriever.directions]
    if not directions:
        _with_mean({}, retriever, validation)
    if not betas or not reverse_weights:
        raise ValueError("betas and reverse_weights need at least one value each")
    if validation.relevant.all():
        raise ValueError("every validation pair matches: the scale of non-matching scores cannot be measured")
    post = Postprocessing(top_k=top_k, scales=_scales(retriever, validation, directions))
    if correct_hubness:
        bank = {modality: _sample(train, modality, max_bank, seed) for modality in validation.pair}
        for direction in directions:
            source, _, target = direction.partition("->")
            post.query_bank[direction] = retriever.queries(direction, {source: bank[source]})
            post.gallery_bank[direction] = retriever.gallery(direction, bank[target])
    best = (-1.0, 0.0, 0.0)
    for weight in reverse_weights if both_directions else (0.0,):
        post.reverse_weight, post.beta = weight, float(correct_hubness)
        parts = {}  # the score is linear in beta: its two parts are computed once
        for direction in directions:
            source, _, target = direction.partition("->")
            found = query_vectors(retriever, post, direction, {source: validation.latents[source]})
            items = item_vectors(retriever, post, direction, validation.latents[target])
            parts[direction] = found[:, :-1] @ items[:, :-1].T, items[:, -1]
        for beta in betas if correct_hubness else (0.0,):
            result = {
                direction: _metrics(scores + beta * correction, validation.relevant_for(direction), ks)
                for direction, (scores, correction) in parts.items()
            }
            best = max(
                best, (_with_mean(result, retriever, validation)["mean_recall"], weight, beta), key=lambda b: b[0]
            )
    post.validation_mean_recall, post.reverse_weight, post.beta = best
    return post


def _scales(retriever: Retriever, data: RetrievalData, directions: list[str]) -> dict[str, float]:
    """Standard deviation of each direction's scores of non-matching pairs."""
    scales = {}
    for direction in directions:
        source, _, target = direction.partition("->")
        scores = score_matrix(retriever, None, direction, {source: data.latents[source]}, data.latents[target])
        scales[direction] = float(scores[~data.relevant_for(direction).to(scores.device)].std(correction=0))
        if not scales[direction] > 0:
            raise ValueError(f"all non-matching validation scores of {direction} are equal: the retriever is constant")
    return scales


def _sample(train: dict[str, Tensor], modality: str, max_bank: int, seed: int) -> Tensor:
    if modality not in train or not len(train[modality]):
        raise ValueError(f"the hubness bank needs training latents of {modality!r}, got {sorted(train)}")
    rows = train[modality]
    if len(rows) <= max_bank:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:max_bank].sort().values
    return rows[chosen.to(rows.device)]


def evaluate_variants(
    retriever: Retriever,
    train: dict[str, Tensor],
    validation: RetrievalData,
    test: RetrievalData,
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> dict[str, dict]:
    """Metrics under each of `VARIANTS`."""
    return {
        name: evaluate_retrieval(
            retriever, test, fit_postprocessing(retriever, train, validation, ks=ks, seed=seed, **options), ks
        )
        for name, options in VARIANTS.items()
    }


def split_groups(
    groups: Sequence[str], seed: int, test_fraction: float = 0.2, validation_fraction: float = 0.1
) -> dict[str, np.ndarray]:
    """Splits rows by group: the sorted distinct groups are shuffled with the seed; no group stands on two sides.

    Args:
        groups: a group name per row.
        test_fraction, validation_fraction: shares of the *groups* (rounded, at least one group each).

    Returns:
        `{"train", "validation", "test"}`: sorted row indices.

    Raises:
        ValueError: fractions that leave nothing to train on, or fewer than three groups.
    """
    if not (0 < test_fraction and 0 < validation_fraction and test_fraction + validation_fraction < 1):
        raise ValueError(f"fractions must be positive and sum below 1, got {test_fraction} and {validation_fraction}")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    n_test, n_validation = (max(1, round(len(names) * f)) for f in (test_fraction, validation_fraction))
    if len(names) - n_test - n_validation < 1:
        raise ValueError(f"{len(names)} distinct groups are too few for train, validation and test")
    position = np.empty(len(names), dtype=np.int64)
    position[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names))
    place = position[member]
    return {
        "test": np.flatnonzero(place < n_test),
        "validation": np.flatnonzero((place >= n_test) & (place < n_test + n_validation)),
        "train": np.flatnonzero(place >= n_test + n_validation),
    }


def format_table(rows: dict[str, dict[str, Iterable[float]]], percent: bool = True) -> str:
    """Markdown table of mean ± standard error over seeds.

    Args:
        rows: `{row name: {column name: one value per seed}}`; a missing cell prints as "-".
        percent: multiply by 100 and print one decimal; otherwise three decimals.
    """
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    factor, digits = (100, 1) if percent else (1, 3)
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        texts = []
        for column in columns:
            values = np.asarray(list(cells.get(column, ())), dtype=np.float64) * factor
            if not len(values):
                texts.append("-")
            elif len(values) == 1:
                texts.append(f"{values[0]:.{digits}f}")
            else:
                error = values.std(ddof=1) / np.sqrt(len(values))
                texts.append(f"{values.mean():.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)

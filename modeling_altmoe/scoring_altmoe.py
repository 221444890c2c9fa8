"""How a query and an item are scored: one rule for our model, for every baseline, in evaluation and in search.

Comes in: a `Retriever` (query vectors and gallery vectors for a direction) and a `Postprocessing` measured on training
and validation data. Goes out: scores. Nothing here ever looks at other queries: each is scored on its own.

The score of a pair (x_i, y_j), searched in direction x->y, is

    S_ij = [q_xy(x_i).g_xy(y_j) - beta r_xy(j)] / s_xy  +  w [q_yx(y_j).g_yx(x_i) - beta r_yx(j)] / s_yx

q, g: query and gallery vectors of the retriever. s: standard deviation of the scores of non-matching validation pairs.
r(j): mean of the k highest similarities of item j to the *training* items of the query side (the hubness term of CSLS,
Conneau et al. 2018, "Word translation without parallel data", eq. 2-3, with a fixed bank as in Nearest Neighbor
Normalization, Chowdhury et al. 2024), so one stored scalar per gallery item and direction. w = 0 is the plain
one-direction score; w = 1 lets both directions vote. The term of the query in CSLS is constant per query and left out.

Items that the retriever was trained on are given `familiarity` less. What it predicts of them is their training partner
itself, so where new items stand beside them, theirs would be the highest scores of nearly every query.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PRINT_SIZE = 32  # numbers that tell a training item
KNOWN = 0.999  # similarity of prints from which it is the same item; of rounded latents (float16, other devices) it is higher


class Retriever(Protocol):
    """What a method must offer to be evaluated. All vectors are L2-normalised; the score is their inner product."""

    directions: list[str]

    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        """Source latents `{modality: (n, d_source)}` -> query vectors `(n, d)`."""

    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        """Target latents `(m, d_target)` -> gallery vectors `(m, d)`."""


@dataclass
class Postprocessing:
    """Everything `score_matrix` needs besides the retriever; made by `fit_postprocessing`, never from test data.

    Attributes:
        scales: `{direction: standard deviation of non-matching validation scores}`.
        reverse_weight: w above; 0 scores in one direction.
        beta: strength of the hubness correction; 0 is none.
        top_k: k of the hubness term.
        query_bank: `{direction: (B, d)}` query vectors of training items.
        gallery_bank: `{direction: (B, d)}` gallery vectors of training items.
        familiarity: what the score of a training item is lowered by; 0 is none.
        known: `{direction: (n, PRINT_SIZE)}` prints of all training items, see `prints`.
        validation_mean_recall: what the chosen settings reached on validation.
    """

    scales: dict[str, float] = field(default_factory=dict)
    reverse_weight: float = 0.0
    beta: float = 0.0
    top_k: int = 10
    query_bank: dict[str, Tensor] = field(default_factory=dict)
    gallery_bank: dict[str, Tensor] = field(default_factory=dict)
    familiarity: float = 0.0
    known: dict[str, Tensor] = field(default_factory=dict)
    validation_mean_recall: float | None = None

    def as_dict(self) -> dict:
        """The chosen settings without the banks, for logs and cards."""
        names = ("scales", "reverse_weight", "beta", "top_k", "familiarity", "validation_mean_recall")
        return {name: getattr(self, name) for name in names}


def reverse_direction(direction: str) -> str | None:
    """`"image->text"` -> `"text->image"`; `None` where several sources are fused (nothing to predict back)."""
    source, arrow, target = direction.partition("->")
    if not (source and arrow and target):
        raise ValueError(f'a direction is "source[+source...]->target", got {direction!r}')
    return None if "+" in source else f"{target}->{source}"


def hubness(items: Tensor, bank: Tensor, top_k: int = 10) -> Tensor:
    """Mean of the `top_k` highest similarities of each item `(m, d)` to the bank `(B, d)`: `(m,)`."""
    count = min(top_k, len(bank))
    return torch.cat([(part @ bank.T).topk(count, dim=1).values.mean(dim=1) for part in items.split(1024)])


def prints(items: Tensor) -> Tensor:
    """Unit vectors `(n, d)` in a few numbers each, `(n, PRINT_SIZE)` of length one: equal items have equal prints."""
    # numpy promises that this stream never changes, so prints may be kept
    directions = np.random.RandomState(0).standard_normal((items.shape[1], PRINT_SIZE))
    return F.normalize(items.float() @ torch.from_numpy(directions).to(items.device, torch.float32), dim=-1)


def is_known(items: Tensor, known: Tensor) -> Tensor:
    """Which of the gallery vectors `(n, d)` are among the training items whose prints are `known`: boolean `(n,)`."""
    if not len(known):
        return torch.zeros(len(items), dtype=torch.bool, device=items.device)
    return hubness(prints(items), known.float(), top_k=1) > KNOWN


def _reverse(retriever: Retriever, post: Postprocessing, direction: str) -> str | None:
    """The reverse direction if it is served and counts."""
    if direction not in retriever.directions:
        raise ValueError(f"this retriever serves {retriever.directions}, got direction {direction!r}")
    reverse = reverse_direction(direction)
    return reverse if post.reverse_weight and reverse in retriever.directions else None


@torch.no_grad()
def query_vectors(retriever: Retriever, post: Postprocessing, direction: str, queries: dict[str, Tensor]) -> Tensor:
    """Queries such that `query_vectors @ item_vectors.T` is the whole score: `(n, d_target [+ d_source] + 1)`.

    So the both-direction score with its hubness correction is one inner product, and any index that searches inner
    products finds it exactly, in one pass.

    Args:
        queries: source latents `{modality: (n, d_source)}`.

    Raises:
        ValueError: a direction the retriever does not serve.
    """
    reverse = _reverse(retriever, post, direction)
    parts = [retriever.queries(direction, queries) / post.scales.get(direction, 1.0)]
    if reverse:
        source = direction.partition("->")[0]
        weight = post.reverse_weight / post.scales.get(reverse, 1.0)
        parts.append(retriever.gallery(reverse, queries[source]) * weight)
    return torch.cat([*parts, parts[0].new_ones(len(parts[0]), 1)], dim=-1)


def item_vectors(
    retriever: Retriever,
    post: Postprocessing,
    direction: str,
    gallery: Tensor,
    correction: Tensor | None = None,
    predicted: Tensor | None = None,
) -> Tensor:
    """Gallery items, ready to be searched: see `query_vectors`. The last component corrects for hubness and familiarity.

    Args and errors: see `item_parts`.
    """
    return torch.cat(item_parts(retriever, post, direction, gallery, correction, predicted), dim=-1)


@torch.no_grad()
def item_parts(
    retriever: Retriever,
    post: Postprocessing,
    direction: str,
    gallery: Tensor,
    correction: Tensor | None = None,
    predicted: Tensor | None = None,
) -> list[Tensor]:
    """What `item_vectors` puts side by side: `(m, d_target)`, `(m, d_source)` where both directions count, `(m, 1)`.

    Args:
        gallery: target latents `(m, d_target)`.
        correction: `(m,)` the last component, where it was kept; None: it is measured.
        predicted: `(m, d_source)` the components before it, where they were kept; None: they are predicted.

    Raises:
        ValueError: a direction the retriever does not serve, or hubness asked for without a bank.
    """
    measure = post.beta and correction is None
    if measure and direction not in post.query_bank:
        raise ValueError(f"beta is {post.beta} but there is no bank of training queries for {direction!r}")
    reverse = _reverse(retriever, post, direction)
    parts = [retriever.gallery(direction, gallery)]
    hubs = parts[0].new_zeros(len(gallery))
    if measure:
        hubs -= hubness(parts[0], post.query_bank[direction], post.top_k) / post.scales.get(direction, 1.0)
    if reverse:
        target = direction.partition("->")[2]
        if predicted is None:
            predicted = retriever.queries(reverse, {target: gallery})  # what each item predicts on the query side
        parts.append(predicted.to(parts[0]))
        if measure:
            weight = post.reverse_weight / post.scales.get(reverse, 1.0)
            hubs -= weight * hubness(parts[1], post.gallery_bank[reverse], post.top_k)
    if correction is None:
        correction = post.beta * hubs
        if post.familiarity:
            correction = correction - post.familiarity * is_known(parts[0], post.known[direction])
    return [*parts, correction.to(hubs)[:, None]]


def score_matrix(
    retriever: Retriever, post: Postprocessing | None, direction: str, queries: dict[str, Tensor], gallery: Tensor
) -> Tensor:
    """Scores of every query for every gallery item, `(n, m)`; each row depends on its own query only.

    Args:
        post: `None` for the plain one-direction cosine.
        queries: source latents `{modality: (n, d_source)}`.
        gallery: target latents `(m, d_target)`.

    Raises:
        ValueError: a direction the retriever does not serve, or hubness asked for without a bank.
    """
    post = post or Postprocessing()
    items = item_vectors(retriever, post, direction, gallery)
    return query_vectors(retriever, post, direction, queries) @ items.T

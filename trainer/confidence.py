"""Calibrating confidence, and measuring it: coverage against precision.

In: tables of scores with their true matches, of items that what scored them was not fitted on (`trainer.measuring`: the
training rows out of fold, or validation). Out: a [`Calibration`], and figures that say how far it can be trusted. Every
query appears twice, once with its matches in the collection and once with them removed: then nothing can be found.
Collections of a few items are asked as well, because people search those, too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_altmoe.confidence_altmoe import SHORT_LIST, Calibration, score_features

SHARES = (1.0, 0.5, 0.25)  # parts of the collection, so that the fit sees what its size does
FEW = (2, 4, 8, 16)  # and collections of so few items, where score lists look otherwise


@dataclass
class Answers:
    """Score lists of queries with and without a match in the collection.

    Attributes:
        top_scores: `(n, SHORT_LIST)` in falling order; -inf after the last item of a smaller collection.
        right: `(n,)` whether the first result is a true match.
        present: `(n,)` whether the collection held one.
        sizes: `(n,)` items searched.
    """

    top_scores: Tensor
    right: Tensor
    present: Tensor
    sizes: Tensor

    @classmethod
    def join(cls, parts: list["Answers"]) -> "Answers":
        """All of several collections' answers."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def of(cls, top_scores: Tensor, right: Tensor, present: bool, size: int) -> "Answers":
        """Of one collection; a list that is not finite is left out."""
        usable = top_scores.isfinite().all(1)
        kept = F.pad(top_scores[usable], (0, SHORT_LIST - top_scores.shape[1]), value=-torch.inf)
        return cls(
            kept, right[usable], torch.full((len(kept),), present), torch.full((len(kept),), size, dtype=torch.long)
        )

    def by_size(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each size of a collection: the size, which rows, and their score lists as a search has them."""
        for size in self.sizes.unique().tolist():
            rows = self.sizes == size
            yield size, rows, self.top_scores[rows][:, :size].double()

    def features(self) -> Tensor:
        """`(n, 4)`, see `score_features`."""
        parts = torch.empty(len(self.sizes), 4, dtype=torch.float64)
        for size, rows, top_scores in self.by_size():
            parts[rows] = score_features(top_scores, size)
        return parts


def answers(scores: Tensor, relevant: Tensor, shares=(1.0,), seed: int = 0) -> Answers:
    """Ask every query twice, in collections of several sizes.

    Args:
        scores: `(queries, items)`.
        relevant: boolean, same shape.
        shares: parts of the items to search in; smaller ones are seeded samples.
        seed: for the samples.

    Raises:
        ValueError: shapes that differ, or too few items to remove a match from.
    """
    if scores.shape != relevant.shape or scores.shape[1] < 4:
        raise ValueError(
            f"scores and relevant must be (queries, at least 4 items), got {tuple(scores.shape)}, {tuple(relevant.shape)}"
        )
    generator, parts = torch.Generator().manual_seed(seed), []
    for share in shares:
        count = max(4, int(share * scores.shape[1]))
        items = torch.randperm(scores.shape[1], generator=generator)[:count].sort().values
        table, match = scores[:, items], relevant[:, items]
        asked = match.any(1)
        table, match = table[asked], match[asked]
        for present in (True, False):
            shown = table if present else table.masked_fill(match, -torch.inf)
            best = shown.topk(min(SHORT_LIST, count), dim=1)
            # removing every match must leave a list of finite scores
            values = torch.where(best.values.isfinite(), best.values, best.values[:, :1].expand_as(best.values))
            right = match.gather(1, best.indices[:, :1])[:, 0] & present
            parts.append(Answers.of(values, right, present, count))
    return Answers.join(parts)


def answers_of_few(scores: Tensor, relevant: Tensor, sizes=FEW, seed: int = 0) -> Answers:
    """Ask every query twice in each of some small collections of its own: random items, with and without one match.

    Args:
        scores, relevant: as for `answers`.
        sizes: items of a collection; a query with fewer that do not match is left out.
        seed: for the samples.
    """
    generator, parts = torch.Generator().manual_seed(seed), []
    match = (torch.rand(scores.shape, generator=generator) * relevant).argmax(1)
    for size in sizes:
        asked = relevant.any(1) & ((~relevant).sum(1) >= size)
        if not asked.any():
            continue
        order = torch.rand(scores.shape, generator=generator).masked_fill(relevant, 2.0)[asked]
        others = order.topk(size, dim=1, largest=False).indices
        for present in (True, False):
            items = torch.cat([match[asked, None], others[:, 1:]], dim=1) if present else others
            best = scores[asked].gather(1, items).topk(min(SHORT_LIST, size), dim=1)
            parts.append(Answers.of(best.values, (best.indices[:, 0] == 0) & present, present, size))
    return Answers.join(parts) if parts else Answers.of(scores[:0, :1], relevant[:0, 0], False, 1)


def fit_calibration(
    tables: Iterable[tuple[Tensor, Tensor]],
    target_precision: float = 0.5,
    caution: float = 0.0,
    penalty: float = 1.0,
    seed: int = 0,
) -> Calibration:
    """Logistic regression of "the first result is right", and a threshold for a precision.

    Args:
        tables: `(scores, relevant)` of one or more collections, each `(queries, items)`, post-processed as in search. They
            are also asked in samples of a few items, which shape the fit; the threshold is chosen without those.
        target_precision: the lowest confidence is chosen at and above which this share is right. Where no threshold
            reaches it, the one with the highest precision that still answers a tenth of what the lowest would.
        caution: how many standard errors below the precision that was seen the target must still be met (lower end
            of Wilson's interval, Wilson 1927): a threshold chosen on few queries is chosen for its luck, too.
        penalty: L2 on the standardised weights, in units of one example.
        seed: for the samples of the collections.

    Raises:
        ValueError: a precision outside 0 to 1, negative caution, no table, or too few items.
    """
    if not 0 < target_precision < 1:
        raise ValueError(f"target_precision={target_precision}: expected a share between 0 and 1.")
    if caution < 0:
        raise ValueError(f"caution={caution}: expected 0 or more standard errors.")
    asked, few = [], []
    for place, (scores, match) in enumerate(tables):
        asked.append(answers(scores.cpu(), match.cpu(), SHARES, seed + place))
        few.append(answers_of_few(scores.cpu(), match.cpu(), FEW, seed + place))
    if not asked:
        raise ValueError("calibration needs at least one table of scores.")
    asked, every = Answers.join(asked), Answers.join([*asked, *few])
    features, right = every.features(), every.right.double()
    mean, size = features.mean(0), features.std(0).clamp_min(1e-6)
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        logits = (features - mean) / size @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, right, reduction="sum")
        loss = loss + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    plain = weight.detach() / size
    result = Calibration(plain.tolist(), float(bias.detach() - plain @ mean), 0.5, target_precision)
    result.threshold = _threshold(_confidence(result, asked), asked.right, target_precision, caution)
    return result


def _confidence(calibration: Calibration, asked: Answers) -> Tensor:
    found = torch.empty(len(asked.sizes), dtype=torch.float64)
    for size, rows, top_scores in asked.by_size():
        found[rows] = calibration.confidence(top_scores, size)
    return found


def _threshold(confidence: Tensor, right: Tensor, target: float, caution: float) -> float:
    order = confidence.argsort(descending=True)
    count = torch.arange(1, len(order) + 1)
    precision = right[order].double().cumsum(0) / count
    queries = count / len(SHARES)  # the same queries in several samples of a collection are not new evidence
    spread = (precision * (1 - precision) / queries + caution**2 / (4 * queries**2)).sqrt()
    lowest = (precision + caution**2 / (2 * queries) - caution * spread) / (1 + caution**2 / queries)
    enough = count >= max(1, len(order) // 20)  # a tenth of the half that has a match
    reached = (lowest >= target) & enough
    place = int(reached.nonzero().max()) if reached.any() else int(precision.masked_fill(~enough, -1).argmax())
    return float(confidence[order][place])


def measure_confidence(calibration: Calibration, scores: Tensor, relevant: Tensor) -> dict:
    """Coverage, precision and calibration on data that the fit has not seen.

    Returns:
        `threshold`; `coverage` (share of queries with a match that are answered), `precision` (share of all answers that
        are right, when every second query has no match), `false_alarms` (share of queries without a match that are
        answered), `auroc` (a query with a match is more confident than one without), `auroc_ceiling` (what it would be if
        every right answer were more confident than all others: where the first result is wrong anyway, removing the
        match changes nothing that could be seen), `auroc_right` (a right answer is more confident than a wrong one),
        `calibration_error` (expected, ten bins), and `curve`, a list of `{"coverage", "precision", "confidence"}`.
    """
    asked = answers(scores.cpu(), relevant.cpu())
    confidence, right, present = _confidence(calibration, asked).numpy(), asked.right.numpy(), asked.present.numpy()
    found = confidence >= calibration.threshold
    bins = np.minimum((confidence * 10).astype(int), 9)
    error = sum(
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(10)
        if (bins == b).any()
    )
    curve = []
    for level in np.quantile(confidence, np.linspace(0.99, 0.0, 34)):
        chosen = confidence >= level
        curve.append(
            {
                "confidence": float(level),
                "coverage": float(chosen[present].mean()),
                "precision": float(right[chosen].mean()),
            }
        )
    return {
        "threshold": calibration.threshold,
        "coverage": float(found[present].mean()),
        "precision": float(right[found].mean()) if found.any() else 0.0,
        "false_alarms": float(found[~present].mean()),
        "auroc": _auroc(confidence[present], confidence[~present]),
        "auroc_ceiling": float((1 + right[present].mean()) / 2),
        "auroc_right": _auroc(confidence[right], confidence[~right]),
        "calibration_error": float(error),
        "curve": curve,
    }


def _auroc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Chance that one of `higher` is above one of `lower`; 0.5 where either is empty."""
    if not len(higher) or not len(lower):
        return 0.5
    return float((higher[:, None] > lower).mean() + (higher[:, None] == lower).mean() / 2)

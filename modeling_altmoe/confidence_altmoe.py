"""How sure a search may be of its best result: a calibrated probability from the shape of a query's score list.

Comes in: the highest scores of one query and the size of the collection. Goes out: the probability that the best result
is a true match. It depends on no other query. Fitted on validation data by `trainer.confidence`; half of the queries
it is fitted on have no match at all, so that a collection without an answer gives a low value.
"""

import math
from dataclasses import asdict, dataclass

import torch

SHORT_LIST = 10  # scores of a query that the features are made of


def score_features(top_scores: torch.Tensor, collection_size: int) -> torch.Tensor:
    """What tells a find from a mere maximum: `(n, 4)`.

    The best score; its distance to the next that differs (copies of the best item are no rivals); its distance to the
    mean of the others in the short list; the log of the collection's size, because the highest of many wrong scores grows
    with their number.

    Args:
        top_scores: `(n, k)` in falling order; the first `SHORT_LIST` are used, a shorter list is what it is.
        collection_size: number of items that were searched.

    Raises:
        ValueError: no scores.
    """
    return top_scores.new_tensor([_features(scores, collection_size) for scores in _short_lists(top_scores)])


def _short_lists(top_scores: torch.Tensor) -> list[list[float]]:
    if top_scores.dim() != 2 or not top_scores.shape[1]:
        raise ValueError(f"top_scores must be (queries, at least 1), got {tuple(top_scores.shape)}")
    return top_scores[:, :SHORT_LIST].double().tolist()


def _features(scores: list[float], size: int) -> tuple[float, float, float, float]:
    # ten numbers a query: plain Python takes a tenth of what tensors take for one
    best, others = scores[0], scores[1:] or scores
    below = max((score for score in others if score < best - 1e-4), default=best)
    return best, best - below, best - sum(others) / len(others), math.log(size)


@dataclass
class Calibration:
    """A logistic model of `score_features`.

    Attributes:
        weight: one number a feature.
        bias: the intercept.
        threshold: at or above this confidence a search says that it found something.
        target_precision: share of true matches among the found that the threshold was chosen for, on validation.
    """

    weight: list[float]
    bias: float
    threshold: float = 0.5
    target_precision: float = 0.5

    def confidence(self, top_scores: torch.Tensor, collection_size: int) -> torch.Tensor:
        """`(n, k)` falling scores -> `(n,)` probabilities that the first result is a true match; errors: `score_features`'s."""
        found = [self.sure(scores, collection_size) for scores in _short_lists(top_scores)]
        return torch.tensor(found, dtype=torch.float64)

    def sure(self, scores: list[float], collection_size: int) -> float:
        """As `confidence`, of one query: its falling scores -> the probability that the first result is a true match."""
        features = _features(scores[:SHORT_LIST], collection_size)
        logit = sum(weight * feature for weight, feature in zip(self.weight, features, strict=True)) + self.bias
        return 1 / (1 + math.exp(-max(-700.0, logit)))

    def as_dict(self) -> dict:
        """For `config.scoring`."""
        return asdict(self)

"""Retrieval metrics from scores: an `evaluate.Metric` and the two plain numpy functions behind it.

In: a score per (query, gallery item) and which items are relevant. Out: recall@k, median rank, MRR as fractions.
Needs numpy, datasets and evaluate only, so that the folder works alone (`evaluate.load` copies just this file).
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Cross-modal retrieval metrics. Each query scores every item of one gallery; one or more items are relevant to it.

The rank of a query is 1 + the number of NON-relevant items whose score is at least the best relevant score. So several
relevant items never push each other down, and ties count against the query: constant scores never look perfect.

recall@k is the share of queries whose rank is at most k (with several relevant items this is the "at least one in the
top k" of image-caption retrieval, not the information-retrieval recall). All values are fractions from 0 to 1 except
median_rank (from 1), n_queries and n_gallery.
"""

_CITATION = """\
@inproceedings{karpathy2015deep,
  title     = {Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author    = {Karpathy, Andrej and Fei-Fei, Li},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): for each query its score for every gallery item; higher is better, all rows
        equally long.
    references (list of list of int): for each query the indices of its relevant gallery items, at least one.
    ks (sequence of int): cut-offs of recall@k. Default (1, 5, 10).
Returns:
    recall@k (float): for each k, the share of queries with a relevant item among the first k.
    mean_recall (float): the mean of the recall@k.
    mrr (float): the mean of 1 / rank.
    median_rank (float): 1 is best.
    n_queries (int), n_gallery (int): sizes.
Raises:
    ValueError: no queries, an empty gallery, NaN scores, a query without a relevant item, an index out of range,
        rows of different lengths, or a k below 1.
Examples:
    >>> metric = evaluate.load("trainer/metrics/cross_modal_retrieval")
    >>> scores = [[0.9, 0.1, 0.3], [0.2, 0.4, 0.8]]
    >>> result = metric.compute(predictions=scores, references=[[0], [1]], ks=(1, 2))
    >>> result["recall@1"], result["recall@2"], result["mrr"]
    (0.5, 1.0, 0.75)
"""


def ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Pessimistic rank of the best relevant item of each query.

    Args:
        scores: `(n_queries, n_gallery)`, higher is better; infinities are allowed, NaN is not.
        relevant: boolean, same shape, at least one true in every row.

    Returns:
        `(n_queries,)` integers from 1: 1 + number of non-relevant items scoring at least the best relevant score.

    Raises:
        ValueError: see `_KWARGS_DESCRIPTION`.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise ValueError(
            f"scores and relevant must both be (queries, gallery), got {scores.shape} and {relevant.shape}"
        )
    if relevant.dtype != np.bool_:
        raise ValueError(f"relevant must be a boolean matrix, got dtype {relevant.dtype}")
    if scores.shape[0] == 0:
        raise ValueError("there are no queries to rank")
    if scores.shape[1] == 0:
        raise ValueError("the gallery is empty")
    bad = np.isnan(scores).any(axis=1)
    if bad.any():
        raise ValueError(f"scores of {int(bad.sum())} queries contain NaN (first: query {int(bad.argmax())})")
    missing = ~relevant.any(axis=1)
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} queries have no relevant gallery item (first: query {int(missing.argmax())}); "
            "leave them out or add their items to the gallery"
        )
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~relevant).sum(axis=1)


def retrieval_metrics(scores: np.ndarray, relevant: np.ndarray, ks=(1, 5, 10)) -> dict:
    """All metrics of `_KWARGS_DESCRIPTION` for `(n_queries, n_gallery)` scores and a boolean matrix of positives."""
    ks = tuple(ks)
    if not ks or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks must be whole numbers from 1, at least one, got {ks}")
    rank = ranks(scores, relevant)
    result = {f"recall@{int(k)}": float((rank <= k).mean()) for k in ks}
    result["mean_recall"] = float(np.mean(list(result.values())))
    result["mrr"] = float((1 / rank).mean())
    result["median_rank"] = float(np.median(rank))
    result["n_queries"], result["n_gallery"] = (int(size) for size in np.shape(scores))
    return result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CrossModalRetrieval(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10)) -> dict:
        lengths = {len(row) for row in predictions}
        if len(lengths) > 1:
            raise ValueError(f"every query must score the whole gallery, got rows of lengths {sorted(lengths)}")
        scores = np.asarray(predictions, dtype=np.float64).reshape(len(predictions), max(lengths, default=0))
        relevant = np.zeros(scores.shape, dtype=bool)
        for query, items in enumerate(references):
            index = np.asarray(items, dtype=np.int64)
            if len(index) and (index.min() < 0 or index.max() >= scores.shape[1]):
                raise ValueError(
                    f"references of query {query} must lie in 0..{scores.shape[1] - 1}, got {index.tolist()}"
                )
            relevant[query, index] = True
        return retrieval_metrics(scores, relevant, ks)

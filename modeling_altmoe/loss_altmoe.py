"""The energy of a batch: regression and contrastive terms, router losses, and their information-theoretic readings.

Comes in: predictions and the *frozen* target latents they are compared with (both in the target's frame). Goes out:
scalars, by name. Nothing here has parameters or knows where latents come from.

Source of the formulas: Alt-MoE (arXiv 2409.05929), L = alpha L_reg + (1 - alpha) L_cl; InfoNCE and its bound:
van den Oord et al. 2018; sigmoid loss: SigLIP, Zhai et al. 2023; load balance: Switch Transformers, Fedus et al.
2021 (eq. 4); router z-loss: ST-MoE, Zoph et al. 2022 (eq. 5).
"""

import math

import torch
from torch.nn import functional as F


def regression_loss(prediction: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """`cosine`: 1 - cos; `mse`: squared L2 distance; `smooth_l1`: summed Huber loss. Mean over the batch.

    Args:
        prediction: `(b, d)`.
        target: `(b, d)`.
        kind: one of the names above.
    """
    if kind == "cosine":
        return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    if kind == "mse":
        return (prediction - target).square().sum(-1).mean()
    return F.smooth_l1_loss(prediction, target, reduction="none").sum(-1).mean()


def info_nce(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """InfoNCE with any number of positives a row: `-log(sum of positives' probability)`, mean over rows.

    Duplicates of the positive are positives as well, so they are never pushed away.

    Args:
        logits: `(b, m)`, cosine / temperature.
        positives: `(b, m)` boolean, at least one a row.
    """
    chosen = logits.masked_fill(~positives, float("-inf"))
    return (logits.logsumexp(-1) - chosen.logsumexp(-1)).mean()


def sigmoid_loss(logits: torch.Tensor, positives: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's pairwise loss: every pair is its own yes-or-no question. Sum over candidates, mean over rows.

    Args:
        logits: `(b, m)`, cosine / temperature.
        positives: `(b, m)` boolean.
        bias: scalar, about -10 at the start: most pairs do not match.
    """
    sign = positives.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(sign * (logits + bias)).sum(-1).mean()


def contrastive_loss(
    logits: torch.Tensor, positives: torch.Tensor, kind: str, bias: torch.Tensor, symmetric: bool = False
) -> torch.Tensor:
    """One of the contrastive terms; `symmetric` averages in the columns (each target ranks the predictions).

    Columns without a positive in the batch (negatives from a store) cannot rank anything and are left out.
    """
    if kind == "sigmoid":
        return sigmoid_loss(logits, positives, bias)
    loss = info_nce(logits, positives)
    if symmetric:
        answered = positives.any(0)
        loss = (loss + info_nce(logits.T[answered], positives.T[answered])) / 2
    return loss


def load_balance_loss(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Switch load balance, averaged over gates: 1 when experts are used evenly, up to e / k when they collapse.

    Args:
        logits: `(b, l, e)`; -inf marks experts out of reach.
        indices: `(b, l, k)`.
    """
    reachable = torch.isfinite(logits).any(0).any(0).sum()
    used = F.one_hot(indices, logits.shape[-1]).float().sum(2).mean(0) / indices.shape[-1]  # (l, e), sums to 1
    wanted = logits.float().softmax(-1).mean(0)  # (l, e)
    return reachable * (used * wanted).sum(-1).mean()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition of the gates: keeps their logits small. `logits`: `(b, l, e)`."""
    return logits.float().logsumexp(-1).square().mean()


@torch.no_grad()
def information_bound(contrastive: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """InfoNCE's lower bound on I(x;y) in nats: log of (candidates per positive) - loss.

    Args:
        contrastive: the InfoNCE loss, scalar.
        positives: `(b, m)` boolean.
    """
    candidates = positives.shape[1] / positives.sum(-1).float().mean()
    return candidates.log() - contrastive


@torch.no_grad()
def conditional_entropy(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Gaussian estimate of H(y|x) in nats per dimension, in the target's frame: 0.5 log(2 pi e var), residual variances.

    Args:
        prediction: `(b, d)` the regression prediction.
        target: `(b, d)`.
    """
    variance = (target - prediction).float().square().mean(0).clamp_min(1e-12)
    return 0.5 * (math.log(2 * math.pi * math.e) + variance.log()).mean()

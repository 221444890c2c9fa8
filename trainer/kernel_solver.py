"""Kernel ridge regression on many rows, for one sharpness and one penalty at a time, by Cholesky factors.

What `trainer.closed_form` says of a few thousand rows by an eigendecomposition (one for all penalties, but fifteen times as
slow and without a bound on its memory), said of tens of thousands: weight, intercept, and a prediction for every row made
without its group. In: unit sources, targets, row weights. Nothing is chosen here.

With all rows as landmarks (`Dual`, Saunders et al. 1998; the intercept as in least-squares SVMs, Suykens 2002),

    A = K + lambda diag(1/w),   P = A^-1 - A^-1 1 1^T A^-1 / (1^T A^-1 1),   alpha = P y,   e_G = P_GG^-1 alpha_G

where e_G are the residuals of group G under the fit that never saw it (Cawley and Talbot 2004 for single rows). With
fewer landmarks (`Nystroem`, Williams and Seeger 2001) the normal equations are solved in the landmarks' whitened features,
and e_G = (I - H_GG)^-1 (y_G - yhat_G). Rows are read in chunks, so memory grows with the landmarks only.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 8192  # rows whose features are in memory at once


class Dual:
    """Every row is a landmark. `cosines` `(n, n)`, `targets` `(n, d)`, `weights` `(n,)`."""

    def __init__(self, cosines: Tensor, targets: Tensor, weights: Tensor, gamma: float, lam: float):
        gram = cosines.sub(1).mul_(gamma).exp_()
        gram.diagonal().add_(lam / weights)
        self.targets, self.factor = targets, torch.linalg.cholesky(gram)
        del gram
        solved = torch.cholesky_solve(torch.cat([targets, torch.ones_like(targets[:, :1])], dim=1), self.factor)
        self.ones = solved[:, -1]  # A^-1 1
        self.bias = solved[:, :-1].sum(0) / self.ones.sum()
        self.weight = solved[:, :-1] - self.ones[:, None] * self.bias

    def leave_group_out(self, groups: Tensor) -> Tensor:
        """`(n, d)` predictions without each row's own group."""
        inverse = torch.cholesky_inverse(self.factor)
        predictions = torch.empty_like(self.targets)
        for index in groups_by_size(groups):
            for part in index.split(max(1, CHUNK // index.shape[1])):
                own = self.ones[part]
                block = inverse[part[:, :, None], part[:, None, :]]
                block = block - own[:, :, None] * own[:, None, :] / self.ones.sum()
                error = torch.linalg.solve(block, self.weight[part])
                predictions[part.flatten()] = self.targets[part.flatten()] - error.flatten(0, 1)
        return predictions


class Nystroem:
    """Fewer landmarks than rows. `sources` `(n, d_source)` and `landmarks` `(m, d_source)` of length one."""

    def __init__(self, sources: Tensor, targets: Tensor, weights: Tensor, landmarks: Tensor, gamma: float, lam: float):
        self.sources, self.targets, self.landmarks, self.gamma = sources, targets, landmarks, gamma
        self.share = weights / weights.sum()
        self.root = weights.sqrt()[:, None]
        self.whiten = cholesky_with_jitter(torch.exp(gamma * (landmarks @ landmarks.T - 1)))
        m = len(landmarks)
        gram, kernel_mean = targets.new_zeros(m, m), targets.new_zeros(m)
        for rows in torch.arange(len(sources), device=sources.device).split(CHUNK):
            kernel_mean += self.share[rows] @ self._kernel(rows)
        self.mean = torch.linalg.solve_triangular(self.whiten, kernel_mean[:, None], upper=False)[:, 0]
        self.target_mean = self.share @ targets
        cross = targets.new_zeros(m, targets.shape[1])
        for rows in torch.arange(len(sources), device=sources.device).split(CHUNK):
            z = self.root[rows] * (self._features(rows) - self.mean)
            gram += z.T @ z
            cross += z.T @ (self.root[rows] * (targets[rows] - self.target_mean))
        gram.diagonal().add_(lam)
        self.factor = torch.linalg.cholesky(gram)
        self.coefficients = torch.cholesky_solve(cross, self.factor)
        self.weight = torch.linalg.solve_triangular(self.whiten.T, self.coefficients, upper=True)
        self.bias = self.target_mean - self.mean @ self.coefficients

    def _kernel(self, rows: Tensor) -> Tensor:
        return torch.exp(self.gamma * (self.sources[rows] @ self.landmarks.T - 1))

    def _features(self, rows: Tensor) -> Tensor:
        """Kernel features `C^-1 k`, `(len(rows), m)`: their inner products are the kernel's."""
        return torch.linalg.solve_triangular(self.whiten, self._kernel(rows).T, upper=False).T

    def leave_group_out(self, groups: Tensor) -> Tensor:
        """`(n, d)` predictions without each row's own group."""
        predictions = torch.empty_like(self.targets)
        for buckets in _in_chunks(groups_by_size(groups), CHUNK):
            rows = torch.cat([index.flatten() for index in buckets])
            z = self.root[rows] * (self._features(rows) - self.mean)
            residual = self.root[rows] * (self.targets[rows] - self.target_mean) - z @ self.coefficients
            basis = torch.linalg.solve_triangular(self.factor, z.T, upper=False).T
            basis = torch.cat([basis, self.share[rows].sqrt()[:, None]], dim=1)  # the intercept's column
            start = 0
            for index in buckets:
                count, size = index.shape
                here = slice(start, start := start + count * size)
                block, own = basis[here].unflatten(0, (count, size)), residual[here].unflatten(0, (count, size))
                error = _solve_without(block, own).flatten(0, 1)
                predictions[rows[here]] = self.targets[rows[here]] - error / self.root[rows[here]]
        return predictions


def _solve_without(basis: Tensor, residual: Tensor) -> Tensor:
    """`(I - B B^T)^-1 r` for a batch, by the smaller of the two sides (Woodbury)."""
    size, width = basis.shape[1:]
    if size <= width:
        hat = basis @ basis.transpose(1, 2)
        return torch.linalg.solve(torch.eye(size, dtype=hat.dtype, device=hat.device) - hat, residual)
    inner = torch.eye(width, dtype=basis.dtype, device=basis.device) - basis.transpose(1, 2) @ basis
    return residual + basis @ torch.linalg.solve(inner, basis.transpose(1, 2) @ residual)


def _in_chunks(buckets: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Whole groups, at most `limit` rows at a time (a group of more stands alone)."""
    now, rows = [], 0
    for index in buckets:
        for part in index.split(max(1, limit // index.shape[1])):
            if now and rows + part.numel() > limit:
                yield now
                now, rows = [], 0
            now.append(part)
            rows += part.numel()
    if now:
        yield now


def choose_landmarks(sources: Tensor, max_landmarks: int, generator: torch.Generator) -> Tensor:
    """Distinct unit sources, in row order, or a seeded random subset of them: `(L, d_source)`."""
    _, inverse = torch.unique(sources, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(sources), device=sources.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(sources), device=sources.device), "amin").sort().values
    if len(first) > max_landmarks:
        chosen = torch.randperm(len(first), generator=generator)[:max_landmarks].sort().values
        first = first[chosen.to(first.device)]
    return F.normalize(sources[first], dim=1)


def groups_by_size(groups: Tensor) -> list[Tensor]:
    """Positions of the rows of each group, stacked for groups of equal size: a list of `(n_groups, size)`."""
    order = torch.argsort(groups, stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    return [
        order[starts[sizes == size][:, None] + torch.arange(int(size), device=groups.device)]
        for size in torch.unique(sizes)
    ]


def cholesky_with_jitter(gram: Tensor) -> Tensor:
    """Cholesky factor of a Gram matrix plus the smallest jitter that succeeds.

    Raises:
        RuntimeError: none does.
    """
    jitter = 10 * torch.finfo(gram.dtype).eps * float(gram.diagonal().sum())
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(gram + jitter * identity)
        if not info.any():
            return factor
        jitter *= 10
    raise RuntimeError(f"the landmark Gram matrix stays singular with jitter {jitter:g}: are the sources finite?")

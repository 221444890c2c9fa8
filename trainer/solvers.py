"""The least-squares problem of `trainer.closed_form`, solved in three ways: weight, intercept, and a prediction for every row
made without its group. In: unit sources, targets, row weights. Nothing is chosen here.

`Spectrum` decomposes a few thousand rows or landmarks once and then answers for every penalty. For more, `Dual` and
`Nystroem` factorise (Cholesky) for one sharpness and one penalty at a time, which is many times faster.

With all rows as landmarks (`Dual`, Saunders et al. 1998; the intercept as in least-squares SVMs, Suykens 2002),

    A = K + lambda diag(1/w),   P = A^-1 - A^-1 1 1^T A^-1 / (1^T A^-1 1),   alpha = P y,   e_G = P_GG^-1 alpha_G

where e_G are the residuals of group G under the fit that never saw it (Cawley and Talbot 2004 for single rows). With
fewer landmarks (`Nystroem`, Williams and Seeger 2001) the normal equations are solved in the landmarks' whitened features,
and e_G = (I - H_GG)^-1 (y_G - yhat_G). Rows are read in chunks, so memory grows with the landmarks only.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 8192  # rows whose features are in memory at once


class Spectrum:
    """Eigendecomposition of one weighted, centred problem; answers for any lambda.

    Tilde quantities are rows scaled by sqrt(w); `unit` is the scaled column of ones, `P = I - unit unit^T` centres.
    Dual (n <= p):  P D Phi R^{-1} Phi^T D P = U s^2 U^T           (kernel: Phi R^{-1} Phi^T = K; ridge: X X^T)
    Primal (n > p): Z = P D Phi C^{-T}, R = C C^T, Z^T Z = V s^2 V^T, U = Z V / s
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        landmarks: Tensor | None,
        cosines: Tensor | None,
        gamma: float | None,
    ):
        self.root = weights.sqrt()[:, None]  # (n, 1)
        self.unit = self.root / self.root.norm()
        self.features = x if landmarks is None else torch.exp(gamma * (cosines - 1))  # (n, p)
        self.targets = y
        self.centred_targets = self._centre(self.root * y)
        self.is_kernel = landmarks is not None
        n, p = self.features.shape
        self.is_dual = n <= p
        if self.is_dual:
            gram = self.features if self.is_kernel else self.features @ self.features.T
            gram = self._centre(self._centre(self.root * gram * self.root.T).T)
            energy, self.vectors = torch.linalg.eigh((gram + gram.T) / 2)
            self.energy = energy.clamp_min(0)
            self.rotated_targets = self.vectors.T @ self.centred_targets  # U^T P Y~: (k, d_target)
        else:
            self.factor = (
                cholesky_with_jitter(torch.exp(gamma * (landmarks @ landmarks.T - 1))) if self.is_kernel else None
            )
            z = self._centre(self.root * self.features)
            if self.is_kernel:
                z = torch.linalg.solve_triangular(self.factor, z.T, upper=False).T
            energy, vectors = torch.linalg.eigh(z.T @ z)
            keep = energy > energy[-1] * torch.finfo(energy.dtype).eps * p
            self.energy, self.vectors, self.whitened = energy[keep], vectors[:, keep], z
            self.rotated_targets = (self.vectors.T @ (z.T @ self.centred_targets)) / self.energy.sqrt()[:, None]

    def _centre(self, rows: Tensor) -> Tensor:
        return rows - self.unit @ (self.unit.T @ rows)

    def _left(self, rows: Tensor) -> Tensor:
        """Rows of U: `(len(rows), k)`."""
        if self.is_dual:
            return self.vectors[rows]
        return self.whitened[rows] @ (self.vectors / self.energy.sqrt())

    def solution(self, lam: float) -> tuple[Tensor, Tensor]:
        """`(weight (p, d_target), bias (d_target,))` at lambda."""
        if self.is_dual:
            dual = self.root * self._centre(self.vectors @ (self.rotated_targets / (self.energy + lam)[:, None]))
            weight = dual if self.is_kernel else self.features.T @ dual
        else:
            weight = self.vectors @ (self.rotated_targets * (self.energy.sqrt() / (self.energy + lam))[:, None])
            if self.is_kernel:
                weight = torch.linalg.solve_triangular(self.factor.T, weight, upper=True)
        share = (self.root**2 / (self.root**2).sum()).T  # (1, n)
        return weight, (share @ self.targets - (share @ self.features) @ weight)[0]

    def leave_group_out(self, groups: Tensor, rows: Tensor) -> Callable[[float], Tensor]:
        """`lambda -> (len(rows), d_target)` predictions without each row's own group. `rows` must hold whole groups."""
        left, unit, root, buckets = self._left(rows), self.unit[rows], self.root[rows], groups_by_size(groups[rows])

        def predict(lam: float) -> Tensor:
            shrink = self.energy / (self.energy + lam)
            residual = self.centred_targets[rows] - left @ (shrink[:, None] * self.rotated_targets)
            # an extra column makes the intercept part of the same low-rank hat matrix
            basis = torch.cat([left * shrink.sqrt(), unit], dim=1)
            error = torch.empty_like(residual)
            for index in buckets:  # (groups of this size, size)
                error[index.flatten()] = _solve_without(basis[index], residual[index]).flatten(0, 1)
            return self.targets[rows] - error / root

        return predict


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

    @cached_property
    def inverse(self) -> Tensor:
        """A^-1; its factor is no longer needed then."""
        inverse = torch.cholesky_inverse(self.factor)
        del self.factor
        return inverse

    def leave_group_out(self, groups: Tensor) -> Tensor:
        """`(n, d)` predictions without each row's own group."""
        predictions = torch.empty_like(self.targets)
        for index in groups_by_size(groups):
            for part in index.split(max(1, CHUNK // index.shape[1])):
                own = self.ones[part]
                block = self.inverse[part[:, :, None], part[:, None, :]]
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
        chunks = torch.arange(len(sources), device=sources.device).split(CHUNK)
        for rows in chunks:
            kernel_mean += self.share[rows] @ self._kernel(rows)
        self.mean = torch.linalg.solve_triangular(self.whiten, kernel_mean[:, None], upper=False)[:, 0]
        self.target_mean = self.share @ targets
        cross = targets.new_zeros(m, targets.shape[1])
        for rows in chunks:
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
    if size == 1:  # the usual case, without a batched solve
        return residual / (1 - basis.square().sum(dim=2, keepdim=True))
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

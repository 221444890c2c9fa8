"""Baselines every result stands beside, part one: chance, ridge, kernel ridge, CCA and ASIF (trained: `trainer.heads`).

In: training latents of paired rows, a group per row, validation data. Out: a fitted `Retriever`. All of them see the
same input (centred-unit latents), are compared by validation mean recall *with* the post-processing of
`trainer.evaluation` (both directions, hubness correction), and may try at most `TRIALS` configurations. Nothing here
sees test data.

A new baseline is a subclass of `Baseline` with `candidates`, and a line in `CLOSED_FORMS` or `trainer.heads.HEADS`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.closed_form import (
    EIGEN_LANDMARKS,
    SCREEN_ROWS,
    ClosedFormFit,
    closed_form_path,
    default_landmarks,
    fit_closed_form,
)
from trainer.evaluation import RetrievalData, fit_postprocessing

TRIALS = 24  # configurations any baseline may compare on validation


@dataclass(frozen=True)
class CentredUnit:
    """u = normalize(x - mean of the training latents)."""

    mean: Tensor

    @classmethod
    def fit(cls, latents: Tensor) -> "CentredUnit":
        return cls(latents.mean(dim=0))

    def __call__(self, latents: Tensor) -> Tensor:
        return F.normalize(latents - self.mean, dim=-1)


def both_ways(pair: tuple[str, str]) -> list[str]:
    """`("image", "text")` -> `["image->text", "text->image"]`."""
    return [f"{pair[0]}->{pair[1]}", f"{pair[1]}->{pair[0]}"]


def ends(direction: str) -> tuple[str, str]:
    """`"image->text"` -> `("image", "text")`."""
    source, _, target = direction.partition("->")
    return source, target


@dataclass
class MapRetriever:
    """One closed-form map per direction; the gallery is the centred-unit target latent itself."""

    maps: dict[str, ClosedFormFit]
    standard: dict[str, CentredUnit]

    @property
    def directions(self) -> list[str]:
        return list(self.maps)

    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        source, _ = ends(direction)
        return F.normalize(self.maps[direction].predict(self.standard[source](latents[source])), dim=-1)

    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        return self.standard[ends(direction)[1]](latents)


@dataclass
class SharedSpaceRetriever:
    """One linear projection per modality `{modality: (d_modality, d_shared)}` into a shared space."""

    projections: dict[str, Tensor]
    standard: dict[str, CentredUnit]
    directions: list[str]

    def _embed(self, modality: str, latents: Tensor) -> Tensor:
        return F.normalize(self.standard[modality](latents) @ self.projections[modality], dim=-1)

    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        source, _ = ends(direction)
        return self._embed(source, latents[source])

    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        return self._embed(ends(direction)[1], latents)


@dataclass
class RandomRetriever:
    """Scores that know nothing: a latent is hashed through a random projection, a different one for each side."""

    seed: int
    directions: list[str]
    size: int = 64

    def _embed(self, salt: str, latents: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(salt.encode()))
        return F.normalize(latents @ torch.randn(latents.shape[1], self.size, generator=generator).to(latents), dim=-1)

    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        return self._embed("query " + direction, latents[ends(direction)[0]])

    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        return self._embed("gallery " + direction, latents)


class Baseline(ABC):
    """A family of retrievers and the search over it."""

    name: str
    trials: int = 0  # configurations that the last `fit` compared

    @abstractmethod
    def candidates(
        self, train: dict[str, Tensor], validation: RetrievalData, groups: Tensor, seed: int
    ) -> Iterator[tuple[dict, object]]:
        """Yields at most `TRIALS` pairs (configuration, fitted retriever). `validation` is for early stopping only."""

    def fit(self, train: dict[str, Tensor], validation: RetrievalData, groups: Tensor, seed: int = 0):
        """The candidate with the best validation mean recall after post-processing.

        Args:
            train: `{modality: (n, d_modality)}`, row i of each side a pair.
            validation: what the configurations are compared on; its `pair` names the two modalities.
            groups: `(n,)` integer ids; rows of one group are each other's positives.

        Returns:
            A retriever, with the attributes `config` and `validation_mean_recall` added.

        Raises:
            ValueError: training rows that are not paired.
        """
        lengths = {modality: len(train[modality]) for modality in validation.pair}
        if len({*lengths.values(), len(groups)}) != 1:
            raise ValueError(f"training rows must be paired: {lengths}, {len(groups)} groups")
        best, self.trials = None, 0
        for count, (config, retriever) in enumerate(self.candidates(train, validation, groups, seed), start=1):
            if count > TRIALS:
                raise RuntimeError(f"{self.name} tried more than its {TRIALS} configurations")
            self.trials = max(self.trials, count)
            value = fit_postprocessing(retriever, train, validation, seed=seed).validation_mean_recall
            if best is None or value > best.validation_mean_recall:
                best = retriever
                best.config, best.validation_mean_recall = config, value
        return best


class Chance(Baseline):
    """Random scores: what the protocol gives for free. Nothing is tuned."""

    name = "chance"

    def candidates(self, train, validation, groups, seed):
        yield {}, RandomRetriever(seed, both_ways(validation.pair))


class ClosedForm(Baseline):
    """Closed-form maps in both directions.

    `selection="validation"` compares `gammas` x `lambdas` (shared by the two directions) on validation like every other
    baseline. `selection="leave_group_out"` chooses per direction on the training rows alone
    (`fit_closed_form`'s own grid) and leaves validation to the post-processing: it costs no trial.
    """

    kind: str
    gammas: Sequence[float] = (None,)
    lambdas: Sequence[float]

    def __init__(self, selection: str = "validation", max_landmarks: int | None = None):
        if selection not in ("validation", "leave_group_out"):
            raise ValueError(f'selection must be "validation" or "leave_group_out", got {selection!r}')
        self.selection, self.max_landmarks = selection, max_landmarks

    def candidates(self, train, validation, groups, seed):
        standard = {modality: CentredUnit.fit(train[modality]) for modality in validation.pair}
        units = {modality: standard[modality](train[modality]) for modality in validation.pair}
        options = {"kind": self.kind, "max_landmarks": self.max_landmarks, "seed": seed}
        directions = both_ways(validation.pair)
        problems = [(units[source], units[target]) for source, target in map(ends, directions)]
        if self.selection == "validation":
            gammas, most = self.gammas, min(len(groups), self.max_landmarks or default_landmarks(len(groups)))
            if self.kind == "kernel" and most > EIGEN_LANDMARKS:
                # every kernel with fewer landmarks first; the two best sharpnesses with all of them
                best: dict[float, float] = {}
                for maps in self._paths(directions, problems, gammas, {**options, "max_landmarks": SCREEN_ROWS}):
                    post = fit_postprocessing(MapRetriever(maps, standard), train, validation, seed=seed)
                    gamma, self.trials = maps[directions[0]].gamma, self.trials + 1
                    best[gamma] = max(best.get(gamma, 0), post.validation_mean_recall)
                gammas = sorted(sorted(best, key=best.get)[-2:])
            fits = self._paths(directions, problems, gammas, options)
        else:
            fits = [dict(zip(directions, (fit_closed_form(*p, groups, **options) for p in problems), strict=True))]
        for maps in fits:
            chosen = {direction: {"gamma": fit.gamma, "lam": fit.lam} for direction, fit in maps.items()}
            yield chosen, MapRetriever(maps, standard)

    def _paths(self, directions, problems, gammas, options) -> Iterator[dict[str, ClosedFormFit]]:
        """The maps of both directions for every gamma and lambda."""
        paths = [closed_form_path(*pair, gammas=gammas, lambdas=self.lambdas, **options) for pair in problems]
        for pair in zip(*paths, strict=True):
            yield dict(zip(directions, pair, strict=True))


class Ridge(ClosedForm):
    """Linear least squares with an L2 penalty: the strongest simple map at a few hundred pairs."""

    name, kind = "ridge", "ridge"
    lambdas = tuple(float(10 ** (-2 + 4 * i / (TRIALS - 1))) for i in range(TRIALS))


class KernelRidge(ClosedForm):
    """Kernel ridge regression with exp(gamma (cos - 1))."""

    name, kind = "kernel_ridge", "kernel"
    gammas, lambdas = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0), (0.01, 0.03, 0.1, 0.3)


class CCA(Baseline):
    """Regularised canonical correlation analysis, correlations raised to a power as weights.

    Whitening (C + r tr(C)/d I)^{-1/2} on each side, SVD of the whitened cross-covariance; a side's projection is
    whitening times singular vectors times s^power (Hotelling 1936; the weighting as in Gong et al. 2014).
    """

    name = "cca"
    regularisers, sizes, powers = (0.3, 1.0, 3.0, 10.0), (64, 128, 256), (1.0, 2.0)

    def candidates(self, train, validation, groups, seed):
        first, second = validation.pair
        standard = {modality: CentredUnit.fit(train[modality]) for modality in validation.pair}
        rows = {modality: standard[modality](train[modality]).double() for modality in validation.pair}
        rows = {modality: unit - unit.mean(dim=0) for modality, unit in rows.items()}
        spectra = {modality: torch.linalg.eigh(unit.T @ unit / len(unit)) for modality, unit in rows.items()}
        cross = rows[first].T @ rows[second] / len(groups)
        for r in self.regularisers:
            white = {}
            for modality, (energy, vectors) in spectra.items():
                floor = r * energy.clamp_min(0).mean()
                white[modality] = (vectors * (energy.clamp_min(0) + floor).rsqrt()) @ vectors.T
            left, s, right = torch.linalg.svd(white[first] @ cross @ white[second], full_matrices=False)
            sides = {first: white[first] @ left, second: white[second] @ right.T}
            for size, power in itertools.product(self.sizes, self.powers):
                weighted = {m: (side[:, :size] * s[:size] ** power).float() for m, side in sides.items()}
                config = {"regulariser": r, "size": size, "power": power}
                yield config, SharedSpaceRetriever(weighted, standard, both_ways(validation.pair))


class ASIF(Baseline):
    """Relative representations, no training at all (ASIF, Norelli et al. 2023).

    An item is described by its cosines to the training items of its own modality; the `k` highest stay, are raised to
    the power `p` and normalised. Training pairs are the shared coordinates, so `(n, training rows)` vectors are compared.
    """

    name = "asif"
    kept, powers, max_anchors = (10, 50, 200, 800), (1.0, 2.0, 4.0, 8.0), 16384

    def candidates(self, train, validation, groups, seed):
        standard = {modality: CentredUnit.fit(train[modality]) for modality in validation.pair}
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[: self.max_anchors]
        anchors = {modality: standard[modality](train[modality])[order] for modality in validation.pair}
        for k, power in itertools.product([k for k in self.kept if k <= len(order)] or [len(order)], self.powers):
            yield {"k": k, "power": power}, RelativeRetriever(anchors, standard, both_ways(validation.pair), k, power)


@dataclass
class RelativeRetriever:
    """Sparse relative representations over paired anchors `{modality: (a, d_modality)}`."""

    anchors: dict[str, Tensor]
    standard: dict[str, CentredUnit]
    directions: list[str]
    k: int
    power: float

    def _embed(self, modality: str, latents: Tensor) -> Tensor:
        cosines = self.standard[modality](latents) @ self.anchors[modality].T
        top = cosines.topk(self.k, dim=1)
        result = torch.zeros_like(cosines)
        return F.normalize(result.scatter_(1, top.indices, top.values.clamp_min(0) ** self.power), dim=1)

    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        source, _ = ends(direction)
        return self._embed(source, latents[source])

    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        return self._embed(ends(direction)[1], latents)


CLOSED_FORMS: dict[str, type[Baseline]] = {
    baseline.name: baseline for baseline in (Chance, Ridge, KernelRidge, CCA, ASIF)
}

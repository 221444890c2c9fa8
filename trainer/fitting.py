"""What is measured before training: the frames of the modalities and the closed forms under the experts.

Comes in: a fresh model and the training pairs. Goes out: the model with frames and bases in place, and for each
direction the base's predictions for training items it was not fitted on. Experts trained on top of those learn to
mend the base's honest errors, not the near-perfect fit it has on its own training items (stacking, Wolpert 1992).
"""

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_altmoe.connector_altmoe import recall_weights
from modeling_altmoe.scoring_altmoe import reverse_direction
from trainer.baselines import KernelRidge
from trainer.closed_form import fit_closed_form
from trainer.measuring import modality_pairs, retrieval_data
from trainer.pairs import LatentPairs
from trainer.target_metric import PLAIN, Compared, fit_target_metrics, reciprocal_ranks

METRIC_FOLDS = 5
FEW = 1000  # training pairs up to which validation chooses the kernel base (`choose_on_validation`) and it recalls


def fit_frames(model, pairs: LatentPairs) -> None:
    """Measure every modality's mean and scale on the training latents."""
    for modality, latents in pairs.latents.items():
        model.connector.frames[modality].fit(latents.to(model.device))


@torch.no_grad()
def fit_bases(
    model,
    pairs: LatentPairs,
    max_landmarks: int | None = None,
    seed: int = 0,
    progress: bool = True,
    held_out: dict | None = None,
    chosen: dict | None = None,
    recall: bool = True,
) -> dict:
    """Fit a closed form (and, with `config.target_metric`, a metric of its targets) for every direction, in place.

    Args:
        model: an [`AltMoEModel`] whose frames are fitted and whose `config.base` is not `"none"`.
        pairs: training pairs.
        max_landmarks: most landmarks of a kernel base; None: `closed_form.default_landmarks`.
        seed: for the choice of landmarks.
        progress: show a bar.
        held_out: filled with `{direction: (said, (rows,))}`: what the base says without a row's whole fold, in the form of
            `ClosedFormBase.forward`, and the folds. Rows are those of `pairs.rows[direction]`.
        chosen: `{direction: {"gamma", "lam"}}`; directions that are not in it choose on their training rows.
        recall: a kernel base of up to `FEW` pairs also recalls the partners of the nearest training items, unless its
            training rows, out of fold, are found better without by more than one standard error.

    Returns:
        `{direction: (rows of the first source, ...)}`: what the base says without a row's group, zero for unpaired rows.
    """
    threads = torch.get_num_threads()
    if len(pairs) < 3000:
        torch.set_num_threads(1)  # small decompositions gain nothing from threads and suffer when cores are shared
    try:
        held_out = {} if held_out is None else held_out
        return _fit_bases(model, pairs, max_landmarks, seed, progress, held_out, chosen or {}, recall)
    finally:
        torch.set_num_threads(threads)


def _fit_bases(
    model,
    pairs: LatentPairs,
    max_landmarks: int | None,
    seed: int,
    progress: bool,
    held_out: dict,
    chosen: dict,
    recall: bool,
) -> dict:
    out_of_sample = {}
    connector, device = model.connector, model.device
    items = torch.from_numpy(pairs.items_of_keys())
    concepts = int(pairs.group_of_key.max()) + 1
    folds = torch.randperm(concepts, generator=torch.Generator().manual_seed(seed)) % METRIC_FOLDS
    out_of_fold = {}
    bar = tqdm(pairs.directions, desc=f"fitting the {model.config.base} base", disable=not progress)
    for direction in bar:
        sources, target = model.config.resolve(direction)
        rows = pairs.rows[direction]
        batch = pairs.batch(direction, range(len(rows)))
        latents = {m: batch["latents"][m].to(device) for m in sources}
        source = connector.source(latents, direction)
        every_target = connector.frames[target].unit(pairs.latents[target].to(device))
        partners = [pairs._rows_of_key[target][int(key)] for key in batch["keys"]]
        # several captions of an image: their mean is what least squares would find for them one by one
        targets = torch.stack([F.normalize(every_target[torch.from_numpy(p)].mean(0), dim=-1) for p in partners])
        groups = torch.from_numpy(pairs.group_of_key[batch["keys"]])
        choice = chosen.get(direction)
        fixed = {"gammas": [choice["gamma"]], "lambdas": [choice["lam"]]} if choice else {}
        # on other devices not: some have no doubles
        where = device if device.type == "cuda" else torch.device("cpu")
        fit = fit_closed_form(
            source.to(where),
            targets.to(where),
            groups,
            kind=model.config.base,
            max_landmarks=max_landmarks,
            seed=seed,
            items=items[batch["keys"]],
            folds=folds[groups],
            told=lambda what, direction=direction: bar.set_postfix_str(f"{direction}, {what}"),
            **fixed,
        ).to("cpu")
        said, said_out_of_fold, partners = fit.out_of_sample, fit.out_of_fold, None
        if recall and model.config.base == "kernel" and len(rows) <= FEW:
            nearest = (source.cpu() @ fit.landmarks.T).argmax(1)  # itself, where every item is a landmark
            partners = torch.zeros(len(fit.landmarks), targets.shape[-1]).index_add(0, nearest, targets.cpu())
            said = torch.stack([said, _recalled_without(groups, source, targets)], dim=1)
            said_out_of_fold = torch.stack([said_out_of_fold, _recalled_without(folds[groups], source, targets)], dim=1)
        connector.set_base(direction, fit.weight, fit.bias, fit.landmarks, fit.gamma, partners=partners)
        first = pairs.latents[sources[0]]
        table = torch.zeros(len(first), *said.shape[1:], device=device)
        table[torch.from_numpy(rows).to(device)] = said.float().to(device)
        out_of_sample[direction], out_of_fold[direction] = table, fit.out_of_fold
        held_out[direction] = said_out_of_fold, folds[groups]
    _fit_scores(model, pairs, out_of_fold, out_of_sample, held_out, items, folds, seed)
    return out_of_sample


def _recalled_without(parts: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What is recalled for every training row, `(n, d_target)`, without the rows of its own part."""
    weights = recall_weights(sources @ sources.T).cpu() * (parts[:, None] != parts)
    return weights @ targets.cpu()


def choose_on_validation(
    pairs: LatentPairs, validation: LatentPairs, max_landmarks: int | None = None, seed: int = 0
) -> dict:
    """The kernel's sharpness and penalty as `trainer.baselines.KernelRidge` chooses them, for `fit_bases`.

    Leave-group-out on training rows judges one direction at a time and knows nothing of the score's other parts. With few
    pairs that costs more than a small validation part errs (measured on stamps), so there the whole score decides: both
    directions and hubness, by validation mean recall. Above `FEW` pairs, and for directions without their reverse,
    training rows decide.
    """
    chosen = {}
    for pair in modality_pairs(pairs.directions)[0]:
        direction = "->".join(pair)
        if reverse_direction(direction) not in pairs.directions or len(pairs.rows[direction]) > FEW:
            continue
        batch = pairs.batch(direction, range(len(pairs.rows[direction])))
        groups = torch.from_numpy(pairs.group_of_key[batch["keys"]])
        method = KernelRidge(max_landmarks=max_landmarks)
        chosen |= method.fit(batch["latents"], retrieval_data(validation, pair), groups, seed=seed).config
    return chosen


def _fit_scores(
    model, pairs: LatentPairs, out_of_fold: dict, out_of_sample: dict, held_out: dict, items, folds, seed: int
) -> None:
    """A metric of the targets, and whether to recall, for every direction; the two of a pair are judged together."""
    done = set()
    for direction in pairs.directions:
        reverse = reverse_direction(direction)
        together = [direction, reverse] if reverse in pairs.directions else [direction]
        if direction in done:
            continue
        done.update(together)
        predictions, targets, keys = {}, {}, {}
        for name in together:
            sources, target = model.config.resolve(name)
            source, rows = "+".join(sources), pairs.rows[name]
            predictions[source, target] = out_of_fold[name]
            keys[source] = pairs.key_codes[sources[0]][rows]
        for name in together:
            sources, target = model.config.resolve(name)
            rows = np.flatnonzero(np.isin(pairs.key_codes[target], pairs.key_codes[sources[0]][pairs.rows[name]]))
            latents = pairs.latents[target][torch.from_numpy(rows)].to(model.device)
            targets[target] = model.connector.frames[target].unit(latents).cpu()
            keys[target] = pairs.key_codes[target][rows]
        parts = {side: folds[torch.from_numpy(pairs.group_of_key[codes])] for side, codes in keys.items()}
        same = {side: items[codes] for side, codes in keys.items()}
        bases = {name: model.connector.base[name] for name in together}
        if model.config.target_metric:
            metrics, _ = fit_target_metrics(predictions, targets, parts, same, seed=seed)
            for base, metric in zip(bases.values(), metrics.values(), strict=True):
                base.metric.copy_(metric)
        if any(base.recalls for base in bases.values()):
            both, alone = {}, {}
            for way, (name, base) in zip(predictions, bases.items(), strict=True):
                said = held_out[name][0].to(model.device)
                both[way], alone[way] = (base.seen(say).cpu() for say in (said, base.estimate(said)))
            gain = _ranks_in_folds(both, targets, parts, same) - _ranks_in_folds(alone, targets, parts, same)
            if gain.mean() < -gain.std(correction=0) / len(gain) ** 0.5:
                for name, base in bases.items():
                    metric = base.metric if base.has_metric else None
                    model.connector.set_base(name, base.weight, base.bias, base.landmarks, base.gamma, metric)
                    out_of_sample[name] = base.estimate(out_of_sample[name])
                    held_out[name] = base.estimate(held_out[name][0]), held_out[name][1]


def _ranks_in_folds(said: dict, targets: dict, folds: dict, items: dict) -> torch.Tensor:
    """1 / rank of every training row's best match among the targets of its fold; arguments as in `fit_target_metrics`."""
    found, (source, target) = [], next(iter(said))
    for fold in folds[source].unique():
        here = {side: ids == fold for side, ids in folds.items()}
        match = items[source][here[source]][:, None] == items[target][here[target]]
        if match.any() and not match.all():
            parts = [Compared(rows[here[s]], targets[t][here[t]]) for (s, t), rows in said.items()]
            found.append(reciprocal_ranks(parts, match, *PLAIN))
    return torch.cat(found or [torch.zeros(1)])

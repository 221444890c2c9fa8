"""A model measured on pairs: validation during training, and what is fitted on validation afterwards.

Comes in: a model and [`LatentPairs`]. Goes out: metrics by direction, and the model with its trust, scales and hubness
banks set. The rules of scoring are those of `trainer.evaluation`, which every baseline is measured with.
"""

import numpy as np
import torch
from torch.nn import functional as F

from modeling_altmoe.configuration_altmoe import parse_direction
from modeling_altmoe.scoring_altmoe import hubness, reverse_direction, score_matrix
from trainer.confidence import fit_calibration
from trainer.evaluation import KS, RetrievalData, evaluate_retrieval, fit_postprocessing
from trainer.familiarity import fit_familiarity
from trainer.metrics.cross_modal_retrieval.cross_modal_retrieval import ranks, retrieval_metrics
from trainer.pairs import LatentPairs

TRUSTS = (0.0, 0.0625, 0.25, 0.5625, 1.0)  # squares of quarter steps: denser where the base is hard to beat


def modality_pairs(directions: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Directions with one source as unordered pairs of modalities, and the remaining ones (several sources)."""
    pairs, rest = [], []
    for direction in directions:
        sources, target = parse_direction(direction)
        if len(sources) > 1:
            rest.append(direction)
        elif (target, sources[0]) not in pairs:
            pairs.append((sources[0], target))
    return pairs, rest


def served_direction(pairs: LatentPairs, pair: tuple[str, str]) -> str:
    """The direction between two modalities that the pairs have: the first way if both are there."""
    direction = f"{pair[0]}->{pair[1]}"
    return direction if direction in pairs.rows else reverse_direction(direction)


def partnered_rows(pairs: LatentPairs, pair: tuple[str, str]) -> dict[str, np.ndarray]:
    """The rows of two modalities that have a partner, `{modality: (n,)}`."""
    direction = served_direction(pairs, pair)
    keys = np.unique(pairs.key_codes[direction.partition("->")[0]][pairs.rows[direction]])
    return {m: np.flatnonzero(np.isin(pairs.key_codes[m], keys)) for m in pair}


def partnered_latents(pairs: LatentPairs, pair: tuple[str, str], device="cpu") -> dict[str, torch.Tensor]:
    """Latents of all items of two modalities that have a partner (their matches, rows x rows, are not computed)."""
    rows = partnered_rows(pairs, pair)
    return {m: pairs.latents[m][torch.from_numpy(r)].to(device) for m, r in rows.items()}


def retrieval_data(pairs: LatentPairs, pair: tuple[str, str], device="cpu") -> RetrievalData:
    """All items of two modalities that have a partner, with their matches."""
    rows, direction = partnered_rows(pairs, pair), served_direction(pairs, pair)
    source, _, target = direction.partition("->")
    relevant = pairs.matches(direction, rows[source], rows[target])
    relevant = relevant if (source, target) == pair else relevant.T
    return RetrievalData(partnered_latents(pairs, pair, device), relevant, pair)


@torch.no_grad()
def _fused_scores(model, pairs: LatentPairs, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and matches of one direction with several sources: every source against all targets."""
    sources, target = parse_direction(direction)
    batch = pairs.batch(direction, range(len(pairs.rows[direction])))
    gallery = np.flatnonzero(np.isin(pairs.key_codes[target], np.unique(batch["keys"])))
    latents = {m: batch["latents"][m].to(model.device) for m in sources}
    items = model.gallery(direction, pairs.latents[target][torch.from_numpy(gallery)].to(model.device))
    scores = model.queries(direction, latents) @ items.T
    return scores.cpu().numpy(), pairs.matches(direction, batch["source_rows"], gallery).numpy()


def evaluate_pairs(model, pairs: LatentPairs, scored: bool = False) -> dict[str, float]:
    """Retrieval metrics of a model on pairs.

    Args:
        model: an [`AltMoEModel`].
        pairs: the pairs to be found.
        scored: use the post-processing kept in the model; otherwise (in training) both directions vote with scales
            measured on these very pairs, and hubness is left as it is.

    Returns:
        `{"mean_recall", "image->text/recall@1", ...}`; `mean_recall` is the mean over directions of the mean of
        recall@1, @5 and @10.
    """
    found, fused = modality_pairs(model.directions)
    results = {direction: retrieval_metrics(*_fused_scores(model, pairs, direction), KS) for direction in fused}
    for pair in found:
        data = retrieval_data(pairs, pair, model.device)
        if scored:
            post = model.postprocessing(served_direction(pairs, pair))  # holds both directions' scales and banks
        else:
            post = fit_postprocessing(model, {}, data, correct_hubness=False)
        metrics = evaluate_retrieval(model, data, post)
        results.update({name: value for name, value in metrics.items() if name != "mean_recall"})
    flat = {f"{direction}/{name}": float(v) for direction, metrics in results.items() for name, v in metrics.items()}
    return {"mean_recall": float(np.mean([metrics["mean_recall"] for metrics in results.values()])), **flat}


@torch.no_grad()
def _reciprocal_ranks(model, data: RetrievalData) -> np.ndarray:
    """1 / rank of every query's best match, both directions of a pair: smoother than recall at three places."""
    post = fit_postprocessing(model, {}, data, correct_hubness=False)
    found = []
    for direction in data.directions():
        if direction in model.directions:
            source, _, target = direction.partition("->")
            scores = score_matrix(model, post, direction, {source: data.latents[source]}, data.latents[target])
            found.append(1 / ranks(scores.cpu().numpy(), data.relevant_for(direction).cpu().numpy()))
    return np.concatenate(found)


def fit_trust(model, validation: LatentPairs) -> float:
    """Choose on validation how far the experts' correction of the base is trusted, and keep it in the model.

    The criterion is the mean reciprocal rank. The base alone (0) is among the choices, and the smallest
    trust within one standard error of the best wins (Breiman et al. 1984, the one-standard-error rule, with paired
    errors): with few validation items the experts must show that they help.
    """
    found, fused = modality_pairs(model.directions)
    data = [retrieval_data(validation, pair, model.device) for pair in found]
    values = {}
    for trust in TRUSTS:
        model.connector.trust.fill_(trust)
        parts = [_reciprocal_ranks(model, part) for part in data]
        parts += [1 / ranks(*_fused_scores(model, validation, direction)) for direction in fused]
        values[trust] = np.concatenate(parts)
    best = max(TRUSTS, key=lambda trust: values[trust].mean())
    for trust in TRUSTS:
        worse = values[best] - values[trust]
        if worse.mean() <= worse.std(ddof=1) / len(worse) ** 0.5:
            break
    model.connector.trust.fill_(trust)
    return trust


def fit_scoring(
    model,
    train: LatentPairs,
    validation: LatentPairs,
    max_bank: int = 1024,
    target_precision: float = 0.5,
    held_out: dict | None = None,
) -> None:
    """Measure scales, hubness, familiarity and confidence for every pair of modalities, and keep them in the model.

    Args:
        train: training items fill the banks (at most `max_bank` a direction travel with the checkpoint).
        validation: sets the scales and the strength of the correction.
        target_precision: share of right answers that the confidence threshold is chosen for.
        held_out: what the closed form says out of fold, from `fit_bases`: then familiarity is chosen, and confidence is
            calibrated on all training rows. Without them familiarity is 0, and confidence is calibrated on validation,
            where the threshold is chosen with a standard error of caution, because validation is small.
    """
    for pair in modality_pairs(model.directions)[0]:
        data = retrieval_data(validation, pair, model.device)
        bank = partnered_latents(train, pair, model.device)
        post = fit_postprocessing(model, bank, data, max_bank=max_bank)
        served = [direction for direction in data.directions() if direction in model.directions]
        if held_out and set(data.directions()) <= set(held_out):
            fit_familiarity(model, post, train, data, held_out)
        for direction in served:
            model.set_scoring(direction, post)
        for direction in served:
            if held_out and set(served) <= set(held_out):
                calibration = fit_calibration(held_out_scores(model, train, direction, held_out), target_precision)
            else:
                calibration = fit_calibration([scores_of(model, data, direction)], target_precision, caution=1.0)
            model.config.scoring[direction]["confidence"] = calibration.as_dict()


@torch.no_grad()
def held_out_scores(model, train: LatentPairs, direction: str, held_out: dict, max_keys: int = 4096, seed: int = 0):
    """Scores among the training items of each fold, made without that fold: `(scores, matches)` one by one.

    Predictions are the closed form's out-of-fold ones, queries and candidates are of one fold, and the hubness banks are
    of the others: so every item is as new to what scores it as a test item is. The experts have seen all training rows
    and are left out; scores are divided by the spread of their own non-matching pairs, as in search.

    Args:
        held_out: as `fit_bases` fills it.
        max_keys: most pairs of a fold, a seeded sample above.
        seed: for the sample.
    """
    source, _, target = direction.partition("->")
    reverse = reverse_direction(direction)
    ways = [direction, reverse] if reverse in held_out else [direction]
    post, generator = model.postprocessing(direction), torch.Generator().manual_seed(seed)
    vectors, parts, keys = {}, {}, {}
    for way in ways:
        said, parts[way] = held_out[way]
        vectors[way] = F.normalize(model.connector.base[way].seen(said.to(model.device)), dim=-1).cpu()
        keys[way] = torch.from_numpy(train.key_codes[way.partition("->")[0]][train.rows[way]])
    own = {m: model.connector.frames[m].unit(train.latents[m].to(model.device)).cpu() for m in (source, target)}
    targets = torch.from_numpy(np.flatnonzero(np.isin(train.key_codes[target], keys[direction].numpy())))
    target_keys = torch.from_numpy(train.key_codes[target])[targets]
    fold_of_key = torch.full((len(train.key_names),), -1, dtype=torch.long)
    fold_of_key[keys[direction]] = parts[direction]
    bank = model.queries(direction, {source: _rows(train, direction).to(model.device)}).cpu()
    for fold in parts[direction].unique():
        chosen = (fold_of_key == fold).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:max_keys]]
        asked, shown = torch.isin(keys[direction], chosen), torch.isin(target_keys, chosen)
        rows = torch.from_numpy(train.rows[direction])
        match = train.matches(direction, rows[asked].numpy(), targets[shown].numpy())
        if match.shape[1] < 4 or match.all():
            continue
        others = parts[direction] != fold
        terms = [(vectors[direction][asked], own[target][targets[shown]], bank[others], 1.0)]
        if reverse in held_out and post.reverse_weight:
            back = vectors[reverse][torch.isin(keys[reverse], chosen)]  # rows of the target, in the order of `shown`
            terms.append((own[source][rows[asked]], back, own[source][rows[others]], post.reverse_weight))
        scores = 0
        for queries, items, around, weight in terms:
            table = queries @ items.T
            corrected = table - post.beta * hubness(items, around[: 4 * max_keys], post.top_k)
            scores = scores + weight * corrected / table[~match].std(correction=0).clamp_min(1e-12)
        yield scores, match


def _rows(pairs: LatentPairs, direction: str) -> torch.Tensor:
    """Latents of a direction's first source, as `pairs.rows` has them."""
    return pairs.latents[direction.partition("->")[0]][torch.from_numpy(pairs.rows[direction])]


def scores_of(model, data: RetrievalData, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores as search gives them and true matches, both `(queries, items)`."""
    source, _, target = direction.partition("->")
    scores = model.score(direction, {source: data.latents[source]}, data.latents[target])
    return scores.cpu(), data.relevant_for(direction).cpu()

"""How much less a training item must score, so that new items can be found beside it.

Comes in: a model, its training pairs, validation pairs. Goes out: the strength of the correction (`scoring_altmoe`). Three
kinds of queries search one collection, validation items and training items together, and count alike. Validation queries
ask for items that are new to the model. Training items are asked for by their own training partners, and, as a second
query that the model has not seen, by stand-ins: what the closed form predicts from each item, fitted without it.
"""

import numpy as np
import torch
from torch.nn import functional as F

from modeling_altmoe.connector_altmoe import ClosedFormBase
from modeling_altmoe.scoring_altmoe import (
    Postprocessing,
    is_known,
    item_vectors,
    prints,
    query_vectors,
    reverse_direction,
)
from trainer.evaluation import RetrievalData
from trainer.metrics.cross_modal_retrieval.cross_modal_retrieval import ranks
from trainer.pairs import LatentPairs

# in standard deviations of the scores of non-matching pairs
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@torch.no_grad()
def fit_familiarity(
    model,
    post: Postprocessing,
    train: LatentPairs,
    validation: RetrievalData,
    held_out: dict,
    max_items: int = 8192,
    max_queries: int = 1024,
    seed: int = 0,
) -> None:
    """Set `post.known` and choose `post.familiarity`, by mean reciprocal rank in both directions.

    Args:
        model: an [`AltMoEModel`] with both directions of the pair.
        post: the other settings, as `fit_postprocessing` chose them.
        train: training pairs; prints of all items that have a partner are kept.
        validation: items of the pair that the model has not seen.
        held_out: as `fit_bases` fills it, for both directions.
        max_items, max_queries: most training items in the collection, and those that are asked for (seeded samples).
        seed: for the samples.
    """
    random, found = np.random.default_rng(seed), []
    for direction in validation.directions():
        source, _, target = direction.partition("->")
        reverse = reverse_direction(direction)
        every = torch.from_numpy(train.rows[reverse])
        seen = model.gallery(direction, train.latents[target][every].to(model.device))
        post.known[direction] = torch.unique(prints(seen).half(), dim=0)
        places = np.sort(random.permutation(len(train.rows[reverse]))[:max_items])
        rows = train.rows[reverse][places]
        asked = np.sort(random.permutation(len(rows))[:max_queries])
        said = held_out[reverse][0][torch.from_numpy(places[asked])].to(model.device).float()
        predicted = F.normalize(ClosedFormBase.estimate(said), dim=-1)
        stand_ins = model.connector.frames[source].inverse(predicted)
        partners = train.partner(source, train.key_codes[target][rows[asked]])
        own = train.latents[source][torch.from_numpy(partners)].to(model.device)
        new, old = validation.relevant_for(direction).cpu(), train.matches(direction, partners, rows)
        is_new = torch.cat([new, torch.zeros(len(new), old.shape[1], dtype=torch.bool)], dim=1)
        is_old = torch.cat([torch.zeros(len(old), new.shape[1], dtype=torch.bool), old], dim=1)
        tables = ((validation.latents[source], is_new), (stand_ins, is_old), (own, is_old))
        latents = torch.cat(
            [validation.latents[target], train.latents[target][torch.from_numpy(rows)].to(model.device)]
        )
        items = item_vectors(model, post, direction, latents)
        familiar = is_known(model.gallery(direction, latents), post.known[direction]).float()
        for queries, relevant in tables:
            scores = query_vectors(model, post, direction, {source: queries}) @ items.T
            found.append(
                [(1 / ranks((scores - s * familiar).cpu().numpy(), relevant.numpy())).mean() for s in STRENGTHS]
            )
    post.familiarity = STRENGTHS[int(np.mean(found, axis=0).argmax())]

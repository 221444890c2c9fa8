"""What the tests of search share: a scored model, a store of its items, and what a search of every pair would find."""

import numpy as np
import torch
from conftest import paired_latents, small_model

from modeling_altmoe import LatentStore
from modeling_altmoe.confidence_altmoe import Calibration
from modeling_altmoe.scoring_altmoe import Postprocessing

DIRECTION = "text->image"
COLUMNS = {"kind": "string", "year": "int32", "weight": "float32", "new": "bool"}
ROWS = 600
APPROXIMATE = ["IVF8,RaBitQ", "IVF8,Flat", "HNSW16", "SQ8", "RR,IVF4,SQ8"]


def scored_model(seed: int = 0, **calibration):
    """A small connector with both directions' scores, hubness and (if asked for) a calibration."""
    model, latents = small_model(seed), paired_latents(96, seed=5)
    data = {"image": latents["image"], "text": latents["text"]}
    for modality, frame in model.connector.frames.items():
        frame.fit(data[modality])
    post = Postprocessing(reverse_weight=0.7, beta=0.5, top_k=5)
    for direction in model.directions:
        source, _, target = direction.partition("->")
        with torch.no_grad():
            post.query_bank[direction] = model.queries(direction, {source: data[source]})
            post.gallery_bank[direction] = model.gallery(direction, data[target])
        post.scales[direction] = 0.2
    for direction in model.directions:
        model.set_scoring(direction, post)
        if calibration:
            model.config.scoring[direction]["confidence"] = Calibration(**calibration).as_dict()
    return model


def write(folder, model, latents, start: int = 0, end: int = ROWS, **settings) -> LatentStore:
    """Rows `start` to `end` of the pictures into a store of small shards."""
    encoder = model.config.encoders["image"]
    with LatentStore.create(folder, "image", encoder, columns=COLUMNS, shard_rows=100, **settings) as store:
        store.append(
            [f"i{row}" for row in range(start, end)],
            latents["image"][start:end],
            kind=[None if row % 50 == 3 else "abc"[row % 3] for row in range(start, end)],
            year=[2000 + row % 40 for row in range(start, end)],
            weight=[row / 7 for row in range(start, end)],
            new=[row % 5 == 0 for row in range(start, end)],
        )
    return LatentStore.open(folder)


def truth(model, store, queries, k: int, rows=None) -> list[list[str]]:
    """Ids of the best rows by the model's own score of all pairs."""
    rows = np.arange(len(store)) if rows is None else np.asarray(rows)
    if not len(rows):
        return [[] for _ in queries]
    best = model.score(DIRECTION, queries, store.take(rows)).topk(min(k, len(rows)), dim=1).indices.numpy()
    names = store.column("id", rows)
    return [[names[place] for place in row] for row in best]


def ids(results) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in results]


def agreement(found: list[list[str]], wanted: list[list[str]]) -> float:
    return float(np.mean([len(set(f) & set(w)) / max(1, len(w)) for f, w in zip(found, wanted, strict=True)]))

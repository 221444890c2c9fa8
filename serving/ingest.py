"""A LatentStore's rows into a database: `altmoe index STORE --index postgresql://...`.

Comes in: a store, an address and a model. Goes out: a table that holds the same rows. There is no mark of how far the last
call came: a digest is kept with each row, and a row is sent where its digest is another or missing. So a call that was killed
is simply given again, nothing is doubled, and what was changed or deleted in the store follows.
"""

import hashlib
import json
from contextlib import closing
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.scoring_altmoe import item_vectors
from modeling_altmoe.sharing_altmoe import shareable

from .databases import Description, Table, hubness_column, identity, open_table

BATCH_ROWS, BATCH_BYTES = 4096, 8_000_000  # of latents in one request; Milvus refuses messages above 64 MB


def _digest(latent: np.ndarray, values: list, tag: str) -> int:
    told = hashlib.blake2b(latent.tobytes(), digest_size=8)
    told.update(json.dumps([values, tag], default=str).encode())
    return int.from_bytes(told.digest(), "big", signed=True)


def ingest(
    store: LatentStore,
    url: str,
    model: AltMoEModel | None = None,
    directions: list[str] | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Make a database hold what a store holds. Rows that are there already are not sent again, whatever interrupted the
    last call; rows that the store no longer has are removed; the index is built when all rows are there.

    Args:
        store: the latents; memory stays flat whatever their number.
        url: see `parse_url`; the table is made if it does not exist.
        model: its hubness scalars are written for each direction into the store's modality; None: left empty.
        directions: only these. Scalars of other directions or models that were written before are not used any more.
        progress: show a bar.

    Returns:
        `{"written", "present", "deleted", "rows"}`.

    Raises:
        ValueError: the table holds latents of another protocol, modality or width, or was not made by this function.
        ConnectionError, RuntimeError: the database cannot be reached or refuses; the message says what it said.
    """
    if model is not None and directions is None:
        directions = [d for d in model.config.directions if model.config.resolve(d)[1] == store.modality]
    for direction in directions or ():
        _, target = model.config.resolve(direction)
        store.check(target, model.config.encoders[target])
    models = {direction: identity(model, direction) for direction in directions or ()}
    with closing(open_table(url)) as table:
        description = _description_for(store, table, models)
        table.create(description)
        counts = {"written": 0, "present": 0, "deleted": 0}
        tag = json.dumps(models, sort_keys=True)
        with tqdm(total=len(store), desc=f"to {table.address.scheme}", unit="row", disable=not progress) as bar:
            for ids, latents, columns in store.batches(max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * store.latent_size)))):
                vectors = np.ascontiguousarray(latents, dtype=np.float32)
                values = list(zip(*(columns[name] for name in store.columns), strict=True)) or [()] * len(ids)
                digests = [_digest(*item, tag) for item in zip(vectors, values, strict=True)]
                there = table.digests(ids)
                new = [place for place, name in enumerate(ids) if there.get(name) != digests[place]]
                rows = [
                    {"id": ids[place], "latent": vectors[place], "altmoe_digest": digests[place]}
                    | dict(zip(store.columns, values[place], strict=True))
                    for place in new
                ]
                for direction in models if new else ():
                    for row, scalar in zip(rows, _hubness(model, direction, vectors[new]), strict=True):
                        row[hubness_column(direction)] = float(scalar)
                table.write(rows)
                counts["written"] += len(new)
                counts["present"] += len(ids) - len(new)
                bar.update(len(ids))
            if table.count() != len(store):
                for page in table.ids(10_000):
                    gone = [name for name, kept in zip(page, store.has(page), strict=True) if not kept]
                    table.delete(gone)
                    counts["deleted"] += len(gone)
            bar.set_description("index")
            table.finish()
        table.describe({**description, "hubness": description["hubness"] | models})
        return {**counts, "rows": table.count()}


def _description_for(store: LatentStore, table: Table, models: dict[str, str]) -> dict[str, Any]:
    """What the table is to hold. Hubness scalars of other models are not used any more, and those of these models not
    before all rows have them."""
    fields = ("modality", "encoder", "columns", "dtype")
    description = {"altmoe": 1, **{name: shareable(store.description)[name] for name in fields}, "hubness": {}}
    if table.width is not None:
        if table.description is None:
            raise ValueError(
                f"{table.address} exists and was not made by altmoe: it is searched as it is, not written to. "
                "Choose another name, or import it with 'altmoe import'."
            )
        Description(table).check(store.modality, store.encoder)
        for name in ("columns", "dtype"):
            if table.description[name] != description[name]:
                raise ValueError(
                    f"{table.address} was made with {name}={table.description[name]}, the store has "
                    f"{description[name]}. Choose another name, or delete it there."
                )
        there = table.description["hubness"]
        description["hubness"] = {d: name if name == models.get(d) else None for d, name in there.items()}
    description["hubness"] = dict.fromkeys(models) | description["hubness"]
    return description


def _hubness(model: AltMoEModel, direction: str, latents: np.ndarray) -> np.ndarray:
    """The last component of `item_vectors`, `(n,)`."""
    items = item_vectors(model, model.postprocessing(direction), direction, torch.from_numpy(latents).to(model.device))
    return items[:, -1].float().cpu().numpy()

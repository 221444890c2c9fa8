"""What the tests of databases share: a scored model, rows that would like to be taken for code, and what is the same."""

import traceback

import numpy as np
import torch
from conftest import paired_latents, score_both_ways, small_config, small_model

from modeling_altmoe import LatentStore

ROWS = 240
ENTRY = small_config().encoders["image"]
COLUMNS = {"title": "string", "year": "int32", "price": "float32", "sold": "bool", "seen": "timestamp[s]"}
NASTY = [
    'a"b',
    "it's",
    "\\",
    "\\' or 1=1 --",
    "ü漢😀",
    "'; DROP TABLE t; --",
    '" or 1==1 or "',
    "{title}",
    "%s 50%",
    "a\nb\t",
]


def scored(seed: int = 0):
    """A model that scores in both directions, with hubness and a calibration."""
    model = score_both_ways(small_model(seed))
    for modality, latents in paired_latents().items():
        model.connector.frames[modality].fit(latents + 0.3)
    return model


def columns_of(start: int, count: int) -> dict[str, list]:
    rows = range(start, start + count)
    return {
        "title": [None if n % 7 == 3 else NASTY[n % len(NASTY)] for n in rows],
        "year": [1990 + n % 40 for n in rows],
        "price": [None if n % 11 == 5 else n / 10 for n in rows],
        "sold": [bool(n % 2) for n in rows],
        "seen": [np.datetime64(1_700_000_000 + 86_400 * n, "s").item() for n in rows],
    }


def ids_of(start: int, count: int) -> list[str]:
    return [f"{n:03} {NASTY[n % len(NASTY)]}" for n in range(start, start + count)]


def write_rows(folder) -> LatentStore:
    with LatentStore.create(folder, "image", ENTRY, columns=COLUMNS, shard_rows=100) as store:
        store.append(ids_of(0, ROWS), paired_latents(ROWS)["image"], **columns_of(0, ROWS))
    return store


def queries(count: int = 4) -> torch.Tensor:
    return paired_latents(ROWS)["text"][:count]


def assert_same(found, expected, columns: bool = True):
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        assert [hit.id for hit in some] == [hit.id for hit in others]
        np.testing.assert_allclose([h.score for h in some], [h.score for h in others], atol=1e-4)
        assert (some.confidence is None) == (others.confidence is None)
        assert some.confidence is None or abs(some.confidence - others.confidence) < 1e-4
        for hit, other in zip(some, others, strict=True) if columns else ():
            seen = {"seen": str(other.columns["seen"])}  # dates are kept as text
            assert hit.columns == other.columns | seen


def everything(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)

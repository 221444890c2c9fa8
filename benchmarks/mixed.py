"""Recall where items that the connector was trained on and new ones lie in one collection, with and without the
correction for familiarity.

`python -m benchmarks.mixed` trains the default recipe on the splits of `benchmarks.quality`, and asks three times: the
test queries, whose matches are new, search the test items alone and the test items among all training items; and queries
that the connector has not seen ask for training items in the latter. Only the stamps have such: their captions in four
other languages, embedded by the same English encoder (which understands them badly: they are far from what it was
trained on). A split that is there is not measured twice.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from subprocess import CalledProcessError

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

from benchmarks import data_sets
from benchmarks.common import RESULTS, keep, read_results
from benchmarks.quality import Job, train_ours
from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.scoring_altmoe import score_matrix
from trainer.evaluate import read_run
from trainer.evaluation import KS, PAIR, format_table
from trainer.measuring import retrieval_data
from trainer.metrics.cross_modal_retrieval.cross_modal_retrieval import retrieval_metrics
from trainer.pairs import LatentPairs
from trainer.train import open_parts, open_stores

PATH = RESULTS / "mixed.json"
ALONE, NEW, TRAINED = "new items, alone", "new items among trained ones", "trained items, asked for in another language"
BEFORE, AFTER = "without", "with"
MEASURES = {"recall@1": "R@1", "recall@10": "R@10", "mean_recall": "mean recall"}


def other_captions(train: LatentPairs) -> tuple[torch.Tensor, np.ndarray]:
    """Captions of training items in other languages: latents `(n, d)`, and the rows of text they stand for `(n,)`."""
    rows, latents, folders = [], [], data_sets.prepare("stamps-languages")
    row_of = {key: row for row, key in enumerate(train.keys["text"])}
    for modality, folder in folders.items():
        if modality.startswith("text_"):
            store = LatentStore.open(folder)
            found = [(row_of[key], place) for place, key in enumerate(store.column("id")) if key in row_of]
            rows += [row for row, _ in found]
            latents.append(store.latents()[[place for _, place in found]])
    return torch.cat(latents), np.array(rows)


@torch.no_grad()
def measure(model, parts: dict[str, LatentPairs], captions: tuple | None = None) -> dict:
    """`{direction: {"familiarity": ..., collection: {"without" | "with": metrics}}}`.

    Args:
        parts: training and test pairs.
        captions: as from `other_captions`.
    """
    train, test = (retrieval_data(parts[part], PAIR) for part in ("train", "test"))
    result = {}
    for direction in test.directions():
        source, _, target = direction.partition("->")
        new = test.relevant_for(direction)
        mixed = torch.cat([test.latents[target], train.latents[target]])
        none = torch.zeros(len(new), len(train.latents[target]), dtype=torch.bool)
        asked = {
            ALONE: (test.latents[source], test.latents[target], new),
            NEW: (test.latents[source], mixed, torch.cat([new, none], dim=1)),
        }
        if captions and source == "text":
            right = train.relevant_for(direction)[captions[1]]
            none = torch.zeros(len(right), new.shape[1], dtype=torch.bool)
            asked[TRAINED] = captions[0], mixed, torch.cat([none, right], dim=1)
        post = model.postprocessing(direction)
        settings = {BEFORE: dataclasses.replace(post, familiarity=0.0), AFTER: post}
        result[direction] = {"familiarity": post.familiarity}
        for name, (queries, items, relevant) in asked.items():
            result[direction][name] = {
                how: retrieval_metrics(
                    score_matrix(model, its, direction, {source: queries}, items).numpy(), relevant.numpy(), KS
                )
                for how, its in settings.items()
            }
    return result


def run(data: str, seed: int) -> None:
    """Train on one split, measure, and keep it."""
    stores = data_sets.prepare(data)
    with contextlib.redirect_stdout(io.StringIO()):
        folder = train_ours(Job(data, "altmoe", seed, 0), stores, "mixed")
    model = AltMoEModel.from_pretrained(folder, load_encoders=False)
    parts = open_parts(model, open_stores(stores), read_run(folder))
    captions = other_captions(parts["train"]) if data == "stamps" else None
    keep(PATH, {"about": __doc__.split("\n\n")[0]}, "splits", [data, str(seed)], measure(model, parts, captions))


def show(data: list[str]) -> None:
    """Print a table a direction: mean over splits ± standard error, in percent."""
    splits = read_results(PATH, "splits")
    for name in data:
        found = list(splits.get(name, {}).values())
        for direction in found[0] if found else ():
            rows = {}
            for collection in (ALONE, NEW, TRAINED):
                for how in (BEFORE, AFTER) if collection in found[0][direction] else ():
                    rows[f"{collection}, {how}"] = {
                        label: [split[direction][collection][how][measure] for split in found]
                        for measure, label in MEASURES.items()
                    }
            strengths = sorted(split[direction]["familiarity"] for split in found)
            print(f"\n{name}, {direction}, {len(found)} splits, familiarity {strengths}:\n\n{format_table(rows)}")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and print the tables."""
    line = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__.split("\n\n")[0])
    line.add_argument("--data", nargs="+", default=["stamps", "twemoji"], help="data sets of benchmarks.quality")
    line.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="splits (default: 0 1 2 3 4)")
    line.add_argument("--again", action="store_true", help="measure what is there anew")
    line.add_argument("--show", action="store_true", help="measure nothing, print what is there")
    given = line.parse_args(arguments)
    for data in given.data if not given.show else ():
        for seed in given.seeds:
            if given.again or str(seed) not in read_results(PATH, "splits").get(data, {}):
                try:
                    run(data, seed)
                except (ValueError, OSError, CalledProcessError) as error:
                    line.error(str(error))
                print(f"{data}, split {seed}", flush=True)
    show(given.data)


if __name__ == "__main__":
    sys.exit(main())

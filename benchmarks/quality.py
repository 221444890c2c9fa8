"""Recall on held-out concepts: altmoe, the paper's plain configuration and simpler methods, beside each other.

`python -m benchmarks.quality` measures the stamps and Twemoji (and the icons where their stores are, or with `--all`),
makes the stores it lacks, and prints one table over all of them; `--data stamps-speech` adds speech as a third modality,
and `--stores image=FOLDER text=HUB_NAME` measures any latents. Every method gets the same split by concept, the same
training rows, the same validation pairs, the same post-processing, and at most 24 configurations to choose from. A
measurement that is there is not made twice, so it can be interrupted, and run in several processes; `--again` makes it
anew. Methods that are trained by gradient search longest: they get fewer splits (`--slow_seeds`), and a set of more than
4,000 pairs gets fewer splits for all and none of them unless they are named with `--methods`. The table says so.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from subprocess import CalledProcessError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: measured faster than two threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks import common, data_sets, report
from benchmarks.common import RESULTS, keep, read_results
from trainer.arguments import parse_arguments
from trainer.baselines import CLOSED_FORMS, TRIALS
from trainer.evaluate import BASELINES, EvaluateArguments, evaluate
from trainer.evaluation import evaluate_variants
from trainer.heads import HEADS
from trainer.measuring import partnered_latents, retrieval_data
from trainer.pairs import LatentPairs
from trainer.train import open_stores, train

OURS = {"altmoe": [], "paper": ["model_cards/recipes/paper.yaml"]}
SLOW = ("paper", *HEADS)
METHODS = (*OURS, *BASELINES)
QUICK = ("altmoe", "chance", "ridge", "kernel_ridge", "cca", "asif")
CURVE = ("altmoe", *CLOSED_FORMS)
PASSES = 30  # of the paper's configuration over the pairs, at least: as many as the other trained heads make
LARGE = 4000  # training pairs from which a search of 24 trained heads takes an hour a split
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where `altmoe train` trains, too
FLAGS: list[str] = []  # further flags of `altmoe train`, for tests
TEST, VALIDATION = 0.2, 0.1  # shares of the concepts
SEARCH = {
    "altmoe": "one recipe for all data sets; on training rows out of fold: 72 closed forms a direction, 17 metrics, "
    "and up to 1,000 pairs whether to recall; on validation: checkpoints, 5 shares of the experts, and up to 1,000 pairs "
    "the kernel ridge's 24 kernels",
    "paper": "one configuration; on validation: checkpoints",
    "others": f"at most {TRIALS} configurations on validation (trained ones by successive halving), and early stopping",
    "everybody": "on validation: 5 strengths of the hubness correction",
}


@dataclass(frozen=True)
class Job:
    """One method on one split with one number of training concepts (0: all)."""

    data: str
    method: str
    seed: int
    concepts: int


def directions_of(stores: dict[str, str]) -> list[str]:
    """Both ways between every two modalities."""
    return [f"{x}->{y}" for a, b in itertools.combinations(sorted(stores), 2) for x, y in ((a, b), (b, a))]


def open_split(stores: dict[str, str], seed: int, concepts: int) -> dict[str, LatentPairs]:
    """The same parts that `altmoe train` makes."""
    opened = open_stores(dict(sorted(stores.items())))
    parts = LatentPairs.from_stores(opened, directions_of(stores)).split(seed, TEST, VALIDATION)
    if concepts:
        parts["train"] = parts["train"].sample_concepts(concepts, seed)
    return parts


def train_ours(job: Job, stores: dict[str, str], benchmark: str = "quality") -> str:
    """Train one recipe; returns its folder."""
    folder = f"build/runs/{benchmark}-{job.data}-{job.method}-{job.concepts or 'all'}-{job.seed}"
    flags = {"stores": json.dumps(stores), "output_dir": folder, "split_seed": job.seed, "seed": job.seed}
    flags |= {"test_fraction": TEST, "validation_fraction": VALIDATION, "train_concepts": job.concepts}
    flags |= {"overwrite": "true", "disable_tqdm": "true"}
    if job.method == "paper":  # its 300 steps are for some hundred pairs
        flags["max_steps"] = max(300, PASSES * len(open_split(stores, job.seed, job.concepts)["train"]) // 128)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    train(parse_arguments([*OURS[job.method], *words, "--directions", *directions_of(stores), *FLAGS]))
    return folder


def run_ours(job: Job, stores: dict[str, str]) -> dict:
    """Train one recipe and measure it: `{pair of modalities: figures}`."""
    wall, own = time.time(), time.process_time()
    folder = train_ours(job, stores)
    cost = {"seconds": time.time() - wall, "cpu_seconds": time.process_time() - own}
    result = evaluate(EvaluateArguments(model=folder, baselines=["none"]))
    found = {}
    for pair, methods in result["results"].items():
        confidence = {
            direction: {name: value for name, value in figures.items() if name != "curve"}
            for direction, figures in result["confidence"].items()
            if set(direction.split("->")) == set(pair.split("<->"))
        }
        rows = min(result["protocol"]["training_rows"].values())
        found[pair] = {**methods["altmoe"], **cost, "training_rows": rows, "confidence": confidence}
    return found


def run_baseline(job: Job, stores: dict[str, str]) -> dict:
    """Fit and choose one competitor, a pair of modalities after the other: `{pair of modalities: figures}`."""
    parts, found = open_split(stores, job.seed, job.concepts), {}
    for pair in itertools.combinations(sorted(stores), 2):
        latents = partnered_latents(parts["train"], pair, DEVICE)
        validation = retrieval_data(parts["validation"], pair, DEVICE)
        direction = "->".join(pair)
        rows = parts["train"].batch(direction, range(len(parts["train"].rows[direction])))
        groups = torch.from_numpy(parts["train"].group_of_key[rows["keys"]])
        method = BASELINES[job.method]()
        wall, own = time.time(), time.process_time()
        rows = {modality: x.to(DEVICE) for modality, x in rows["latents"].items()}
        retriever = method.fit(rows, validation, groups, seed=job.seed)
        cost = {"seconds": time.time() - wall, "cpu_seconds": time.process_time() - own, "trials": method.trials}
        figures = evaluate_variants(retriever, latents, validation, retrieval_data(parts["test"], pair, DEVICE))
        found["<->".join(pair)] = {**figures, **cost, "training_rows": len(groups), "chosen": retriever.config}
    return found


def run_job(job: Job, stores: dict[str, str]) -> None:
    """Measure, and keep it in the data set's JSON."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        found = (run_ours if job.method in OURS else run_baseline)(job, stores)
    about = {"data": job.data, "split": {"test": TEST, "validation": VALIDATION, "by": "concept"}, "search": SEARCH}
    place = [str(job.concepts or "all"), str(job.seed)]
    today = datetime.date.today().isoformat()
    for pair, figures in found.items():
        figures = {**figures, "date": today, "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
        keep(path_of(job.data), about, "sizes", [*place, pair, job.method], figures)


def path_of(data: str):
    """Where a data set's figures lie."""
    return RESULTS / f"quality-{data}.json"


def plan(data: str, stores: dict[str, str], given) -> list[Job]:
    """All that is asked for, least first: closed forms, then ours, then what searches longest."""
    pairs = LatentPairs.from_stores(open_stores(stores), directions_of(stores))
    concepts = len(set(pairs.groups.values()))
    most = concepts - round(TEST * concepts) - round(VALIDATION * concepts)
    sizes = [size for size in given.concepts if size < most]
    large = (1 - TEST - VALIDATION) * len(pairs) > LARGE
    methods = given.methods or [name for name in METHODS if not (large and name in SLOW)]
    jobs = []
    for method, size in itertools.product(methods, sizes):
        few = large or method in SLOW or (size and not given.full_curve)
        if size and method not in CURVE and not given.full_curve:
            continue
        jobs += [Job(data, method, seed, size) for seed in (given.seeds[: given.slow_seeds] if few else given.seeds)]
    order = {**dict.fromkeys(CLOSED_FORMS, 0), "altmoe": 1, "paper": 2}
    return sorted(jobs, key=lambda job: (order.get(job.method, 3), job.concepts > 0, job.seed))


def is_done(job: Job, pairs: int) -> bool:
    """Whether every pair of modalities has this job's figures."""
    split = read_results(path_of(job.data), "sizes").get(str(job.concepts or "all"), {}).get(str(job.seed), {})
    return sum(job.method in methods for methods in split.values()) == pairs


def run_all(jobs: list[tuple[Job, dict]], processes: int) -> None:
    """`run_job` for every job, see `common.run_all`."""

    def name(job: Job) -> str:
        return f"{job.data}, split {job.seed}, {job.concepts or 'all'} concepts, {job.method}"

    common.run_all(run_job, {name(job): (job, stores) for job, stores in jobs}, processes)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    add = result.add_argument
    add(
        "--data",
        nargs="+",
        help=f"data sets: {', '.join(data_sets.DATA)}, each also with {' or '.join(data_sets.ENDINGS)} (latents of several "
        "layers), or a folder of build/stores",
    )
    add(
        "--stores",
        nargs="+",
        metavar="MODALITY=STORE",
        help="two stores or more, by folder or Hub name, as one data set",
    )
    add("--name", default="given", help="what the data set of --stores is called in the results (default: given)")
    add("--all", action="store_true", help="the icons, too, even if their stores have to be made (10 minutes)")
    add("--seeds", type=int, nargs="+", default=list(range(5)), help="splits (default: 0 1 2 3 4)")
    add("--slow_seeds", type=int, default=3, help="so many of them for slow methods and for curves (default: 3)")
    add("--concepts", type=int, nargs="+", default=[0], help="training concepts, 0: all; several draw a curve")
    add("--full_curve", action="store_true", help="the curve for slow methods, too")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"default: all of {', '.join(METHODS)}")
    add("--again", nargs="+", default=[], choices=METHODS, metavar="METHOD", help="measure these anew")
    add("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    add("--quick", action="store_true", help="stamps, two splits, no method trained by gradient but ours: a minute")
    add("--show", action="store_true", help="measure nothing, print and draw what is there")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the tables, draw."""
    line = parser()
    given = line.parse_args(arguments)
    if given.quick:
        given.data, given.seeds = given.data or ["stamps"], given.seeds[:2]
        given.methods = [name for name in given.methods or QUICK if name in QUICK]
    try:
        if given.stores:
            asked = {given.name: data_sets.given_stores(given.stores)}
        else:
            names = given.data or ["stamps", "twemoji"]
            if not given.data and (given.all or data_sets.is_there("icons")):
                names.append("icons")
            asked = {name: (data_sets.store_folders if given.show else data_sets.prepare)(name) for name in names}
    except (ValueError, OSError, CalledProcessError) as error:
        line.error(str(error))
    if not given.show:
        jobs = []
        for data, stores in asked.items():
            pairs = len(stores) * (len(stores) - 1) // 2
            found = [job for job in plan(data, stores, given) if job.method in given.again or not is_done(job, pairs)]
            jobs += [(job, stores) for job in found]
        print(f"{len(jobs)} measurements to make", flush=True)
        run_all(jobs, given.jobs)
    report.show(list(asked), given.methods or list(METHODS))


if __name__ == "__main__":
    sys.exit(main())

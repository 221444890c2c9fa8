"""What each part is worth: one part changed at a time, on several splits, with paired differences.

`python -m benchmarks.ablation` needs the stores that `make demo` leaves; `--data stamps-speech` and `--data
stamps-languages` (made if they are missing) train six and thirty directions in one connector. Nothing is tuned here:
every variant keeps the settings of its reference but what it names. References: the default; the connector alone (no
closed form), where the mixture has to do all the work; and the connector alone with small batches, or narrow.

Measured is mean recall on the test split with the shared post-processing, and what it took to 95 % of the reference's
best validation recall: updates of one direction, samples (pairs that a loss has seen) and seconds. A joint step updates
all T directions: "equal updates" is equal work with T times fewer optimiser steps, "equal steps" is T times the work.
Splits that are already there are not run again (`--again` does), so it can be interrupted.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: measured faster than two threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

from benchmarks import data_sets
from benchmarks.common import RESULTS, keep, read_results, run_all, standard_error
from benchmarks.quality import directions_of
from trainer.arguments import parse_arguments
from trainer.evaluate import EvaluateArguments, evaluate
from trainer.evaluation import VARIANTS
from trainer.plotting import pyplot
from trainer.train import train

ALONE = {"base": "none", "alpha": 0.5, "latent_noise": 1.0}
DEFAULT, CONNECTOR, SMALL, NARROW = "default", "connector alone", "batches of 16", "narrow: width 16"
UPDATES = {"stamps-languages": 40}  # updates of each direction, where 150 would take too long
JOINT = {"schedule": "joint"}
EQUAL_UPDATES = {"schedule": "joint", "equal": "updates"}
LARGER_STEPS = {**EQUAL_UPDATES, "rate": "root"}  # is it only the number of steps?
# name: (reference, what differs from it)
PARTS = {
    DEFAULT: (None, {}),
    "closed form only, experts off": (DEFAULT, {"max_steps": 1, "learning_rate": 0.0}),
    "no target metric": (DEFAULT, {"target_metric": "false"}),
    "nothing recalled": (DEFAULT, {"recall": "false"}),
    "joint instead of alternating": (DEFAULT, JOINT),
    CONNECTOR: (None, ALONE),
    "one dense expert of equal active size": (CONNECTOR, {"num_experts": 1, "top_k": 1, "moe_intermediate_size": 128}),
    "joint, equal steps (T times the updates)": (CONNECTOR, JOINT),
    "joint, equal updates (steps / T)": (CONNECTOR, EQUAL_UPDATES),
    "joint, equal updates, learning rate x root of T": (CONNECTOR, LARGER_STEPS),
    "alternating, learning rate x root of T": (CONNECTOR, {"rate": "root"}),
    "blocks of 10 steps": (CONNECTOR, {"schedule": "blocks"}),
    "one gate for both terms": (CONNECTOR, {"num_gates": 1}),
    "one pool a modality": (CONNECTOR, {"expert_pool": "per_modality"}),
    "N = 4 experts": (CONNECTOR, {"num_experts": 4}),
    "N = 24 experts": (CONNECTOR, {"num_experts": 24}),
    "K = 1": (CONNECTOR, {"top_k": 1}),
    "K = 8": (CONNECTOR, {"top_k": 8}),
    "alpha = 0 (contrastive only)": (CONNECTOR, {"alpha": 0.0}),
    "alpha = 0.25": (CONNECTOR, {"alpha": 0.25}),
    "alpha = 0.75": (CONNECTOR, {"alpha": 0.75}),
    "alpha = 1 (regression only)": (CONNECTOR, {"alpha": 1.0}),
    SMALL: (None, {**ALONE, "per_device_train_batch_size": 16}),
    "batches of 16: joint, equal updates": (SMALL, EQUAL_UPDATES),
    "batches of 16: joint, equal steps": (SMALL, JOINT),
    NARROW: (None, {**ALONE, "hidden_size": 16, "moe_intermediate_size": 8}),
    "narrow: joint, equal updates": (NARROW, EQUAL_UPDATES),
    "narrow: joint, equal steps": (NARROW, JOINT),
}
QUICK = (CONNECTOR, "one dense expert of equal active size", "joint, equal updates (steps / T)")
SCHEDULES = tuple(name for name, (reference, changes) in PARTS.items() if name in (CONNECTOR, SMALL, NARROW) or (
    reference in (CONNECTOR, SMALL, NARROW) and (changes.get("schedule") == "joint" or "rate" in changes)))  # fmt: skip


def settings_of(name: str, directions: int = 2, updates: int = 150) -> dict:
    """A variant's flags: its reference's, then its own, then the steps that its schedule needs for so many updates."""
    reference, changes = PARTS[name]
    settings = {**(PARTS[reference][1] if reference else {}), **changes}
    if settings.pop("rate", None):
        settings["learning_rate"] = round(1e-3 * directions**0.5, 6)
    steps = updates if settings.pop("equal", None) == "updates" else updates * directions
    # as many evaluations whatever the number of steps, and all at whole rounds of the directions
    evaluations = {"eval_steps": max(1, steps // 12), "save_steps": max(1, steps // 12)}
    return {"max_steps": steps, **evaluations, **settings}


def gradient_conflict(model, pairs, rows: int = 256, most: int = 6) -> float:
    """Mean cosine of the directions' gradients on the shared parts (experts and gates), on one batch of training pairs.

    Over all pairs of the first `most` directions.
    """
    shared = [*model.connector.experts.parameters(), *model.connector.router.parameters()]
    gradients = []
    for direction in model.directions[:most]:
        batch = pairs.batch(direction, range(min(rows, len(pairs))))
        matches = pairs.matches(direction, batch["source_rows"], batch["target_rows"])
        loss = model(batch["latents"], direction, positives=matches, return_loss=True).loss
        found = torch.autograd.grad(loss, shared, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
        gradients.append(torch.nn.functional.normalize(torch.cat([g.flatten() for g in flat]), dim=0))
    cosines = torch.stack(gradients) @ torch.stack(gradients).T
    return float(cosines[torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)].mean())


def run(data: str, name: str, seed: int, stores: dict[str, str]) -> dict:
    """Train one variant on one split, and measure it."""
    folder = f"build/runs/ablation-{data}-{os.getpid()}"
    directions = directions_of(stores)
    settings = settings_of(name, len(directions), UPDATES.get(data, 150))
    flags = {"stores": json.dumps(stores), "output_dir": folder, "split_seed": seed, "seed": seed, "overwrite": "true",
             "disable_tqdm": "true", "early_stopping_patience": 0, **settings}  # fmt: skip
    flat = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    start, own = time.time(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        model, parts, metrics = train(arguments := parse_arguments([*flat, "--directions", *directions]))
        seconds, cpu_seconds = time.time() - start, time.process_time() - own
        result = evaluate(EvaluateArguments(model=folder, baselines=["none"]))
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    validation = [[entry["step"], entry["eval_mean_recall"]] for entry in history if "eval_mean_recall" in entry]
    best = [methods["altmoe"][list(VARIANTS)[-1]]["mean_recall"] for methods in result["results"].values()]
    shutil.rmtree(folder)
    return {
        "mean_recall": float(np.mean(best)),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "setup": 1 - metrics["train_runtime"] / seconds,
        "updates_a_step": len(directions) if settings.get("schedule") == "joint" else 1,
        "batch": arguments.per_device_train_batch_size,
        "steps": settings["max_steps"],
        "validation": validation,
        "gradient_cosine": gradient_conflict(model.eval().cpu(), parts["train"]),
    }


def path_of(data: str) -> Path:
    """Where a data set's figures lie."""
    return RESULTS / f"ablation-{data}.json"


def run_and_keep(data: str, name: str, seed: int, stores: dict[str, str]) -> None:
    """Measure one variant on one split, and keep it in the data set's JSON with the day."""
    torch.set_num_threads(1)
    about = {"data": data, "settings": {part: settings_of(part, len(directions_of(stores))) for part in PARTS}}
    measured = run(data, name, seed, stores)
    keep(path_of(data), about, "parts", [name, str(seed)], {**measured, "date": datetime.date.today().isoformat()})


def updates_to(of: dict, level: float) -> float:
    """Updates of one direction until validation first reached `level`; NaN if never."""
    return next((step * of["updates_a_step"] for step, value in of["validation"] if value >= level), float("nan"))


def summarise(results: dict, names: list[str], seeds: list[int]) -> list[dict]:
    """A row a variant, of the splits that it and its reference have: recall, paired difference, what it took."""
    rows = []
    for name in names:
        reference = PARTS[name][0]
        both = [s for s in map(str, seeds) if s in results.get(name, {}) and s in results.get(reference or name, {})]
        if not both:
            continue
        of, base = [results[name][s] for s in both], [results[reference or name][s] for s in both]
        levels = [0.95 * max(value for _, value in b["validation"]) for b in base]
        updates = [updates_to(m, level) for m, level in zip(of, levels, strict=True)]
        # measurements of earlier versions do not say how long a run was: 300 steps (half as many joint ones) of 128 pairs
        work = [m.get("steps", 300 / m["updates_a_step"]) * m["updates_a_step"] for m in of]
        rows.append(
            {
                "part": name,
                "reference": reference,
                "recall": [100 * m["mean_recall"] for m in of],
                "difference": [100 * (m["mean_recall"] - b["mean_recall"]) for m, b in zip(of, base, strict=True)],
                "cosine": [m["gradient_cosine"] for m in of],
                "updates": updates,
                "samples": [count * m.get("batch", 128) for count, m in zip(updates, of, strict=True)],
                "until": [_until(m, count / whole) for count, whole, m in zip(updates, work, of, strict=True)],
            }
        )
    return rows


def _until(of: dict, share: float) -> float:
    """Seconds of one core until a share of the steps was made: closed forms and files first, then the steps."""
    setup = of.get("setup", 0.0)
    return of.get("cpu_seconds", of["seconds"]) * (setup + share * (1 - setup))


def _reached(values: list[float], digits: int = 0) -> str:
    """The mean, or how many runs came there at all."""
    reached = [value for value in values if value == value]
    return f"{np.mean(reached):.{digits}f}" if len(reached) == len(values) else f"{len(reached)} of {len(values)} runs"


def _text(values: list[float], digits: int = 1, sign: str = "") -> str:
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""  # one split has none
    return f"{np.mean(values):{sign}.{digits}f}{error}"


def table(rows: list[dict]) -> str:
    """Markdown; a difference within two standard errors is not marked."""
    lines = [
        "| part | mean recall | against its reference | updates to 95 % | samples | seconds | gradient cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, error = np.mean(row["difference"]), standard_error(row["difference"])
        sign = "**" if row["reference"] and abs(mean) > 2 * error > 0 else ""
        against = (
            f"{sign}{_text(row['difference'], sign='+')}{sign} ({row['reference']})"
            if row["reference"]
            else "reference"
        )
        lines.append(
            f"| {row['part']} | {_text(row['recall'])} | {against} "
            f"| {_reached(row['updates'])} | {_reached(row['samples'])} | {_reached(row['until'], 1)} "
            f"| {_text(row['cosine'], 2, '+')} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], data: str) -> None:
    """Paired differences with two standard errors."""
    shown = [row for row in rows if row["reference"]][::-1]
    figure, axis = pyplot().subplots(figsize=(8, 0.36 * len(shown) + 1.2), layout="constrained")
    for place, row in enumerate(shown):
        color = "#1a6fb0" if row["reference"] == DEFAULT else "#555b61"
        axis.errorbar(
            np.mean(row["difference"]),
            place,
            xerr=2 * standard_error(row["difference"]),
            fmt="o",
            color=color,
            capsize=3,
        )
    axis.axvline(0, color="#b8bec4", linewidth=1)
    axis.set_yticks(range(len(shown)), [f"{row['part']}  [{row['reference']}]" for row in shown])
    splits = max(len(row["recall"]) for row in rows)
    axis.set_xlabel(f"points of mean recall against the reference\n{data}, up to {splits} splits, ± 2 standard errors")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"ablation-{data}.png", dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the table, write the JSON, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="stamps", help=f"data set (default: stamps): {', '.join(data_sets.DATA)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="splits (default: 0 1 2 3 4)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--schedules", action="store_true", help=f"only where schedules differ: {', '.join(SCHEDULES)}")
    parser.add_argument("--quick", action="store_true", help="three variants of the connector alone, two splits")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--show", action="store_true", help="run nothing, print and draw what is there")
    given = parser.parse_args(arguments)
    names = list(SCHEDULES) if given.schedules else given.parts
    seeds = given.seeds[:2] if given.quick else given.seeds
    names = list(QUICK) if given.quick else names
    names = list(dict.fromkeys(n for name in names for n in (PARTS[name][0], name) if n))  # references come along
    try:
        stores = (data_sets.store_folders if given.show else data_sets.prepare)(given.data)
    except ValueError as error:
        parser.error(str(error))
    path = path_of(given.data)
    results = read_results(path, "parts")
    if not given.show:
        missing = {
            f"split {seed}: {name}": (given.data, name, seed, stores)
            for seed in seeds
            for name in names
            if given.again or str(seed) not in results.get(name, {})
        }
        run_all(run_and_keep, missing, given.jobs)
        results = read_results(path, "parts")
    rows = summarise(results, names, seeds)
    print(f"\n{given.data}, mean recall in % ± standard error\n\n{table(rows)}")
    draw(rows, given.data)


if __name__ == "__main__":
    main()

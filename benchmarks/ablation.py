"""What each part is worth: one part changed at a time, on several splits, with paired differences.

`python -m benchmarks.ablation` needs the stores that `make demo` leaves. Nothing is tuned here: every variant keeps the
settings of its reference but the one it names. Two references: the default, and the connector alone (no closed form),
where the mixture has to do all the work. Measured is mean recall on the test split with the shared post-processing, and
how many updates of one direction, steps and seconds it took to 95 % of the reference's best validation recall. Splits
that are already there are not run again, so it can be interrupted.
"""

import argparse
import contextlib
import io
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: measured faster than two threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

from benchmarks.common import RESULTS, keep, read_results, standard_error
from trainer.arguments import parse_arguments
from trainer.evaluate import EvaluateArguments, evaluate
from trainer.evaluation import VARIANTS
from trainer.plotting import pyplot
from trainer.train import train

RECIPE = "model_cards/recipes/stamps.yaml"
ALONE = {"base": "none", "alpha": 0.5, "latent_noise": 1.0}
DEFAULT, CONNECTOR = "default", "connector alone"
# name: (reference, what differs from it)
PARTS = {
    DEFAULT: (None, {}),
    "closed form only, experts off": (DEFAULT, {"max_steps": 1, "learning_rate": 0.0}),
    "no target metric": (DEFAULT, {"target_metric": "false"}),
    "joint instead of alternating": (DEFAULT, {"schedule": "joint"}),
    CONNECTOR: (None, {}),
    "one dense expert of equal active size": (CONNECTOR, {"num_experts": 1, "top_k": 1, "moe_intermediate_size": 128}),
    "joint, equal steps (twice the updates)": (CONNECTOR, {"schedule": "joint"}),
    "joint, equal updates (half the steps)": (CONNECTOR, {"schedule": "joint", "max_steps": 150}),
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
}
QUICK = (CONNECTOR, "one dense expert of equal active size", "joint, equal updates (half the steps)")


def settings_of(name: str) -> dict:
    """A variant's flags: its reference's, then its own."""
    reference, changes = PARTS[name]
    return {**(ALONE if CONNECTOR in (name, reference) else {}), **changes}


def gradient_conflict(model, pairs, rows: int = 256) -> float:
    """Cosine of the directions' gradients on the shared parts (experts and gates), on one batch of training pairs."""
    shared = [*model.connector.experts.parameters(), *model.connector.router.parameters()]
    gradients = []
    for direction in model.directions[:2]:
        batch = pairs.batch(direction, range(min(rows, len(pairs))))
        matches = pairs.matches(direction, batch["source_rows"], batch["target_rows"])
        loss = model(batch["latents"], direction, positives=matches, return_loss=True).loss
        found = torch.autograd.grad(loss, shared, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
        gradients.append(torch.cat([g.flatten() for g in flat]))
    return float(torch.nn.functional.cosine_similarity(*gradients, dim=0))


def run(data: str, name: str, seed: int) -> dict:
    """Train one variant on one split, and measure it."""
    folder = f"build/runs/ablation-{data}"
    stores = json.dumps({m: f"build/stores/{data}/{m}" for m in ("image", "text")})
    flags = {"stores": stores, "output_dir": folder, "split_seed": seed, "seed": seed, "overwrite": "true",
             "disable_tqdm": "true", "early_stopping_patience": 0, **settings_of(name)}  # fmt: skip
    flat = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        model, parts, _ = train(parse_arguments([RECIPE, *flat]))
        seconds = time.time() - start
        result = evaluate(EvaluateArguments(model=folder, baselines=["none"]))
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    validation = [[entry["step"], entry["eval_mean_recall"]] for entry in history if "eval_mean_recall" in entry]
    updates = 2 if flags.get("schedule") == "joint" else 1
    return {
        "mean_recall": result["results"]["image<->text"]["altmoe"][list(VARIANTS)[-1]]["mean_recall"],
        "seconds": seconds,
        "updates_a_step": updates,
        "validation": validation,
        "gradient_cosine": gradient_conflict(model.eval(), parts["train"]),
    }


def updates_to(of: dict, level: float) -> float:
    """Updates of one direction until validation first reached `level`; NaN if never."""
    return next((step * of["updates_a_step"] for step, value in of["validation"] if value >= level), float("nan"))


def summarise(results: dict, names: list[str], seeds: list[int]) -> list[dict]:
    """A row a variant: mean recall, the paired difference to its reference, updates and seconds."""
    rows = []
    for name in names:
        of = [results[name][str(seed)] for seed in seeds]
        reference = PARTS[name][0]
        row = {"part": name, "reference": reference, "recall": [100 * m["mean_recall"] for m in of]}
        row["seconds"] = [m["seconds"] for m in of]
        row["cosine"] = [m["gradient_cosine"] for m in of]
        base = [results[reference or name][str(seed)] for seed in seeds]
        row["difference"] = [100 * (m["mean_recall"] - b["mean_recall"]) for m, b in zip(of, base, strict=True)]
        levels = [0.95 * max(value for _, value in b["validation"]) for b in base]
        row["updates"] = [updates_to(m, level) for m, level in zip(of, levels, strict=True)]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; a difference within two standard errors is not marked."""
    lines = [
        "| part | mean recall | against its reference | updates to 95 % | seconds | gradient cosine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, error = np.mean(row["difference"]), standard_error(row["difference"])
        sign = "**" if row["reference"] and abs(mean) > 2 * error > 0 else ""
        against = f"{sign}{mean:+.1f} ± {error:.1f}{sign} ({row['reference']})" if row["reference"] else "reference"
        reached = [value for value in row["updates"] if value == value]
        speed = (
            f"{np.mean(reached):.0f}"
            if len(reached) == len(row["updates"])
            else f"{len(reached)} of {len(row['updates'])} runs"
        )
        lines.append(
            f"| {row['part']} | {np.mean(row['recall']):.1f} ± {standard_error(row['recall']):.1f} | {against} | {speed} "
            f"| {np.mean(row['seconds']):.0f} | {np.mean(row['cosine']):+.2f} ± {standard_error(row['cosine']):.2f} |"
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
    splits = len(rows[0]["recall"])
    axis.set_xlabel(f"points of mean recall against the reference\n{data}, {splits} splits, ± 2 standard errors")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"ablation-{data}.png", dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the table, write the JSON, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--data", default="stamps", help="a folder of build/stores with an image and a text store")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="splits (default: 0 1 2 3 4)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="three variants of the connector alone, two splits")
    given = parser.parse_args(arguments)
    names, seeds = (list(QUICK), given.seeds[:2]) if given.quick else (given.parts, given.seeds)
    names = list(dict.fromkeys(n for name in names for n in (PARTS[name][0], name) if n))  # references come along
    for modality in ("image", "text"):
        if not Path(f"build/stores/{given.data}/{modality}").is_dir():
            parser.error(f"no store at build/stores/{given.data}/{modality}: run 'altmoe encode' (see README)")
    path = RESULTS / f"ablation-{given.data}.json"
    results = read_results(path, "parts")
    for seed in seeds:
        for name in names:
            if str(seed) not in results.get(name, {}):
                print(f"split {seed}: {name} ...", flush=True)
                about = {"data": given.data, "settings": {part: settings_of(part) for part in PARTS}}
                results = keep(path, about, "parts", [name, str(seed)], run(given.data, name, seed))
    rows = summarise(results, names, seeds)
    print(f"\n{given.data}, {len(seeds)} splits, mean recall in % ± standard error\n\n{table(rows)}")
    draw(rows, given.data)


if __name__ == "__main__":
    main()

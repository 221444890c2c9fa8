"""Recall on held-out concepts over several splits: altmoe, the paper's plain configuration and simpler methods.

`python -m benchmarks.quality --data stamps` needs the stores that `make demo` leaves. Every method gets the same split,
the same training rows, the same validation pairs and the same post-processing. Prints a table with standard errors and
writes JSON to `benchmarks/results/`; splits that are already there are not run again, so it can be interrupted.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: measured faster than two threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

from benchmarks.common import RESULTS, keep, read_results, standard_error
from trainer.arguments import parse_arguments
from trainer.evaluate import BASELINES, EvaluateArguments, evaluate
from trainer.evaluation import VARIANTS, format_table
from trainer.plotting import pyplot
from trainer.train import train

QUICK = ("chance", "ridge", "kernel_ridge", "cca", "asif", "linear_infonce")


def run_split(data: str, recipe: str, seed: int, concepts: int, baselines: list[str]) -> dict:
    """Train one recipe on one split and measure it (and the baselines) on the test split."""
    folder = f"build/runs/benchmark-{data}-{Path(recipe).stem}-{concepts or 'all'}-{seed}"
    stores = json.dumps({m: f"build/stores/{data}/{m}" for m in ("image", "text")})
    flags = ["--stores", stores, "--output_dir", folder, "--split_seed", seed, "--seed", seed, "--overwrite", "true"]
    start = time.time()
    train(parse_arguments([recipe, *map(str, flags), "--train_concepts", str(concepts), "--disable_tqdm", "true"]))
    seconds = time.time() - start
    result = evaluate(EvaluateArguments(model=folder, baselines=baselines or ["none"]))
    measured = result["results"]["image<->text"]
    measured["altmoe"]["seconds"] = seconds
    measured["altmoe"]["confidence"] = {
        direction: {name: value for name, value in figures.items() if name != "curve"}
        for direction, figures in result["confidence"].items()
    }
    for cells in measured.values():
        cells["training_rows"] = min(result["protocol"]["training_rows"].values())
    return measured


def draw(rows: dict, data: str) -> None:
    """A bar a method: mean recall with its standard error."""
    column = list(VARIANTS)[-1].replace("_", " ")
    values = {name: 100 * np.array(cells[column]) for name, cells in rows.items()}
    order = sorted(values, key=lambda name: values[name].mean())
    errors = [standard_error(values[name]) for name in order]
    figure, axis = pyplot().subplots(figsize=(7, 0.45 * len(order) + 1.2), layout="constrained")
    colors = ["#1a6fb0" if name == "altmoe" else "#b8bec4" for name in order]
    axis.barh(order, [values[name].mean() for name in order], xerr=errors, color=colors, capsize=3)
    axis.set_xlabel(f"mean recall on held-out concepts of {data}, % (± standard error, {len(values[order[0]])} splits)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"quality-{data}.png", dpi=100)


def draw_curve(sizes: dict, methods: list[str], data: str) -> None:
    """Mean recall against the number of training pairs, a line a method."""
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for method in methods:
        points = []
        for splits in sizes.values():
            of = [split[method] for split in splits.values() if method in split]
            values = 100 * np.array([m[list(VARIANTS)[-1]]["mean_recall"] for m in of])
            if len(of):
                points.append((np.mean([m["training_rows"] for m in of]), values.mean(), standard_error(values)))
        rows, means, errors = zip(*sorted(points), strict=True)
        style = {"color": "#1a6fb0", "linewidth": 2.5} if method == "altmoe" else {"linewidth": 1.2}
        axis.errorbar(rows, means, yerr=errors, label=method, capsize=3, marker="o", **style)
    axis.set(xscale="log", xlabel="training pairs", ylabel=f"mean recall on held-out concepts of {data}, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / f"curve-{data}.png", dpi=100)


def confidence_table(splits: list[dict]) -> str:
    """Coverage, precision and calibration by direction."""
    names = ("coverage", "precision", "false_alarms", "auroc", "calibration_error")
    rows = {
        direction: {
            name.replace("_", " "): [split["confidence"][direction][name] for split in splits] for name in names
        }
        for direction in splits[0]["confidence"]
    }
    return format_table(rows)


def main() -> None:
    """Run what is missing, print the tables, write the JSON, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--data", default="stamps", help="a folder of build/stores with an image and a text store")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="splits (default: 0 1 2 3 4)")
    parser.add_argument(
        "--concepts", type=int, nargs="+", default=[0], help="training concepts, 0: all; several give a curve"
    )
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES))
    parser.add_argument("--no_paper", action="store_true", help="leave out the paper's plain configuration")
    parser.add_argument("--quick", action="store_true", help="two splits and the methods that are tuned in seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.no_paper = arguments.seeds[:2], True
        arguments.baselines = [name for name in arguments.baselines if name in QUICK]
    for modality in ("image", "text"):
        if not Path(f"build/stores/{arguments.data}/{modality}").is_dir():
            parser.error(f"no store at build/stores/{arguments.data}/{modality}: run 'altmoe encode' (see README)")
    path = RESULTS / f"quality-{arguments.data}.json"
    sizes, about = read_results(path, "sizes"), {"data": arguments.data}
    for seed in arguments.seeds:
        for concepts in arguments.concepts:
            size = str(concepts or "all")
            done = sizes.get(size, {}).get(str(seed), {})
            missing = [name for name in arguments.baselines if name not in done]
            if "altmoe" not in done or missing:
                measured = run_split(arguments.data, "model_cards/recipes/stamps.yaml", seed, concepts, missing)
                sizes = keep(path, about, "sizes", [size, str(seed)], measured)
            if "paper" not in done and not arguments.no_paper:
                measured = run_split(arguments.data, "model_cards/recipes/paper.yaml", seed, concepts, [])
                sizes = keep(path, about, "sizes", [size, str(seed)], {"paper": measured["altmoe"]})
    methods = ["altmoe", *([] if arguments.no_paper else ["paper"]), *arguments.baselines]
    for concepts in arguments.concepts:
        rows: dict = {}
        for method in methods:
            of = [sizes[str(concepts or "all")][str(seed)][method] for seed in arguments.seeds]
            best = [m[list(VARIANTS)[-1]] for m in of]
            rows[method] = {name.replace("_", " "): [m[name]["mean_recall"] for m in of] for name in VARIANTS}
            for direction in ("image->text", "text->image"):
                rows[method][f"{direction} R@1"] = [m[direction]["recall@1"] for m in best]
                rows[method][f"{direction} R@10"] = [m[direction]["recall@10"] for m in best]
        named = f"{concepts} training concepts" if concepts else "all training pairs"
        print(f"\n{arguments.data}, {named}, mean recall in % ± standard error over {len(arguments.seeds)} splits\n")
        print(format_table(rows))
        print("\naltmoe's confidence that the first result is a match, every second query without one, %\n")
        print(confidence_table([sizes[str(concepts or "all")][str(seed)]["altmoe"] for seed in arguments.seeds]))
        if not concepts:
            draw(rows, arguments.data)
    if len(arguments.concepts) > 1:
        draw_curve(sizes, methods, arguments.data)


if __name__ == "__main__":
    main()

"""Recall on held-out concepts over several splits: altmoe, the paper's plain configuration and simpler methods.

`python -m benchmarks.quality --data stamps` needs the stores that `make demo` leaves. Every method gets the same split,
the same training rows, the same validation pairs and the same post-processing. Prints a table with standard errors and
writes JSON to `benchmarks/results/`; splits that are already there are not run again, so it can be interrupted.
"""

import argparse
import datetime
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: measured faster than two threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from trainer.arguments import parse_arguments
from trainer.evaluate import DEFAULT_BASELINES, EvaluateArguments, evaluate
from trainer.evaluation import VARIANTS, format_table
from trainer.train import train

RESULTS = Path("benchmarks/results")


def run_split(data: str, recipe: str, seed: int, baselines: list[str]) -> dict:
    """Train one recipe on one split and measure it (and the baselines) on the test split."""
    folder = f"build/runs/benchmark-{data}-{Path(recipe).stem}-{seed}"
    stores = json.dumps({m: f"build/stores/{data}/{m}" for m in ("image", "text")})
    flags = ["--stores", stores, "--output_dir", folder, "--split_seed", seed, "--seed", seed, "--overwrite", "true"]
    start = time.time()
    train(parse_arguments([recipe, *map(str, flags), "--disable_tqdm", "true"]))
    seconds = time.time() - start
    measured = evaluate(EvaluateArguments(model=folder, baselines=baselines or ["none"]))["results"]["image<->text"]
    return {"seconds": seconds, "methods": measured}


def draw(rows: dict, data: str) -> None:
    """A bar a method: mean recall with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    column = list(VARIANTS)[-1].replace("_", " ")
    values = {name: 100 * np.array(cells[column]) for name, cells in rows.items()}
    order = sorted(values, key=lambda name: values[name].mean())
    errors = [values[name].std(ddof=1) / len(values[name]) ** 0.5 if len(values[name]) > 1 else 0 for name in order]
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(order) + 1.2), layout="constrained")
    colors = ["#1a6fb0" if name == "altmoe" else "#b8bec4" for name in order]
    axis.barh(order, [values[name].mean() for name in order], xerr=errors, color=colors, capsize=3)
    axis.set_xlabel(f"mean recall on held-out concepts of {data}, % (± standard error, {len(values[order[0]])} splits)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"quality-{data}.png", dpi=100)


def main() -> None:
    """Run what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--data", default="stamps", choices=["stamps", "twemoji"])
    parser.add_argument("--seeds", type=int, default=5, help="number of splits (default: 5)")
    parser.add_argument("--baselines", nargs="*", default=list(DEFAULT_BASELINES))
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"quality-{arguments.data}.json"
    splits = json.loads(path.read_text())["splits"] if path.exists() else {}
    for seed in range(arguments.seeds):
        done = splits.setdefault(str(seed), {})
        missing = [name for name in arguments.baselines if name not in done]
        if "altmoe" not in done or missing:
            result = run_split(arguments.data, f"model_cards/recipes/{arguments.data}.yaml", seed, missing)
            done.update(result["methods"])
            done["altmoe"]["seconds"] = result["seconds"]
        if "paper" not in done:
            result = run_split(arguments.data, "model_cards/recipes/paper.yaml", seed, [])
            done["paper"] = {**result["methods"]["altmoe"], "seconds": result["seconds"]}
        date = datetime.date.today().isoformat()
        path.write_text(json.dumps({"data": arguments.data, "date": date, "splits": splits}, indent=1) + "\n")
    rows: dict = {}
    for method in ("altmoe", "paper", *arguments.baselines):
        of = [splits[str(seed)][method] for seed in range(arguments.seeds)]
        best = [m["both_directions+hubness"] for m in of]
        rows[method] = {name.replace("_", " "): [m[name]["mean_recall"] for m in of] for name in VARIANTS}
        for direction in ("image->text", "text->image"):
            rows[method][f"{direction} R@1"] = [m[direction]["recall@1"] for m in best]
            rows[method][f"{direction} R@10"] = [m[direction]["recall@10"] for m in best]
    print(f"\n{arguments.data}, mean recall in percent ± standard error over {arguments.seeds} splits\n")
    print(format_table(rows))
    draw(rows, arguments.data)


if __name__ == "__main__":
    main()

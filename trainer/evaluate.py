"""`altmoe evaluate`: a finished model on the test split it never saw, beside the simpler methods on the same split.

Comes in: the folder that `altmoe train` wrote (its recipe says which stores and which split). Goes out: a table and a
JSON file. Every method gets the same split, the same validation pairs and the same post-processing.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from modeling_altmoe import AltMoEModel
from modeling_altmoe.configuration_altmoe import unknown_name_message
from trainer.baselines import CLOSED_FORMS
from trainer.confidence import measure_confidence
from trainer.evaluation import evaluate_variants, format_table
from trainer.heads import HEADS
from trainer.measuring import modality_pairs, partnered_latents, retrieval_data, scores_of, served_direction
from trainer.plotting import draw_confidence
from trainer.train import RECIPE, open_parts, open_stores
from trainer.usage import expert_usage

BASELINES = {**CLOSED_FORMS, **HEADS}
DEFAULT_BASELINES = ("chance", "ridge", "kernel_ridge", "cca", "linear_infonce")


@dataclass
class EvaluateArguments:
    """Measure a finished model on held-out pairs."""

    model: str = field(metadata={"help": "folder written by 'altmoe train'"})
    stores: str | None = field(
        default=None,
        metadata={
            "help": "LatentStores as JSON, {modality: folder or Hub name} (default: those of the recipe; needed for a "
            "published model)"
        },
    )
    baselines: list[str] = field(
        default_factory=lambda: list(DEFAULT_BASELINES),
        metadata={"help": f"methods beside it: {', '.join(BASELINES)}, or none"},
    )
    part: str = field(default="test", metadata={"help": "which part of the split: test or validation"})
    json: str | None = field(
        default=None, metadata={"help": "JSON file to write (default: evaluation.json in the model)"}
    )


def read_run(folder: str) -> dict:
    """The recipe a model was trained with.

    Raises:
        FileNotFoundError: the folder has none.
    """
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' has no {RECIPE}: expected a folder written by 'altmoe train'.")
    return yaml.safe_load(path.read_text())


def _stores_of_the_recipe(recipe: dict, arguments: EvaluateArguments) -> dict[str, str]:
    # OWNER/NAME may be a store on the Hub, which is asked when it is opened
    given = recipe["stores"].items()
    absent = [f"{modality} ('{path}')" for modality, path in given if not Path(path).is_dir() and path.count("/") != 1]
    if absent:
        example = json.dumps(dict.fromkeys(recipe["stores"], "FOLDER"))
        raise FileNotFoundError(
            f"'{arguments.model}' is measured on LatentStores that are not here: {', '.join(absent)}. A published model does "
            f"not bring them. Say where they are, or make them with 'altmoe encode': --stores '{example}'"
        )
    return recipe["stores"]


def evaluate(arguments: EvaluateArguments) -> dict:
    """Measure the model and the baselines.

    Returns:
        `{"protocol": ..., "results": {pair: {method: {variant: metrics}}}, "confidence": {direction: figures},
        "experts": expert_usage(...)}`.

    Raises:
        ValueError: unknown baseline or part, or stores of another protocol.
        FileNotFoundError: no such model, or the stores of its recipe are not here.
    """
    names = [name for name in arguments.baselines if name != "none"]
    for name in names:
        if name not in BASELINES:
            raise ValueError(unknown_name_message("baseline", name, BASELINES))
    if arguments.part not in ("test", "validation"):
        raise ValueError(f"part '{arguments.part}': expected test or validation.")
    recipe = read_run(arguments.model)
    model = AltMoEModel.from_pretrained(arguments.model, load_encoders=False)
    stores = open_stores(json.loads(arguments.stores) if arguments.stores else _stores_of_the_recipe(recipe, arguments))
    for modality in model.config.modalities:
        stores[modality].check(modality, model.config.encoders[modality])
    parts = open_parts(model, stores, recipe)
    results, confidence = {}, {}
    for pair in modality_pairs(model.directions)[0]:
        train, validation = partnered_latents(parts["train"], pair), retrieval_data(parts["validation"], pair)
        asked = retrieval_data(parts[arguments.part], pair)
        measured = {"altmoe": evaluate_variants(model, train, validation, asked)}
        for direction in asked.directions():
            if direction in model.directions and (calibration := model.calibration(direction)):
                confidence[direction] = measure_confidence(calibration, *scores_of(model, asked, direction))
        for name in names:
            print(f"tuning {name} on validation ...", flush=True)
            # the items the model was trained on, paired row by row
            direction = served_direction(parts["train"], pair)
            rows = parts["train"].batch(direction, range(len(parts["train"].rows[direction])))
            groups = torch.from_numpy(parts["train"].group_of_key[rows["keys"]])
            retriever = BASELINES[name]().fit(rows["latents"], validation, groups, seed=recipe["seed"])
            measured[name] = evaluate_variants(retriever, train, validation, asked)
        results["<->".join(pair)] = measured
    protocol = {
        "part": arguments.part,
        **{name: recipe[name] for name in ("split_seed", "test_fraction", "validation_fraction")},
        "split": "by concept: no caption stands on both sides",
        "queries": {m: len(x) for m, x in parts[arguments.part].latents.items()},
        "training_rows": {m: len(x) for m, x in parts["train"].latents.items()},
        "hubness": "training queries only; strength chosen on validation",
        "ties": "pessimistic",
    }
    used = expert_usage(model, parts[arguments.part])
    return {"protocol": protocol, "results": results, "confidence": confidence, "experts": used}


def table(result: dict) -> str:
    """The results as Markdown: recall in percent, best post-processing last."""
    lines = []
    for pair, methods in result["results"].items():
        rows = {}
        for method, variants in methods.items():
            best = variants["both_directions+hubness"]
            cells = {}
            for direction, metrics in best.items():
                if isinstance(metrics, dict):
                    cells.update({f"{direction} R@{k}": [metrics[f"recall@{k}"]] for k in (1, 5, 10)})
                    cells[f"{direction} median rank"] = [metrics["median_rank"] / 100]  # printed as it is
            cells["mean recall"] = [best["mean_recall"]]
            cells["one direction only"] = [variants["one_direction"]["mean_recall"]]
            rows[method] = cells
        lines += [f"{pair}, {result['protocol']['part']} split:", "", format_table(rows), ""]
    if result["confidence"]:
        names = ("threshold", "coverage", "precision", "false_alarms", "auroc", "calibration_error")
        rows = {
            d: {name.replace("_", " "): [values[name]] for name in names} for d, values in result["confidence"].items()
        }
        lines += ["confidence that the first result is a match; every second query has none (percent):", ""]
        lines += [format_table(rows), ""]
    return "\n".join(lines)


def main(arguments: EvaluateArguments) -> None:
    """Run, print the table, write the JSON."""
    result = evaluate(arguments)
    print(table(result))
    path = Path(arguments.json or Path(arguments.model) / "evaluation.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
    if result["confidence"]:
        picture = path.with_name(path.stem + "-confidence.png")
        draw_confidence(result["confidence"], picture)
        print(f"drawn in {picture}")

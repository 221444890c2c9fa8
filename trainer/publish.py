"""`altmoe publish`: a trained run as a folder that is ready for the Hub.

Comes in: the folder of a run, evaluated. Goes out: connector weights, configuration, processor, code, a card written
from what was measured, and a picture of held-out queries with their best results.
"""

import datetime
import json
import os
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import model_cards
from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.sharing_altmoe import on_hub, refuse_local_encoders
from trainer.encode import open_data
from trainer.evaluate import read_run, table
from trainer.measuring import modality_pairs
from trainer.pairs import LatentPairs
from trainer.plotting import pyplot
from trainer.train import RECIPE, open_parts, open_stores

VERSION = "0.1.0"
TEMPLATE = Path(model_cards.__file__).parent / "template.md"
ENDPOINT = TEMPLATE.parent / "endpoint"


@dataclass
class PublishArguments:
    """Make a folder that is ready for the Hub from a finished run."""

    run: str = field(metadata={"help": "folder written by 'altmoe train' (and 'altmoe evaluate', for the numbers)"})
    out: str = field(metadata={"help": "folder to write"})
    name: str | None = field(default=None, metadata={"help": "title of the card (default: the folder's name)"})
    self_contained: bool = field(default=False, metadata={"help": "write the encoders' weights as well"})
    data: str | None = field(default=None, metadata={"help": "data set with the pictures, for examples.png"})
    image_column: str = field(default="image", metadata={"help": "column of the pictures"})
    caption_column: str = field(default="caption", metadata={"help": "column of the captions"})
    license: str = field(default="apache-2.0", metadata={"help": "licence of the connector"})


def front_matter(folder: str | os.PathLike | None) -> dict:
    """The YAML head of a folder's README.md, or nothing."""
    path = Path(folder or "") / "README.md"
    if not folder or not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8").split("---", 2)
    return (yaml.safe_load(parts[1]) or {}) if len(parts) == 3 and not parts[0].strip() else {}


def _encoder_rows(model: AltMoEModel) -> list[dict]:
    rows = []
    for modality, entry in model.config.encoders.items():
        protocol = model.protocol(modality)
        given = entry.get("name_or_path")
        local = given and not on_hub(entry)
        licence = front_matter(given).get("license", "unknown") if local else "see its repository"
        name = Path(given).name if local else (given or "vectors only")
        latent = f"{entry['latent_size']}-d, {protocol.pooling} pooling" + (", L2" if protocol.normalize else "")
        rows.append({"modality": modality, "name": name, "licence": licence, "latent": latent, "local": local})
    return rows


def _eval_results(evaluation: dict, dataset: str) -> list[EvalResult]:
    """One result a direction and k, with the standard error over its queries, `sqrt(p (1 - p) / n)`."""
    results, queries = [], evaluation["protocol"]["queries"]
    for pair, methods in evaluation["results"].items():
        metrics = methods["altmoe"]["both_directions+hubness"]
        for direction in (d for d in metrics if d != "mean_recall"):
            count = min(queries[modality] for modality in direction.partition("->")[0].split("+"))
            for k in (1, 5, 10):
                share = metrics[direction][f"recall@{k}"]
                error = 100 * (share * (1 - share) / count) ** 0.5
                results.append(
                    EvalResult(
                        task_type="cross-modal-retrieval",
                        dataset_type=dataset,
                        dataset_name=f"{dataset} ({pair}, {evaluation['protocol']['part']})",
                        metric_type="recall",
                        metric_name=f"{direction} recall@{k}",
                        metric_value=round(100 * share, 2),
                        metric_args={"standard_error": round(error, 2), "queries": count},
                    )
                )
    return results


def write_card(arguments: PublishArguments, model: AltMoEModel, recipe: dict, example_image: str) -> None:
    """Write README.md from the template, the recipe and the evaluation."""
    out = Path(arguments.out)
    name = arguments.name or out.name
    measured = Path(arguments.run) / "evaluation.json"
    evaluation = json.loads(measured.read_text()) if measured.is_file() else None
    data_card = front_matter(arguments.data)
    data_name = Path(arguments.data).name if arguments.data else "own pairs"
    rows = _encoder_rows(model)
    on_hub = [row["name"] for row in rows if not row["local"] and row["name"] != "vectors only"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if {"image", "text"} <= set(model.config.encoders) else None,
        license=arguments.license,
        tags=[
            "altmoe",
            "sentence-transformers",
            "mixture-of-experts",
            "cross-modal-retrieval",
            *model.config.modalities,
        ],
        base_model=on_hub or None,
        base_model_relation="adapter" if on_hub else None,
        model_name=name,
        eval_results=_eval_results(evaluation, data_name) if evaluation else None,
    )
    protocol = "Not evaluated yet: run `altmoe evaluate` and publish again."
    if evaluation:
        p = evaluation["protocol"]
        protocol = (
            f"Protocol: {p['part']} split (seed {p['split_seed']}, {p['split']}), "
            f"{', '.join(f'{n} {m}' for m, n in p['queries'].items())} items; trained on "
            f"{', '.join(f'{n} {m}' for m, n in p['training_rows'].items())} items. All methods: same split, tuned on the "
            f"same validation pairs, same post-processing (both-direction score, hubness correction from "
            f"{p['hubness']}). Ties count against the method. One split: the standard errors in the metadata are over "
            "its queries; the project's benchmark has several splits."
        )
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoders."))
    config = model.config
    licence = data_card.get("license", "see its source")
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo=os.path.relpath(out) if not on_hub else name,
        summary=(
            f"Joins frozen {' and '.join(model.config.modalities)} encoders with one mixture-of-experts connector "
            "(altmoe), trained one direction at a time in latent space."
        ),
        encoders=rows,
        directions=", ".join(f"`{d}`" for d in model.directions),
        connector=(
            f"{config.num_experts} experts, top-{config.top_k}, {config.num_gates} gates, width {config.hidden_size}, over a "
            f"{config.base} base; {parameters / 1e6:.2f} M trained parameters"
        ),
        example_image=example_image,
        results=table(evaluation) if evaluation else "",
        protocol=protocol,
        data=f"{data_name} (licence: {licence}).",
        recipe=yaml.safe_dump(
            {k: v for k, v in recipe.items() if k not in ("stores", "output_dir")}, sort_keys=False
        ).strip(),
        date=datetime.date.today().isoformat(),
        version=VERSION,
        limits=(
            "It knows what its encoders and its training pairs know; queries from another domain are answered with the "
            "nearest thing it has. Scores are ranks' raw material, not probabilities."
        ),
    )
    card.save(out / "README.md")


def _distinct(ranked: list[int], contents, count: int) -> list[int]:
    """The first `count` results whose content differs: an item that occurs twice is shown once."""
    first = {}
    for row in ranked:
        first.setdefault(int(contents[row]), row)
    return list(first.values())[:count]


def draw_examples(
    path: Path, model: AltMoEModel, test: LatentPairs, data: Dataset, arguments: PublishArguments
) -> list:
    """A picture of held-out queries (four each way) with their five best held-out results; right ones framed.

    The queries are spread evenly over the split, not chosen by their results.

    Returns:
        ids of the pictures that served as queries.
    """
    plt = pyplot()
    row_of = {str(name): row for row, name in enumerate(data["id"])}
    keys = {m: test.keys[m] for m in ("image", "text")}

    def draw(axis, modality: str, row: int) -> None:
        item = data[row_of[keys[modality][row]]]
        if modality == "image":
            axis.imshow(item[arguments.image_column])
        else:
            words = textwrap.shorten(item[arguments.caption_column], 80, placeholder=" ...")
            axis.text(
                0.5, 0.5, textwrap.fill(words, 18), ha="center", va="center", fontsize=9, transform=axis.transAxes
            )

    count = len(keys["image"])
    picked = [count * i // 9 for i in range(1, 9)]
    figure, axes = plt.subplots(8, 6, figsize=(9.5, 13), layout="constrained")
    for number, (axis_row, item) in enumerate(zip(axes, picked, strict=True)):
        direction = "text->image" if number < 4 else "image->text"
        source, target = direction.split("->")
        scores = model.score(direction, test.latents[source][item : item + 1], test.latents[target])[0]
        right = test.matches(direction, [item], range(len(test.latents[target])))[0]
        found = _distinct(scores.argsort(descending=True).tolist(), test.contents[target], 5)
        draw(axis_row[0], source, item)
        axis_row[0].set_title(f"query ({source})", fontsize=8, loc="left", weight="bold")
        for axis in axis_row:
            axis.set(xticks=[], yticks=[], facecolor="white")
            axis.set_box_aspect(1)
            for spine in axis.spines.values():
                spine.set_color("#dddddd")
        for place, axis in enumerate(axis_row[1:]):
            if place >= len(found):
                axis.axis("off")
                continue
            draw(axis, target, found[place])
            axis.set_title(f"{place + 1}", fontsize=8, loc="left")
            if right[found[place]]:
                for spine in axis.spines.values():
                    spine.set(color="#1a9850", linewidth=3)
    figure.suptitle("Held-out queries and their five best held-out results (green: right)", fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return [keys["image"][item] for item in picked[4:]]


def publish(arguments: PublishArguments) -> Path:
    """Write the folder.

    Returns:
        its path.

    Raises:
        FileNotFoundError: the run has no recipe or no model.
        ValueError: `self_contained` with encoders that are not at hand, or without it encoders that only this machine has.
    """
    recipe = read_run(arguments.run)
    model = AltMoEModel.from_pretrained(arguments.run, load_encoders=arguments.self_contained)
    if not arguments.self_contained:
        refuse_local_encoders(model.config.encoders)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, self_contained=arguments.self_contained)
    AltMoEProcessor.from_pretrained(arguments.run, trust_remote_code=True).save_pretrained(out)
    shared = {**recipe, "stores": {m: Path(path).name for m, path in recipe["stores"].items()}}  # no folders of ours
    (out / RECIPE).write_text(yaml.safe_dump({**shared, "output_dir": out.name}, sort_keys=False))
    for name in ("handler.py", "requirements.txt"):  # what an Inference Endpoint starts
        shutil.copy(ENDPOINT / name, out / name)
    if (Path(arguments.run) / "evaluation.json").is_file():
        shutil.copy(Path(arguments.run) / "evaluation.json", out / "evaluation.json")
    example = '"photo.png"'
    if arguments.data and ("image", "text") in [tuple(sorted(p)) for p in modality_pairs(model.directions)[0]]:
        data = open_data(arguments.data)
        test = open_parts(model, open_stores(recipe["stores"]), recipe)["test"]
        used = draw_examples(out / "examples.png", model, test, data, arguments)
        example = 'cached_file(repo, "example.png")'  # in a folder and on the Hub alike
        data[[str(name) for name in data["id"]].index(used[0])][arguments.image_column].save(out / "example.png")
    write_card(arguments, model, recipe, example)
    return out


def main(arguments: PublishArguments) -> None:
    """Run and say where it is."""
    out = publish(arguments)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    print(f"{out}: {len([f for f in out.rglob('*') if f.is_file()])} files, {size:.1f} MB, ready for the Hub")

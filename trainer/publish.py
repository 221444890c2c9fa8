"""`altmoe publish`: a trained run as a folder that is ready for the Hub.

Comes in: the folder of a run, evaluated. Goes out: connector weights, configuration, processor, code, a card written
from what was measured, and a picture of held-out queries with their best results.
"""

import json
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.sharing_altmoe import refuse_local_encoders
from trainer.card import TEMPLATE, write_card
from trainer.evaluate import read_run
from trainer.items import open_data
from trainer.measuring import modality_pairs
from trainer.pairs import LatentPairs
from trainer.plotting import pyplot
from trainer.train import RECIPE, open_parts, open_stores
from trainer.usage import draw_usage

ENDPOINT = TEMPLATE.parent / "endpoint"
LABEL_LENGTH = 40  # characters of a widget's label


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


def save_examples(out: Path, data: Dataset, ids: list, arguments: PublishArguments) -> list[dict]:
    """Pictures that were queries, saved for the card's code and the Hub's widget, with their captions as labels.

    Returns:
        the widget's entries. It separates labels by commas: captions with a comma, or too long to be shown, are left out.
    """
    rows = {str(name): row for row, name in enumerate(data["id"])}
    items = {name: data[rows[name]] for name in dict.fromkeys(ids)}
    captions = {name: str(item[arguments.caption_column]).strip(" .") for name, item in items.items()}
    labels = list(dict.fromkeys(c for c in captions.values() if "," not in c and len(c) <= LABEL_LENGTH))
    widget = []
    for number, (name, item) in enumerate(items.items(), start=1):
        file = "example.png" if number == 1 else f"example-{number}.png"
        item[arguments.image_column].save(out / file)
        if captions[name] in labels:
            widget.append({"src": file, "candidate_labels": ", ".join(labels), "example_title": captions[name]})
    return widget


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
    stores = {modality: Path(path).name for modality, path in recipe["stores"].items()}
    shared = {**recipe, "stores": stores, "output_dir": out.name}  # no folders of ours
    (out / RECIPE).write_text(yaml.safe_dump(shared, sort_keys=False))
    for name in ("handler.py", "requirements.txt"):  # what an Inference Endpoint starts
        shutil.copy(ENDPOINT / name, out / name)
    about = {"name": arguments.name or out.name, "license": arguments.license, "data": arguments.data}
    measured = Path(arguments.run) / "evaluation.json"
    if measured.is_file():
        shutil.copy(measured, out / measured.name)
        about["evaluation"] = json.loads(measured.read_text())
        if usage := about["evaluation"].get("experts"):
            draw_usage(usage, out / "experts.png")
    if arguments.data and ("image", "text") in [tuple(sorted(p)) for p in modality_pairs(model.directions)[0]]:
        data = open_data(arguments.data)
        test = open_parts(model, open_stores(recipe["stores"]), recipe)["test"]
        used = draw_examples(out / "examples.png", model, test, data, arguments)
        about["widget"] = save_examples(out, data, used, arguments)
        about["example_image"] = 'cached_file(repo, "example.png")'  # in a folder and on the Hub alike
    write_card(out, model, shared, **about)
    return out


def main(arguments: PublishArguments) -> None:
    """Run and say where it is."""
    out = publish(arguments)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    print(f"{out}: {len([f for f in out.rglob('*') if f.is_file()])} files, {size:.1f} MB, ready for the Hub")

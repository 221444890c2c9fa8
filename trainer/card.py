"""The model card, written from what was measured: metadata for the Hub's search, widget and results, then the text.

Comes in: a model, the recipe it was trained with, its evaluation, and what its encoders' and data's own cards say. Goes
out: README.md. Strings from others' files stay strings: one line each, never a template and never code.
"""

import contextlib
import datetime
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

import model_cards
from modeling_altmoe import AltMoEModel
from modeling_altmoe.sharing_altmoe import on_hub, one_line
from trainer.evaluate import table

VERSION = "0.1.0"
TEMPLATE = Path(model_cards.__file__).parent / "template.md"
UNKNOWN = "unknown"


def front_matter(name: str | os.PathLike | None, revision: str | None = None, kind: str = "model") -> dict:
    """The YAML head of a folder's or a Hub repository's README.md; empty where there is none, or the Hub is out of reach.

    Raises:
        ValueError: it is not plain YAML (tags that would make objects are never followed).
    """
    if not name:
        return {}
    try:
        found = cached_file(
            str(name), "README.md", revision=revision, repo_type=kind, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError):
        found = None
    text = Path(found).read_text(encoding="utf-8") if found else ""
    match = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The head of '{name}/README.md' is not plain YAML: {one_line(error)}") from error
    return fields if isinstance(fields, dict) else {}


def hub_names(names) -> list[str]:
    """Those that can be names on the Hub, each once."""
    kept = []
    for name in names if isinstance(names, list) else [names]:
        with contextlib.suppress(ValueError):
            validate_repo_id(name)
            kept += [name] if isinstance(name, str) else []
    return list(dict.fromkeys(kept))


@dataclass
class Part:
    """A part of what is published that somebody made: an encoder.

    Attributes:
        modality: of the encoder.
        name: Hub name, or the folder's name.
        licence: as its own card says.
        latent: width, pooling and normalisation, in words.
        base_model: names on the Hub: its own, or what its card says it is made of.
        source: Python arguments that load it, as the card's code has them.
        adapted: LoRA weights lie in `adapter_<modality>/`.
    """

    modality: str
    name: str
    licence: str
    latent: str
    base_model: list[str]
    source: str
    adapted: bool


def encoder_parts(model: AltMoEModel) -> list[Part]:
    """What the card says of each encoder."""
    parts = []
    for modality, entry in model.config.encoders.items():
        protocol, name = model.protocol(modality), entry.get("name_or_path")
        about = front_matter(name, entry.get("revision"))
        there = on_hub(entry)
        parts.append(
            Part(
                modality=modality,
                name=one_line((name if there else Path(name).name) if name else "vectors only"),
                licence=one_line(about.get("license", "see its repository" if there else UNKNOWN)),
                latent=f"{entry['latent_size']}-d, {protocol.pooling} pooling" + (", L2" if protocol.normalize else ""),
                base_model=hub_names(name if there else about.get("base_model")),
                source=f'"{name}", revision="{entry["revision"]}"'
                if there
                else f'repo, subfolder="encoder_{modality}"',
                adapted=bool(entry.get("lora")),
            )
        )
    return parts


def eval_results(evaluation: dict, dataset: str) -> list[EvalResult]:
    """One result a direction and k, with its protocol and the standard error over its queries, `sqrt(p (1 - p) / n)`."""
    protocol, results = evaluation["protocol"], []
    known = {name: protocol[name] for name in ("split", "split_seed", "test_fraction", "hubness", "ties")}
    for pair, methods in evaluation["results"].items():
        metrics = methods["altmoe"]["both_directions+hubness"]
        for direction in (d for d in metrics if d != "mean_recall"):
            count = min(protocol["queries"][modality] for modality in direction.partition("->")[0].split("+"))
            for k in (1, 5, 10):
                share = metrics[direction][f"recall@{k}"]
                error = 100 * (share * (1 - share) / count) ** 0.5
                results.append(
                    EvalResult(
                        task_type="cross-modal-retrieval",
                        dataset_type=dataset,
                        dataset_name=f"{dataset} ({pair}, {protocol['part']})",
                        dataset_split=protocol["part"],
                        dataset_args=known,
                        metric_type="recall",
                        metric_name=f"{direction} recall@{k}",
                        metric_value=round(100 * share, 2),
                        metric_args={"standard_error": round(error, 2), "queries": count},
                    )
                )
    return results


def _protocol(evaluation: dict | None) -> str:
    if not evaluation:
        return "Not evaluated yet: run `altmoe evaluate` and publish again."
    p = evaluation["protocol"]
    return (
        f"Protocol: {p['part']} split (seed {p['split_seed']}, {p['split']}), "
        f"{', '.join(f'{n} {m}' for m, n in p['queries'].items())} items; trained on "
        f"{', '.join(f'{n} {m}' for m, n in p['training_rows'].items())} items. All methods: same split, tuned on the "
        f"same validation pairs, same post-processing (both-direction score, hubness correction from "
        f"{p['hubness']}). Ties count against the method. The standard errors in the metadata are over this one split's "
        "queries; they say nothing of other splits or seeds."
    )


def _experts(usage: dict[str, dict]) -> str:
    """What the picture of the experts shows, in one sentence a direction."""
    sentences = []
    for direction, its in usage.items():
        gates = ", ".join(f"{name}: {gate['effective']:.1f}" for name, gate in its["gates"].items())
        sentences.append(f"`{direction}` ({its['items']} held-out items): effective number of experts by {gates}; the "
                         f"experts' correction counts with {its['trust']:g}.")  # fmt: skip
    return "\n".join(f"- {sentence}" for sentence in sentences)


def write_card(
    out: Path,
    model: AltMoEModel,
    recipe: dict,
    *,
    name: str,
    license: str,
    data: str | None = None,
    evaluation: dict | None = None,
    widget: list[dict] | None = None,
    example_image: str = '"photo.png"',
) -> None:
    """Write README.md from the template.

    Args:
        out: the folder.
        model: the published model; its encoders still say where they came from.
        recipe: as it is published.
        name: title.
        license: of the connector.
        data: data set the pairs came from: Hub name or folder.
        evaluation: what `altmoe evaluate` wrote.
        widget: examples for the Hub's widget.
        example_image: Python expression for the picture in the card's code.

    Raises:
        ValueError: an encoder's or the data's own card has a head that is not plain YAML.
    """
    parts, config = encoder_parts(model), model.config
    data_here = bool(data) and os.path.exists(data)
    data_card = front_matter(data, kind="dataset")
    data_name = one_line((Path(data).name if data_here else data) if data else "own pairs")
    base_model = list(dict.fromkeys(found for part in parts for found in part.base_model))
    searchable = {"image", "text"} <= set(config.encoders)
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if searchable else None,
        license=license,
        tags=["altmoe", "sentence-transformers", "mixture-of-experts", "cross-modal-retrieval", *config.modalities],
        datasets=hub_names(data) if data and not data_here else None,
        base_model=base_model or None,
        base_model_relation="adapter" if base_model else None,
        model_name=one_line(name),
        eval_results=eval_results(evaluation, data_name) if evaluation else None,
        widget=(widget if searchable else None) or None,
    )
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoders."))
    usage = (evaluation or {}).get("experts")
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=one_line(name),
        repo=json.dumps(out.name),
        summary=(
            f"Joins frozen {' and '.join(config.modalities)} encoders with one mixture-of-experts connector "
            "(altmoe), trained one direction at a time in latent space."
        ),
        encoders=parts,
        directions=", ".join(f"`{d}`" for d in model.directions),
        connector=(
            f"{config.num_experts} experts, top-{config.top_k}, {config.num_gates} gates, width {config.hidden_size}, over a "
            f"{config.base} base; {parameters / 1e6:.2f} M trained parameters"
        ),
        examples=(out / "examples.png").is_file(),
        example_image=example_image,
        results=table(evaluation) if evaluation else "",
        protocol=_protocol(evaluation),
        experts=_experts(usage) if usage else "",
        data=data_name,
        licence=one_line(license),
        data_licence=one_line(data_card.get("license", UNKNOWN if data_here or not data else "see its repository")),
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip(),
        date=datetime.date.today().isoformat(),
        version=VERSION,
        limits=(
            "It knows what its encoders and its training pairs know; queries from another domain are answered with the "
            "nearest thing it has. Scores are ranks' raw material, not probabilities."
        ),
    )
    card.save(out / "README.md")

"""`altmoe train` and `accelerate launch -m trainer.train recipe.yaml`: from stored latents to a finished model.

Comes in: a recipe. Goes out: a folder with the best model, its processor, the recipe as it was run and all logged
metrics. The test split is not touched here; `altmoe evaluate` does that.
"""

import gc
import os
import shutil
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModel, set_seed

from modeling_altmoe import AltMoEConfig, AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.configuration_altmoe import parse_direction
from modeling_altmoe.search_altmoe import open_store
from trainer.arguments import OWN_FIELDS, AltMoEArguments, parse_arguments
from trainer.encode import load_processor
from trainer.fitting import choose_on_validation, fit_bases, fit_frames
from trainer.measuring import evaluate_pairs, fit_scoring, fit_trust
from trainer.pairs import LatentPairs
from trainer.trainer import AltMoETrainer, last_complete_checkpoint

RECIPE = "recipe.yaml"


def open_stores(stores: dict[str, str] | None) -> dict[str, LatentStore]:
    """Open the stores of a recipe.

    Raises:
        ValueError: none given, or one holds another modality.
        FileNotFoundError: one does not exist.
    """
    if not stores:
        raise ValueError("No stores given. Name them in the recipe: 'stores: {image: folder, text: folder}'.")
    opened = {modality: open_store(path) for modality, path in stores.items()}
    for modality, store in opened.items():
        if store.modality != modality:
            raise ValueError(f"'{store.path}' holds '{store.modality}' latents, the recipe calls it '{modality}'.")
        if not len(store):
            raise ValueError(f"'{store.path}' is empty. Run 'altmoe encode' first.")
    return opened


def make_model(arguments: AltMoEArguments, stores: dict[str, LatentStore]) -> AltMoEModel:
    """A new connector over the encoders that made the stores (their weights are not needed for training)."""
    directions = arguments.directions or [f"{a}->{b}" for a in stores for b in stores if a != b]
    used = {m for d in directions for part in parse_direction(d) for m in ([part] if isinstance(part, str) else part)}
    encoders = {modality: store.encoder for modality, store in stores.items() if modality in used}
    config = AltMoEConfig(encoders=encoders, directions=directions, **arguments.model_fields())
    return AltMoEModel(config)


def open_parts(model: AltMoEModel, stores: dict[str, LatentStore], recipe: dict) -> dict[str, LatentPairs]:
    """The pairs of a model's stores, split by concept as a recipe says: `{"train", "validation", "test"}`."""
    pairs = LatentPairs.from_stores({m: stores[m] for m in model.config.modalities}, model.directions)
    parts = pairs.split(recipe["split_seed"], recipe["test_fraction"], recipe["validation_fraction"])
    if wanted := recipe.get("train_concepts", 0):  # absent in recipes of earlier versions
        parts["train"] = parts["train"].sample_concepts(wanted, recipe["split_seed"])
    return parts


def load_processors(model: AltMoEModel) -> AltMoEProcessor | None:
    """The processor of all modalities whose encoders are at hand by name, or None.

    Stores may be trained on where the folder their encoder came from is not: such a modality is named and left out.
    """
    processors, prompts = {}, {}
    for modality, entry in model.config.encoders.items():
        if not entry.get("name_or_path") or not entry.get("config"):
            continue
        if os.path.isabs(entry["name_or_path"]) and not os.path.isdir(entry["name_or_path"]):
            print(
                f"the encoder of {modality}, '{entry['name_or_path']}', is not here: the model is kept without its processor"
            )
            continue
        kind = AutoModel._model_mapping[type(model.config.encoder_config(modality))]
        revision = {"revision": entry["revision"]} if entry.get("revision") else {}
        processors[modality] = load_processor(entry["name_or_path"], kind.main_input_name, **revision)
        if model.protocol(modality).prompt:
            prompts[modality] = model.protocol(modality).prompt
    return AltMoEProcessor(processors, prompts) if processors else None


def write_recipe(arguments: AltMoEArguments, folder: str | Path) -> None:
    """The recipe as it was run: our fields and what differs from transformers' defaults."""
    values = {name: getattr(arguments, name) for name in sorted(OWN_FIELDS)}
    for name in ("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay",
                 "warmup_steps", "max_grad_norm", "gradient_accumulation_steps", "eval_steps", "output_dir"):  # fmt: skip
        values[name] = getattr(arguments, name)
    values["lr_scheduler_type"] = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    values["stores"] = {modality: str(Path(path).absolute()) for modality, path in (arguments.stores or {}).items()}
    values["overwrite"] = False
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RECIPE).write_text(yaml.safe_dump(values, sort_keys=False))


def train(arguments: AltMoEArguments) -> tuple[AltMoEModel, dict[str, LatentPairs], dict]:
    """Train a connector and write it to `output_dir`.

    Returns:
        `(model, {"train", "validation", "test"} pairs, metrics)`.

    Raises:
        ValueError: bad settings, stores that do not fit together, or an `output_dir` in use.
    """
    stores = open_stores(arguments.stores)
    model = make_model(arguments, stores)
    resume = arguments.resume_from_checkpoint
    found = last_complete_checkpoint(arguments.output_dir)
    if resume and str(resume).lower() in ("true", "yes", "1"):
        resume = found
        print(
            f"resuming from {found}" if found else f"no complete checkpoint in '{arguments.output_dir}': starting anew"
        )
    elif resume and str(resume).lower() in ("false", "no", "0"):
        resume = None
    if found and not resume:
        if not arguments.overwrite:
            raise ValueError(
                f"'{arguments.output_dir}' holds checkpoints already. Pass --resume_from_checkpoint true to go on, "
                "--overwrite true to start anew, or another --output_dir."
            )
        if arguments.process_index == 0:
            for checkpoint in Path(arguments.output_dir).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    set_seed(arguments.seed)
    parts = open_parts(model, stores, vars(arguments))
    if arguments.process_index == 0:
        for part, its in parts.items():
            print(f"{part}: {its.describe()}")
    model.to(arguments.device)  # closed forms are fitted where the experts are trained
    fit_frames(model, parts["train"])
    out_of_sample, held_out = None, {}
    if model.config.base != "none":
        options = arguments.max_landmarks, arguments.seed
        chosen = {}
        if model.config.base == "kernel" and "validation" in parts:
            chosen = choose_on_validation(parts["train"], parts["validation"], *options)
        show = arguments.process_index == 0
        out_of_sample = fit_bases(model, parts["train"], *options, show, held_out, chosen, arguments.recall)

    trainer = AltMoETrainer(
        model,
        arguments,
        train_dataset=parts["train"],
        eval_dataset=parts.get("validation"),
        out_of_sample=out_of_sample,
        processing_class=load_processors(model),
    )
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = dict(result.metrics)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if "validation" in parts:
        if arguments.fit_trust and model.config.base != "none":
            metrics["trust"] = fit_trust(model, parts["validation"])
        fit_scoring(
            model, parts["train"], parts["validation"], target_precision=arguments.target_precision, held_out=held_out
        )
        final = evaluate_pairs(model, parts["validation"], scored=True)
        metrics.update({f"eval_{name}": value for name, value in final.items()})
    if trainer.is_world_process_zero():
        write_recipe(arguments, arguments.output_dir)
    trainer.save_model(arguments.output_dir)  # and pushes, with --push_to_hub true
    if trainer.is_world_process_zero():
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    return model, parts, metrics


def leave_process_group() -> None:
    """End this rank's part in a training on several processes; call it when no Trainer is needed any more.

    DDP's reducer must be gone before: as the last holder of the group it frees it under Python's lock, and waits for a
    thread that waits for that lock.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Command line: errors for users are one sentence, not a traceback."""
    try:
        parsed = parse_arguments(arguments)
        metrics = train(parsed)[2]
        leave_process_group()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if parsed.process_index == 0:
        recall = metrics.get("eval_mean_recall")
        print(f"saved to {parsed.output_dir}" + (f"; validation mean recall {100 * recall:.1f} %" if recall else ""))


if __name__ == "__main__":
    main()

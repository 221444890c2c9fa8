"""All settings of a training run in one dataclass, read from a YAML recipe and the command line.

Comes in: a recipe (`key: value`) and flags that override it. Goes out: one validated [`AltMoEArguments`]. An unknown
key is an error that names the nearest known one. transformers' own `TrainingArguments` apply as they are.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_altmoe import AltMoEConfig
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.search_altmoe import open_store
from trainer.schedules import SCHEDULES

COMMON = (
    "output_dir", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation_steps",
    "eval_strategy", "eval_steps", "save_steps", "logging_steps", "resume_from_checkpoint", "report_to",
    "push_to_hub", "hub_model_id", "bf16",
)  # fmt: skip


LARGE = 4000  # training pairs from which the settings below are the defaults
LARGE_DEFAULTS = {
    "hidden_size": 512, "moe_intermediate_size": 128, "dropout": 0.3, "latent_noise": 0.5, "head_scale": 0.5,
    "alpha": 0.1, "temperature": 0.03, "symmetric": True, "per_device_train_batch_size": 1024, "eval_steps": 50,
    "save_steps": 50, "early_stopping_patience": 3,
}  # fmt: skip


def _help(text: str, default: Any = dataclasses.MISSING, **extra) -> Any:
    metadata = {"help": text, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AltMoEArguments(TrainingArguments):
    """Settings of a run: data, connector, loss, alternation, and all of transformers' `TrainingArguments`."""

    # data
    stores: dict | str | None = _help(
        "LatentStores by modality: {image: folder, text: folder} (JSON on the command line)", None
    )
    directions: list[str] | None = _help("directions to train, e.g. image->text; default: every ordered pair", None)
    split_seed: int = _help("seed of the split by concept", 0)
    test_fraction: float = _help("share of concepts kept for the final evaluation; never used in training", 0.2)
    validation_fraction: float = _help("share of concepts for early stopping and post-processing", 0.1)
    train_concepts: int = _help("train on so many concepts only, seeded by split_seed; 0: all (learning curves)", 0)

    # connector (see AltMoEConfig)
    hidden_size: int = _help("width of the connector, a multiple of 8", 128)
    moe_intermediate_size: int = _help("inner width of an expert, a multiple of 8", 32)
    num_experts: int = _help("N, experts in a pool", 12)
    top_k: int = _help("K, experts that see an item", 4)
    num_gates: int = _help("L, 2: one gate a loss term; 1: shared", 2)
    expert_pool: str = _help("shared or per_modality", "shared")
    dropout: float = _help("on the experts' output", 0.1)
    latent_noise: float = _help("Gaussian noise on standardised source latents in training", 2.0)
    base: str = _help("closed form under the experts: none, ridge or kernel", "kernel")
    target_metric: bool = _help("score the closed form through a fitted metric of the target latents", True)
    recall: bool = _help("with up to 1,000 pairs the kernel base also recalls the nearest training items", True)
    max_landmarks: int | None = _help(
        "most landmarks of the kernel base (default: every pair up to 16,384, of more a sample, the smaller the more there are); "
        "fewer make a smaller model that finds less",
        None,
    )
    head_scale: float = _help("size of the experts' correction relative to the base", 1.0)

    # loss
    alpha: float = _help("weight of the regression term; 1 - alpha weighs the contrastive term", 0.9)
    regression: str = _help("cosine, mse (the paper) or smooth_l1 (the authors' code)", "cosine")
    contrastive: str = _help("infonce or sigmoid", "infonce")
    temperature: float = _help("divides cosines in the contrastive term", 0.1)
    learn_temperature: bool = _help("learn one temperature a direction", False)
    symmetric: bool = _help("rank predictions for each target, too", False)
    negatives: str = _help("candidates of the contrastive term: batch, or store (all training targets, exact)", "batch")
    max_negatives: int = _help("most candidates with negatives=store; beyond, a new sample each step", 32768)
    router_aux_loss_coef: float = _help("weight of the load-balance loss", 0.01)
    router_z_loss_coef: float = _help("weight of the router z-loss", 0.001)

    # alternation
    schedule: str = _help(f"which direction a step trains: {', '.join(SCHEDULES)}", "round_robin")
    block_steps: int = _help("steps in one direction before switching (schedule=blocks)", 10)
    direction_weights: dict | str | None = _help("chances by direction (schedule=proportional)", None)
    direction_learning_rates: dict | str | None = _help("factors on the learning rate by direction", None)
    early_stopping_patience: int = _help("evaluations without a better mean recall before stopping; 0: never", 10)
    fit_trust: bool = _help("choose on validation how far the experts' correction is trusted", True)

    target_precision: float = _help("share of right answers a search's confidence threshold is chosen for", 0.5)

    overwrite: bool = _help("start anew where output_dir holds checkpoints", False)

    # other defaults than transformers'
    output_dir: str | None = _help("folder for checkpoints and the finished model", "build/run")
    learning_rate: float = _help("peak learning rate", 1e-3)
    lr_scheduler_type: str = _help("learning-rate schedule", "cosine")
    warmup_steps: float = _help("warm-up: steps, or a share of all below 1", 0.1)
    weight_decay: float = _help("AdamW weight decay", 0.1)
    max_steps: int = _help("optimiser steps; -1: use num_train_epochs", 300)
    per_device_train_batch_size: int = _help("pairs a device and step", 128)
    per_device_eval_batch_size: int = _help("pairs a device in evaluation", 1024)
    logging_steps: float = _help("log every so many steps", 20)
    eval_strategy: str = _help("when to evaluate", "steps")
    eval_steps: float | None = _help("evaluate every so many steps", 25)
    save_strategy: str = _help("when to save", "steps")
    save_steps: float = _help("save every so many steps", 25)
    save_total_limit: int | None = _help("checkpoints to keep besides the best", 2)
    load_best_model_at_end: bool = _help("keep the checkpoint with the best validation mean recall", True)
    metric_for_best_model: str | None = _help("what 'best' means", "mean_recall")
    greater_is_better: bool | None = _help("whether larger is better", True)
    remove_unused_columns: bool | None = _help("leave as it is: batches are made from latents", False)
    dataloader_pin_memory: bool = _help("pin host memory (batches are item numbers: nothing to gain)", False)
    report_to: None | str | list[str] = _help("tensorboard, wandb, ... or none", "none")

    def __post_init__(self):
        for name in ("stores", "direction_weights", "direction_learning_rates"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f'--{name} {value!r} is not JSON ({error}). Example: \'{{"image": "folder"}}\'.'
                    ) from error
        if self.negatives not in ("batch", "store"):
            raise ValueError(unknown_name_message("negatives", self.negatives, ("batch", "store")))
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown_name_message("schedule", self.schedule, SCHEDULES))
        for name in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to below 1.")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # a step in one direction leaves the other heads unused
        if not 0 < self.target_precision < 1:
            raise ValueError(f"target_precision={self.target_precision}: expected a share between 0 and 1.")
        if self.train_concepts < 0:
            raise ValueError(f"train_concepts={self.train_concepts}: expected 0 (all) or a positive number.")
        if self.max_landmarks is not None and self.max_landmarks < 1:
            raise ValueError(f"max_landmarks={self.max_landmarks}: expected at least 1.")
        super().__post_init__()

    def model_fields(self) -> dict[str, Any]:
        """The fields that belong to [`AltMoEConfig`]."""
        shared = {f.name for f in fields(AltMoEConfig)} & OWN_FIELDS - {"directions"}
        return {name: getattr(self, name) for name in sorted(shared)}


FIELD_DEFAULTS = {f.name: f.default for f in fields(AltMoEArguments)}
OWN_FIELDS = {f.name for f in fields(AltMoEArguments)} - {f.name for f in fields(TrainingArguments)}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML recipe as a dictionary; every key must be a field of [`AltMoEArguments`].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or an unknown key (with the nearest known one).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at '{path}'. Examples are in model_cards/recipes/.")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"'{path}' should hold 'key: value' lines, got a {type(recipe).__name__}.")
    known = [f.name for f in fields(AltMoEArguments) if f.init]
    for key in recipe:
        if key not in known:
            close = unknown_name_message("recipe key", key, known).rpartition("Did you mean")
            hint = f" Did you mean{close[2]}" if close[1] else " See 'altmoe train --help'."
            raise ValueError(f"'{path}': unknown key '{key}'.{hint}")
    return recipe


def _convert(values: dict[str, Any], parser: HfArgumentParser) -> dict[str, Any]:
    """Give YAML's strings the type of their field (YAML reads `1e-3` as a string)."""
    kinds = {action.dest: action.type for action in parser._actions}
    result = {}
    for key, value in values.items():
        kind = kinds.get(key)
        if isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError as error:
                raise ValueError(f"{key}: expected a number, got {value!r}.") from error
        elif isinstance(value, bool) and kind in (int, float):
            raise ValueError(f"{key}: expected a number, got {value!r}.")
        result[key] = value
    return result


def size_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The defaults that follow the number of training pairs: many pairs carry wider experts with less noise.

    Chosen on the validation parts of stamps, Twemoji and icons; so one recipe serves all sizes. Where the stores cannot
    be read, the small sets' defaults stay: opening them for training says what is wrong.

    Args:
        values: what recipe and flags say.
    """
    stores = values.get("stores")
    try:
        stores = json.loads(stores) if isinstance(stores, str) else stores
        rows = min(len(open_store(path)) for path in stores.values())
        kept = 1 - sum(
            float(values.get(name, FIELD_DEFAULTS[name])) for name in ("test_fraction", "validation_fraction")
        )
        pairs = min(rows * kept, int(values.get("train_concepts") or rows))
    except (AttributeError, OSError, TypeError, ValueError):
        return {}
    return LARGE_DEFAULTS if pairs >= LARGE else {}


def print_help(everything: bool) -> None:
    """Our fields and the common ones of transformers, or all of them."""
    print("usage: altmoe train [RECIPE.yaml] [--key value ...]\n")
    print("Train a connector on stored latents. Keys come from the recipe; flags override it.\n")
    shown = [f for f in fields(AltMoEArguments) if f.init and (everything or f.name in OWN_FIELDS or f.name in COMMON)]
    shown.sort(key=lambda f: f.name not in OWN_FIELDS)
    for f in shown:
        default = f.default if f.default is not dataclasses.MISSING else None
        text = " ".join(str(f.metadata.get("help", "")).split())
        if f.name in LARGE_DEFAULTS:
            default = f"{default}; {LARGE_DEFAULTS[f.name]} from {LARGE} training pairs"
        print(f"  --{f.name:28} {text if everything or len(text) < 90 else text[:87] + '...'} (default: {default})")
    if not everything:
        print("\n  --help-all                     all fields, with the rest of transformers' TrainingArguments")


def parse_arguments(arguments: list[str] | None = None, defaults: dict[str, Any] | None = None) -> AltMoEArguments:
    """Recipe and flags -> arguments; flags win over the recipe, the recipe over `defaults`.

    Args:
        arguments: like `sys.argv[1:]`: an optional `recipe.yaml`, then flags.
        defaults: values below the recipe.

    Raises:
        SystemExit: after `--help`, or for flags that argparse refuses.
        ValueError, FileNotFoundError: as in `read_recipe`, or a value out of range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help-all" in arguments or "--help" in arguments or "-h" in arguments:
        print_help("--help-all" in arguments)
        raise SystemExit(0)
    recipe = read_recipe(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else {}
    parser = HfArgumentParser(AltMoEArguments, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what was typed counts as given
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        known = [f.name for f in fields(AltMoEArguments) if f.init]
        close = unknown_name_message("flag", name, known).rpartition("Did you mean")
        hint = f" Did you mean{close[2]}" if close[1] else " See 'altmoe train --help'."
        raise ValueError(f"Unknown argument '{unknown[0]}'.{hint}")
    values = {**(defaults or {}), **recipe, **vars(given)}
    values = {**size_defaults(values), **values}
    return AltMoEArguments(**_convert(values, parser))

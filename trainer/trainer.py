"""AltMoETrainer: transformers' Trainer with alternating direction steps.

Comes in: an [`AltMoEModel`] and [`LatentPairs`] (or a data set of raw items with a collator). Goes out: checkpoints of
the connector, logs that name their direction, and the best model by validation mean recall. Everything that the
schedule needs to go on after a crash is in the Trainer's own state: the step and the log of evaluations.
"""

import json
import os
import re
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME, PushInProgress
from transformers.trainer_utils import HubStrategy, speed_metrics

from modeling_altmoe.attaching_altmoe import load_lora
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.sharing_altmoe import PICKLES, on_hub, refuse_local_encoders
from trainer.arguments import AltMoEArguments
from trainer.measuring import evaluate_pairs
from trainer.pairs import LatentPairs
from trainer.schedules import DirectionSchedule
from trainer.state import load_tree, random_state, save_tree, set_random_state

TRAINING_STATE = "training_state.safetensors"  # optimiser, schedule and gradient scale


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest `checkpoint-N` that was written to its end (a kill may leave a newer half one), or None."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
        except (OSError, json.JSONDecodeError):
            continue
        if match:
            found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None


class _DirectionLearningRates(TrainerCallback):
    """Scale the learning rate for the step's direction, and put it back after the step."""

    def __init__(self, trainer: "AltMoETrainer", factors: dict[str, float]):
        self.trainer, self.factors, self.before = trainer, factors, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        factor = self.factors.get(self.trainer.direction or "", 1.0)
        self.before = [group["lr"] for group in self.trainer.optimizer.param_groups]
        for group in self.trainer.optimizer.param_groups:
            group["lr"] *= factor

    def on_optimizer_step(self, args, state, control, **kwargs):
        for group, before in zip(self.trainer.optimizer.param_groups, self.before, strict=True):
            group["lr"] = before


class AltMoETrainer(Trainer):
    """
    Train one direction an optimiser step.

    The direction is constant over gradient accumulation and over processes, and a pure function of the seed, the step
    and (for `adaptive`) the evaluations logged so far, so a resumed run continues exactly.

    Args:
        model ([`AltMoEModel`]): frames and closed forms fitted (see `trainer.fitting`).
        args ([`AltMoEArguments`]): all settings.
        train_dataset ([`LatentPairs`] or a data set of raw items): with raw items, pass the `data_collator` that
            turns them into the model's inputs.
        eval_dataset ([`LatentPairs`], *optional*): validation pairs; early stopping follows their mean recall.
        out_of_sample (`dict[str, Tensor]`, *optional*): the closed form's predictions for training rows it was not
            fitted on, as `fit_bases` returns them.
        kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: unknown direction in `direction_learning_rates`, evaluation asked for without validation
            pairs, or `push_to_hub` with encoders that only this machine has.
    """

    def __init__(
        self, model, args: AltMoEArguments, train_dataset: Dataset, eval_dataset=None, out_of_sample=None, **kwargs
    ):
        directions = model.config.directions
        if args.push_to_hub:
            refuse_local_encoders(model.config.encoders)  # before any work
        for direction in args.direction_learning_rates or {}:
            if direction not in directions:
                raise ValueError(
                    f"direction_learning_rates: {unknown_name_message('direction', direction, directions)}"
                )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(
                "eval_strategy needs validation pairs: raise validation_fraction, or set eval_strategy: no."
            )
        if isinstance(train_dataset, LatentPairs):
            kwargs.setdefault("data_collator", lambda items: {"index": torch.tensor(items)})
        self.schedule = DirectionSchedule(
            directions, args.schedule, args.seed, args.block_steps, args.direction_weights
        )
        self.out_of_sample = out_of_sample or {}
        self.direction: str | None = directions[0]
        self._hub: HfApi | None = None
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.loss_is_scaled_for_ga = False  # contrastive terms are means over a batch
        if args.direction_learning_rates:
            self.add_callback(_DirectionLearningRates(self, args.direction_learning_rates))
        if args.early_stopping_patience and args.load_best_model_at_end and args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    # ---------------------------------------------------------------- one step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.direction = self.schedule.direction(self.state.global_step, self.state.log_history)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if isinstance(self.train_dataset, LatentPairs):
            loss, output = self._loss_on_pairs(model, inputs["index"])
        else:
            output = model(**inputs, direction=self.direction, return_loss=True)
            loss = output.loss
            self._note(self.direction or "joint", output.loss_terms)
        return (loss, output) if return_outputs else loss

    def _loss_on_pairs(self, model, index: torch.Tensor):
        """The step's loss, from item numbers. `joint` adds up all directions in one step."""
        directions = self.schedule.directions if self.direction is None else [self.direction]
        losses = []
        for direction in directions:
            batch = self._batch(self.train_dataset, direction, index)
            output = model(**batch, direction=direction, return_loss=True)
            losses.append(output.loss)
            self._note(direction, output.loss_terms)
        return torch.stack(losses).mean(), output

    def _batch(self, pairs: LatentPairs, direction: str, index: torch.Tensor) -> dict:
        """Latents, candidates and matches of one direction, on the device.

        Candidates are the targets of *all* processes' rows (or of the whole store): targets are frozen, so every
        process takes them from its own copy, and the mean over processes is the loss of one large batch.
        """
        step, rank = self.state.global_step, self.args.process_index
        generator = np.random.default_rng([self.args.seed, step, rank, int(index.sum())])
        batch = pairs.batch(direction, index.cpu().numpy(), generator)
        _, target = self.accelerator.unwrap_model(self.model).config.resolve(direction)
        candidates = batch["target_rows"]
        if self.args.world_size > 1:
            candidates = self.accelerator.gather(torch.from_numpy(candidates).to(self.args.device)).cpu().numpy()
        if self.args.negatives == "store":
            everything = np.arange(len(pairs.latents[target]))
            if len(everything) > self.args.max_negatives:
                shared = np.random.default_rng([self.args.seed, step])  # the same sample in every process
                everything = shared.choice(everything, self.args.max_negatives, replace=False)
            candidates = np.union1d(candidates, everything)
        matches = pairs.matches(direction, batch["source_rows"], candidates)
        moved = {
            "latents": {m: x.to(self.args.device) for m, x in batch["latents"].items()},
            "candidates": pairs.latents[target][torch.from_numpy(candidates)].to(self.args.device),
            "positives": matches.to(self.args.device),
        }
        if pairs is self.train_dataset and direction in self.out_of_sample:
            table = self.out_of_sample[direction]
            own = table[torch.from_numpy(batch["source_rows"]).to(table.device)]
            moved["base_prediction"] = own.to(self.args.device)
        return moved

    # ---------------------------------------------------------------- logs

    def _note(self, direction: str, terms: dict[str, torch.Tensor] | None) -> None:
        for name, value in (terms or {}).items():
            self._terms[f"{direction}/{name}"].append(value)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["direction"] = self.direction or "joint"
            for name, values in self._terms.items():
                if values:
                    logs[name] = round(torch.stack(values).mean().item(), 5)
            self._terms.clear()
        super().log(logs, start_time)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Retrieval metrics and the loss on pairs.

        Returns:
            `{prefix}_mean_recall` (with the both-direction score where both directions are trained),
            `{prefix}_{direction}/recall@1` and so on, `{prefix}_loss`.
        """
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(pairs, LatentPairs):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        start = time.time()
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluate_pairs(model, pairs).items()}
        metrics[f"{metric_key_prefix}_loss"] = self._evaluation_loss(model, pairs)
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(pairs)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluation_loss(self, model, pairs: LatentPairs) -> float:
        """Mean loss over directions; candidates are each batch's own targets."""
        total, count = 0.0, 0
        for direction in self.schedule.directions:
            rows = np.arange(len(pairs.rows[direction]))
            for index in np.array_split(rows, -(-len(rows) // self.args.per_device_eval_batch_size)):
                batch = pairs.batch(direction, index)
                matches = pairs.matches(direction, batch["source_rows"], batch["target_rows"])
                latents = {m: x.to(self.args.device) for m, x in batch["latents"].items()}
                loss = model(latents, direction, positives=matches.to(self.args.device), return_loss=True).loss
                total, count = total + loss.item() * len(index), count + len(index)
        return total / count

    # ---------------------------------------------------------------- save, share and resume

    def _save(self, output_dir=None, state_dict=None):
        """The arguments are kept as JSON, without tokens; the stock file is a pickle."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and (folder / TRAINING_ARGS_NAME).exists():
            (folder / TRAINING_ARGS_NAME).unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _sharded(self) -> bool:
        """DeepSpeed and FSDP spread the optimiser over processes and have formats of their own."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_optimizer_and_scheduler(self, output_dir):
        """As safetensors and JSON; the stock files are pickles."""
        if self._sharded():
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            parts = {"optimizer": self.optimizer, "scheduler": self.lr_scheduler, "scaler": self._scaler()}
            state = {name: part.state_dict() for name, part in parts.items() if part is not None}
            save_tree(state, Path(output_dir) / TRAINING_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._sharded():
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = load_tree(Path(checkpoint) / TRAINING_STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if (scaler := self._scaler()) is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])

    def _scaler(self):
        return getattr(self.accelerator, "scaler", None)

    def _save_scaler(self, output_dir):
        """Saved with the optimiser."""
        if self._sharded():
            super()._save_scaler(output_dir)

    def _load_scaler(self, checkpoint):
        """Loaded with the optimiser."""
        if self._sharded():
            super()._load_scaler(checkpoint)

    def _random_file(self, folder) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir):
        """As safetensors and JSON; the stock file is a pickle."""
        save_tree(random_state(self.args.device), self._random_file(output_dir))

    def _load_rng_state(self, checkpoint):
        # a run may go on with more processes than it had
        if checkpoint is not None and self._random_file(checkpoint).is_file():
            set_random_state(load_tree(self._random_file(checkpoint)), self.args.device)

    def _upload(self, folder, message: str, **place):
        """Send a folder, without what is a pickle."""
        ignored = ["_*", "checkpoint-*", *PICKLES] if not place else list(PICKLES)
        if self._hub is None:  # one client: its uploads wait for each other, so no commit overtakes another
            self._hub = HfApi(token=self.args.hub_token)
        return self._hub.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            run_as_future=True,
            ignore_patterns=ignored,
            revision=self.args.hub_revision,
            **place,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        """The stock method copies two files only, so the repository would lack code and adapters."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save(self.args.output_dir)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.args.output_dir, message)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=name))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def create_model_card(self, *args, **kwargs):
        """The stock card, with the encoders it joins and the task of the Hub's widget."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        place = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(place)
        encoders = self.accelerator.unwrap_model(self.model).config.encoders
        card.data.library_name = "transformers"
        card.data.base_model = [entry["name_or_path"] for entry in encoders.values() if on_hub(entry)] or None
        if card.data.base_model:
            card.data.base_model_relation = "adapter"
        if {"image", "text"} <= set(encoders):
            card.data.pipeline_tag = "zero-shot-image-classification"
        card.data.tags = sorted({*(card.data.tags or []), "altmoe", "cross-modal-retrieval"})
        card.save(place)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_adapters(self.state.best_model_checkpoint)

    def _load_adapters(self, checkpoint) -> None:
        """The stock Trainer restores the connector only."""
        model = self.accelerator.unwrap_model(self.model)
        for modality, encoder in model.encoders.items():
            if os.path.isdir(os.path.join(checkpoint, f"adapter_{modality}")):
                load_lora(encoder, str(checkpoint), modality, is_trainable=True)

    def _issue_warnings_after_load(self, load_result):
        """Encoders are not in the checkpoint by design; anything else that is missing is an error."""
        missing = [key for key in load_result.missing_keys if not key.startswith("encoders.")]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:5]}, unexpected "
                f"{load_result.unexpected_keys[:5]}. Was it made with another recipe?"
            )

"""Frozen encoder or LoRA: the text encoder of the stamps, adapted or not, under the same connector and the same steps.

`python -m benchmarks.lora` needs what `make demo` leaves: the data set, both encoders, the image store. Both arms train
the connector alone (no closed form) on raw captions and stored image latents, one direction a step, with equal steps and
no early stopping. Targets stay the base encoder's latents in both arms, so a caption is searched *with* through the
adapter and searched *for* as it is stored. Splits that are there are not run again. The budget is small on purpose: an
adapter costs a forward and a backward pass through the encoder for every caption of every step.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModel, AutoTokenizer, set_seed

from benchmarks.common import RESULTS, keep, read_results, standard_error
from modeling_altmoe import AltMoEModel, LatentStore
from trainer.arguments import AltMoEArguments
from trainer.evaluation import PAIR, VARIANTS, RetrievalData, evaluate_variants
from trainer.fitting import fit_frames
from trainer.pairs import LatentPairs
from trainer.trainer import AltMoETrainer

ENCODER, DATA, IMAGES = "build/encoders/minilm-l6", "build/data/stamps", "build/stores/stamps/image"
ARMS = {"frozen": None, "LoRA, last three layers": 8}  # rank
PATH = RESULTS / "lora-stamps.json"
DIRECTIONS = ["image->text", "text->image"]


class AdaptedRetriever:
    """A model with an adapted text encoder behind the interface of a `Retriever`.

    Text latents are `(n, 2 d)`: adapted, for asking, beside base, for being found.
    """

    def __init__(self, model: AltMoEModel):
        self.model, self.directions, self.size = model, model.directions, model.config.latent_size("text")

    def queries(self, direction, latents):
        asked = {m: x[:, : self.size] if m == "text" else x for m, x in latents.items()}
        return self.model.queries(direction, asked)

    def gallery(self, direction, latents):
        found = latents[:, self.size :] if direction.endswith("->text") else latents
        return self.model.gallery(direction, found)


@torch.no_grad()
def both_latents(model: AltMoEModel, tokenizer, captions: list[str]) -> torch.Tensor:
    """Adapted and base latents of captions, side by side: `(n, 2 d)`."""
    parts = []
    for start in range(0, len(captions), 64):
        tokens = dict(tokenizer(captions[start : start + 64], padding=True, truncation=True, return_tensors="pt"))
        ways = [model.encode("text", tokens, adapted=adapted) for adapted in (True, False)]
        parts.append(torch.cat(ways, dim=1))
    return torch.cat(parts)


def run(rank: int | None, seed: int, given) -> dict:
    """Train one arm on one split and measure it."""
    data, store = load_from_disk(DATA).remove_columns("image"), LatentStore.open(IMAGES)
    place = {name: row for row, name in enumerate(store.ids)}
    images = store.take([place[name] for name in data["id"]])
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    captions, keys = list(data["caption"]), list(data["id"])
    set_seed(seed)
    text = AutoModel.from_pretrained(ENCODER)
    last = list(range(text.config.num_hidden_layers))[-3:]
    lora = (
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], layers_to_transform=last)
        if rank
        else None
    )
    model = AltMoEModel.from_encoders(
        {"text": text, "image": AutoModel.from_pretrained("build/encoders/efficientnet-lite0")},
        directions=DIRECTIONS, lora={"text": lora} if lora else None, base="none", alpha=0.5, latent_noise=1.0,
        hidden_size=128, moe_intermediate_size=32, num_experts=12, top_k=4,
    )  # fmt: skip
    base = both_latents(model.eval(), tokenizer, captions)[:, model.config.latent_size("text") :]
    pairs = LatentPairs({"image": images, "text": base}, {"image": keys, "text": keys}, DIRECTIONS,
                        dict(zip(keys, data["group"], strict=True)))  # fmt: skip
    row_of_key = {key: row for row, key in enumerate(keys)}
    parts = pairs.split(seed, 0.2, 0.1)
    rows = {name: [row_of_key[key] for key in part.keys["image"]] for name, part in parts.items()}
    fit_frames(model, parts["train"])

    def collate(chosen):
        tokens = tokenizer([captions[row] for row in chosen], padding=True, truncation=True, return_tensors="pt")
        groups = np.array([data[row]["group"] for row in chosen])
        positives = torch.from_numpy(groups[:, None] == groups[None, :])  # a caption that occurs twice is no negative
        return {"latents": {"image": images[list(chosen)]}, "positives": positives, **tokens}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = AltMoEArguments(
            output_dir=folder, seed=seed, use_cpu=True, disable_tqdm=True, max_steps=given.steps, eval_strategy="no",
            save_strategy="no", per_device_train_batch_size=given.batch, logging_steps=10**6, learning_rate=1e-3,
            load_best_model_at_end=False, early_stopping_patience=0,
        )  # fmt: skip
        own = time.process_time()
        AltMoETrainer(model, arguments, rows["train"], data_collator=collate).train()
        seconds = time.process_time() - own
    latents = {"image": images, "text": both_latents(model.eval(), tokenizer, captions)}
    groups = torch.from_numpy(np.unique(data["group"], return_inverse=True)[1])
    held = {
        name: RetrievalData.from_groups({m: x[chosen] for m, x in latents.items()}, groups[chosen], PAIR)
        for name, chosen in rows.items()
    }
    figures = evaluate_variants(AdaptedRetriever(model), held["train"].latents, held["validation"], held["test"])
    return {"mean_recall": figures[list(VARIANTS)[-1]]["mean_recall"], "cpu_seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="splits (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args(arguments)
    about = {"settings": {"steps": given.steps, "batch": given.batch, "ranks": ARMS}}
    results = read_results(PATH, "arms")
    for seed in given.seeds:
        for arm, rank in ARMS.items():
            if str(seed) not in results.get(arm, {}):
                print(f"split {seed}: {arm} ...", flush=True)
                results = keep(PATH, about, "arms", [arm, str(seed)], run(rank, seed, given))
    print("\n| text encoder | mean recall | against frozen | CPU seconds |\n|---|---|---|---|")
    frozen = [results["frozen"][str(seed)] for seed in given.seeds]
    for arm in ARMS:
        of = [results[arm][str(seed)] for seed in given.seeds]
        values = [100 * m["mean_recall"] for m in of]
        gain = [100 * (m["mean_recall"] - f["mean_recall"]) for m, f in zip(of, frozen, strict=True)]
        against = "reference" if arm == "frozen" else f"{np.mean(gain):+.1f} ± {standard_error(gain):.1f}"
        print(f"| {arm} | {np.mean(values):.1f} ± {standard_error(values):.1f} | {against} "
              f"| {np.mean([m['cpu_seconds'] for m in of]):.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()

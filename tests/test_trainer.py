"""Training as a whole: alternation, exact resume, ranks, learning rates, joint, LoRA."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import paired_latents, small_model, tiny_bert, tiny_processors, tiny_vit
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from trainer import fitting
from trainer.arguments import AltMoEArguments
from trainer.baselines import KernelRidge
from trainer.fitting import choose_on_validation, fit_bases, fit_frames
from trainer.measuring import evaluate_pairs, fit_scoring, fit_trust, partnered_latents, retrieval_data
from trainer.pairs import LatentPairs
from trainer.state import load_tree, save_tree
from trainer.train import leave_process_group, load_processors
from trainer.trainer import AltMoETrainer, last_complete_checkpoint

DIRECTIONS = ["image->text", "text->image"]


def pairs_of(rows=96, seed=0):
    latents = paired_latents(rows, seed)
    keys = [f"k{i}" for i in range(rows)]
    return LatentPairs(latents, {m: keys for m in latents}, DIRECTIONS)


@pytest.fixture
def parts():
    return pairs_of(160).split(0, 0.2, 0.2)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "early_stopping_patience": 0,
        **changes,
    }
    return AltMoEArguments(**settings)


def make_trainer(folder, parts, model=None, **changes):
    if model is None:
        model = small_model(dropout=0.1, latent_noise=0.5)
    fit_frames(model, parts["train"])
    return AltMoETrainer(model, arguments(folder, **changes), parts["train"], parts["validation"])


def train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry and "eval_loss" not in entry]


def test_training_learns_and_logs_name_their_direction(tmp_path, parts):
    trainer = make_trainer(tmp_path, parts, max_steps=80, eval_steps=40, save_steps=40, learning_rate=1e-2)
    before = trainer.evaluate()["eval_mean_recall"]
    trainer.train()
    after = trainer.evaluate()["eval_mean_recall"]
    assert after > before + 0.2, (before, after)
    logs = train_logs(trainer)
    assert [entry["direction"] for entry in logs[:4]] == DIRECTIONS * 2
    assert "image->text/information_bound" in logs[0] and "text->image/regression" not in logs[0]
    assert "text->image/conditional_entropy" in logs[1]


def test_the_direction_is_constant_over_gradient_accumulation(tmp_path, parts):
    seen = []
    trainer = make_trainer(
        tmp_path,
        parts,
        gradient_accumulation_steps=3,
        max_steps=4,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    original = trainer._batch
    trainer._batch = lambda pairs, direction, index: seen.append(direction) or original(pairs, direction, index)
    trainer.train()
    assert seen == [d for d in DIRECTIONS * 2 for _ in range(3)]


def test_joint_trains_every_direction_in_a_step(tmp_path, parts):
    trainer = make_trainer(tmp_path, parts, schedule="joint", max_steps=4)
    trainer.train()
    log = train_logs(trainer)[0]
    assert log["direction"] == "joint" and {"image->text/contrastive", "text->image/contrastive"} <= set(log)


@pytest.mark.parametrize("schedule", ["round_robin", "adaptive", "proportional"])
def test_a_resumed_run_is_bit_identical(tmp_path, parts, schedule):
    whole = make_trainer(tmp_path / "whole", parts, schedule=schedule, load_best_model_at_end=False)
    whole.train()

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    half = make_trainer(tmp_path / "half", parts, schedule=schedule, load_best_model_at_end=False)
    half.add_callback(Stop())
    half.train()
    assert half.state.global_step == 8
    resumed = make_trainer(tmp_path / "half", parts, schedule=schedule, load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "half"))
    expected, got = (load_file(tmp_path / name / "checkpoint-12" / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [e["direction"] for e in train_logs(whole)] == [e["direction"] for e in train_logs(resumed)]


def test_a_checkpoint_holds_no_pickle_and_one_without_state_is_not_resumed(tmp_path, parts):
    make_trainer(tmp_path, parts).train()
    checkpoint = tmp_path / "checkpoint-12"
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".py", ".safetensors"}
    assert (checkpoint / "training_state.safetensors").is_file() and (checkpoint / "rng_state_0.safetensors").is_file()
    (checkpoint / "training_state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds weights only"):
        make_trainer(tmp_path, parts).train(resume_from_checkpoint=str(checkpoint))


def test_state_comes_back_as_it_was(tmp_path):
    tree = {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, "none": None, "list": [1, 2.5, "a", True]}
    save_tree({**tree, "random": np.random.get_state(legacy=False)}, tmp_path / "state.safetensors")
    again = load_tree(tmp_path / "state.safetensors")
    random = again.pop("random")
    assert again == tree and isinstance(again[0]["betas"], tuple)
    np.testing.assert_array_equal(random["state"]["key"], np.random.get_state()[1])
    with pytest.raises(TypeError, match="A set cannot be written"):
        save_tree({"bad": {1}}, tmp_path / "bad.safetensors")


def test_a_half_written_checkpoint_is_not_taken_for_whole(tmp_path, parts):
    make_trainer(tmp_path, parts).train()
    broken = tmp_path / "checkpoint-99"
    shutil.copytree(tmp_path / "checkpoint-12", broken)
    text = (broken / "trainer_state.json").read_text()
    (broken / "trainer_state.json").write_text(text[: len(text) // 2])
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-12")
    (broken / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-12")
    assert last_complete_checkpoint(tmp_path / "none") is None


def test_learning_rate_of_a_direction(tmp_path, parts):
    """A factor of zero leaves everything as it was in that direction's steps, and the schedule's rate comes back."""
    model = small_model()
    trainer = make_trainer(
        tmp_path, parts, model, direction_learning_rates={"text->image": 0.0}, max_steps=6, load_best_model_at_end=False
    )
    before = model.connector.heads["image"][0].weight.clone()
    other = model.connector.heads["text"][0].weight.clone()
    trainer.train()
    assert torch.equal(model.connector.heads["image"][0].weight, before)
    assert not torch.equal(model.connector.heads["text"][0].weight, other)


def test_frozen_encoders_are_not_in_the_optimiser(tmp_path, parts):
    torch.manual_seed(0)
    model = AltMoEModel.from_encoders(
        {"image": tiny_vit(), "text": tiny_bert()}, hidden_size=16, moe_intermediate_size=8, base="none"
    )
    trainer = AltMoETrainer(
        model, arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False), parts["train"]
    )
    optimised = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert optimised and not optimised & {id(p) for p in model.encoders.parameters()}


def test_early_stopping_follows_mean_recall(tmp_path, parts):
    trainer = make_trainer(tmp_path, parts, max_steps=400, learning_rate=0.0, early_stopping_patience=2)
    trainer.train()
    assert trainer.state.global_step == 12  # first evaluation is the best, two more change nothing


def test_the_best_checkpoint_is_kept(tmp_path, parts):
    trainer = make_trainer(tmp_path, parts, max_steps=40, learning_rate=1e-2, save_total_limit=1)
    trainer.train()
    recalls = {e["step"]: e["eval_mean_recall"] for e in trainer.state.log_history if "eval_mean_recall" in e}
    assert abs(trainer.evaluate()["eval_mean_recall"] - max(recalls.values())) < 1e-9


@pytest.mark.parametrize("kind", ["kernel", "ridge"])
def test_training_on_a_base_starts_at_the_base_and_keeps_it(tmp_path, parts, kind):
    model = small_model(base=kind)
    fit_frames(model, parts["train"])
    tables = fit_bases(model, parts["train"], progress=False)
    base = evaluate_pairs(model, parts["validation"])["mean_recall"]
    trainer = AltMoETrainer(model, arguments(tmp_path), parts["train"], parts["validation"], tables)
    weights = model.connector.base["image->text"].weight.clone()
    trainer.train()
    assert torch.equal(model.connector.base["image->text"].weight, weights)
    trust = fit_trust(model, parts["validation"])
    assert 0 <= trust <= 1 and evaluate_pairs(model, parts["validation"])["mean_recall"] >= base
    fit_scoring(model, parts["train"], parts["validation"])
    model.save_pretrained(tmp_path / "model")
    again = AltMoEModel.from_pretrained(tmp_path / "model")
    latents = parts["test"].latents
    with torch.no_grad():
        for direction in DIRECTIONS:
            source, target = direction.split("->")
            scores = model.score(direction, latents[source], latents[target])
            assert torch.equal(scores, again.score(direction, latents[source], latents[target]))
            alone = model.score(direction, latents[source][2:3], latents[target])
            torch.testing.assert_close(scores[2:3], alone)  # no query sees another
    assert again.config.scoring["image->text"]["scale"] > 0


def test_with_few_pairs_the_base_alone_is_the_kernel_ridge_that_validation_chose(parts, monkeypatch):
    """With the experts off, no metric and nothing recalled our scores are the competitor's: we start level with it."""
    pair, options = ("image", "text"), (2048, 0)
    monkeypatch.setattr(KernelRidge, "gammas", (1.0, 4.0))
    monkeypatch.setattr(KernelRidge, "lambdas", (0.03, 0.3))
    chosen = choose_on_validation(parts["train"], parts["validation"], *options)
    model = small_model(base="kernel", target_metric=False)
    fit_frames(model, parts["train"])
    fit_bases(model, parts["train"], *options, progress=False, chosen=chosen, recall=False)
    model.connector.trust.fill_(0.0)
    train, validation = partnered_latents(parts["train"], pair), retrieval_data(parts["validation"], pair)
    other = KernelRidge().fit(train, validation, torch.arange(len(train["image"])))
    assert other.config == chosen and set(chosen) == set(DIRECTIONS)
    for direction in DIRECTIONS:
        latents = {m: parts["test"].latents[m] for m in pair}
        mine, theirs = model.queries(direction, latents), other.queries(direction, latents)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(fitting, "FEW", 5)
    assert choose_on_validation(parts["train"], parts["validation"], *options) == {}


@torch.no_grad()
def test_with_few_pairs_partners_of_the_nearest_training_items_are_recalled(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(fitting, "_ranks_in_folds", lambda *sides: torch.zeros(2))  # training rows have no objection
    model, train, held_out = small_model(base="kernel"), parts["train"], {}
    fit_frames(model, train)
    tables = fit_bases(model, train, progress=False, held_out=held_out)
    direction = DIRECTIONS[0]
    source, target = direction.split("->")
    rows = train.batch(direction, range(len(train.rows[direction])))
    known, partners = (model.connector.frames[m].unit(rows["latents"][m]) for m in (source, target))
    base = model.connector.base[direction]

    new = model.connector.frames[source].unit(parts["test"].latents[source])
    said = base(new)
    expected = (new @ known.T).clamp_min(0) ** 3 @ partners
    torch.testing.assert_close(said[:, 1], expected, atol=1e-4, rtol=1e-3)
    both = F.normalize(said[:, 0], dim=1) + F.normalize(said[:, 1], dim=1)
    model.connector.trust.fill_(0.0)
    queries = model.queries(direction, {source: parts["test"].latents[source]})
    torch.testing.assert_close(queries, F.normalize(both, dim=1), atol=1e-5, rtol=1e-4)

    # what experts and confidence learn from never holds the row's own partner
    groups = torch.from_numpy(train.group_of_key[rows["keys"]])
    for said, own in ((tables[direction][train.rows[direction]], groups), held_out[direction]):
        others = (known @ known.T).clamp_min(0) ** 3 * (own[:, None] != own)
        torch.testing.assert_close(said[:, 1], others @ partners, atol=1e-4, rtol=1e-3)

    fit_scoring(model, train, parts["validation"], held_out=held_out)
    model.save_pretrained(tmp_path / "model")
    again = AltMoEModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.queries(direction, {source: parts["test"].latents[source]}), queries)
    assert again.config.base_recalls == sorted(DIRECTIONS)

    monkeypatch.setattr(fitting, "FEW", 5)
    fit_bases(model, train, progress=False)
    assert model.config.base_recalls == [] and base.partners.shape == (len(known), partners.shape[1])
    assert model.connector.base[direction](new).ndim == 2


@torch.no_grad()
def test_nothing_is_recalled_where_training_rows_do_better_without(parts):
    """Of a smooth function that ridge has found, the partners of near items are a worse account."""
    train, said, tables = parts["train"], {}, {}
    for recall in (True, False):
        model = small_model(base="kernel", target_metric=True)
        fit_frames(model, train)
        held_out = {}
        tables[recall] = fit_bases(model, train, progress=False, held_out=held_out, recall=recall), held_out
        said[recall] = model.queries("image->text", {"image": parts["test"].latents["image"]})
        assert model.config.base_recalls == []
    assert torch.equal(said[True], said[False])
    for direction in DIRECTIONS:
        assert torch.equal(*(found[direction] for found, _ in tables.values()))
        assert torch.equal(*(held_out[direction][0] for _, held_out in tables.values()))


def test_out_of_sample_predictions_are_used_in_training_only(tmp_path, parts):
    model = small_model(base="ridge")
    fit_frames(model, parts["train"])
    tables = fit_bases(model, parts["train"], progress=False)
    trainer = AltMoETrainer(model, arguments(tmp_path), parts["train"], parts["validation"], tables)
    batch = trainer._batch(parts["train"], "image->text", torch.arange(5))
    assert torch.equal(batch["base_prediction"], tables["image->text"][parts["train"].rows["image->text"][:5]])
    assert "base_prediction" not in trainer._batch(parts["validation"], "image->text", torch.arange(5))


def test_all_that_a_step_takes_is_on_the_device(tmp_path, parts, monkeypatch):
    """The device here is one that holds no numbers; a closed form's predictions may have been made elsewhere."""
    trainer = make_trainer(tmp_path, parts)
    trainer.out_of_sample = {"image->text": torch.zeros(len(parts["train"]), 16)}
    monkeypatch.setattr(AltMoEArguments, "device", torch.device("meta"))
    batch = trainer._batch(parts["train"], "image->text", torch.arange(5))
    tensors = [*batch.pop("latents").values(), *batch.values()]
    assert len(tensors) == 5 and all(tensor.device.type == "meta" for tensor in tensors)


def test_stores_are_trained_on_where_the_folder_of_their_encoder_is_not(tmp_path, capsys):
    model = AltMoEModel.from_encoders({"text": tiny_bert(), "image": tiny_vit()}, base="none")
    model.config.encoders["image"]["name_or_path"] = str(tmp_path / "elsewhere")
    assert load_processors(model) is None
    assert "the encoder of image" in (said := capsys.readouterr().out) and "elsewhere', is not here" in said


def test_negatives_from_the_store_include_every_training_target(tmp_path, parts):
    trainer = make_trainer(tmp_path, parts, negatives="store")
    batch = trainer._batch(parts["train"], "image->text", torch.arange(4))
    assert len(batch["candidates"]) == len(parts["train"].latents["text"]) and batch["positives"].sum() == 4
    few = make_trainer(tmp_path, parts, negatives="store", max_negatives=10)
    batch = few._batch(parts["train"], "image->text", torch.arange(4))
    assert 10 <= len(batch["candidates"]) <= 14 and batch["positives"].any(-1).all()


def _rank(rank, world, folder, port):
    import os

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    parts = pairs_of(160).split(0, 0.2, 0.2)
    model = small_model(dropout=0.0, latent_noise=0.0, router_aux_loss_coef=0.0)
    trainer = make_trainer(
        folder,
        parts,
        model,
        per_device_train_batch_size=16 // world,
        max_steps=4,
        save_steps=4,
        load_best_model_at_end=False,
    )
    trainer.train()
    del trainer
    leave_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Negatives come from both ranks, so two halves of a batch give the gradient of the whole."""
    import torch.multiprocessing as mp

    for world in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mp.spawn(_rank, args=(world, str(tmp_path / str(world)), port), nprocs=world)
    one, two = (load_file(tmp_path / str(w) / "checkpoint-4" / "model.safetensors") for w in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    logs = [json.loads((tmp_path / str(w) / "checkpoint-4" / "trainer_state.json").read_text()) for w in (1, 2)]
    directions = [[e["direction"] for e in log["log_history"] if "direction" in e] for log in logs]
    assert directions[0] == directions[1] == DIRECTIONS * 2


def test_lora_trains_on_raw_items_and_resumes(tmp_path):
    processor = AltMoEProcessor(tiny_processors(tmp_path))
    colors = ["red", "green", "blue", "red", "green", "blue", "red", "green"]
    words = [f"a {color} {shape}" for color, shape in zip(colors, ["cat", "dog", "tree", "house"] * 2, strict=True)]
    items = Dataset.from_dict({"color": colors, "caption": words})

    def collate(rows):
        images = [Image.new("RGB", (32, 32), row["color"]) for row in rows]
        return dict(processor(images=images, text=[row["caption"] for row in rows]))

    def make(folder):
        torch.manual_seed(0)
        lora = {"text": LoraConfig(r=2, target_modules=["query", "value"])}
        model = AltMoEModel.from_encoders(
            {"image": tiny_vit(), "text": tiny_bert()}, lora=lora, hidden_size=16, moe_intermediate_size=8, base="none"
        )
        settings = {"eval_strategy": "no", "load_best_model_at_end": False, "max_steps": 6, "save_steps": 3}
        args = arguments(folder, per_device_train_batch_size=4, learning_rate=1e-2, **settings)
        return AltMoETrainer(model, args, items, data_collator=collate)

    first = make(tmp_path / "run")
    first.train()
    adapters = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_text" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapters.items() if "lora_B" in name)  # B starts at zero
    resumed = make(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    again = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_text" / "adapter_model.safetensors")
    assert all(torch.equal(adapters[name], again[name]) for name in adapters)


def test_bad_settings_are_refused(tmp_path, parts):
    with pytest.raises(ValueError, match="direction_learning_rates: Unknown direction 'image->txt'"):
        make_trainer(tmp_path, parts, direction_learning_rates={"image->txt": 1.0})
    with pytest.raises(ValueError, match="needs validation pairs"):
        AltMoETrainer(small_model(), arguments(tmp_path), parts["train"])


def test_duplicates_in_a_batch_are_positives(tmp_path):
    latents = paired_latents(40)
    latents["text"][1] = latents["text"][0]
    keys = [f"k{i}" for i in range(40)]
    pairs = LatentPairs(latents, {m: keys for m in latents}, DIRECTIONS)
    trainer = AltMoETrainer(small_model(), arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False), pairs)
    positives = trainer._batch(pairs, "image->text", torch.arange(4))["positives"].numpy()
    expected = np.eye(4, dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    assert (positives == expected).all()

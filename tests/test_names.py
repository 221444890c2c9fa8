"""Names that users give: a mistyped path is told at once, in every command, and never asked of the Hub."""

import re

import numpy as np
import pytest
import torch
import yaml
from conftest import small_model, tiny_processors
from hub_server import Hub

from modeling_altmoe import AltMoEProcessor, LatentStore
from modeling_altmoe.search_altmoe import open_store
from modeling_altmoe.sharing_altmoe import is_folder
from trainer.cli import main


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process could ask, and folders to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "runs" / "stamps").mkdir(parents=True)
    with Hub() as server:
        server.use_here(monkeypatch)
        yield server


PATHS = ["./build/rusn/stamps", "build/rusn/stamps", "build/nothing", "../nothing", "~/nothing", "/nothing/here"]


@pytest.mark.parametrize("name", PATHS)
def test_what_can_only_be_a_path_is_no_name_on_the_hub(hub, name):
    with pytest.raises(FileNotFoundError, match=f"no folder '{re.escape(name)}': expected a model, a folder or a name"):
        is_folder(name, "a model")
    asked = [path for _, path, _ in hub.requests if path.startswith("/api/models")]
    assert asked == (["/api/models/build/nothing"] if name == "build/nothing" else [])  # once: it may be OWNER/NAME


def test_the_error_names_what_is_near(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="Did you mean 'build/runs'"):
        is_folder("./build/rusn/stamps", "a model")
    with pytest.raises(FileNotFoundError, match="Below 'build' is no 'xyz'"):
        is_folder("build/xyz", "a model")
    (tmp_path / "build" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="is a file: expected a model, a folder"):
        is_folder("build/model.safetensors", "a model")


def test_folders_and_names_on_the_hub_are_known(hub, tmp_path):
    assert is_folder("build/runs", "a model") and is_folder(tmp_path, "a model")
    for name in ("bert-base-uncased", "me/altmoe-stamps", "hf://datasets/me/words"):
        assert not is_folder(name, "a model") and not hub.requests
    hub.add("build/public", tmp_path / "build")  # its owner is called like a folder here
    assert not is_folder("build/public", "a model")
    with pytest.raises(FileNotFoundError):
        is_folder("build/public", "a data set", "dataset")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and a store that fit."""
    root = tmp_path_factory.mktemp("saved")
    model = small_model()
    model.save_pretrained(root / "model")
    AltMoEProcessor(tiny_processors(root)).save_pretrained(root / "model")
    with LatentStore.create(root / "image", "image", model.config.encoders["image"]) as store:
        store.append(["a", "b"], torch.eye(2, 24))
    return root


COMMANDS = [
    "search {store} --model {wrong} --text frog",
    "search {wrong} --model {model} --text frog",
    "index {store} --model {wrong}",
    "serve --model {wrong} --store image={store} --port 0",
    "serve --model {model} --store image={wrong} --port 0",
    "evaluate --model {wrong}",
    "publish --run {wrong} --out out",
    "push {wrong} me/model",
    "push {wrong} me/page --space --store image={store}",
    "push {model} me/page --space --store image={wrong}",
    "encode --data {wrong} --modality image --encoder {wrong} --out out",
    "import vectors.npy --modality image --like {wrong} --out out",
    "train --stores {{\"image\":\"{wrong}\"}} --output_dir out",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_there_is_no_such_folder(hub, saved, capsys, command):
    names = {"store": saved / "image", "model": saved / "model", "wrong": "./build/rusn/stamps"}
    np.save("vectors.npy", np.eye(24, dtype=np.float32))
    with pytest.raises(SystemExit) as end:
        main(command.format(**names).split())
    assert end.value.code == 2 and not hub.requests
    assert re.search(r"[Nn]o folder '|is no folder|'.*' has no recipe", capsys.readouterr().err)


def test_an_encoder_that_was_mistyped_is_told_at_once(hub, saved, capsys, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"text": "a frog"}\n')
    with pytest.raises(SystemExit):
        main("encode --data words.jsonl --modality text --encoder ./build/rusn/minilm --out out".split())
    assert "There is no folder './build/rusn/minilm'" in capsys.readouterr().err and not hub.requests


def test_a_store_is_opened_by_folder_or_by_its_name_on_the_hub(hub, saved):
    hub.add("me/image", saved / "image", kind="dataset")
    assert open_store("me/image").ids == open_store(saved / "image").ids == ["a", "b"]


def test_evaluating_a_model_whose_stores_are_elsewhere_says_which_it_needs(hub, saved, capsys):
    """A published recipe names its stores without their folders."""
    recipe = {"stores": {"image": str(saved / "image"), "text": "text"}, "seed": 0}
    (saved / "model" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(saved / "model")])
    shown = capsys.readouterr().err
    assert "is measured on LatentStores that are not here: text ('text')" in shown
    assert """--stores '{"image": "FOLDER", "text": "FOLDER"}'""" in shown and not hub.requests

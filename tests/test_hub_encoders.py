"""Encoders by reference: pinned, moved, gated, replaced and self-contained ones, through a Hub on the loopback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_bert, tiny_vit
from hub_server import Hub

from modeling_altmoe import AltMoEModel
from modeling_altmoe.sharing_altmoe import refuse_local_encoders

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}


def run(code: str, environment: dict, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


PUSH = """
import json, sys; sys.path.insert(0, {root!r})
import torch
from modeling_altmoe import AltMoEModel, AltMoEProcessor
for name in ("steady", "gone", "gated"):
    torch.manual_seed(1)
    model = AltMoEModel.from_encoders({{"image": f"lab/{{name}}", "text": "lab/words"}}, **{sizes})
    model.push_to_hub(f"me/{{name}}")
torch.manual_seed(1)
own = AltMoEModel.from_encoders({folders}, **{sizes})  # the same weights by folder ...
own.save_pretrained("run")
try: own.push_to_hub("me/own")
except ValueError as error: print(error)
named = AltMoEModel.from_pretrained("run", encoders={{"image": "lab/steady", "text": "lab/words"}})
named.push_to_hub("me/own")  # ... and then by their Hub names
pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
print(json.dumps(model.eval().encode("image", {{"pixel_values": pixels}}).tolist()))
"""
STRANGER = """
import json, torch
from transformers import AutoModel
pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
def show(name, **more):
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=True, **more)
        print(json.dumps(model.encode("image", {{"pixel_values": pixels}}).tolist()))
    except (OSError, ValueError) as error:
        print(str(error).replace(chr(10), " "))
show("me/steady")
show("me/own")
show("me/gone")
show("me/gone", encoders={{"image": {image!r}}})
show("me/gated", token=False)
show("me/gated", encoders={{"image": "lab/steady"}})
show("me/gone", encoders={{"image": {other!r}}})
show("me/branch")
"""


def test_encoders_by_reference(encoder_folders, tmp_path):
    with Hub() as hub:
        pinned = {name: hub.add(f"lab/{name}", encoder_folders["image"]) for name in ("steady", "gone", "gated")}
        hub.add("lab/words", encoder_folders["text"])
        code = PUSH.format(root=str(ROOT), sizes=SIZES, folders=encoder_folders)
        refused, expected = run(code, hub.environment(tmp_path / "mine"), tmp_path / "work")
        assert "lie on this machine only" in refused and "('model', 'me/own')" not in str(refused)
        for name in ("steady", "gone", "gated", "own"):  # a pushed repository is small and names what it needs
            files = hub.files(f"me/{name}")
            entry = json.loads(files["config.json"])["encoders"]["image"]
            assert not [path for path in files if path.startswith("encoder_")]
            place = "steady" if name == "own" else name
            assert (entry["name_or_path"], entry["revision"]) == (f"lab/{place}", pinned[place])
            assert str(tmp_path).encode() not in b"".join(files.values())

        # main moves on to other weights; one repository is deleted, one gated; one config follows a branch by hand
        tiny_vit(seed=9).save_pretrained(tmp_path / "other")
        moved_on = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
        hub.repositories["model", "lab/steady"].commit(
            {**hub.files("lab/steady"), **moved_on}, "main", "better weights"
        )
        del hub.repositories["model", "lab/gone"]
        hub.repositories["model", "lab/gated"].gated = True
        by_branch = hub.files("me/steady")["config.json"].replace(pinned["steady"].encode(), b"main")
        shutil.copytree(tmp_path / "work" / "run", tmp_path / "branch")
        hub.add("me/branch", tmp_path / "branch")
        hub.files("me/branch").update({**hub.files("me/steady"), "config.json": by_branch})

        fresh = hub.environment(tmp_path / "fresh", token=None)
        code = STRANGER.format(image=encoder_folders["image"], other=str(tmp_path / "other"))
        steady, own, gone, local, gated, renamed, foreign, branch = run(code, fresh, tmp_path / "elsewhere")
        assert steady == own == local == expected  # the pinned revision, though main has other weights now
        for message, name in ((gone, "gone"), (gated, "gated")):
            assert f"The image encoder 'lab/{name}' at revision {pinned[name]} cannot be loaded" in message
            assert "AltMoEModel.from_pretrained(..., encoders={'image': name_folder_or_model})" in message
        assert "gated" in gated and renamed.startswith("The image encoder's weights are not those")
        for message, name in ((foreign, "gone"), (branch, "steady")):
            revision = "main" if message is branch else pinned[name]
            assert f"'lab/{name}' at revision {revision}: expected weights:" in message and "got weights:" in message

        before = len(hub.requests)
        code = STRANGER.split('show("me/steady")')[0].format() + "show('me/steady')"
        offline = {**fresh, "HF_HUB_OFFLINE": "1"}
        assert run(code, offline, tmp_path / "elsewhere") == [expected] and len(hub.requests) == before


# ---------------------------------------------------------------- encoders that go along


def paths_of_this_machine(folder: Path, *places) -> list[str]:
    """Names of files that hold one of the places."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(str(place).encode() in path.read_bytes() for place in places)]


def test_a_self_contained_checkpoint_names_no_folder_and_stays_self_contained(encoder_folders, tmp_path):
    model = AltMoEModel.from_encoders(encoder_folders, **SIZES)
    home = Path(encoder_folders["image"]).parent
    model.save_pretrained(tmp_path / "whole", self_contained=True)
    assert paths_of_this_machine(tmp_path / "whole", home, tmp_path) == []
    assert model.config.encoders["image"]["name_or_path"] == encoder_folders["image"]  # still known here

    loaded = AltMoEModel.from_pretrained(tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "again")  # its encoders have no other home, so they go along
    shutil.rmtree(tmp_path / "whole")
    again = AltMoEModel.from_pretrained(tmp_path / "again")
    assert set(again.encoders) == {"image", "text"} and paths_of_this_machine(tmp_path / "again", home, tmp_path) == []
    with pytest.raises(ValueError, match=r"lie on this machine only: \{'image': 'a model in memory'"):
        again.push_to_hub("me/model", self_contained=False)
    connector = AltMoEModel.from_pretrained(tmp_path / "again", load_encoders=False)
    with pytest.raises(ValueError, match="which are not attached"):
        connector.save_pretrained(tmp_path / "no", self_contained=True)
    with pytest.raises(ValueError, match="lie on this machine only"):
        connector.push_to_hub("me/model")


def test_what_is_shared_has_a_home_or_goes_along():
    config = {"model_type": "vit"}
    refuse_local_encoders({"image": {"latent_size": 3}})  # vectors only
    refuse_local_encoders({"image": {"config": config, "self_contained": True}})
    refuse_local_encoders({"image": {"config": config, "name_or_path": "lab/vit", "revision": "a" * 40}})
    for entry in ({"config": config}, {"config": config, "name_or_path": "lab/vit"}, {"name_or_path": "/somewhere"}):
        with pytest.raises(ValueError, match="lie on this machine only"):
            refuse_local_encoders({"image": entry})


def test_a_relative_folder_is_recorded_for_any_working_directory(encoder_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(encoder_folders["image"]).parent)
    model = AltMoEModel.from_encoders({"image": "image", "text": tiny_bert()}, **SIZES)
    assert model.config.encoders["image"]["name_or_path"] == encoder_folders["image"]
    assert "_name_or_path" not in model.config.encoders["image"]["config"]

"""Files that we write may be read by whoever may read other new files here; safetensors alone would not let them."""

import os
import stat

import pytest
import torch
from conftest import score_both_ways, small_model, tiny_bert, tiny_vit
from peft import LoraConfig

from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.index_files_altmoe import update
from trainer.state import save_tree


@pytest.fixture(params=[0o022, 0o027, 0o077])
def mode(request):
    """That of a new file under the umask of the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in files}


def test_a_model_its_encoders_and_its_adapters(mode, tmp_path):
    lora = LoraConfig(r=2, target_modules=["query"])
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}
    model = AltMoEModel.from_encoders({"image": tiny_vit(), "text": tiny_bert()}, lora={"text": lora}, **sizes)
    model.save_pretrained(tmp_path / "model", self_contained=True)
    found = modes(tmp_path / "model")
    weights = {name for name in found if name.endswith(".safetensors")}
    assert {name.split("/")[0] for name in weights} == {
        "model.safetensors",
        "encoder_image",
        "encoder_text",
        "adapter_text",
    }
    assert set(found.values()) == {mode}


def test_a_store_its_index_and_the_state_of_a_run(mode, tmp_path):
    model = score_both_ways(small_model())
    store = LatentStore.create(tmp_path / "store", "image", model.config.encoders["image"])
    with store:
        store.append([str(i) for i in range(40)], torch.randn(40, 24))
    store.delete(["3"])
    update(model, store, "text->image", "exact")
    save_tree({"step": torch.ones(1)}, tmp_path / "store" / "state.safetensors")
    found = modes(tmp_path / "store")
    assert any(name.startswith("index/") for name in found) and set(found.values()) == {mode}, found

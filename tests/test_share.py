"""README's "Share it", command by command as printed, then what others do with it: a Space from the Hub's copy, and
plain PEFT. Every step is a new process; only names of folders are replaced."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_processors
from hub_server import Hub
from peft import LoraConfig
from PIL import Image

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.search_altmoe import LatentIndex
from trainer.card import write_card

ROOT = Path(__file__).parent.parent
COLORS = "red green blue orange purple black".split()
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Share it")[1].split("\n## ")[0]
COMMANDS = [line for line in SECTION.split("```sh\n")[1].split("```")[0].splitlines() if line.startswith("altmoe ")]


def run(code: str, environment: dict, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_" not in done.stdout + done.stderr  # no token is ever shown
    return done.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory, encoder_folders):
    """A Hub to which all of the section's commands were sent, and the model as it is here."""
    root = tmp_path_factory.mktemp("share")
    processors = tiny_processors(root)
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}
    model = AltMoEModel.from_encoders(encoder_folders, processors=processors, lora={"text": lora}, **sizes).eval()
    processor = AltMoEProcessor(processors)
    pictures = [Image.new("RGB", (40, 30), color) for color in COLORS]
    latents = model.encode("image", processor.batch("image", pictures))
    with LatentStore.create(root / "store", "image", model.config.encoders["image"]) as store:
        store.append(COLORS, latents)
    with Hub() as hub:
        for modality, folder in encoder_folders.items():
            home = {"name_or_path": f"lab/{modality}", "revision": hub.add(f"lab/{modality}", folder)}
            model.config.encoders[modality].update(home)
        model.save_pretrained(root / "model")
        processor.save_pretrained(root / "model")
        write_card(root / "model", model, {}, name="colors", license="apache-2.0")
        folders = {"build/hub/altmoe-stamps": root / "model", "build/stores/stamps/image": root / "store"}
        for command in COMMANDS:
            words = [str(folders.get(word, word)) for word in shlex.split(command, comments=True)][1:]
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from trainer.cli import main; main({words!r})"
            assert hub.url in run(code, hub.environment(root / "mine"), root / "work"), command
        yield hub, model, processor, root


def test_the_section_shows_all_three_kinds():
    assert len(COMMANDS) == 3 and sum("--space" in command for command in COMMANDS) == 1


def test_what_is_shared_names_no_folder_of_this_machine(shared, encoder_folders):
    hub, _, _, root = shared
    for kind, name in (("model", "me/altmoe-stamps"), ("dataset", "me/stamps-image"), ("space", "me/altmoe-search")):
        for path, content in hub.files(name, kind=kind).items():
            for here in (root, ROOT, Path(encoder_folders["image"]).parent):
                assert str(here).encode() not in content, (name, path)


START = """
import json, os, sys
from huggingface_hub import snapshot_download
folder = snapshot_download("me/altmoe-search", repo_type="space", local_dir="copy")
os.chdir(folder); sys.path.insert(0, os.getcwd())
from pathlib import Path
import app, modeling_altmoe
from engine import Engine
assert Path(modeling_altmoe.__file__).parent.parent == Path.cwd()
options = app.settings([])
engine = Engine(options.model, options.stores, options.data)
assert app.build(engine, options, Path.cwd())
print(json.dumps([hit.id for hit in engine.search("text", "a red square", "image").found]))
"""


def test_the_pushed_space_starts_from_the_hubs_copy(shared, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -c constraints.txt -e '.[space]')")
    hub, model, processor, root = shared
    found = json.loads(run(START, hub.environment(tmp_path / "fresh", token=None), tmp_path / "space").splitlines()[-1])
    latents = model.encode("text", processor.batch("text", ["a red square"]), adapted=True)
    here = LatentIndex(model, LatentStore.open(root / "store"), "text->image").search(latents, len(COLORS))[0]
    assert found == [hit.id for hit in here]


def test_an_adapter_loads_with_plain_peft_as_the_card_says(shared, tmp_path):
    hub, model, _, _ = shared
    files = hub.files("me/altmoe-stamps")
    assert {"adapter_text/adapter_config.json", "adapter_text/adapter_model.safetensors"} <= set(files)
    assert "adapter_config.json" not in files  # at the root it would redirect a load of the model to its base model
    assert json.loads(files["adapter_text/adapter_config.json"])["base_model_name_or_path"] == "lab/text"
    code = next(block for block in files["README.md"].decode().split("```python\n")[1:] if "PeftModel" in block)
    code = code.split("```")[0] + (
        "\nimport json, sys, torch\n"
        "ids = torch.arange(12).reshape(2, 6)\n"
        "print(json.dumps(adapted.eval()(input_ids=ids).last_hidden_state.tolist()))\n"
        "assert not [name for name in sys.modules if 'modeling_altmoe' in name]\n"
    )
    printed = run(code, hub.environment(tmp_path / "fresh", token=None), tmp_path / "elsewhere")
    ids = torch.arange(12).reshape(2, 6)
    expected = model.encoders["text"](input_ids=ids).last_hidden_state
    assert torch.equal(torch.tensor(json.loads(printed.splitlines()[-1])), expected)
    model.encoders["text"].disable_adapters()
    try:
        assert not torch.allclose(model.encoders["text"](input_ids=ids).last_hidden_state, expected, atol=1e-3)
    finally:
        model.encoders["text"].enable_adapters()

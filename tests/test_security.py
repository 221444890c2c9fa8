"""What a stranger sends stays data: no code, no file outside the target folder, no pickle, and no token in a file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import paired_latents, small_config, small_model, tiny_processors
from huggingface_hub import DatasetCard
from peft import LoraConfig
from safetensors.torch import load_file

import modeling_altmoe
from modeling_altmoe import AltMoEConfig, AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.sharing_altmoe import store_card
from trainer.arguments import AltMoEArguments

CODE = Path(modeling_altmoe.__file__).parent
DANGEROUS = r"import pickle|pickle\.|(?<![.\w])(eval|exec)\(|torch\.load|os\.system|subprocess"
NAMES = ["../../x", "a/b", "..", "", "image\n", "/abs", "Image", "image.x", 3]


@pytest.fixture
def whole(encoder_folders, tmp_path):
    """A self-contained model with its processor."""
    model = AltMoEModel.from_encoders(encoder_folders, hidden_size=16, moe_intermediate_size=8, base="none")
    model.save_pretrained(tmp_path / "model", self_contained=True)
    AltMoEProcessor(tiny_processors(tmp_path)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def needed(names: list[str]) -> set[str]:
    """The files that the relative imports of some files need, and these."""
    found, wanted = set(), list(names)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            code = (CODE / name).read_text()
            wanted += [f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", code, re.MULTILINE)]
    return found


def test_remote_code_is_the_flat_folder_that_the_imports_need(whole):
    entries = ["configuration_altmoe.py", "modeling_altmoe.py", "processing_altmoe.py", "pipeline_altmoe.py"]
    assert {path.name for path in whole.glob("*.py")} == needed(entries) <= {path.name for path in CODE.glob("*.py")}
    assert not list(whole.glob("*/**/*.py"))
    for path in whole.glob("*.py"):
        assert path.read_bytes() == (CODE / path.name).read_bytes()
        assert not re.search(DANGEROUS, path.read_text()), path.name


@pytest.mark.parametrize("name", NAMES)
def test_a_modality_cannot_name_another_place(name, tmp_path):
    with pytest.raises(ValueError, match="cannot name a modality"):
        small_config(encoders={name: {"latent_size": 3}}, directions=[])
    small_config(directions=[]).save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    fields = json.loads(place.read_text())
    place.write_text(json.dumps({**fields, "encoders": {str(name) or "": {"latent_size": 3}}}))
    with pytest.raises(ValueError, match="cannot name a modality"):
        AltMoEConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot name a modality"):
        AltMoEProcessor({name: object()})


@pytest.mark.parametrize("change", [{"folder": ".."}, {"folder": "processor_text"}, {"folder": "/"}, {"kind": "code"}])
def test_a_processor_reads_its_own_folders_only(whole, change):
    place = whole / "processor_config.json"
    fields = json.loads(place.read_text())
    fields["modalities"]["image"].update(change)
    place.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="unusable entry"):
        AltMoEProcessor.from_pretrained(whole)
    fields["modalities"] = {"../../x": fields["modalities"]["text"]}
    place.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="cannot name a modality"):
        AltMoEProcessor.from_pretrained(whole)


def test_code_beside_an_encoder_or_tokenizer_is_not_run(whole, tmp_path):
    """The installed package trusts a repository's data, never the code that its files name."""
    bomb = tmp_path / "ran"
    for folder in (whole, whole / "encoder_image"):
        (folder / "evil.py").write_text(f"open({str(bomb)!r}, 'w')\n")
    for file, key in (("encoder_image/config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer"),
                      ("preprocessor_config.json", "AutoImageProcessor")):  # fmt: skip
        fields = json.loads((whole / file).read_text())
        (whole / file).write_text(json.dumps({**fields, "auto_map": {key: "evil.Evil", "AutoConfig": "evil.Evil"}}))
    for load in (AltMoEModel, AltMoEProcessor):
        try:
            load.from_pretrained(whole)
        except (ValueError, OSError) as error:  # transformers refuses what is only there as code
            assert "trust_remote_code" in str(error)
    assert not bomb.exists()


def test_weights_in_a_pickle_are_not_opened(tmp_path):
    small_model().save_pretrained(tmp_path)
    state = AltMoEModel.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AltMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["encoder of its own", "encoder by name", "adapter"])
def test_encoders_and_adapters_in_a_pickle_are_not_opened(encoder_folders, tmp_path, part, monkeypatch):
    own = part == "encoder of its own"
    lora = {"text": LoraConfig(r=2, target_modules=["query"])} if part == "adapter" else None
    folders = {m: shutil.copytree(folder, tmp_path / m) for m, folder in encoder_folders.items()}
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}
    AltMoEModel.from_encoders(folders, lora=lora, **sizes).save_pretrained(tmp_path / "model", self_contained=own)
    place = {"encoder of its own": tmp_path / "model" / "encoder_text", "encoder by name": folders["text"]}
    place = place.get(part, tmp_path / "model" / "adapter_text")
    (weights,) = place.glob("*.safetensors")
    name = weights.stem.replace("model", "pytorch_model") if part != "adapter" else weights.stem
    torch.save(load_file(weights), weights.with_name(f"{name}.bin"))
    weights.unlink()
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AltMoEModel.from_pretrained(tmp_path / "model")
    if part == "encoder by name":
        with pytest.raises(
            OSError, match=r"text encoder '.*' cannot be loaded: .*safetensors only, never from a pickle"
        ):
            AltMoEModel.from_encoders(folders, **sizes)


def test_a_strangers_store_stays_in_its_folder_and_its_card(tmp_path):
    nasty = "../../x | `a`\n---\n<script>"
    with LatentStore.create(tmp_path / "store", "image", {"latent_size": 24}, columns={"path": "string"}) as store:
        store.append([nasty], paired_latents(1)["image"], path=["/etc/passwd"])
    before = {path for path in tmp_path.rglob("*")}
    opened = LatentStore.open(tmp_path / "store")
    opened.columns = {nasty: "string"}
    opened.description["encoder"]["name_or_path"] = opened.modality = nasty
    card = DatasetCard(text := store_card(opened, "me/store", license=nasty))
    assert (
        card.data.license == nasty
        and "\n---" not in card.text.split("| | |")[0]
        and "<script>" not in text.split("\n---\n", 1)[1]
    )
    assert set(card.data.to_dict()) == {"license", "tags", "configs"}
    assert {path for path in tmp_path.rglob("*")} == before


def test_tokens_are_in_no_file(whole, tmp_path):
    token = "hf_secretsecretsecret"
    model = AltMoEModel.from_pretrained(whole, token=token)
    model.save_pretrained(tmp_path / "again", token=token)
    AltMoEProcessor.from_pretrained(whole, token=token).save_pretrained(tmp_path / "again", token=token)
    arguments = AltMoEArguments(
        output_dir=str(tmp_path / "run"),
        load_best_model_at_end=False,
        eval_strategy="no",
        hub_token=token,
        use_cpu=True,
    )
    (tmp_path / "again" / "training_args.json").write_text(arguments.to_json_string())
    for path in (path for path in (tmp_path / "again").rglob("*") if path.is_file()):
        assert token.encode() not in path.read_bytes(), path.name

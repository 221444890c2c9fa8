"""Round trips through a Hub on the loopback, with the real client, each in a new process with an empty cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import paired_latents, small_model, tiny_processors
from datasets import Dataset
from hub_server import READ, STRANGER, Hub
from PIL import Image
from transformers import pipeline

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from trainer.arguments import AltMoEArguments
from trainer.pairs import LatentPairs
from trainer.trainer import AltMoETrainer

ROOT = Path(__file__).parent.parent
COMMAND = "import sys; sys.path.insert(0, {root!r}); from trainer.cli import main\n"
LOAD = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({name!r}, trust_remote_code=True)
print(model.predict({{"image": torch.ones(1, 32)}}, "image->text").flatten().tolist())
"""
EVERYTHING = """
import json, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
name, trust = {name!r}, {{"trust_remote_code": True, "revision": {revision!r}}}
config, model = AutoConfig.from_pretrained(name, **trust), AutoModel.from_pretrained(name, **trust)
processor, pipe = AutoProcessor.from_pretrained(name, **trust), pipeline(model=name, **trust)
pictures, words = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")], ["a cat", "a red house", "green"]
logits = model(**processor(images=pictures, text=words)).logits_per_image
ranked = pipe(words, candidates={{"image": pictures}})
print(json.dumps([config.directions, logits.tolist(), [[hit["score"] for hit in hits] for hits in ranked]]))
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def run(code: str, environment: dict, folder) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )


def altmoe(arguments: list[str], environment: dict, folder) -> subprocess.CompletedProcess:
    return run(COMMAND.format(root=str(ROOT)) + f"main({arguments!r})", environment, folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory, encoder_folders):
    """A self-contained model with processor and card."""
    root = tmp_path_factory.mktemp("published")
    model = AltMoEModel.from_encoders(encoder_folders, hidden_size=16, moe_intermediate_size=8, base="none")
    model.save_pretrained(root, self_contained=True)
    AltMoEProcessor(tiny_processors(tmp_path_factory.mktemp("words"))).save_pretrained(root)
    (root / "README.md").write_text(
        '---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n---\n\nrepo = "here"\n'
    )
    return root, model.eval()


def test_altmoe_push_and_a_stranger_pulls(hub, published, tmp_path):
    root, model = published
    done = altmoe(["push", str(root), "me/joined"], hub.environment(tmp_path / "mine"), tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.files("me/joined")
    assert 'repo = "me/joined"' in files["README.md"].decode() and "modeling_altmoe.py" in files
    environment = hub.environment(tmp_path / "fresh", token=None)
    code = EVERYTHING.format(name="me/joined", revision="main")
    pulled = run(code, environment, tmp_path / "elsewhere")
    assert pulled.returncode == 0, pulled.stderr
    directions, logits, ranked = json.loads(pulled.stdout.splitlines()[-1])
    pictures, words = (
        [Image.new("RGB", (40, 30), color) for color in ("red", "blue")],
        ["a cat", "a red house", "green"],
    )
    processor = AltMoEProcessor.from_pretrained(root)
    assert directions == model.directions
    expected = model(**processor(images=pictures, text=words)).logits_per_image
    assert torch.equal(torch.tensor(logits), expected)
    here = pipeline("cross-modal-retrieval", model=model, processor=processor)(words, candidates={"image": pictures})
    assert ranked == [[hit["score"] for hit in hits] for hits in here]
    before = len(hub.requests)
    offline = run(code, {**environment, "HF_HUB_OFFLINE": "1"}, tmp_path / "elsewhere")
    assert offline.stdout == pulled.stdout, offline.stderr
    assert len(hub.requests) == before


def test_branches_private_repositories_and_tokens(hub, published, tmp_path):
    root, _ = published
    push = ["push", str(root), "me/secret"]
    both = f"main({[*push, '--private']}); main({[*push, '--revision', 'next']})"
    done = run(COMMAND.format(root=str(ROOT)) + both, hub.environment(tmp_path / "mine"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "config.json" in hub.files("me/secret", "next") and hub.repositories["model", "me/secret"].private
    hub.repositories["model", "me/secret"].commit({"README.md": b"nothing here"}, "main", "emptied")
    refuse = f"""
from transformers import AutoModel
for token in ({STRANGER!r}, False):
    try: AutoModel.from_pretrained("me/secret", revision="next", trust_remote_code=True, token=token)
    except OSError: print("refused")
"""
    code = refuse + EVERYTHING.format(name="me/secret", revision="next")  # from one empty cache
    pulled = run(code, hub.environment(tmp_path / "reader", READ), tmp_path / "elsewhere")
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.splitlines()[:2] == ["refused"] * 2 and len(pulled.stdout.splitlines()) == 3
    refused = altmoe(push, hub.environment(tmp_path / "reader", READ), tmp_path)
    assert refused.returncode == 2 and "may write" in refused.stderr and READ not in refused.stderr


def test_model_and_processor_push_themselves(hub, published, tmp_path):
    root, _ = published
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from modeling_altmoe import AltMoEModel, AltMoEProcessor
model = AltMoEModel.from_pretrained({str(root)!r})
try: model.push_to_hub("me/own", self_contained=False)
except ValueError as error: print("refused:", error)
model.push_to_hub("me/own")  # it came with its encoders, and goes with them
processor = AltMoEProcessor.from_pretrained({str(root)!r})
processor.push_to_hub("me/own")
model.save_pretrained("saved", push_to_hub=True, repo_id="me/saved", private=True)
processor.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
"""
    done = run(code, hub.environment(tmp_path / "mine"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "refused: These encoders lie on this machine only" in done.stdout
    for name in ("me/own", "me/saved"):
        assert {"processor_config.json", "encoder_image/model.safetensors"} <= set(hub.files(name))
    assert hub.repositories["model", "me/saved"].private
    code = "from transformers import AutoProcessor\nAutoProcessor.from_pretrained('me/own', trust_remote_code=True)\n"
    pulled = run(code + LOAD.format(name="me/own"), hub.environment(tmp_path / "fresh"), tmp_path)
    assert pulled.returncode == 0, pulled.stderr


def test_a_store_comes_back_the_same(hub, tmp_path):
    latents = paired_latents(10)["image"]
    encoder = {"latent_size": 24, "name_or_path": str(tmp_path), "protocol": {"pooling": "cls"}}
    with LatentStore.create(tmp_path / "store", "image", encoder, columns={"path": "string"}) as store:
        store.append([str(i) for i in range(10)], latents, path=[f"{i}.png" for i in range(10)])
    mine = hub.environment(tmp_path / "mine")
    done = altmoe(["push", str(tmp_path / "store"), "me/latents", "--license", "mit", "--data", "me/pictures"],
                  mine, tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files("me/latents", kind="dataset")
    assert b"license: mit" in files["README.md"] and b"| data | me/pictures |" in files["README.md"]
    assert str(tmp_path).encode() not in b"".join(files.values())
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from modeling_altmoe import LatentStore
import datasets
store = LatentStore.from_hub("me/latents")
rows = datasets.load_dataset("me/latents", split="train")
assert rows["id"][:] == store.ids and rows["latent"][:] == store.latents().tolist()
print([store.fingerprint, store.column("path"), store.latents().tolist()])
"""
    pulled = run(code, hub.environment(tmp_path / "fresh", READ), tmp_path / "elsewhere")
    assert pulled.returncode == 0, pulled.stderr
    fingerprint, paths, rows = json.loads(pulled.stdout.replace("'", '"'))
    assert fingerprint == store.fingerprint and paths[3] == "3.png" and torch.equal(torch.tensor(rows), latents)
    store.delete(["3"])
    code = f"""
from modeling_altmoe import LatentStore
store = LatentStore.open({str(tmp_path / "store")!r})
try:
    store.push_to_hub("me/latents")
except ValueError as error:
    print("refused:", error)
store.compact()
store.push_to_hub("me/latents")
print(LatentStore.from_hub("me/latents").content == store.content)
"""
    done = run(code, {**mine, "PYTHONPATH": str(ROOT)}, tmp_path)
    assert "still holds deleted rows, which would be sent as well" in done.stdout and done.stdout.endswith("True\n")
    (shard,) = (name for name in hub.files("me/latents", kind="dataset") if name.startswith("shard-"))
    assert shard.startswith("shard-1.00000-")


def test_a_data_set_of_the_hub_is_encoded_whole_or_as_a_stream(hub, encoder_folders, tmp_path):
    texts = ["a cat", "a red dog", "blue", "a green circle house", "tree"]
    Dataset.from_dict({"id": list("abcde"), "text": texts}).to_parquet(tmp_path / "data" / "train.parquet")
    hub.add("me/words", tmp_path / "data", "dataset")
    code = COMMAND.format(root=str(ROOT))
    for out, how in (("whole", []), ("stream", ["--streaming"])):
        words = [
            "encode",
            "--data",
            "me/words",
            "--modality",
            "text",
            "--encoder",
            encoder_folders["text"],
            "--out",
            out,
        ]
        code += f"main({words + how})\n"
    done = run(code, hub.environment(tmp_path / "mine", READ), tmp_path / "work")
    assert done.returncode == 0, done.stderr
    whole, stream = (LatentStore.open(tmp_path / "work" / name) for name in ("whole", "stream"))
    assert sorted(whole.ids) == list("abcde") and whole.column("text", whole.rows_of(["c"])) == ["blue"]
    assert torch.equal(whole.latents(), stream.take(stream.rows_of(whole.ids)))


def test_pickles_and_unknown_folders_are_refused(published, tmp_path):
    from modeling_altmoe.sharing_altmoe import push_folder

    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickles"):
        push_folder(tmp_path, "me/x")
    with pytest.raises(FileNotFoundError, match="Nothing to push"):
        push_folder(tmp_path / "none", "me/x")


STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
TRAIN = """
import json, sys; sys.path[:0] = [{root!r}, {tests!r}]
import torch
from conftest import paired_latents, small_model
from trainer.arguments import AltMoEArguments
from trainer.pairs import LatentPairs
from trainer.trainer import AltMoETrainer
latents = paired_latents(32)
keys = {{m: [str(i) for i in range(32)] for m in latents}}
predictions = []
for seed, strategy in enumerate({strategies!r}):
    model = small_model(seed)
    pairs = LatentPairs(latents, keys, model.directions)
    args = AltMoEArguments(
        output_dir=strategy, max_steps=4, save_steps=2, eval_strategy="no", load_best_model_at_end=False, use_cpu=True,
        per_device_train_batch_size=8, push_to_hub=True, hub_model_id="me/" + strategy, hub_strategy=strategy,
        hub_always_push=True, disable_tqdm=True,
    )
    trainer = AltMoETrainer(model, args, pairs)
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
    predictions.append(model.eval().predict({{"image": torch.ones(1, 24)}}, "image->text").tolist())
print(json.dumps(predictions))
"""
LOAD_TRAINED = """
import json, torch
from transformers import AutoModel
models = [AutoModel.from_pretrained("me/" + name, trust_remote_code=True) for name in {strategies!r}]
print(json.dumps([model.predict({{"image": torch.ones(1, 24)}}, "image->text").tolist() for model in models]))
"""


def resume_from_the_hubs_files(files: dict[str, bytes], folder: Path) -> None:
    """Two more steps than the pushed run had."""
    folder.mkdir()
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            (folder / Path(name).name).write_bytes(content)
    latents = paired_latents(32)
    model = small_model(seed=5)
    pairs = LatentPairs(latents, {m: [str(i) for i in range(32)] for m in latents}, model.directions)
    still = {"eval_strategy": "no", "load_best_model_at_end": False, "use_cpu": True, "disable_tqdm": True}
    args = AltMoEArguments(str(folder.parent / "on"), max_steps=6, per_device_train_batch_size=8, **still)
    trainer = AltMoETrainer(model, args, pairs)
    trainer.train(resume_from_checkpoint=str(folder))
    steps = [entry["step"] for entry in trainer.state.log_history if "train_runtime" not in entry]
    assert trainer.state.global_step == 6 and steps == sorted(steps) and trainer.optimizer.state_dict()["state"]
    updates = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
    assert updates == {3, 6}  # of one direction's parts and of shared ones: the four steps before count


def test_every_hub_strategy_pushes_a_loadable_repository_without_pickles_or_tokens(hub, tmp_path):
    mine = hub.environment(tmp_path / "mine")
    code = TRAIN.format(root=str(ROOT), tests=str(ROOT / "tests"), strategies=STRATEGIES)
    done = run(code, mine, tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert mine["HF_TOKEN"] not in done.stdout + done.stderr
    for strategy in STRATEGIES:
        files = hub.files(f"me/{strategy}")
        assert {"modeling_altmoe.py", "training_args.json", "model.safetensors"} <= set(files)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        assert mine["HF_TOKEN"].encode() not in b"".join(files.values())
    # all that a run needs to go on from there
    needed = ("config.json", "trainer_state.json", "training_state.safetensors", "rng_state_0.safetensors")
    files = hub.files("me/checkpoint")
    assert {f"last-checkpoint/{name}" for name in needed} <= set(files)
    resume_from_the_hubs_files(files, tmp_path / "last-checkpoint")
    assert "checkpoint-2/config.json" in hub.files("me/all_checkpoints")
    code = LOAD_TRAINED.format(strategies=STRATEGIES)
    pulled = run(code, hub.environment(tmp_path / "fresh", None), tmp_path / "elsewhere")
    assert pulled.stdout.splitlines()[-1] == done.stdout.splitlines()[-1], pulled.stderr

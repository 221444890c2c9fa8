"""The commands from end to end on tiny encoders: encode, train, evaluate, search, publish, and a stranger's process."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, Image, Value
from hub_server import Hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image as Pictures
from PIL import ImageDraw

from benchmarks import mteb_task
from modeling_altmoe import AltMoEModel, LatentStore
from trainer.cli import main as altmoe
from trainer.encode import EncodeArguments, encode

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

COLORS = ["red", "green", "blue", "orange", "purple", "black"]
SHAPES = ["square", "circle", "tree", "house", "cat", "dog", "bar", "cross"]


def picture(color: str, number: int) -> Pictures.Image:
    """A few boxes whose places tell the shape's number."""
    image = Pictures.new("RGB", (32, 32), "white")
    pen = ImageDraw.Draw(image)
    for bit in range(4):
        if (number + 1) >> bit & 1:
            pen.rectangle([8 * bit, 4 + 6 * bit, 8 * bit + 7, 14 + 4 * bit], fill=color)
    return image


@pytest.fixture(scope="module")
def place(tmp_path_factory, encoder_folders):
    """One finished project: data, stores, a trained run, evaluated and published."""
    root = tmp_path_factory.mktemp("project")
    items = [(color, number) for color in COLORS for number in range(len(SHAPES))]
    columns = {
        "id": [f"{color}-{SHAPES[number]}" for color, number in items],
        "image": [picture(*item) for item in items],
        "caption": [f"a {color} {SHAPES[number]}" for color, number in items],
        "group": [f"{color} {SHAPES[number]}" for color, number in items],
    }
    kinds = {name: Value("string") for name in ("id", "caption", "group")}
    Dataset.from_dict(columns, Features({"image": Image(), **kinds})).save_to_disk(root / "data")
    for modality, column in (("image", "image"), ("text", "caption")):
        altmoe(
            [
                "encode",
                "--data",
                str(root / "data"),
                "--column",
                column,
                "--modality",
                modality,
                "--encoder",
                encoder_folders[modality],
                "--out",
                str(root / modality),
            ]
        )
    recipe = {
        "stores": {"image": str(root / "image"), "text": str(root / "text")},
        "output_dir": str(root / "run"),
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "top_k": 2,
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 4,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    altmoe(["train", str(root / "recipe.yaml")])
    altmoe(["evaluate", "--model", str(root / "run"), "--baselines", "chance", "ridge"])
    altmoe(
        [
            "publish",
            "--run",
            str(root / "run"),
            "--out",
            str(root / "hub"),
            "--data",
            str(root / "data"),
            "--self_contained",
        ]
    )
    return root


def fails(capsys, *words) -> str:
    """Run a command that must end with one sentence for its user, and return that sentence."""
    with pytest.raises(SystemExit) as ended:
        altmoe([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- the way once


def test_stores_hold_every_item_with_its_metadata(place):
    images, texts = LatentStore.open(place / "image"), LatentStore.open(place / "text")
    assert len(images) == len(texts) == 48 and set(images.ids) == set(texts.ids)
    assert dict(zip(texts.ids, texts.column("caption"), strict=True))["red-cat"] == "a red cat"
    assert images.protocol.encoder.startswith("weights:") and images.protocol.preprocessing
    np.testing.assert_allclose(images.latents().norm(dim=-1), 1, atol=1e-5)


def test_encoding_again_adds_nothing(place, encoder_folders):
    arguments = {"data": str(place / "data"), "encoder": encoder_folders["image"], "modality": "image"}
    again = encode(EncodeArguments(**arguments, out=str(place / "image")))
    assert (again["written"], again["present"], again["rows"]) == (0, 48, 48)


@pytest.mark.parametrize("fields", [{"layers": [-2, -1], "combine": "concat"}, {"pooling": "mean+std"}])
def test_parts_side_by_side_have_a_measured_width_and_a_protocol_of_their_own(place, encoder_folders, tmp_path, fields):
    """Half the width is each layer's or each pooling's, and each counts the same."""
    named = {"data": str(place / "data"), "encoder": encoder_folders["image"], "modality": "image"}
    encode(EncodeArguments(**named, out=str(tmp_path), **fields))
    store = LatentStore.open(tmp_path)
    assert store.protocol.parts == 2 and store.protocol.to_dict().items() >= fields.items()
    halves = store.latents().reshape(len(store), 2, -1)
    np.testing.assert_allclose(halves.norm(dim=-1), 0.5**0.5, atol=1e-5)
    with pytest.raises(ValueError, match=r"of width|another protocol"):
        encode(EncodeArguments(**named, out=str(tmp_path)))


def test_the_model_agrees_with_its_stores(place):
    """Encoding with the published model gives the stored vectors: one protocol, one latent."""
    from modeling_altmoe import AltMoEProcessor

    model, processor = AltMoEModel.from_pretrained(place / "hub"), AltMoEProcessor.from_pretrained(place / "hub")
    store = LatentStore.open(place / "text")
    assert model.protocol("text") == store.protocol
    captions = store.column("caption")[:5]
    latents = model.encode("text", processor.batch("text", captions))
    np.testing.assert_allclose(latents, store.take(range(5)), atol=1e-5)


def test_evaluation_has_every_method_and_the_protocol(place):
    result = json.loads((place / "run" / "evaluation.json").read_text())
    measured = result["results"]["image<->text"]
    assert set(measured) == {"altmoe", "chance", "ridge"}
    assert result["protocol"]["queries"] == {"image": 10, "text": 10}
    for variants in measured.values():
        for metrics in variants.values():
            assert 0 <= metrics["mean_recall"] <= 1


def test_the_card_is_valid_and_holds_the_numbers(place):
    card = ModelCard.load(place / "hub" / "README.md")
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    result = json.loads((place / "run" / "evaluation.json").read_text())
    recall = result["results"]["image<->text"]["altmoe"]["both_directions+hubness"]["image->text"]["recall@10"]
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert values["image->text recall@10"] == round(100 * recall, 2)
    _, again = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert again == card.data.eval_results and {r.metric_args["queries"] for r in again} == {10}
    for r in again:
        share = r.metric_value / 100
        assert r.metric_args["standard_error"] == pytest.approx(100 * (share * (1 - share) / 10) ** 0.5, abs=0.01)
        assert r.dataset_split == "test" and r.dataset_args["split_seed"] == 0
    assert "| ridge |" in card.content
    recipe = (place / "hub" / "recipe.yaml").read_text()
    assert recipe in card.content.split("```yaml\n")[1].split("```")[0] and "max_steps: 8" in recipe
    assert card.data.datasets is None and card.data.base_model is None  # neither is on the Hub
    for part in ("connector (`model.safetensors`) | apache-2.0", "image encoder (image) | unknown", "(data) | unknown"):
        assert part in card.content
    for example in card.data.widget:
        assert Pictures.open(place / "hub" / example["src"]).size == (32, 32)
        assert example["example_title"] in example["candidate_labels"].split(", ")
    assert Pictures.open(place / "hub" / "examples.png").size[0] > 500


def test_the_card_shows_which_experts_fire(place):
    usage = json.loads((place / "hub" / "evaluation.json").read_text())["experts"]
    assert set(usage) == {"image->text", "text->image"} and Pictures.open(place / "hub" / "experts.png").size[0] > 300
    for its in usage.values():
        assert its["items"] == 10 and set(its["gates"]) == {"contrastive gate", "regression gate"}
        for gate in its["gates"].values():
            assert sum(gate["chosen"]) == pytest.approx(2) and sum(gate["weight"]) == pytest.approx(1, abs=1e-3)
            assert 1 <= gate["effective"] <= 4
    text = (place / "hub" / "README.md").read_text()
    assert "![How often each gate of each direction chooses each expert](experts.png)" in text


def test_a_published_folder_names_no_folder_of_this_machine(place, encoder_folders):
    files = [path for path in (place / "hub").rglob("*") if path.is_file()]
    for here in (place, Path(encoder_folders["image"]).parent, Path(__file__).parents[1], Path.home()):
        assert [path.name for path in files if str(here).encode() in path.read_bytes()] == []


def test_publishing_without_encoders_that_others_could_load_is_refused(place, capsys):
    message = fails(capsys, "publish", "--run", place / "run", "--out", place / "no")
    assert "lie on this machine only" in message and "--self_contained" in message and not (place / "no").exists()


def test_search_both_ways(place, capsys, tmp_path):
    altmoe(["search", str(place / "image"), "--model", str(place / "hub"), "--text", "a red cat", "--json", "-k", "3"])
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found[0]["confidence"] <= 1
    assert found[0]["direction"] == "text->image" and len(found[0]["hits"]) == 3
    scores = [hit["score"] for hit in found[0]["hits"]]
    assert scores == sorted(scores, reverse=True)
    picture("red", 2).save(tmp_path / "query.png")
    altmoe(["search", str(place / "text"), "--model", str(place / "hub"), "--image", str(tmp_path / "query.png")])
    shown = capsys.readouterr().out
    assert "image->text" in shown and shown.count("caption: a ") == 5


def test_an_index_gives_the_scores_of_the_model(place):
    from modeling_altmoe.search_altmoe import LatentIndex

    model = AltMoEModel.from_pretrained(place / "hub", load_encoders=False)
    store, queries = LatentStore.open(place / "image"), LatentStore.open(place / "text").take(range(4))
    hits = LatentIndex(model, store, "text->image").search(queries, k=48)
    expected = model.score("text->image", queries, store.latents())
    for row, found in enumerate(hits):
        assert [hit.row for hit in found][:10] == expected[row].argsort(descending=True).tolist()[:10]
        np.testing.assert_allclose([hit.score for hit in found], expected[row].sort(descending=True).values, atol=1e-4)


STRANGER = """
import importlib.util, sys
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
assert importlib.util.find_spec("modeling_altmoe") is None and importlib.util.find_spec("trainer") is None
repo, image = sys.argv[1:]
assert AutoConfig.from_pretrained(repo, trust_remote_code=True).model_type == "altmoe"
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
inputs = processor(images=Image.open(image), text=["a red cat", "a blue dog", "a tree"])
print("scores", *model(**inputs).logits_per_image[0].tolist())
"""


def test_a_process_without_the_package_loads_the_folder(place, tmp_path):
    """As on the Hub: another directory, the package not importable, code from the checkpoint."""
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    done = subprocess.run(
        # -P keeps this folder off the path; the blocker hides an editable install
        [sys.executable, "-c", HIDE.format(script=str(script)), str(place / "hub"), str(place / "hub" / "example.png")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [float(word) for word in done.stdout.split("scores")[1].split()]
    model = AltMoEModel.from_pretrained(place / "hub")
    from modeling_altmoe import AltMoEProcessor

    processor = AltMoEProcessor.from_pretrained(place / "hub")
    image = Pictures.open(place / "hub" / "example.png")
    inputs = processor(images=image, text=["a red cat", "a blue dog", "a tree"])
    np.testing.assert_allclose(scores, model(**inputs).logits_per_image[0].detach(), atol=1e-6)


HIDE = """
import os, runpy, sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", type(f).__module__)]
sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p or ".", "modeling_altmoe"))]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_the_cards_code_runs_as_printed(place, tmp_path):
    text = (place / "hub" / "README.md").read_text()
    code = text.split("```python")[1].split("```")[0]
    code = code.replace(code.split('repo = "')[1].split('"')[0], str(place / "hub"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"a dog", "a red apple", "a sailing boat"} <= {line[6:].strip() for line in done.stdout.splitlines()}


def test_the_pushed_cards_code_runs_as_printed_in_an_empty_cache(place, tmp_path):
    push = f"""
from huggingface_hub import ModelCard
from trainer.cli import main
ModelCard.load({str(place / "hub" / "README.md")!r}).validate()
main(['push', {str(place / "hub")!r}, 'me/colors'])
"""
    with Hub() as hub:
        mine = {**hub.environment(tmp_path / "mine"), "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run([sys.executable, "-c", push], capture_output=True, text=True, env=mine)
        assert done.returncode == 0, done.stderr[-3000:]
        validated = [status for method, path, status in hub.requests if path == "/api/validate-yaml"]
        assert validated == [200, 200]  # asked for, and again by the push
        files = hub.files("me/colors")
        assert {"handler.py", "evaluation.json", "recipe.yaml"} <= set(files)
        assert not [name for name, content in files.items() if str(place).encode() in content]
        code = files["README.md"].decode().split("```python")[1].split("```")[0]
        fresh = hub.environment(tmp_path / "fresh", token=None)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=fresh, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3


# ---------------------------------------------------------------- neighbours


def test_the_readmes_neighbours_work_and_mteb_finds_what_we_find(place, monkeypatch, capsys):
    section = README.split("## Neighbours")[1].split("\n## ")[0]
    embed, extract = (code.split("```")[0] for code in section.split("```python")[1:])
    known = {}
    for code in (embed, extract):
        exec(code.replace("build/hub/altmoe-stamps", str(place / "hub")), known)
    assert known["similarity"].shape == (2, 1) and np.shape(known["latents"])[:2] == (2, 1)
    command = next(line for line in section.splitlines() if line.startswith("python -m benchmarks.mteb_task "))
    places = {"build/runs/stamps": str(place / "run"), "build/data/stamps": str(place / "data")}
    monkeypatch.setattr(sys, "argv", [places.get(word, word) for word in shlex.split(command)[2:]])
    capsys.readouterr()
    mteb_task.main()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    ours = json.loads((place / "run" / "evaluation.json").read_text())["results"]["image<->text"]["altmoe"]
    for direction, *found in rows[2:]:
        metrics = ours["both_directions"][direction]
        assert found[:3] == [f"{100 * metrics[f'recall@{k}']:.1f}" for k in (1, 5, 10)]
    assert rows[0][1:4] == ["hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10"] and len(rows) == 4


def test_mteb_refuses_data_of_other_items(place, tmp_path):
    columns = {"image": "image", "text": "caption"}
    other = Dataset.from_dict({"id": ["x"], "image": [picture("red", 1)], "caption": ["a"]})
    other.save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="10 of 10 items are not in the data"):
        mteb_task.held_out_tasks(str(place / "run"), str(tmp_path / "other"), columns)
    with pytest.raises(ValueError, match="is between two of: audio, text"):
        mteb_task.held_out_tasks(str(place / "run"), str(place / "data"), {"audio": "sound", "text": "caption"})


# ---------------------------------------------------------------- bad input


def test_a_used_output_folder_is_not_overwritten_silently(place, capsys):
    message = fails(capsys, "train", place / "recipe.yaml")
    assert "holds checkpoints already" in message and "--resume_from_checkpoint true" in message


def test_missing_columns_and_splits_are_named(place, capsys, encoder_folders, tmp_path):
    common = ["encode", "--data", place / "data", "--encoder", encoder_folders["image"], "--out", tmp_path / "s"]
    assert "Did you mean 'image'" in fails(capsys, *common, "--modality", "image", "--column", "imag")
    assert "Unknown column 'sentence'" in fails(capsys, *common, "--modality", "image", "--keep", "sentence")
    assert "pooling" in fails(capsys, *common, "--modality", "image", "--pooling", "avg")
    assert not (tmp_path / "s").exists()


def test_missing_data_encoders_models_and_stores_are_named(place, capsys, encoder_folders, tmp_path):
    gone = tmp_path / "gone"
    encode_it = ["encode", "--modality", "image", "--out", tmp_path / "s"]
    assert "No data file at" in fails(capsys, *encode_it, "--data", f"{gone}.jsonl", "--encoder", "x")
    message = fails(capsys, *encode_it, "--data", place / "data", "--encoder", gone)
    assert "image encoder" in message and "cannot be loaded" in message
    missing = fails(capsys, "search", gone, "--model", place / "hub", "--text", "a")
    assert "expected a LatentStore ('altmoe encode' makes one)" in missing
    assert "has no recipe.yaml" in fails(capsys, "evaluate", "--model", gone)
    assert "No query" in fails(capsys, "search", place / "image", "--model", place / "hub")
    assert "Unknown direction" in fails(capsys, "search", place / "text", "--model", place / "hub", "--text", "a")
    assert "Did you mean 'encode'" in fails(capsys, "encod")


def test_bad_items_are_skipped_counted_and_named(place, encoder_folders, tmp_path, capsys):
    good = place / "good.png"
    picture("red", 1).save(good)
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "noise.png").write_bytes(b"no picture")
    rows = [{"id": "a", "image": str(good)}, {"id": "b", "image": str(tmp_path / "zero.png")}]
    rows += [{"id": "c", "image": str(tmp_path / "noise.png")}, {"id": "d", "image": str(tmp_path / "none.png")}]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = {"data": str(tmp_path / "items.jsonl"), "encoder": encoder_folders["image"], "modality": "image"}
    result = encode(EncodeArguments(**arguments, out=str(tmp_path / "store")))
    assert result["written"] == 1 and [row for row, _ in result["skipped"]] == [1, 2, 3]
    reasons = [reason for _, reason in result["skipped"]]
    assert "zero bytes" in reasons[0] and "cannot be read" in reasons[1] and "no image file" in reasons[2]
    command = ["encode", "--data", tmp_path / "items.jsonl", "--encoder", encoder_folders["image"]]
    message = fails(capsys, *command, "--modality", "image", "--out", tmp_path / "strict", "--strict")
    assert "item 1 (id 'b')" in message


def test_empty_captions_are_skipped(place, encoder_folders, tmp_path):
    (tmp_path / "texts.csv").write_text('id,text\na,a cat\nb,""\nc,a dog\n')
    arguments = {"data": str(tmp_path / "texts.csv"), "encoder": encoder_folders["text"], "modality": "text"}
    result = encode(EncodeArguments(**arguments, out=str(tmp_path / "store")))
    assert result["rows"] == 2 and result["skipped"][0][0] == 1


def test_a_store_of_another_protocol_is_refused(place, capsys, encoder_folders, tmp_path):
    command = ["encode", "--data", place / "data", "--column", "caption", "--modality", "text"]
    altmoe([str(w) for w in [*command, "--encoder", encoder_folders["text"], "--out", tmp_path, "--pooling", "cls"]])
    capsys.readouterr()
    message = fails(capsys, "search", tmp_path, "--model", place / "hub", "--image", place / "hub" / "example.png")
    assert "pooling: expected 'mean', got 'cls'" in message
    stores = json.dumps({"image": str(place / "image"), "text": str(tmp_path)})
    assert "pooling" in fails(capsys, "evaluate", "--model", place / "run", "--stores", stores)
    again = ["--encoder", encoder_folders["text"], "--out", place / "text", "--pooling", "cls"]
    assert "pooling" in fails(capsys, *command, *again)


def test_a_bad_query_picture_is_named(place, capsys, tmp_path):
    (tmp_path / "zero.png").write_bytes(b"")
    message = fails(capsys, "search", place / "text", "--model", place / "hub", "--image", tmp_path / "zero.png")
    assert "has zero bytes" in message


def test_search_says_so_when_it_found_nothing(place, capsys):
    arguments = ["search", str(place / "image"), "--model", str(place / "hub"), "--text", "a red cat"]
    altmoe([*arguments, "--min_confidence", "1"])
    assert "nothing found" in capsys.readouterr().out
    altmoe([*arguments, "--min_confidence", "0", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["found"] is True
    assert "--min_confidence" in fails(capsys, *arguments, "--min_confidence", "2")


def test_a_database_alone_gives_the_results_of_the_store(place, capsys, tmp_path):
    pytest.importorskip("milvus_lite")
    address, model = f"milvus://{tmp_path}/lite.db?collection=pictures", str(place / "hub")
    query = ["--model", model, "--text", "a red cat", "-k", "3", "--where", "group!=red cat", "--json"]
    altmoe(["index", str(place / "image"), "--model", model, "--index", address])
    assert f"{len(LatentStore.open(place / 'image'))} rows" in capsys.readouterr().out
    altmoe(["search", "-", "--index", address, *query])
    (found,) = json.loads(capsys.readouterr().out)
    altmoe(["search", str(place / "image"), *query])
    (expected,) = json.loads(capsys.readouterr().out)
    assert len(found["hits"]) == 3 and found["confidence"] == pytest.approx(expected["confidence"], abs=1e-4)
    for hit, other in zip(found["hits"], expected["hits"], strict=True):
        assert hit == {**other, "row": None, "score": pytest.approx(other["score"], abs=1e-4)}
    words = ["search", "-", "--model", model, "--text", "a cat"]
    assert "'-' instead of a store needs a database" in fails(capsys, *words)
    assert "does not exist. Make it with 'altmoe index" in fails(capsys, *words, "--index", address + "s")

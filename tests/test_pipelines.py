"""Pipelines: scores are the model's own, however queries are batched and candidates given; transformers' own work, too."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import score_both_ways, tiny_bert, tiny_processors, tiny_vit
from hub_server import Hub
from huggingface_hub import constants
from PIL import Image
from torch.utils.data import Dataset
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, pipeline

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe import index_altmoe as index_module
from modeling_altmoe.processing_altmoe import ItemError

TASK = "cross-modal-retrieval"
SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "base": "none"}
CAPTIONS = [
    "a cat",
    "a red dog",
    "a blue square circle tree house",
    "green",
    "a house",
    "red tree",
    "dog",
    "a green cat",
]
COLORS = ["red", "green", "blue", "black", "white", "yellow", "gray", "orange", "pink", "brown", "purple", "cyan"]


def pictures_of(colors=COLORS) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), color) for color in colors]


def sounds(count: int = 3) -> list[np.ndarray]:
    return [np.sin(np.arange(8000) * (k + 1) / 40).astype(np.float32) for k in range(count)]


def tiny_ast() -> ASTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ASTModel(ASTConfig(num_mel_bins=32, max_length=48, **sizes)).eval()


def join(encoders: dict, processors: dict, directions=None) -> AltMoEModel:
    torch.manual_seed(0)
    return AltMoEModel.from_encoders(encoders, directions, processors=processors, **SIZES).eval()


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return {
        **tiny_processors(tmp_path_factory.mktemp("own")),
        "audio": ASTFeatureExtractor(num_mel_bins=32, max_length=48),
    }


@pytest.fixture(scope="module")
def three(processors):
    """Pictures, texts and sounds; scored in both directions, with hubness and a calibration where images are searched."""
    return score_both_ways(join({"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_ast()}, processors))


@pytest.fixture(scope="module")
def pipe(three, processors):
    return pipeline(TASK, model=three, processor=AltMoEProcessor(processors))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    pipe.model.save_pretrained(path, self_contained=True)
    pipe.processor.save_pretrained(path)
    return path


def latents_of(pipe, modality: str, items: list) -> torch.Tensor:
    processor = pipe.processor
    with torch.no_grad():
        return pipe.model.encode(modality, processor.batch(modality, [processor.read(modality, i) for i in items]))


def by_index(ranking: list[dict]) -> list[float]:
    return [hit["score"] for hit in sorted(ranking, key=lambda hit: hit["index"])]


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("direction", ["text->image", "image->text", "audio->text", "image->audio"])
def test_scores_are_the_models_own(pipe, direction):
    items = {"text": CAPTIONS[:3], "image": pictures_of()[:3], "audio": sounds()}
    source, target = direction.split("->")
    rankings = pipe([{source: item} for item in items[source]], candidates={target: items[target]}, batch_size=3)
    expected = pipe.model.score(
        direction, latents_of(pipe, source, items[source]), latents_of(pipe, target, items[target])
    )
    assert torch.equal(torch.tensor([by_index(ranking) for ranking in rankings]), expected)
    for ranking in rankings:
        assert [hit["score"] for hit in ranking] == sorted((hit["score"] for hit in ranking), reverse=True)
        assert {hit["modality"] for hit in ranking} == {target}


class Queries(Dataset):
    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, place):
        return CAPTIONS[place]


def test_batches_change_nothing(pipe):
    mixed = [pictures_of()[0], *sounds(2), *pictures_of(COLORS[:4])]
    for queries, candidates in ((CAPTIONS, {"image": pictures_of()}), (mixed, CAPTIONS)):
        alone = [by_index(pipe(query, candidates=candidates, top_k=None, batch_size=1)) for query in queries]
        for size in (1, 2, 3, 16):
            together = pipe(queries, candidates=candidates, top_k=None, batch_size=size)
            torch.testing.assert_close([by_index(r) for r in together], alone, atol=1e-4, rtol=1e-4)
    for stream in (Queries(), (caption for caption in CAPTIONS)):
        streamed = list(pipe(stream, candidates=pictures_of(), top_k=None, batch_size=3))
        assert streamed == pipe(CAPTIONS, candidates=pictures_of(), top_k=None, batch_size=3)


def test_candidates_are_encoded_once(pipe, processors, monkeypatch):
    counted, encode = [], pipe.model.encode
    monkeypatch.setattr(pipe.model, "encode", lambda m, *a, **k: counted.append(m) or encode(m, *a, **k))
    pipe(CAPTIONS, candidates={"image": pictures_of()}, batch_size=4)
    assert (counted.count("image"), counted.count("text")) == (3, 2)
    kept = pipe.encode_candidates({"image": pictures_of()})
    counted.clear()
    first = [pipe(caption, candidates=kept) for caption in CAPTIONS[:3]]
    made_with = pipeline(TASK, model=pipe.model, processor=pipe.processor, candidates=kept, top_k=2)
    assert [made_with(caption) for caption in CAPTIONS[:3]] == [ranking[:2] for ranking in first]
    assert set(counted) == {"text"}


def test_forms_of_queries_and_candidates(pipe, tmp_path):
    colors, picture = pictures_of(), pictures_of()[1]
    paths = []
    for number, image in enumerate(colors):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    named = pipe({"text": "a cat"}, candidates={"image": paths})
    assert len(named) == 5 and all(hit["item"] == paths[hit["index"]] for hit in named)
    assert [hit["score"] for hit in pipe("a cat", candidates=colors)] == [hit["score"] for hit in named]
    assert "item" not in pipe("a cat", candidates=colors)[0]
    texts = pipe(picture, candidates=CAPTIONS)
    assert pipe({"image": paths[1]}, candidates={"text": CAPTIONS}) == texts == pipe((picture,), candidates=CAPTIONS)[0]
    assert texts[0]["item"] == CAPTIONS[texts[0]["index"]]
    sound = {"array": sounds()[0], "sampling_rate": 16000}
    assert pipe(sound, candidates=CAPTIONS) == pipe(sounds()[0], candidates=CAPTIONS)
    assert pipe([], candidates=CAPTIONS) == []
    assert json.loads(json.dumps(named)) == named


def test_fused_sources(processors):
    own = {"image": processors["image"], "text": processors["text"], "label": processors["text"]}
    encoders = {"image": tiny_vit(), "text": tiny_bert(), "label": tiny_bert(1)}
    model = join(encoders, own, ["image+text->label", "image->text"])
    fusing = pipeline(TASK, model=model, processor=AltMoEProcessor(own))
    ranking = fusing({"text": "a cat", "image": pictures_of()[0]}, candidates={"label": CAPTIONS}, top_k=None)
    sources = {"image": latents_of(fusing, "image", pictures_of()[:1]), "text": latents_of(fusing, "text", ["a cat"])}
    expected = model.score("image+text->label", sources, latents_of(fusing, "label", CAPTIONS))
    assert by_index(ranking) == expected[0].tolist()
    with pytest.raises(ValueError, match="the model has label, text of that kind: name the modality"):
        fusing("a cat", candidates={"label": CAPTIONS})


# ---------------------------------------------------------------- confidence and stores


def test_the_first_result_says_how_sure_it_is(pipe):
    ranking = pipe("a cat", candidates=pictures_of(), top_k=None)
    scores = torch.tensor([[hit["score"] for hit in ranking]])
    expected = pipe.model.calibration("text->image").confidence(scores, len(COLORS)).item()
    assert ranking[0]["confidence"] == pytest.approx(expected)
    assert ranking[0]["found"] is (expected >= 0.4)
    assert not any("confidence" in hit for hit in ranking[1:])
    assert pipe("a cat", candidates=pictures_of(), top_k=2)[0]["confidence"] == ranking[0]["confidence"]
    assert "confidence" not in pipe(pictures_of()[0], candidates=CAPTIONS)[0]


@pytest.fixture
def store(pipe, tmp_path):
    entry = pipe.model.config.encoders["image"]
    with LatentStore.create(tmp_path / "store", "image", entry, columns={"color": "string"}) as made:
        made.append(COLORS, latents_of(pipe, "image", pictures_of()), color=COLORS)
    return made


def test_a_store_gives_what_its_items_give(pipe, store):
    kept = {"image": pictures_of()}
    for given in (store, str(store.path), store.path, pipe.encode_candidates(store)):
        for found, direct in zip(
            pipe(CAPTIONS, candidates=given, batch_size=4), pipe(CAPTIONS, candidates=kept, batch_size=4), strict=True
        ):
            assert [hit["index"] for hit in found] == [hit["index"] for hit in direct]
            assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in direct], abs=1e-4)
            assert found[0]["confidence"] == pytest.approx(direct[0]["confidence"], abs=1e-4)
            assert all(hit["id"] == hit["columns"]["color"] == COLORS[hit["index"]] for hit in found)
            assert json.loads(json.dumps(found)) == found
    assert len(pipe("a cat", candidates=store, top_k=None)) == len(COLORS)


def test_a_published_store_is_named_and_pulled(pipe, store, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub() as hub:
        hub.use_here(monkeypatch)
        hub.add("me/colors", store.path, kind="dataset")
        assert pipe("a cat", candidates="me/colors") == pipe("a cat", candidates=store)


def test_a_store_without_faiss_says_what_to_install(pipe, store, monkeypatch):
    monkeypatch.setattr(index_module, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        pipe("a cat", candidates=store)


def test_a_store_of_another_protocol_is_refused(pipe, tmp_path):
    entry = pipe.model.config.encoders["image"]
    other = {**entry, "protocol": {**entry["protocol"], "pooling": "cls"}}
    with pytest.raises(ValueError, match="pooling: expected 'mean', got 'cls'"):
        pipe("a cat", candidates=LatentStore.create(tmp_path / "other", "image", other))
    with pytest.raises(ValueError, match="Unknown modality 'smell'"):
        pipe("a cat", candidates=LatentStore.create(tmp_path / "smell", "smell", entry))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("query", "arguments", "message"),
    [
        ("a cat", {}, "Nothing to rank: pass candidates"),
        ("a cat", {"candidates": CAPTIONS}, r"cannot rank text for text. Known directions: image->text, image->audio"),
        ({"image": "x", "text": "a"}, {"candidates": CAPTIONS}, r"query \(image\): no image file 'x'"),
        ({"vidio": "x"}, {"candidates": CAPTIONS}, r"The modality of a dict cannot be told.*audio, image, text"),
        (3, {"candidates": CAPTIONS}, "The modality of a int cannot be told: name it, {modality: item}"),
        (" ", {"candidates": pictures_of()}, r"query \(text\): empty caption"),
        ("a cat", {"candidates": {"imag": pictures_of()}}, "Unknown modality 'imag'.*Did you mean 'image'"),
        (
            "a cat",
            {"candidates": {"image": [*pictures_of(), "x.png"]}},
            r"candidate 12 \(image\): no image file 'x.png'",
        ),
        ("a cat", {"candidates": {"image": [], "text": []}}, "one modality a call"),
        ("a cat", {"candidates": {"image": []}}, "expected a list of items.*got an empty one"),
        ("a cat", {"candidates": {"image": "x.png"}}, "expected a list of items.*got str"),
        ("a cat", {"candidates": 7}, "expected a list of items.*got int"),
        ("a cat", {"candidates": pictures_of(), "top_k": 0}, "top_k=0: expected at least 1"),
        ("a cat", {"candidates": pictures_of(), "topk": 3}, r"Unknown arguments \['topk'\]. Known: candidates, top_k"),
    ],
)
def test_mistakes_are_named(pipe, query, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(query, **arguments)


def test_other_mistakes(pipe, three, processors, tmp_path):
    with pytest.raises(FileNotFoundError, match="No LatentStore at"):
        pipe("a cat", candidates=tmp_path)
    with pytest.raises(ItemError, match="8000 Hz"):
        pipe({"array": sounds()[0], "sampling_rate": 8000}, candidates=CAPTIONS)
    other = pipeline(TASK, model=join({"image": tiny_vit(), "text": tiny_bert()}, {}), processor=pipe.processor)
    with pytest.raises(ValueError, match="encoded with another pipeline's model"):
        other("a cat", candidates=pipe.encode_candidates(pictures_of()))
    with pytest.raises(ValueError, match="needs a processor"):
        type(pipe)(model=three)


# ---------------------------------------------------------------- transformers' own pipelines


def zero_shot_logits(pipe, modality: str, items: list, texts: list[str]) -> torch.Tensor:
    latents = {modality: latents_of(pipe, modality, items), "text": latents_of(pipe, "text", texts)}
    with torch.no_grad():
        return getattr(pipe.model(latents=latents), f"logits_per_{modality}")


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_zero_shot_classification(pipe, folder, kind):
    task = f"zero-shot-{kind}-classification"
    classify = pipeline(task, model=str(folder), trust_remote_code=True)
    items, labels = {"image": pictures_of()[:3], "audio": sounds()}[kind], ["cat", "red dog", "tree"]
    template = "a {}"
    logits = zero_shot_logits(pipe, kind, items, [template.format(label) for label in labels])
    assert logits.shape == (3, 3) and logits.std(dim=1).min() > 1e-3
    options = {"candidate_labels": labels, "hypothesis_template": template}
    for size in (1, 2):
        results = classify(items, batch_size=size, **options)
        for result, row in zip(results, logits.softmax(-1).tolist(), strict=True):
            assert {r["label"]: r["score"] for r in result} == pytest.approx(
                dict(zip(labels, row, strict=True)), abs=1e-4
            )
    single = classify(items[0], **options)
    assert [r["label"] for r in single] == [r["label"] for r in results[0]]


@torch.no_grad()
def test_logits_find_modalities_of_other_names(processors):
    def wrapped(names: dict, encoders: dict):
        renamed = {names.get(modality, modality): encoder for modality, encoder in encoders.items()}
        own = {names.get(modality, modality): processors[modality] for modality in encoders}
        return join(renamed, own), AltMoEProcessor(own)

    names = {"audio": "noise", "image": "photo", "text": "words"}  # in the same alphabetical order
    items = {"image": pictures_of()[:2], "text": CAPTIONS[:3], "audio": sounds(2)}
    encoders = {"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_ast()}
    (model, process), (renamed, process_renamed) = wrapped({}, encoders), wrapped(names, encoders)
    plain, other = model(**process(**items)), renamed(**process_renamed(**{names[m]: x for m, x in items.items()}))
    assert torch.equal(plain.logits_per_image, other.logits_per_image) and plain.logits_per_image.shape == (2, 3)
    assert torch.equal(plain.logits_per_audio, other.logits_per_audio) and plain.logits_per_audio.shape == (2, 3)
    assert torch.equal(plain.logits_per_text, plain.logits_per_image.T)
    heard = model(**process(text=items["text"], audio=items["audio"]))
    assert heard.logits_per_image is None and torch.equal(heard.logits_per_text, heard.logits_per_audio.T)
    two = join({"photo": tiny_vit(), "sketch": tiny_vit(1), "text": tiny_bert()}, {})
    latents = {"photo": torch.randn(2, 32), "sketch": torch.randn(2, 32), "text": torch.randn(3, 24)}
    assert two(latents=latents).logits_per_image is None  # which of the two would be a guess


# ---------------------------------------------------------------- saved, and loaded elsewhere

FRESH = """
import json, sys
for name in ("modeling_altmoe", "trainer", "datasets", "pyarrow", "faiss"):
    sys.modules[name] = None  # importing it fails
from PIL import Image
from transformers import pipeline
folder = sys.argv[1]
pictures = [Image.new("RGB", (40, 30), color) for color in sys.argv[2:]]
found = pipeline(model=folder, trust_remote_code=True)("a cat", candidates={"image": pictures})
named = pipeline("cross-modal-retrieval", model=folder, trust_remote_code=True)("a cat", candidates={"image": pictures})
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
print(json.dumps([found, named, classify(pictures[0], candidate_labels=["cat", "dog"])]))
"""


def run_elsewhere(tmp_path, code: str, *arguments: str):
    """Run code in a new process: another folder, empty caches, no path to this package."""
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("HF_")}
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        cwd=tmp_path / "elsewhere",
        env={**keep, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_saved_model_works_in_a_new_process_without_any_package(pipe, folder, tmp_path):
    found, named, classified = run_elsewhere(tmp_path, FRESH, str(folder), *COLORS)
    expected = pipe("a cat", candidates={"image": pictures_of()})
    assert found == named
    assert [hit["index"] for hit in found] == [hit["index"] for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in expected], abs=1e-4)
    assert found[0]["confidence"] == pytest.approx(expected[0]["confidence"], abs=1e-4)
    assert sum(hit["score"] for hit in classified) == pytest.approx(1)


def test_a_pipeline_saves_itself_with_its_processor(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "model", self_contained=True)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p.name for p in folder.iterdir()}
    again = pipeline(model=str(tmp_path / "model"), trust_remote_code=True)
    expected = pipe(CAPTIONS[:2], candidates=pictures_of())
    for found, direct in zip(again(CAPTIONS[:2], candidates=pictures_of()), expected, strict=True):
        assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in direct], abs=1e-4)

"""Doors to neighbours: one embedding for sentence-transformers whose cosine is the model's own score, and transformers'
stock feature extraction."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_bert, tiny_processors, tiny_vit
from hub_server import Hub, Repository
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from test_pipelines import CAPTIONS, join, pictures_of, sounds, tiny_ast
from transformers import ASTFeatureExtractor, pipeline

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.scoring_altmoe import Postprocessing, score_matrix
from modeling_altmoe.sentence_altmoe import AltMoEEmbedder, joint_space

SCALES = {"text->image": 0.3, "image->text": 0.4, "text->audio": 0.2, "audio->text": 0.5}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    audio = ASTFeatureExtractor(num_mel_bins=32, max_length=48)
    return {**tiny_processors(tmp_path_factory.mktemp("own")), "audio": audio}


def neighbour(processors, encoders: dict, directions=None) -> SentenceTransformer:
    """With scales, hubness and both directions, as training leaves a model."""
    own = {modality: processors[modality] for modality in encoders}
    model = join(encoders, own, directions)
    for direction in (d for d in model.directions if d in SCALES):
        bank = {
            d: torch.randn(9, model.config.latent_size(d.split("->")[1])) for d in SCALES if d.split("->")[1] in own
        }
        model.set_scoring(direction, Postprocessing(SCALES, 1.0, 0.5, 3, bank, bank))
    return SentenceTransformer(modules=[AltMoEEmbedder(model, AltMoEProcessor(own))], device="cpu")


@pytest.fixture(scope="module")
def two(processors):
    return neighbour(processors, {"image": tiny_vit(), "text": tiny_bert()})


def latents_of(neighbour, modality: str, items: list) -> torch.Tensor:
    embedder = neighbour[0]
    inputs = embedder.processor.batch(modality, [embedder.processor.read(modality, item) for item in items])
    with torch.no_grad():
        return embedder.model.encode(modality, inputs)


def score(neighbour, direction: str, queries: list, items: list) -> torch.Tensor:
    """`model.score` of raw items, without hubness."""
    model, (source, target) = neighbour[0].model, direction.split("->")
    post = model.postprocessing(direction)
    post.beta = 0.0
    latents = {source: latents_of(neighbour, source, queries)}
    return score_matrix(model, post, direction, latents, latents_of(neighbour, target, items))


# ---------------------------------------------------------------- one space


def test_cosine_is_the_score_of_both_directions_whichever_side_asks(two):
    texts, pictures = two.encode(CAPTIONS), two.encode(pictures_of())
    assert texts.shape == (8, 24 + 32) and two.get_embedding_dimension() == 56 and two.modalities == ["text", "image"]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, pictures]), axis=1), 1, atol=1e-5)
    factor = 1 / SCALES["text->image"] + 1 / SCALES["image->text"]
    cosines = two.similarity(texts, pictures)
    torch.testing.assert_close(
        factor * cosines, score(two, "text->image", CAPTIONS, pictures_of()), atol=1e-4, rtol=1e-4
    )
    back = score(two, "image->text", pictures_of(), CAPTIONS)
    torch.testing.assert_close(factor * cosines.T, back, atol=1e-4, rtol=1e-4)
    assert cosines.std() > 1e-2


def test_batches_and_their_order_change_nothing(two):
    for items in (CAPTIONS, pictures_of()):
        alone = np.stack([two.encode(item) for item in items])
        for size in (2, 3, 32):
            np.testing.assert_allclose(two.encode(items, batch_size=size), alone, atol=1e-5)
        np.testing.assert_allclose(two.encode(items[::-1], batch_size=3), alone[::-1], atol=1e-5)


def test_forms_of_items_and_prompts(two, tmp_path):
    picture = pictures_of()[1]
    picture.save(tmp_path / "green.png")
    expected = two.encode(picture)
    for given in (str(tmp_path / "green.png"), {"image": picture}, np.asarray(picture)):
        np.testing.assert_allclose(two.encode(given), expected, atol=1e-6)
    np.testing.assert_array_equal(two.encode({"text": "a cat"}), two.encode("a cat"))
    np.testing.assert_array_equal(two.encode("cat", prompt="a "), two.encode("a cat"))
    np.testing.assert_array_equal(two.encode_query("a cat"), two.encode_document("a cat"))


def test_captions_are_cut_where_the_user_says(two):
    assert two.max_seq_length == 32
    two.max_seq_length = 4  # [CLS] a cat [SEP]
    try:
        np.testing.assert_array_equal(two.encode("a cat house tree"), two.encode("a cat"))
    finally:
        two.max_seq_length = 32
    assert np.abs(two.encode("a cat house tree") - two.encode("a cat")).max() > 1e-3


def test_three_modalities_meet_at_text(processors):
    three = neighbour(processors, {"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_ast()})
    model = three[0].model
    assert joint_space(model) == ("text", ["audio", "image"]) and three.modalities == ["text", "image", "audio"]
    items = {"text": CAPTIONS, "image": pictures_of(), "audio": sounds()}
    vectors = {modality: three.encode(some) for modality, some in items.items()}
    for modality in ("image", "audio"):
        ratio = three.similarity(vectors["text"], vectors[modality]) / score(
            three, f"text->{modality}", CAPTIONS, items[modality]
        )
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), atol=1e-3, rtol=1e-3)
        assert ratio[0, 0] > 0
    meant = {
        m: model.queries(f"{m}->text", latents_of(three, m, items[m])).detach() for m in ("image", "audio")
    }  # as text
    ratio = three.similarity(vectors["image"], vectors["audio"]) / (meant["image"] @ meant["audio"].T)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), atol=1e-3, rtol=1e-3)
    sound = {"array": sounds()[0], "sampling_rate": 16000}
    np.testing.assert_allclose(three.encode(sound), vectors["audio"][0], atol=1e-5)


@pytest.mark.parametrize("direction", ["image->text", "text->image"])
def test_one_direction_alone_is_its_own_cosine(processors, direction):
    one = neighbour(processors, {"image": tiny_vit(), "text": tiny_bert()}, [direction])
    (source, target), items = direction.split("->"), {"text": CAPTIONS, "image": pictures_of()}
    assert one.get_embedding_dimension() == {"text": 24, "image": 32}[target]
    cosines = one.similarity(one.encode(items[source]), one.encode(items[target]))
    expected = SCALES[direction] * score(one, direction, items[source], items[target])
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=1e-5)


def test_with_lora_the_source_is_adapted_and_the_target_is_not(encoder_folders, processors):
    lora = {"text": LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)}
    model = AltMoEModel.from_encoders(encoder_folders, lora=lora, hidden_size=16, base="none").eval()
    own = AltMoEProcessor({"image": processors["image"], "text": processors["text"]})
    embedder = AltMoEEmbedder(model, own)
    inputs = own.batch("text", CAPTIONS)
    plain, adapted = model.encode("text", inputs), model.encode("text", inputs, adapted=True)
    assert not torch.allclose(plain, adapted)
    there = model.queries("text->image", adapted).detach()  # scales were never measured: both blocks count the same
    expected = torch.cat([model.gallery("image->text", plain), there], dim=1) / 2**0.5
    found = SentenceTransformer(modules=[embedder], device="cpu").encode(CAPTIONS, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_mistakes_are_named(two, processors):
    with pytest.raises(ValueError, match="Encode each modality separately"):
        two.encode(["a cat", pictures_of()[0]])
    with pytest.raises(ValueError, match="'audio' is not supported"):
        two.encode(sounds()[0])
    with pytest.raises(ValueError, match="empty caption"):
        two.encode([" "])
    with pytest.raises(ValueError, match="'smell' is not in the joint space of text and image"):
        two[0].embed("smell", torch.zeros(1, 3))
    with pytest.raises(ValueError, match="runs on torch only"):
        AltMoEEmbedder.load("anything", backend="onnx")
    own = {"image": processors["image"], "text": processors["text"], "label": processors["text"]}
    encoders = {"image": tiny_vit(), "text": tiny_bert(), "label": tiny_bert(1)}
    with pytest.raises(ValueError, match="No direction joins two modalities"):
        joint_space(join(encoders, own, ["image+text->label"]))
    ambiguous = join(
        {"image": tiny_vit(), "words": tiny_bert(), "label": tiny_bert(1)}, {}, ["image->words", "image->label"]
    )
    embedder = AltMoEEmbedder(
        ambiguous, AltMoEProcessor({"image": own["image"], "words": own["text"], "label": own["text"]})
    )
    assert embedder.modalities == ["image"]  # two tokenizers: which one a string is for would be a guess


# ---------------------------------------------------------------- saved, and loaded elsewhere

FRESH = """
import json, sys
sys.modules["modeling_altmoe"] = None  # importing it fails
from PIL import Image
from sentence_transformers import SentenceTransformer
vectors = []
for name in sys.argv[1:]:
    model = SentenceTransformer(name, trust_remote_code=True, device="cpu")
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    vectors.append([model.encode(["a cat", "a red dog"]).tolist(), model.encode(pictures).tolist()])
model.save_pretrained("again")
print(json.dumps(vectors))
"""


@pytest.fixture(scope="module")
def folder(two, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    two[0].model.save_pretrained(path, self_contained=True)
    two[0].processor.save_pretrained(path)
    return path


def test_it_loads_from_a_folder_and_from_the_hub_in_a_new_process(two, folder, tmp_path):
    expected = [two.encode(["a cat", "a red dog"]), two.encode(pictures_of()[:2])]
    (tmp_path / "elsewhere").mkdir()
    pushed = Repository()
    pushed.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, "main")
    with Hub() as hub:
        hub.repositories["model", "me/joined"] = pushed
        done = subprocess.run(
            [sys.executable, "-I", "-c", FRESH, str(folder), "me/joined"],
            env=hub.environment(tmp_path / "fresh", token=None),
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        for vectors, here in zip(found, expected, strict=True):
            np.testing.assert_allclose(vectors, here, atol=1e-5)
    again = SentenceTransformer(str(tmp_path / "elsewhere" / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(["a cat", "a red dog"]), expected[0], atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(folder))


# ---------------------------------------------------------------- transformers' stock feature extraction


@pytest.mark.parametrize(
    ("task", "modality", "items"),
    [("feature-extraction", "text", CAPTIONS), ("image-feature-extraction", "image", pictures_of())],
)
def test_stock_feature_extraction_gives_latents(two, folder, task, modality, items):
    extract = pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")
    assert type(extract).__module__.startswith("transformers.")
    expected = latents_of(two, modality, items)
    assert np.shape(extract(items[0])) == (1, expected.shape[1])
    for size in (1, 3):
        found = torch.cat(extract(items, batch_size=size, return_tensors=True))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

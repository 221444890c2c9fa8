"""The Inference Endpoint's handler, driven as the endpoint's server drives it: a fresh process, another working
directory, the package out of reach, JSON in and out, exceptions answered with status 400."""

import base64
import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bert, tiny_processors, tiny_vit, tiny_wav2vec2
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor

from model_cards.endpoint import handler
from modeling_altmoe import AltMoEModel, AltMoEProcessor

ENDPOINT = Path(handler.__file__).parent

SERVER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_altmoe", "trainer", "model_cards", "altmoe"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
opened = []
sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
import importlib.util
spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
endpoint = module.EndpointHandler(sys.argv[1])
for line in sys.stdin:
    opened.clear()
    try:
        answer = {"status": 200, "body": endpoint(json.loads(line))}
    except Exception as error:
        answer = {"status": 400, "body": {"error": str(error)}, "kind": type(error).__name__}
    print("\\nANSWER" + json.dumps({**answer, "opened": opened}), flush=True)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A published model of three modalities, with handler.py and requirements.txt in its root."""
    root = tmp_path_factory.mktemp("endpoint")
    encoders = {"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_wav2vec2()}
    processors = {**tiny_processors(root), "audio": Wav2Vec2FeatureExtractor()}
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "top_k": 2}
    torch.manual_seed(0)
    model = AltMoEModel.from_encoders(
        encoders,
        ["image->text", "text->image", "audio->text", "image+text->audio"],
        processors=processors,
        protocols={"image": {"pooling": "cls"}},
        base="none",
        **sizes,
    ).eval()
    model.save_pretrained(root / "repository", self_contained=True)
    AltMoEProcessor(processors).save_pretrained(root / "repository")
    for name in ("handler.py", "requirements.txt"):
        shutil.copy(ENDPOINT / name, root / "repository")
    return root / "repository"


class Endpoint:
    """The handler in a process of its own."""

    def __init__(self, repository: Path, place: Path, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_MODULES_CACHE": str(place / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.errors = open(place / "stderr.txt", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVER, str(repository)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=place,
            env=environment,
        )

    def ask(self, inputs, **parameters) -> dict:
        return self.send({"inputs": inputs, "parameters": parameters})

    def send(self, body: dict) -> dict:
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        self.errors.seek(0)
        raise RuntimeError(f"the endpoint ended: {self.errors.read()[-3000:]}")

    def refuses(self, inputs, *words, **parameters) -> None:
        answer = self.ask(inputs, **parameters)
        assert (answer["status"], answer["kind"]) == (400, "RequestError"), answer
        for word in words:
            assert word in answer["body"]["error"], answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture(scope="module")
def endpoint(repository, tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere")
    running = Endpoint(repository, place)
    running.place = place
    yield running
    running.close()


@pytest.fixture(scope="module")
def model(repository):
    return AltMoEModel.from_pretrained(repository)


@pytest.fixture(scope="module")
def own_processor(repository):
    return AltMoEProcessor.from_pretrained(repository, trust_remote_code=True)


def png(color: str, size=(20, 16), form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def wav(seconds: float = 0.5, rate: int = 8000, channels: int = 2) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        tone = np.sin(np.arange(int(seconds * rate)) * 440 * 2 * math.pi / rate) * 20000
        sound.writeframes(np.repeat(tone.astype("<i2"), channels).tobytes())
    return base64.b64encode(file.getvalue()).decode()


LABELS = ["a red square", "a green tree", "a blue house"]


def test_standard_zero_shot_payload(endpoint, model, own_processor):
    answer = endpoint.ask({"image": png("red")}, candidate_labels=LABELS)
    assert answer["status"] == 200, answer
    inputs = own_processor(images=Image.new("RGB", (20, 16), "red"), text=LABELS)
    expected = model(**inputs).logits_per_image[0].softmax(-1).tolist()
    got = {row["label"]: row["score"] for row in answer["body"]}
    assert got == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)
    assert [row["score"] for row in answer["body"]] == sorted(got.values(), reverse=True)


def test_forms_of_the_same_request(endpoint):
    expected = endpoint.ask({"image": png("red")}, candidate_labels=LABELS)["body"]
    assert endpoint.ask(png("red"), candidate_labels=LABELS)["body"] == expected
    assert endpoint.ask("data:image/png;base64," + png("red"), candidate_labels=", ".join(LABELS))["body"] == expected
    several = endpoint.ask([png("red"), png("blue", form="BMP")], candidate_labels=LABELS, top_k=2)["body"]
    assert [len(rows) for rows in several] == [2, 2]
    assert several[0][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-6)
    short = endpoint.ask(
        png("red"), candidate_labels=["red square", "green tree", "blue house"], hypothesis_template="a {}"
    )
    assert [row["score"] for row in short["body"]] == pytest.approx([row["score"] for row in expected], abs=1e-6)


def test_ranks_candidates_as_search_does(endpoint, model, own_processor):
    colors = ["red", "green", "blue"]
    answer = endpoint.ask({"text": ["a cat", "a dog"], "candidates": {"image": [png(c) for c in colors]}}, top_k=2)
    assert answer["status"] == 200, answer
    pictures = own_processor.batch("image", [Image.new("RGB", (20, 16), color) for color in colors])
    texts = own_processor.batch("text", ["a cat", "a dog"])
    scores = model.score("text->image", model.encode("text", texts), model.encode("image", pictures))
    for row, got in zip(scores.tolist(), answer["body"], strict=True):
        assert [hit["index"] for hit in got] == sorted(range(3), key=lambda i: -row[i])[:2]
        assert [hit["score"] for hit in got] == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-5)
    one = endpoint.ask({"image": png("red"), "candidates": {"text": LABELS}})["body"]
    assert {hit["text"] for hit in one} == set(LABELS) and LABELS[one[0]["index"]] == one[0]["text"]


def test_sound(endpoint):
    pytest.importorskip("soundfile", reason="soundfile is not installed: no sound can be decoded")
    pytest.importorskip("soxr", reason="soxr is not installed: no sound can be resampled")
    answer = endpoint.ask({"audio": wav()}, candidate_labels=LABELS)
    assert answer["status"] == 200 and sum(row["score"] for row in answer["body"]) == pytest.approx(1, abs=1e-5)
    two = endpoint.ask({"image": png("red"), "text": "a cat", "candidates": {"audio": [wav(), wav(0.2, 16000, 1)]}})
    assert len(two["body"]) == 2
    endpoint.refuses({"audio": wav(61, 1000, 1)}, "longer than 60 seconds", task="embed")
    endpoint.refuses({"audio": png("red")}, "audio, item 0", "not a readable sound", task="embed")


def test_embeddings(endpoint, model, own_processor):
    answer = endpoint.ask({"image": [png("red"), png("blue")], "text": ["a cat"]}, task="embed")["body"]
    assert np.shape(answer["image"]) == (2, 32) and np.shape(answer["text"]) == (1, 24)
    latents = model.encode("text", own_processor.batch("text", ["a cat"]))
    assert answer["text"][0] == pytest.approx(latents[0].tolist(), abs=1e-5)
    predicted = endpoint.ask({"text": "a cat"}, task="embed", direction="text->image")["body"]
    assert predicted["image"] == pytest.approx(model.predict(latents, "text->image")[0].tolist(), abs=1e-5)
    assert np.shape(endpoint.ask("a cat", task="embed")["body"]["text"]) == (24,)


def test_files_are_never_opened(endpoint):
    secret = endpoint.place / "secret.png"
    Image.new("RGB", (9, 9), "red").save(secret)
    for name in (str(secret), "secret.png", "./secret.png", f"file://{secret}", "secretpng123"):
        for inputs in (name, {"image": name}, {"image": {"path": name}}, {"image": {"bytes": None, "path": name}}):
            answer = endpoint.ask(inputs, candidate_labels=["a cat"])
            assert answer["status"] == 400 and not [path for path in answer["opened"] if "secret" in path], answer
    endpoint.refuses({"image": str(secret)}, "File names are not opened", candidate_labels=["a cat"])


def test_urls_are_refused(endpoint, repository, tmp_path):
    for url in ("http://127.0.0.1:9/a.png", "HTTPS://example.org/a.png"):
        endpoint.refuses({"image": url}, "URLs are refused", candidate_labels=["a cat"])
    allowed = Endpoint(repository, tmp_path, ALTMOE_ALLOW_URLS="1", ALTMOE_MAX_ITEMS="2")
    allowed.refuses({"image": "http://127.0.0.1:9/a.png"}, "not on the public internet", candidate_labels=["a cat"])
    allowed.refuses({"image": "http://localhost:9/a.png"}, "not on the public internet", candidate_labels=["a cat"])
    allowed.refuses({"image": "http://user@127.0.0.1/a.png"}, "without a user name", candidate_labels=["a cat"])
    allowed.refuses({"image": png("red")}, "3 items", "at most 2", candidate_labels=["a cat", "a dog"])
    allowed.close()


def test_bad_input_is_told(endpoint):
    picture, labels = png("red"), {"candidate_labels": ["a cat"]}
    for inputs, words, parameters in (
        ({}, ["no query", "audio, image, text"], labels),
        (None, ["no query"], labels),
        ({"image": []}, ["the list is empty"], labels),
        ({"image": 5}, ["image, item 0", "got int"], labels),
        ({"image": "no base64!"}, ["not base64"], labels),
        ({"image": ""}, ["0 bytes"], labels),
        ({"image": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()}, ["not a readable image"], labels),
        ({"image": picture[: len(picture) // 2 // 4 * 4]}, ["not a readable image"], labels),
        ({"image": "data:image/png,abc"}, ["must be base64"], labels),
        ({"image": [picture, "?"]}, ["image, item 1"], labels),
        ({"image": picture, "candidates": {"text": ["a"] * 64}}, ["65 items", "at most 64"], {}),
        ({"image": base64.b64encode(b"0" * 10_000_001).decode()}, ["10000001 bytes"], labels),
        ({"image": png("red", (5001, 5000))}, ["5001 x 5000 pixels", "smaller"], labels),
        ({"image": png("red", (60000, 6000))}, ["pixels"], labels),
        ({"text": "a" * 10_001}, ["10001 characters"], {"task": "embed"}),
        ({"text": " "}, ["text, item 0", "empty caption"], {"task": "embed"}),
        ({"video": "a"}, ["no modality 'video'"], {"task": "embed"}),
        ({"text": "a cat"}, ["Nothing to compare with"], {}),
        ({"text": "a cat", "candidates": ["a dog"]}, ["Nothing to compare with"], {}),
        ({"text": "a cat", "candidates": {"text": ["a"]}}, ["No direction text->text"], {}),
        ({"text": "a cat"}, ["not text"], labels),
        ({"image": picture}, ["list of strings"], {"candidate_labels": [1]}),
        ({"image": picture}, ["hypothesis_template"], {**labels, "hypothesis_template": "{} {}"}),
        ({"image": picture}, ["top_k"], {**labels, "top_k": 0}),
        ({"image": picture}, ["Unknown task 'delete'"], {"task": "delete"}),
        ({"image": picture}, ["Unknown parameters ['topk']"], {**labels, "topk": 1}),
        ({"image": picture}, ["No direction image->audio"], {"task": "embed", "direction": "image->audio"}),
        ({"image": [picture] * 2, "text": "a", "candidates": {"audio": "?"}}, ["one item of every source"], {}),
    ):
        endpoint.refuses(inputs, *words, **parameters)
    assert endpoint.send({"inputs": "a", "parameters": [1]})["status"] == 400
    assert endpoint.ask(picture, **labels)["status"] == 200  # it goes on after all that


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 localhost 10.1.2.3 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 ::ffff:127.0.0.1 "
    "fd00::1 fe80::1 2002:7f00:1:: 64:ff9b::7f00:1 2001:0:7f00:1::".split(),
)
def test_private_addresses_are_refused(host):
    with pytest.raises(handler.RequestError, match="public internet"):
        handler.public_address(host, 80)


def test_public_addresses_pass():
    assert handler.public_address("8.8.8.8", 80) == "8.8.8.8"
    assert handler.public_address("2606:4700::1111", 443) == "2606:4700::1111"


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if self.path == "/moved" else 200)
        if self.path == "/moved":
            self.send_header("Location", "http://127.0.0.1/")
        self.end_headers()
        self.wfile.write(b"x" * (10_000_001 if self.path == "/large" else 5))

    def log_message(self, *_):
        return None


def test_fetching(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        monkeypatch.setattr(handler, "public_address", lambda host, port: "127.0.0.1")
        monkeypatch.setenv("ALTMOE_ALLOW_URLS", "1")
        base = f"http://pictures.example:{site.server_address[1]}"
        assert handler.decode(f"{base}/small?a=b", "image") == b"xxxxx"
        for path, words in (("/moved", "status 302"), ("/large", "larger than")):
            with pytest.raises(handler.RequestError, match=words):
                handler.fetch(base + path)
        monkeypatch.setattr(handler, "FETCH_SECONDS", 0)
        with pytest.raises(handler.RequestError):
            handler.fetch(base + "/small")
        site.shutdown()
    for url in ("ftp://example.org/a", "https://", "http://[::1", "http://host:99999/"):
        with pytest.raises(handler.RequestError):
            handler.fetch(url)


@pytest.mark.parametrize("folder", ["endpoint", "space"])
def test_requirements_are_the_measured_versions(folder):
    pinned = (ENDPOINT.parents[1] / "constraints.txt").read_text().splitlines()
    asked = (ENDPOINT.parent / folder / "requirements.txt").read_text().splitlines()
    assert len(asked) > 5 and not {line for line in asked if not line.startswith("#")} - set(pinned)

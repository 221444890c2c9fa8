"""`altmoe serve`: a real process on the loopback, asked over HTTP by many clients at once."""

import io
import json
import re
import shlex
import shutil
import socket
import struct
import subprocess
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from database_servers import postgres_server
from PIL import Image
from service_models import write_service

pytest.importorskip("fastapi", reason="the service's packages are not installed: pip install -e '.[serve]'")

from benchmarks import serve as benchmark
from serving.engine import Engine, Query
from serving.ingest import ingest
from serving.limits import Limits
from trainer.cli import main

TEXTS = ["a cat", "a red tree", "dog", "blue house green square a red circle", "a dog a cat " * 8, "house", "circle"]
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

JSON = {"content-type": "application/json"}


def png(color: str, size=(40, 30)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "PNG")
    return content.getvalue()


def wav(seconds: float, rate: int = 8000) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        signal_ = 9000 * np.sin(np.arange(int(seconds * rate)) / 5)
        file.writeframes(signal_.astype("<i2").tobytes())
    return content.getvalue()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    return write_service(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def engine(flags) -> Engine:
    stores = dict(flag.removeprefix("--store=").split("=") for flag in flags if flag.startswith("--store"))
    return Engine(flags[1], stores, device="cpu")


@pytest.fixture(scope="module")
def server(flags):
    limits = ["--max_bytes", "200000", "--max_pixels", "1000000", "--max_seconds", "3", "--max_characters", "300"]
    running = benchmark.Running([*flags, *limits])
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def found(answer: httpx.Response) -> list[tuple[str, float]]:
    assert answer.status_code == 200, answer.text
    return [(hit["id"], hit["score"]) for hit in answer.json()["hits"]]


def same(one: list, other: list) -> bool:
    """The same scores, and the same items where scores are not tied."""
    scores = [score for _, score in one]
    if scores != pytest.approx([score for _, score in other], abs=1e-4):
        return False
    return all(
        a[0] == b[0] or any(abs(a[1] - score) < 1e-3 for place, score in enumerate(scores) if place != here)
        for here, (a, b) in enumerate(zip(one, other, strict=True))
    )


# ---------------------------------------------------------------- answers


def test_a_text_finds_what_the_library_finds(client, engine):
    answer = client.post("/search", json={"text": "a red tree", "k": 4, "where": {"category": "animals"}})
    body = answer.json()
    with torch.inference_mode():
        latents = engine.model.encode("text", engine.processor.batch("text", ["a red tree"]))
        (hits,) = engine.indexes["text->image"].search(latents, 4, {"category": "animals"})
    assert same(found(answer), [(hit.id, hit.score) for hit in hits])
    assert [hit["columns"] for hit in body["hits"]] == [hit.columns for hit in hits]
    assert {hit["columns"]["category"] for hit in body["hits"]} == {"animals"}
    assert body["direction"] == "text->image" and body["batch"] == 1
    assert (body["confidence"], body["found"]) == (None, True)
    assert set(body["milliseconds"]) == {"read", "encode", "connector", "search", "total"}
    assert body["milliseconds"]["total"] >= body["milliseconds"]["encode"] > 0


def test_a_picture_and_a_sound_find_what_the_library_finds(client, engine):
    answer = client.post("/search", files={"image": png("red")}, data={"k": 3, "where": '{"year": {"ge": 2000}}'})
    with torch.inference_mode():
        item = engine.processor.read("image", Image.new("RGB", (40, 30), "red"))
        latents = engine.model.encode("image", engine.processor.batch("image", [item]))
        (hits,) = engine.indexes["image->text"].search(latents, 3, {"year": {"ge": 2000}})
    assert same(found(answer), [(hit.id, hit.score) for hit in hits])
    assert all(hit["columns"]["year"] >= 2000 for hit in answer.json()["hits"])

    sound = client.post("/search", files={"audio": wav(0.5)}, data={"target": "image", "k": 2})
    assert sound.json()["direction"] == "audio->image" and len(found(sound)) == 2
    joined = client.post("/search", files={"image": png("red"), "audio": wav(0.5)})
    assert joined.json()["direction"] == "image+audio->text" and len(found(joined)) == 10


def test_a_sound_on_the_command_line_finds_what_the_service_finds(client, flags, tmp_path, capsys):
    (tmp_path / "query.wav").write_bytes(wav(0.5))
    store = flags[2].removeprefix("--store=image=")
    main(["search", store, "--model", flags[1], "--audio", str(tmp_path / "query.wav"), "-k", "3", "--json"])
    (answer,) = json.loads(capsys.readouterr().out)
    served = client.post("/search", files={"audio": wav(0.5)}, data={"target": "image", "k": 3})
    assert answer["direction"] == "audio->image" and len(answer["hits"]) == 3
    assert same([(hit["id"], hit["score"]) for hit in answer["hits"]], found(served))


def test_a_latent_finds_what_its_item_finds(client, engine):
    with torch.inference_mode():
        latent = engine.model.encode("text", engine.processor.batch("text", ["a cat"]))[0].tolist()
    health = client.get("/health").json()
    protocol = health["sources"]["text"]["protocol"]
    by_latent = client.post("/search", json={"latent": {"text": latent}, "protocol": protocol})
    assert same(found(by_latent), found(client.post("/search", json={"text": "a cat"})))
    assert client.post("/search", data={"latent": json.dumps({"text": latent})}, files=[("x", b"")]).status_code == 400
    assert health["status"] == "ready" and health["sources"]["text"]["size"] == len(latent)
    assert health["directions"]["text->image"]["items"] == 60


def test_a_path_or_url_is_just_text(client, flags):
    for text in ("/etc/passwd", f"file://{flags[1]}/config.json", "http://127.0.0.1:9/a.png", "a\x00cat", "\ud7ff {}"):
        assert len(found(client.post("/search", json={"text": text}))) == 10


def test_concurrent_queries_share_batches_and_get_their_own_answers(server, client):
    latents = torch.nn.functional.normalize(torch.randn(6, 24), dim=-1).tolist()
    asked = [{"json": {"text": text, "k": 5}} for text in TEXTS]
    asked += [
        {"json": {"latent": {"text": latent}, "k": k}} for latent, k in zip(latents, (5, 5, 1, 60, 5, 5), strict=True)
    ]
    asked += [{"files": {"image": png(color)}, "data": {"k": 5}} for color in ("red", "green", "blue")]
    asked += [{"files": {"audio": wav(length)}, "data": {"target": "text"}} for length in (0.3, 0.4)]
    alone = [found(client.post("/search", **request)) for request in asked]
    batches = server.metric("altmoe_batch_size_count")

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as own:
            for turn in range(number, number + 12):
                request = turn * 7 % len(asked)
                assert same(found(own.post("/search", **asked[request])), alone[request]), asked[request]

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(ask, range(32)))
    answered = 32 * 12
    assert server.metric("altmoe_batch_size_count") - batches < answered / 2  # more than two a batch
    assert server.metric('altmoe_requests_total{status="200"}') >= answered
    assert server.metric("altmoe_requests_inside") == server.metric("altmoe_queue_length") == 0
    for stage in ("read", "encode", "connector", "search"):
        assert server.metric(f'altmoe_stage_seconds_sum{{stage="{stage}"}}') > 0


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_examples_of_the_readme_run_as_printed(server, tmp_path):
    (tmp_path / "build/hub/altmoe-stamps").mkdir(parents=True)
    (tmp_path / "build/hub/altmoe-stamps/example.png").write_bytes(png("red"))
    shown = re.findall(r"^curl .*", README, re.MULTILINE)
    assert len(shown) == 4
    for line in shown:
        words = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        answer = json.loads(subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout)
        assert answer.get("status") == "ready" or len(answer["hits"]) == 3, (line, answer)


# ---------------------------------------------------------------- bad input


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000)))]
    packed = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    "status, words, request_",
    [
        (400, "No query", {"json": {}}),
        (400, "No query", {"files": {"k": (None, "3")}}),
        (
            400,
            "Invalid multipart",
            {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=a"}},
        ),
        (400, "should be an object", {"json": [1]}),
        (400, "Invalid JSON", {"content": b"{", "headers": JSON}),
        (400, "empty caption", {"json": {"text": "  "}}),
        (400, "valid string", {"json": {"text": ["a"]}}),
        (400, "300 characters", {"json": {"text": "a" * 301}}),
        (400, "Extra inputs", {"json": {"text": "a", "kk": 3}}),
        (400, "greater than or equal to 1", {"json": {"text": "a", "k": 0}}),
        (400, "less than or equal to 100", {"json": {"text": "a", "k": 101}}),
        (400, "valid integer", {"json": {"text": "a", "k": "many"}}),
        (400, "Cannot search text->sculpture", {"json": {"text": "a", "target": "sculpture"}}),
        (400, "Name the target: image, text", {"files": {"audio": wav(0.2)}}),
        (400, "There is no column 'colour'", {"json": {"text": "a", "where": {"colour": "red"}}}),
        (400, "compares nothing", {"json": {"text": "a", "where": {"year": {"like": 3}}}}),
        (400, "which 'x' is not", {"json": {"text": "a", "where": {"year": "x"}}}),
        (400, "is not JSON", {"files": {"image": png("red")}, "data": {"where": "{"}}),
        (400, "has 24 numbers, got 3", {"json": {"latent": {"text": [1, 2, 3]}}}),
        (
            400,
            "NaN or infinity",
            {"content": b'{"latent": {"text": [%s]}}' % b",".join([b"NaN"] * 24), "headers": JSON},
        ),
        (400, "NaN or infinity", {"json": {"latent": {"text": [1e39] * 24}}}),
        (400, "valid number", {"json": {"latent": {"text": ["x"] * 24}}}),
        (400, "Unknown modality 'smell'", {"json": {"latent": {"smell": [1]}}}),
        (400, "is of protocol abc", {"json": {"latent": {"text": [1] * 24}, "protocol": "abc"}}),
        (400, "given twice", {"json": {"text": "a", "latent": {"text": [1] * 24}}}),
        (400, "given twice", {"files": {"image": png("red")}, "data": {"latent": json.dumps({"image": [1] * 32})}}),
        (400, "Unknown modality 'images'", {"files": {"images": png("red")}}),
        (400, "given twice", {"files": [("image", png("red")), ("image", png("blue"))]}),
        (400, "send it as a plain field", {"files": {"text": b"a cat"}}),
        (400, "boundary", {"content": b"a", "headers": {"content-type": "multipart/form-data"}}),
        (413, "larger than 200000 bytes", {"files": {"image": b"0" * 200_001}}),
        (413, "larger than 200000 bytes", lambda: {"content": iter([b"0" * 50_000] * 5), "headers": JSON}),
        (413, "1001 x 1000 pixels", {"files": {"image": bomb(1001, 1000)}}),
        (413, "pixels", {"files": {"image": bomb(60_000, 60_000)}}),
        (413, "longer than 3 seconds", {"files": {"audio": wav(3.1)}}),
        (415, "not a readable image", {"files": {"image": b"GIF89a nothing"}}),
        (415, "not a readable image", {"files": {"image": png("red")[:60]}}),
        (415, "not a readable image", {"files": {"image": b""}}),
        (415, "not a readable sound", {"files": {"audio": png("red")}}),
        (415, "paths and URLs are not opened", {"files": {"audio": wav(0.2)}, "data": {"image": "/etc/passwd"}}),
        (415, "Send application/json", {"data": {"text": "a"}}),
        (415, "not nothing", {"content": b""}),
    ],
)
def test_bad_input_is_told_with_the_right_status(client, status, words, request_):
    request_ = request_() if callable(request_) else request_
    answer = client.post("/search", **request_)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and words in answer.json()["error"], answer.text
    assert len(found(client.post("/search", json={"text": "a", "k": 2}))) == 2  # it goes on after that


def test_unknown_paths_and_methods_have_the_same_shape(client):
    for answer, status in ((client.get("/secret"), 404), (client.get("/search"), 405), (client.post("/health"), 405)):
        assert answer.status_code == status and list(answer.json()) == ["error"]


def test_the_documentation_knows_both_kinds_of_request(client):
    documented = client.get("/openapi.json").json()["paths"]["/search"]["post"]
    content = documented["requestBody"]["content"]
    assert "text" in content["application/json"]["schema"]["properties"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert "422" not in documented["responses"] and "503" in documented["responses"]
    assert client.get("/docs").status_code == 200


def test_logs_tell_no_contents(server, client):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as leaves:
        leaves.sendall(b"POST /search HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
    client.post("/search", json={"text": "confidential words"})
    client.post("/search?text=confidential", json={"confidential": 3})
    logged = server.errors()
    assert re.search(r"POST /search 200 .* text->image batch 1", logged) and "POST /search 400" in logged
    assert "confidential" not in logged and "Traceback" not in logged


def test_memory_stays_flat_over_uploads(server):
    pictures = [png(color, (300, 200)) for color in ("red", "green", "blue")]

    def upload(count: int) -> float:
        with httpx.Client(base_url=server.url, timeout=60) as own:
            for turn in range(count):
                assert own.post("/search", files={"image": pictures[turn % 3]}).status_code == 200
        return server.metric("process_resident_memory_bytes") / 1e6

    with ThreadPoolExecutor(4) as threads:
        before = max(threads.map(upload, [25] * 4))
        after = max(threads.map(upload, [75] * 4))
    assert after - before < 40, (before, after)


# ---------------------------------------------------------------- inside


def test_one_bad_query_does_not_harm_its_batch(engine):
    good = [Query("text->image", {"text": text}, 3) for text in TEXTS]
    bad = Query("text->image", {"text": torch.ones(3)}, 3)
    answers = engine.answer([*good[:3], bad, *good[3:]])
    assert isinstance(answers.pop(3), Exception)
    for answer, query in zip(answers, good, strict=True):
        (alone,) = engine.answer([query])
        assert same([(h.id, h.score) for h in answer.hits], [(h.id, h.score) for h in alone.hits])


def test_a_batch_is_one_connector_call_a_direction(engine):
    calls = []
    hook = engine.model.connector.register_forward_hook(lambda module, given, output: calls.append(given[1]))
    latent = torch.ones(24)
    queries = [Query("text->image", {"text": text}) for text in TEXTS] + [Query("text->image", {"text": latent})]
    answers = engine.answer([*queries, Query("image->text", {"image": torch.ones(32)})])
    hook.remove()
    assert calls == ["text->image", "image->text"]
    assert {answer.batch for answer in answers} == {9} and all(answer.seconds["connector"] > 0 for answer in answers)


def test_a_database_can_be_what_is_searched_and_its_end_is_told(engine, flags):
    psycopg = pytest.importorskip("psycopg")
    store = engine.indexes["text->image"].store
    asked = [Query("text->image", {"text": text}, 3, {"category": "animals"}) for text in TEXTS]
    with postgres_server() as server:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        address = f"{server}?table=served"
        ingest(store, address, engine.model, progress=False)
        other = Engine(flags[1], {"image": address}, device="cpu")
        for one, two in zip(engine.answer(asked), other.answer(asked), strict=True):
            assert same([(h.id, h.score) for h in one.hits], [(h.id, h.score) for h in two.hits])
        assert "served" not in json.dumps(other.about())
    assert all(isinstance(answer, OSError) for answer in other.answer(asked))


def test_limits_are_positive():
    assert Limits(max_wait=0).max_wait == 0
    with pytest.raises(ValueError, match="--max_k 0"):
        Limits(max_k=0)

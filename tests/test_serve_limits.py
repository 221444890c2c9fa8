"""`altmoe serve` at its limits: what takes too long, more than it can take, being stopped, and what it refuses to start with."""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from service_models import write_service

pytest.importorskip("fastapi", reason="the service's packages are not installed: pip install -e '.[serve]'")

from benchmarks import serve as benchmark
from trainer.cli import main

# every batch takes k / 10 seconds
SLOW = """
import time
from serving.engine import Engine
answer = Engine.answer
def slowly(self, queries):
    time.sleep(max(query.k for query in queries) / 10)
    return answer(self, queries)
Engine.answer = slowly
from trainer.cli import main
main()
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    return write_service(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def slow(flags):
    running = benchmark.Running([*flags, "--timeout", "1", "--max_queue", "3", "--max_batch", "1"], ("-c", SLOW))
    yield running
    running.stop()


def test_what_takes_too_long_is_ended(slow):
    with httpx.Client(base_url=slow.url, timeout=60) as client:
        answer = client.post("/search", json={"text": "a", "k": 15})
        assert answer.status_code == 504 and "within 1 seconds" in answer.json()["error"]
        time.sleep(0.6)  # the thread is busy with it still
        assert client.post("/search", json={"text": "a", "k": 1}).status_code == 200


def test_an_upload_that_never_ends_is_ended(slow):
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as own:
        own.sendall(
            b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        answer = b""
        while part := own.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b'{"error"' in answer


def test_a_full_queue_refuses_and_says_when_to_come_again(slow):
    def ask(_) -> httpx.Response:
        return httpx.post(f"{slow.url}/search", json={"text": "a", "k": 2}, timeout=60)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, range(12)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(answer.headers["retry-after"] == "1" and "try again" in answer.json()["error"] for answer in refused)
    assert ask(0).status_code == 200


def test_sigterm_answers_what_is_inside_and_refuses_what_is_new(slow):
    with ThreadPoolExecutor(1) as threads, httpx.Client(base_url=slow.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        running = threads.submit(httpx.post, f"{slow.url}/search", json={"text": "a", "k": 8}, timeout=60)
        while not slow.metric("altmoe_requests_inside"):
            time.sleep(0.01)
        slow.process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code == 200:
            time.sleep(0.01)
        assert client.get("/health").json()["status"] == "stopping"
        answer = client.post("/search", json={"text": "a"})
        assert answer.status_code == 503 and "stopping" in answer.json()["error"]
        assert running.result().status_code == 200
    assert slow.process.wait(timeout=30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{slow.url}/health")


# ---------------------------------------------------------------- starting


def refuses_to_start(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *flags])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_start_up_errors_are_one_sentence(capsys, flags, tmp_path):
    model, image = flags[:2], flags[2].removeprefix("--store=image=")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refuses_to_start(capsys, *flags, "--port", port)
    assert re.fullmatch(rf"error: Cannot listen on 127.0.0.1, port {port} .*: choose another --port or --host.\n", said)
    free = [*model, "--port", "0", "--store"]
    assert "expected MODALITY=STORE" in refuses_to_start(capsys, *free, image)
    assert "already" in refuses_to_start(capsys, *free, f"image={image}", "--store", f"image={image}")
    assert "holds 'image' latents, expected 'text'" in refuses_to_start(capsys, *free, f"text={image}")
    assert "No LatentStore at" in refuses_to_start(capsys, *free, f"image={tmp_path}")
    assert "There is no folder" in refuses_to_start(capsys, *free, "image=build/stores/nothing")
    assert str(tmp_path) in refuses_to_start(
        capsys, "--model", str(tmp_path), "--store", f"image={image}", "--port", "0"
    )
    assert "Unknown modality" in refuses_to_start(capsys, *free, f"smell={image}")
    assert "--timeout 0" in refuses_to_start(capsys, *flags, "--timeout", "0")
    assert "Unknown index" in refuses_to_start(capsys, *flags, "--port", "0", "--index", "nothing")

"""The search service under load: throughput, latency, errors and memory at 1 to 256 clients, driven by wrk.

`python -m benchmarks.serve` needs what `make demo` leaves, and wrk (`apt-get install wrk`). It starts `altmoe serve` as a
child on the loopback, sends different texts, pictures or latents over kept connections, prints a table and writes JSON to
`benchmarks/results/`. Client and service share the machine's processors. Exit code 1 if any answer was an error.
"""

import argparse
import datetime
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.common import RESULTS

BOUNDARY = "altmoe-benchmark"
COLUMNS = {
    "queries": "{}",
    "clients": "{}",
    "per_second": "{:.1f}",
    "p50_ms": "{:.0f}",
    "p99_ms": "{:.0f}",
    "mean_batch": "{:.1f}",
    "cpu_ms": "{:.1f}",
    "errors": "{}",
    "rss_mb": "{:.0f}",
}


class Running:
    """`altmoe serve` as a child process on a free port.

    Args:
        flags: of `altmoe serve`, without `--port`.
        program: how Python is told to run the `altmoe` command.

    Raises:
        RuntimeError: it ended before it was ready; with what it said.
    """

    def __init__(self, flags: list[str], program: tuple[str, ...] = ("-m", "trainer.cli")):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.url = None
        for line in self.process.stdout:
            if match := re.match(r"ready on (http\S+)", line):
                self.url = match[1]
                break
        if self.url is None:
            self.process.wait()
            raise RuntimeError(f"altmoe serve did not start: {self.errors()[-2000:]}")

    def errors(self) -> str:
        """What it wrote to stderr."""
        self.log.seek(0)
        return self.log.read()

    def metric(self, name: str) -> float:
        """One of `GET /metrics`, now."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.log.close()


def write_bodies(folder: Path, count: int, data: str, store: str) -> dict[str, tuple[int, str]]:
    """Request bodies of every kind: `{kind: (number, content type)}`."""
    from datasets import load_from_disk

    from modeling_altmoe import LatentStore

    rows = load_from_disk(data)
    rows = rows.select(range(0, len(rows), max(1, len(rows) // count))).select(range(min(count, len(rows))))
    latents = LatentStore.open(store).take(range(len(rows))).tolist()
    kinds = {
        "text": "application/json",
        "latent": "application/json",
        "image": f"multipart/form-data; boundary={BOUNDARY}",
    }
    for kind in kinds:
        (folder / kind).mkdir()
    for number, row in enumerate(rows):
        picture = io.BytesIO()
        row["image"].convert("RGBA").save(picture, "PNG")
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode()
        bodies = {
            "text": json.dumps({"text": row["caption"]}).encode(),
            "latent": json.dumps({"latent": {"text": latents[number]}}).encode(),
            "image": head + picture.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode(),
        }
        for kind, body in bodies.items():
            (folder / kind / str(number)).write_bytes(body)
    return {kind: (len(rows), content) for kind, content in kinds.items()}


def drive(server: Running, folder: Path, kind: str, bodies: tuple[int, str], clients: int, seconds: float) -> dict:
    """One cell of the table."""
    names = ("altmoe_batch_size_sum", "altmoe_batch_size_count", "process_cpu_seconds_total")
    before = [server.metric(name) for name in names]
    script = str(Path(__file__).with_suffix(".lua"))
    tool = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "120s",
        "-s",
        script,
        f"{server.url}/search",
    ]
    said = subprocess.run(
        [*tool, "--", str(folder / kind), *map(str, bodies)], capture_output=True, text=True, check=True
    )
    measured = json.loads(said.stdout.splitlines()[-1])
    while server.metric("altmoe_requests_inside"):  # wrk leaves without waiting for its last answers
        time.sleep(0.2)
    answered, batches, cpu = (server.metric(name) - start for name, start in zip(names, before, strict=True))
    return {
        "queries": kind,
        "clients": clients,
        "per_second": measured["requests"] / measured["seconds"],
        **measured,
        "mean_batch": answered / max(1, batches),
        "cpu_ms": 1000 * cpu / max(1, answered),
        "rss_mb": server.metric("process_resident_memory_bytes") / 1e6,
    }


def table(cells: list[dict]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS).replace("_", " ") + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(form.format(cell[name]) for name, form in COLUMNS.items()) + " |" for cell in cells]
    return "\n".join(lines)


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="build/hub/altmoe-stamps", help="published model")
    parser.add_argument("--stores", default="build/stores/stamps", help="folder with the stores image and text")
    parser.add_argument("--data", default="build/data/stamps", help="data set with columns image and caption")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--kinds", nargs="+", default=["latent", "text", "image"], help="kinds of queries")
    parser.add_argument("--seconds", type=float, default=10, help="of each cell, at least")
    parser.add_argument(
        "--flags", default="--threads 1 --timeout 120", help="further flags of altmoe serve, in one string"
    )
    parser.add_argument("--out", default=str(RESULTS / "serve.json"))
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("error: wrk is not installed: apt-get install wrk")
    stores = [f"--store={modality}={arguments.stores}/{modality}" for modality in ("image", "text")]
    flags = ["--model", arguments.model, *stores, "--quiet", *arguments.flags.split()]
    server = Running(flags)
    cells = []
    try:
        start = server.metric("process_resident_memory_bytes") / 1e6
        with tempfile.TemporaryDirectory() as folder:
            kinds = write_bodies(Path(folder), 200, arguments.data, f"{arguments.stores}/text")
            for kind in arguments.kinds:
                for clients in arguments.clients:
                    seconds = max(arguments.seconds, clients / 10)  # so that each client has a few answers
                    cells.append(drive(server, Path(folder), kind, kinds[kind], clients, seconds))
                    print(table(cells[-1:]).splitlines()[-1], file=sys.stderr)
    finally:
        code = server.stop()
    print(f"{table(cells)}\n\nmemory at the start: {start:.0f} MB; exit code after SIGTERM: {code}")
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared with the client",
        "load_average": os.getloadavg(),
        "flags": arguments.flags,
        "rss_start_mb": start,
    }
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")
    if code or any(cell["errors"] for cell in cells):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

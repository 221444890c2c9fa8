"""How long a new process takes from its start to its first answer, with a pushed model pulled from a Hub on the loopback.

    python -m benchmarks.first_query --model build/hub/altmoe-stamps --repeats 5

`cold`: nothing is cached. `warm encoders`: the encoders' repositories are cached, the model, its code and the store are not.
`warm`: everything is cached. A text is asked of a published LatentStore (`--store`), with the text's encoder alone, and of
pictures that are encoded there and then. Printed are medians: wall seconds until the answer, the process's own CPU
seconds until its end, the stages, and the machine's load before each process: what else runs on a core is part of a wall
time, and two threads that wait for each other on a shared core are part of a CPU time, so measure with nothing beside it.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from tests.hub_server import Hub

CHILD = """
import json, time
start = time.perf_counter()
def lap():
    global start
    before, start = start, time.perf_counter()
    return round(start - before, 2)
from transformers import pipeline
stages = {"imports": lap()}
pipe = pipeline(model="me/model", trust_remote_code=True, model_kwargs=%r)
stages["model"] = lap()
best = pipe("a green frog", candidates=%r, top_k=1)
stages["query"] = lap()
assert best[0]["confidence"] is not None
print(json.dumps(stages), flush=True)
"""


def publish(hub: Hub, folder: Path, store: Path, place: Path) -> None:
    """Put a self-contained model and its encoders on the Hub as repositories of their own, the model by reference."""
    hub.add("me/store", store, kind="dataset")
    model = AltMoEModel.from_pretrained(folder, load_encoders=False)
    for modality, entry in model.config.encoders.items():
        commit = hub.add(f"lab/{modality}", folder / f"encoder_{modality}")
        entry.update(name_or_path=f"lab/{modality}", revision=commit, self_contained=False)
    model.save_pretrained(place)
    AltMoEProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(place)
    hub.add("me/model", place)


def ask(hub: Hub, cache: Path, candidates: str | dict) -> dict:
    """One new process; its times."""
    load = os.getloadavg()[0]
    kept = {"load_encoders": ["text"]} if isinstance(candidates, str) else {}  # stored latents need no other
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command, environment = [sys.executable, "-c", CHILD % (kept, candidates)], hub.environment(cache)
    environment["OMP_NUM_THREADS"] = "2"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, cwd=cache.parent, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        answer = process.stdout.readline()
        wall = time.perf_counter() - start  # taking torch down again comes after the answer
        if process.wait():
            errors.seek(0)
            raise RuntimeError(errors.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, **json.loads(answer), "load": load}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("build/hub/altmoe-stamps"), help="self-contained model")
    parser.add_argument("--store", type=Path, default=Path("build/stores/stamps/image"), help="a LatentStore of images")
    parser.add_argument("--repeats", type=int, default=5, help="processes a row")
    options = parser.parse_args()
    pictures = [str(path.resolve()) for path in sorted(options.model.glob("example*.png"))]
    asked = {"a published store": "me/store", f"{len(pictures)} pictures": {"image": pictures}}
    rows = {f"{state}, {what}": [] for what in asked for state in ("cold", "warm encoders", "warm")}
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        root = Path(folder)
        publish(hub, options.model, options.store, root / "model")
        for _, (what, candidates) in itertools.product(range(options.repeats), asked.items()):
            shutil.rmtree(root / "cache", ignore_errors=True)
            rows[f"cold, {what}"].append(ask(hub, root / "cache", candidates))
            rows[f"warm, {what}"].append(ask(hub, root / "cache", candidates))
            for kept in ("hub/models--me--model", "hub/datasets--me--store", "modules"):
                shutil.rmtree(root / "cache" / kept, ignore_errors=True)
            rows[f"warm encoders, {what}"].append(ask(hub, root / "cache", candidates))
    names = list(rows[next(iter(rows))][0])
    print("| seconds | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(f"{statistics.median(each[n] for each in found):.1f}" for n in names) + " |")


if __name__ == "__main__":
    main()

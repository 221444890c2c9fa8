"""How long a new process takes from its start to its first answer, with a pushed model pulled from a Hub on the loopback.

    python -m benchmarks.first_query --model build/hub/altmoe-stamps --repeats 5

`cold`: nothing is cached. `warm encoders`: the encoders' repositories are cached, the model and its code are not.
`warm`: everything is cached. Printed are medians: wall seconds, the process's own CPU seconds (what the wall
time is near on an idle machine), and the stages.
"""

import argparse
import json
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
pipe = pipeline(model="me/model", trust_remote_code=True)
stages["model"] = lap()
best = pipe("a green frog", candidates={"image": %r}, top_k=1)
stages["query"] = lap()
assert best[0]["item"]
print(json.dumps(stages))
"""


def publish(hub: Hub, folder: Path, place: Path) -> None:
    """Put a self-contained model and its encoders on the Hub as repositories of their own, the model by reference."""
    model = AltMoEModel.from_pretrained(folder, load_encoders=False)
    for modality, entry in model.config.encoders.items():
        commit = hub.add(f"lab/{modality}", folder / f"encoder_{modality}")
        entry.update(name_or_path=f"lab/{modality}", revision=commit, self_contained=False)
    model.save_pretrained(place)
    AltMoEProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(place)
    hub.add("me/model", place)


def ask(hub: Hub, cache: Path, pictures: list[str]) -> dict:
    """One new process; its times."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command, environment = [sys.executable, "-c", CHILD % pictures], hub.environment(cache)
    environment["OMP_NUM_THREADS"] = "2"
    done = subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("build/hub/altmoe-stamps"), help="self-contained model")
    parser.add_argument("--repeats", type=int, default=5, help="processes a row")
    options = parser.parse_args()
    pictures = [str(path.resolve()) for path in sorted(options.model.glob("example*.png"))]
    rows = {"cold": [], "warm encoders": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        root = Path(folder)
        publish(hub, options.model, root / "model")
        for _ in range(options.repeats):
            shutil.rmtree(root / "cache", ignore_errors=True)
            rows["cold"].append(ask(hub, root / "cache", pictures))
            rows["warm"].append(ask(hub, root / "cache", pictures))
            shutil.rmtree(root / "cache" / "hub" / "models--me--model")
            shutil.rmtree(root / "cache" / "modules")
            rows["warm encoders"].append(ask(hub, root / "cache", pictures))
    names = list(rows["cold"][0])
    print("| seconds | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(f"{statistics.median(each[n] for each in found):.1f}" for n in names) + " |")


if __name__ == "__main__":
    main()

"""`make demo`: the whole way once, on real input, without a model hub.

Every step is a command that works the same with Hub names; it is printed before it runs. Finished steps are kept in
`build/`, so a second run is quick and an interrupted one goes on.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

# Measured on two cores: these encoders and small matrices run faster with one thread than with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BUILD = Path("build")
CAPTIONS = {
    "stamps": ["a green frog", "something to drink from", "a musical instrument"],
    "twemoji": ["a green frog", "something to drink", "a musical instrument"],
}


def say(number: int, text: str) -> None:
    """A headline for a step."""
    print(f"\n\033[1m[{number}/6] {text}\033[0m" if sys.stdout.isatty() else f"\n[{number}/6] {text}", flush=True)


def command(*words: str) -> None:
    """Print a command as a person would type it, and run it in this process (imports are slow)."""
    print("$ " + " ".join(shlex.quote(str(word)) for word in words), flush=True)
    if words[0] == "altmoe":
        from trainer.cli import main as run
    elif words[2] == "demo.encoders":
        from demo.encoders import main as run
    else:
        from demo.data import main as run
    if run([str(word) for word in (words[1:] if words[0] == "altmoe" else words[3:])]):
        raise SystemExit(1)  # the step has said why


def choose(data: str) -> str:
    """Which data set `auto` means on this machine; what was chosen is said aloud by `demo.data`."""
    if data != "auto":
        return data
    built = [name for name in ("stamps", "twemoji") if (BUILD / "data" / name / "dataset_info.json").exists()]
    return built[0] if built and (built[0] == "stamps" or not shutil.which("apt-get")) else "auto"


def main() -> None:
    """Run the six steps and say how long they took."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--data", default="auto", choices=["auto", "stamps", "twemoji"], help="which packaged data set")
    start = time.time()
    wanted = choose(parser.parse_args().data)

    say(1, "packaged encoders and data, in transformers' and datasets' own formats")
    command("python", "-m", "demo.encoders", "--out", BUILD / "encoders")
    command("python", "-m", "demo.data", wanted, "--out", BUILD / "data")
    sets = [wanted] if wanted != "auto" else ["stamps", "twemoji"]
    data = next(name for name in sets if (BUILD / "data" / name / "dataset_info.json").exists())
    began = time.time()

    say(2, "every item through its frozen encoder, once")
    stores = {m: BUILD / "stores" / data / m for m in ("image", "text")}
    encoders = {"image": BUILD / "encoders" / "efficientnet-lite0", "text": BUILD / "encoders" / "minilm-l6"}
    for modality, column in (("image", "image"), ("text", "caption")):
        command(
            *("altmoe", "encode", "--data", BUILD / "data" / data, "--column", column, "--modality", modality),
            *("--encoder", encoders[modality], "--out", stores[modality]),
        )

    say(3, "the connector, trained one direction an optimiser step")
    run = BUILD / "runs" / data
    command("altmoe", "train", f"model_cards/recipes/{data}.yaml", "--overwrite", "true")

    say(4, "held-out items it never saw, beside simpler methods")
    baselines = ("chance", "ridge", "kernel_ridge", "cca", "linear_infonce")
    command("altmoe", "evaluate", "--model", run, "--baselines", *baselines)

    say(5, "a folder that is ready for the Hub")
    out = BUILD / "hub" / f"altmoe-{data}"
    command("altmoe", "publish", "--run", run, "--out", out, "--self_contained", "--data", BUILD / "data" / data)
    print(f"look at {out / 'examples.png'} and {out / 'README.md'}")

    say(6, "searches over the whole store")
    words = [word for caption in CAPTIONS[data] for word in ("--text", caption)]
    command("altmoe", "search", stores["image"], "--model", out, *words)
    from datasets import load_from_disk

    pictures = BUILD / "queries"
    pictures.mkdir(exist_ok=True)
    items = load_from_disk(str(BUILD / "data" / data))
    words = []
    for row in (len(items) // 5, len(items) // 2, len(items) * 4 // 5):
        file = pictures / f"{items[row]['id'].replace('/', '-')}.png"
        items[row]["image"].save(file)
        words += ["--image", file]
    command("altmoe", "search", stores["text"], "--model", out, *words)
    print(
        "\n(The store holds all items, so most of what is found here was trained on; held-out figures are those of step 4.)"
    )
    print(f"\ndone in {time.time() - start:.0f} s ({time.time() - began:.0f} s without the encoders and data)")


if __name__ == "__main__":
    main()

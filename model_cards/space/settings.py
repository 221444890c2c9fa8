"""What the Space shows, from the command line, else from ALTMOE_MODEL, ALTMOE_STORES ("image=NAME,text=NAME"),
ALTMOE_DATA, ALTMOE_TITLE, else from space.json beside this file. Names are local folders or Hub names."""

import argparse
import json
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
TITLE = "Search across senses"


def settings(arguments: list[str] | None = None, folder: Path = HERE) -> argparse.Namespace:
    """`model`, `stores`, `data`, `title`, ... from the command line, the environment and space.json.

    Raises:
        SystemExit: a wrong argument, no model or no store; the message says what to give.
    """
    parser = argparse.ArgumentParser(description="Start the search page of an altmoe model.", allow_abbrev=False)
    parser.add_argument("--model", help="trained model: folder or Hub name")
    parser.add_argument("--store", action="append", metavar="MODALITY=NAME", help="LatentStore to search (repeatable)")
    parser.add_argument("--data", help="data set with columns id, a picture, caption: folder or Hub name")
    parser.add_argument("--title", help=f"heading (default: {TITLE})")
    parser.add_argument("--results", type=int, default=12, help="results a query (default: 12)")
    parser.add_argument("--port", type=int, help="port (default: GRADIO_SERVER_PORT, else the first free from 7860)")
    given = parser.parse_args(arguments)
    place = folder / "space.json"
    kept = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}

    def beside(name):  # space.json may name folders that lie beside it
        return str(folder / name) if name and (folder / name).is_dir() else name

    pairs = given.store or [pair for pair in os.environ.get("ALTMOE_STORES", "").split(",") if pair.strip()]
    if wrong := [pair for pair in pairs if not all(pair.partition("=")[::2])]:
        parser.error(f"--store {wrong[0]!r}: expected MODALITY=NAME, e.g. image=build/stores/stamps/image")
    given.stores = {m.strip(): name.strip() for m, _, name in (pair.partition("=") for pair in pairs)}
    given.stores = given.stores or {m: beside(name) for m, name in kept.get("stores", {}).items()}
    given.model = given.model or os.environ.get("ALTMOE_MODEL") or beside(kept.get("model"))
    given.data = given.data or os.environ.get("ALTMOE_DATA") or beside(kept.get("data"))
    given.title = given.title or os.environ.get("ALTMOE_TITLE") or kept.get("title") or TITLE
    given.examples = kept.get("examples")
    for name, value in (("--model", given.model), ("--store", given.stores)):
        if not value:
            parser.error(f"{name} is missing: give it here, in the environment or in {place.name}")
    return given

"""`altmoe search`: a store, searched with a text, a picture or a sound."""

import argparse
import json
import sys
from pathlib import Path

import torch

from modeling_altmoe import AltMoEModel, AltMoEProcessor
from modeling_altmoe.search_altmoe import Hits, open_index, open_store, parse_where
from trainer.contact_sheet import contact_sheet, pictures_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("store", help="LatentStore to search: folder or Hub name; - where a database has it all")
    parser.add_argument("--model", required=True, help="trained or published model: folder or Hub name")
    parser.add_argument("--text", action="append", help="a query in words (may be repeated)")
    parser.add_argument("--image", action="append", help="a picture as the query (may be repeated)")
    parser.add_argument("--audio", action="append", help="a sound file as the query (may be repeated)")
    parser.add_argument("--direction", help="e.g. image->text; default: from the query's modality to the store's")
    parser.add_argument(
        "--min_confidence", type=float, help="say 'nothing found' below this (default: the model's own threshold)"
    )
    parser.add_argument("-k", type=int, default=5, help="results a query (default: 5)")
    parser.add_argument(
        "--where",
        action="append",
        help="only items with this, e.g. category=animals or year>=2020 (also != <= < >); repeated: all of them, several = "
        "on one column: any of these",
    )
    parser.add_argument(
        "--index",
        default="auto",
        help="auto (what 'altmoe index' has kept; else exact for a small store, approximate for a large one), exact, a FAISS "
        "factory string, or a database's address, milvus://... or postgresql://... (default: auto)",
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="make an index in memory where the kept one does not fit any more"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write a page with queries, hits and pictures")
    parser.add_argument(
        "--data",
        help="data set with the pictures for --html: folder, file or Hub name; its column 'id' matches the store's "
        "(default: a column of the store that names picture files)",
    )


def run(arguments: argparse.Namespace) -> list[dict]:
    """Search; `[{"query", "kind", "direction", "index", "confidence", "found", "hits"}, ...]`.

    Raises:
        ValueError: no query, unknown direction, a bad picture or condition, a store of another protocol, or a kept index
            that does not fit.
        OSError: no such model, store or encoder.
    """
    if arguments.min_confidence is not None and not 0 <= arguments.min_confidence <= 1:
        raise ValueError(f"--min_confidence {arguments.min_confidence}: expected a probability from 0 to 1.")
    given = {m: getattr(arguments, m) for m in ("text", "image", "audio") if getattr(arguments, m)}
    if not given:
        raise ValueError("No query: give --text, --image or --audio.")
    store = None if arguments.store == "-" else open_store(arguments.store)
    held, columns = _held(arguments) if store is None else (store.modality, store.columns)
    model = AltMoEModel.from_pretrained(arguments.model)
    where = parse_where(arguments.where or [], columns)
    processor = AltMoEProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    results = []
    for modality, queries in given.items():
        direction = arguments.direction or f"{modality}->{held}"
        model.config.resolve(direction)
        index = open_index(model, store, direction, arguments.index, rebuild=arguments.rebuild)
        items = [processor.read(modality, item) for item in queries]
        with torch.inference_mode():
            latents = model.encode(modality, processor.batch(modality, items), adapted=True)
        for query, hits in zip(queries, index.search(latents, arguments.k, where), strict=True):
            if arguments.min_confidence is not None:
                hits.threshold = arguments.min_confidence
            about = {"query": query, "kind": modality, "direction": direction, "index": index.describe()}
            results.append({**about, "confidence": hits.confidence, "found": hits.found, "hits": hits})
    return results


def _held(arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The modality and the columns of a database that is searched without a store."""
    if "://" not in arguments.index:
        raise ValueError(f"'-' instead of a store needs a database: --index {arguments.index} is none.")
    from serving.databases import look

    modality, columns = look(arguments.index)
    if modality is None and arguments.direction is None:
        raise ValueError("The table does not say of which modality its vectors are: give --direction.")
    return modality, columns


def show(query: str, direction: str, hits: Hits) -> str:
    """One query's results as a small table."""
    lines = [f"{direction}: {query}"]
    if hits.confidence is not None:
        if hits.found:
            lines[0] += f"  (the first is a match with {100 * hits.confidence:.0f} % confidence)"
        else:
            lines[0] += (
                f"  nothing found: {100 * hits.confidence:.0f} % confidence, "
                f"{100 * hits.threshold:.0f} % asked for; nearest:"
            )
    if not hits:
        lines.append("  no item meets the conditions")
    for place, hit in enumerate(hits, 1):
        about = ", ".join(f"{name}: {value}" for name, value in hit.columns.items() if name not in ("group", "key"))
        lines.append(f"  {place:2}. {hit.score:7.3f}  {hit.id:40.40}  {about}")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    """Run and print."""
    results = run(arguments)
    if arguments.html:
        pictures = pictures_of(arguments.data, Path(arguments.store))
        searched = results[0]["index"] if arguments.store == "-" else arguments.store
        title = f"{searched}, searched by {arguments.model}"
        Path(arguments.html).write_text(contact_sheet(title, results, pictures), encoding="utf-8")
    if arguments.json:
        shown = [{**r, "hits": [vars(hit) for hit in r["hits"]]} for r in results]
        json.dump(shown, sys.stdout, indent=2, default=str)  # dates have no JSON of their own
        print()
        return
    for index in dict.fromkeys(r["index"] for r in results):
        print(f"index: {index}\n")
    print("\n\n".join(show(r["query"], r["direction"], r["hits"]) for r in results))
    if arguments.html:
        print(f"\nwritten: {arguments.html}")

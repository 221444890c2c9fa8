"""`altmoe search`: a store, searched with a text, a picture or a sound."""

import argparse
import json
import sys

import torch

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.search_altmoe import Hits, LatentIndex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("store", help="folder of the LatentStore to search")
    parser.add_argument("--model", required=True, help="trained or published model: folder or Hub name")
    parser.add_argument("--text", action="append", help="a query in words (may be repeated)")
    parser.add_argument("--image", action="append", help="a picture as the query (may be repeated)")
    parser.add_argument("--audio", action="append", help="a sound file as the query (may be repeated)")
    parser.add_argument("--direction", help="e.g. image->text; default: from the query's modality to the store's")
    parser.add_argument(
        "--min_confidence", type=float, help="say 'nothing found' below this (default: the model's own threshold)"
    )
    parser.add_argument("-k", type=int, default=5, help="results a query (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> list[dict]:
    """Search; `[{"query", "direction", "hits", "confidence", "found"}, ...]`.

    Raises:
        ValueError: no query, unknown direction, a bad picture, or a store of another protocol.
        OSError: no such model, store or encoder.
    """
    if arguments.min_confidence is not None and not 0 <= arguments.min_confidence <= 1:
        raise ValueError(f"--min_confidence {arguments.min_confidence}: expected a probability from 0 to 1.")
    given = {m: getattr(arguments, m) for m in ("text", "image", "audio") if getattr(arguments, m)}
    if not given:
        raise ValueError("No query: give --text, --image or --audio.")
    store = LatentStore.open(arguments.store)
    model = AltMoEModel.from_pretrained(arguments.model)
    processor = AltMoEProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    results = []
    for modality, queries in given.items():
        direction = arguments.direction or f"{modality}->{store.modality}"
        model.config.resolve(direction)
        index = LatentIndex(model, store, direction)
        items = [processor.read(modality, item) for item in queries]
        with torch.inference_mode():
            latents = model.encode(modality, processor.batch(modality, items), adapted=True)
        for query, hits in zip(queries, index.search(latents, arguments.k), strict=True):
            if arguments.min_confidence is not None:
                hits.threshold = arguments.min_confidence
            about = {"confidence": hits.confidence, "found": hits.found}
            results.append({"query": query, "direction": direction, **about, "hits": hits})
    return results


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
    for place, hit in enumerate(hits, 1):
        about = ", ".join(f"{name}: {value}" for name, value in hit.columns.items() if name not in ("group", "key"))
        lines.append(f"  {place:2}. {hit.score:7.3f}  {hit.id:40.40}  {about}")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    """Run and print."""
    results = run(arguments)
    if arguments.json:
        json.dump([{**r, "hits": [vars(hit) for hit in r["hits"]]} for r in results], sys.stdout, indent=2)
        print()
        return
    print("\n\n".join(show(r["query"], r["direction"], r["hits"]) for r in results))

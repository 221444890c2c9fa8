"""`altmoe index`: make a search index once and keep it beside its store, or fill a database."""

import argparse
import time

from tqdm.auto import tqdm

from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.index_altmoe import BATCH_ROWS
from modeling_altmoe.index_files_altmoe import update


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("store", help="folder of the LatentStore that will be searched")
    parser.add_argument("--model", required=True, help="trained or published model: folder or Hub name")
    parser.add_argument(
        "--direction", action="append", help="e.g. text->image (may be repeated); default: all that lead to the store"
    )
    parser.add_argument(
        "--index",
        default="auto",
        help="auto (exact for a small store, approximate for a large one), exact, a FAISS factory string such as "
        "IVF1024,RaBitQ or HNSW32, or a database's address, milvus://... or postgresql://... (default: auto)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.99,
        help="share of the true ten best that an approximate index is to find, measured with training queries; how hard "
        "it looks is chosen by it (default: 0.99)",
    )
    parser.add_argument("--fresh", action="store_true", help="make it anew, also where only rows are to be added")


def run(arguments: argparse.Namespace) -> list[str]:
    """Make or bring up to date; a line a direction that says what was done.

    Raises:
        ValueError: no direction leads to the store, an unknown one, or an index that does not fit.
        OSError: no such model or store, or the folder cannot be written.
        RuntimeError: another process makes the same index.
    """
    store = LatentStore.open(arguments.store)
    model = AltMoEModel.from_pretrained(arguments.model, load_encoders=False).eval()
    directions = arguments.direction or [d for d in model.directions if model.config.resolve(d)[1] == store.modality]
    if not directions:
        raise ValueError(
            f"No direction of {', '.join(model.directions)} leads to '{store.modality}', the store's modality."
        )
    for direction in directions:
        _, target = model.config.resolve(direction)
        store.check(target, model.config.encoders[target])
    if "://" in arguments.index:
        from serving.ingest import ingest

        counts = ingest(store, arguments.index, model, directions)
        return [f"{', '.join(directions)}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())]
    lines = []
    for direction in directions:
        start = time.time()

        def progress(batches, direction=direction):
            return tqdm(batches, desc=f"{direction}, {BATCH_ROWS:,} rows a batch", unit="batch")

        backend, folder, done = update(
            model, store, direction, arguments.index, arguments.recall, arguments.fresh, progress
        )
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        lines.append(
            f"{direction}: {done} in {time.time() - start:.0f} s: {backend.describe()}; {size:.0f} MB in {folder}"
        )
    return lines


def main(arguments: argparse.Namespace) -> None:
    """Run and print."""
    print("\n".join(run(arguments)))

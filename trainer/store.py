"""`altmoe store`: look at a LatentStore, delete rows, compact it."""

import argparse
from pathlib import Path

from modeling_altmoe import LatentStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("store", help="folder of the LatentStore")
    parser.add_argument("--delete", nargs="+", default=[], metavar="ID", help="delete the rows of these ids")
    parser.add_argument(
        "--delete_file", metavar="FILE", help="delete the rows of the ids in this text file, one a line"
    )
    parser.add_argument("--compact", action="store_true", help="rewrite into full shards, without the deleted rows")


def describe(store: LatentStore) -> str:
    """A few lines: rows, shards, what made the latents."""
    size = sum(path.stat().st_size for path in store.shards)
    protocol = ", ".join(
        f"{name} {value}" for name, value in store.protocol.to_dict().items() if value not in ("", None)
    )
    return "\n".join(
        [
            f"{store.path}: {len(store)} '{store.modality}' latents, {store.latent_size}-d {store.dtype}",
            f"  shards    {len(store.shards)}, {size / 1e6:.1f} MB, {store.deleted} deleted rows in them",
            f"  columns   id{''.join(f', {name} ({kind})' for name, kind in store.columns.items())}",
            f"  encoder   {store.encoder.get('name_or_path') or 'known by its protocol only'}",
            f"  protocol  {store.fingerprint}: {protocol}",
            f"  content   {store.content}",
        ]
    )


def main(arguments: argparse.Namespace) -> None:
    """Delete, compact, describe: in this order.

    Raises:
        FileNotFoundError: no store, or no file with ids.
        RuntimeError: another process writes there.
        OSError: the folder cannot be written.
    """
    store = LatentStore.open(arguments.store)
    ids = list(arguments.delete)
    if arguments.delete_file:
        ids += [line for line in Path(arguments.delete_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if ids:
        absent = [name for name, there in zip(ids, store.has(ids), strict=True) if not there]
        deleted = store.delete(ids, missing_ok=True)  # so that a command that was killed can be given again
        print(f"rows deleted: {deleted}; ids that were not there: {len(set(ids)) - deleted}", end="")
        print(f" (e.g. {', '.join(absent[:3])})" if absent else "")
    if arguments.compact:
        store.compact()
    print(describe(store))

"""`altmoe encode --check`: what is wrong with a LatentStore, if anything, and does it hold what the data set holds.

Comes in: a store, and perhaps the data it was made from. Goes out: a small report, and a list of faults. All vectors are
read once, a few at a time; 16 bytes a row stay in memory.
"""

from dataclasses import dataclass, field

import numpy as np

from modeling_altmoe import LatentStore
from modeling_altmoe.shards_altmoe import SHARD_NAME, file_digest, hash_ids
from trainer.encode import read_skipped
from trainer.items import RawItems

TOLERANCE = {"float32": 1e-3, "float16": 1e-2}  # how far from 1 the norm of a normalised vector may lie


@dataclass
class Report:
    """What was found: `facts` for reading, `faults` that make the store unfit (none: the store is sound)."""

    facts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [*self.facts, *(f"FAULT: {fault}" for fault in self.faults), *([] if self.faults else ["sound"])]
        )


def _examples(store: LatentStore, rows: np.ndarray) -> str:
    return f"{len(rows)} (e.g. {', '.join(store.column('id', rows[:3]))})"


def _same(store: LatentStore, keys: np.ndarray, equal, batch: int = 4096) -> np.ndarray:
    """Rows that equal another row of the same key, by pairs `equal(rows, rows) -> boolean` decides on."""
    order = np.argsort(keys, kind="stable")
    at = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    found = []
    for start in range(0, len(at), batch):
        first, second = order[at[start : start + batch]], order[at[start : start + batch] + 1]
        found.append(second[equal(first, second)])
    return np.sort(np.concatenate(found)) if found else at


def check_store(store: LatentStore) -> Report:
    """Verify rows, norms, ids, and every shard's bytes and protocol (a shard of another protocol cannot even be opened).

    Args:
        store: open; not written to meanwhile.
    """
    report = Report()
    report.facts.append(
        f"{store.path}: {len(store)} '{store.modality}' latents, {store.latent_size}-d {store.dtype}, in "
        f"{len(store.shards)} shards; {store.deleted} deleted rows wait to be compacted; columns: id, {', '.join(store.columns)}"
    )
    report.facts.append(f"protocol {store.fingerprint} in every shard; content {store.content}")
    undigested = 0
    for path in store.shards:
        digest = SHARD_NAME.fullmatch(path.name)[3]
        undigested += digest is None
        if digest and file_digest(path) != digest:
            report.faults.append(f"shard '{path.name}': its bytes have changed since it was written")
    if undigested:
        report.facts.append(f"{undigested} shards are of the first format, which kept no digest of their bytes")
    ids, vectors = np.empty(len(store), dtype="<u8"), np.empty(len(store), dtype="<u8")
    odd = np.random.default_rng(0).integers(0, 2**63, store.latent_size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    bad, zero, norms, start = [], [], [], 0
    for names, latents, _ in store.batches(4096):
        rows, stop = latents.numpy(), start + len(names)
        ids[start:stop] = hash_ids(names)
        vectors[start:stop] = (rows.view(np.uint32).astype(np.uint64) * odd).sum(1)
        norm = np.linalg.norm(rows, axis=1)
        bad.append(start + np.flatnonzero(~np.isfinite(rows).all(1)))
        zero.append(start + np.flatnonzero(norm == 0))
        off = np.abs(norm - 1) > TOLERANCE[store.dtype]
        norms.append(start + np.flatnonzero(off & (norm > 0)))
        start = stop
    bad, zero, norms = (np.concatenate(part) if part else np.empty(0, np.int64) for part in (bad, zero, norms))
    if len(bad):
        report.faults.append(f"NaN or infinity in {_examples(store, bad)}")
    if len(zero):
        report.faults.append(f"nothing but zeros in {_examples(store, zero)}")
    if store.protocol.normalize:
        if len(norms):
            report.faults.append(f"the protocol normalises, but the norm is not 1 in {_examples(store, norms)}")
        else:
            report.facts.append(f"norms: 1, within {TOLERANCE[store.dtype]}")
    doubled = _same(store, ids, lambda a, b: np.array(store.column("id", a)) == np.array(store.column("id", b)))
    if len(doubled):
        report.faults.append(f"ids that are there before: {_examples(store, doubled)}")
    same = _same(store, vectors, lambda a, b: (store.take(a) == store.take(b)).all(1).numpy())
    if len(same):
        report.facts.append(f"vectors that equal another one, which may be right: {_examples(store, same)}")
    return report


def check_against(store: LatentStore, data: RawItems, report: Report) -> None:
    """Compare ids with those of the data set; what differs becomes a fault, except what was skipped as bad."""
    count, missing, examples, skipped, bad = 0, 0, [], read_skipped(store), []
    for block in data.blocks():
        absent = np.flatnonzero(store.rows_of(block.ids) < 0)
        names = [block.ids[place] for place in absent]
        unknown = [name for name in names if name not in skipped]
        count, missing, bad = count + len(block.ids), missing + len(names), bad + [n for n in names if n in skipped]
        examples += unknown[: 3 - len(examples)]
    report.facts.append(f"data: {count} items")
    if bad:
        report.facts.append(f"skipped as bad when encoding: {len(bad)} (e.g. {bad[0]}: {skipped[bad[0]]})")
    if missing > len(bad):
        report.faults.append(
            f"{missing - len(bad)} items of the data are not in the store (e.g. {', '.join(examples)}): encoding is not done"
        )
    if len(store) > count - missing:
        report.faults.append(f"{len(store) - count + missing} rows of the store are not in the data, or its ids repeat")


def main(arguments) -> None:
    """Print the report; exit code 1 if there are faults."""
    try:
        store = LatentStore.open(arguments.out)
    except ValueError as error:  # damaged, or a shard of another protocol
        print(f"FAULT: {error}")
        raise SystemExit(1) from error
    report = check_store(store)
    if arguments.data:
        column = arguments.column or arguments.modality or store.modality
        places = (arguments.split, arguments.streaming, arguments.id_column, arguments.keep, arguments.limit)
        check_against(store, RawItems(arguments.data, column, *places), report)
    print(report)
    if report.faults:
        raise SystemExit(1)

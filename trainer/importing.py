"""`altmoe import`: vectors that somebody has already become a LatentStore, by naming the protocol that made them.

Comes in: a source of vectors (see `trainer.vectors`) and the protocol: an encoder with its pooling, or a store or model to
be like. Goes out: a store that is searched from another modality without encoding anything again. Whatever speaks against
the claim (another width, NaN, lengths that are not 1, a sample encoded anew) is said before the long work starts.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Value
from tqdm.auto import tqdm
from transformers import AutoConfig

from modeling_altmoe import AltMoEConfig, AltMoEModel, AltMoEProcessor, LatentProtocol, LatentStore
from modeling_altmoe.attaching_altmoe import infer_latent_size, load_encoder, verify_encoder
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.encoding_altmoe import COMBINATIONS, POOLINGS, encode_latents
from modeling_altmoe.latents_altmoe import DESCRIPTION, DTYPES
from modeling_altmoe.processing_altmoe import ItemError
from modeling_altmoe.sharing_altmoe import is_folder
from trainer.encode import load_processor, prepare_encoder
from trainer.items import RESERVED, open_data
from trainer.vectors import KINDS, VectorSource, open_source

SAMPLE = 16  # items encoded anew by --verify
ALIKE = 0.98  # mean cosine that --verify asks for; half precision and other batch sizes cost less than 0.001
NORM_TOLERANCE = 1e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "source", help=f"vectors: a file or address ({', '.join(sorted(KINDS))}), or a data set (folder or Hub name)"
    )
    parser.add_argument("--out", required=True, help="folder of the LatentStore; an unfinished one is continued")
    parser.add_argument("--modality", required=True, help="what the vectors are of: text, image, audio, ...")
    parser.add_argument(
        "--like", help="made as in this LatentStore, or as the encoder of this model (folder or Hub name)"
    )
    parser.add_argument("--encoder", help="made by this encoder: Hub name or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the encoder")
    parser.add_argument(
        "--pooling", default="mean", help=f"over tokens (default: mean): {', '.join(POOLINGS)}, or mean+std"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="hidden states that were used (default: the last)")
    parser.add_argument("--combine", default="mean", choices=COMBINATIONS, help="several layers: mean or concat")
    parser.add_argument("--prompt", default="", help="text that was put before every item")
    parser.add_argument(
        "--unnormalized", action="store_true", help="the encoder's protocol does not divide by the norm"
    )
    parser.add_argument("--vectors", help="array, tensor or column with the vectors, where several could be")
    parser.add_argument("--split", help="split of a data set that has several (default: train)")
    parser.add_argument(
        "--ids",
        help="column, or text file with an id a line (default: the source's own, a column 'id', or the row number)",
    )
    parser.add_argument(
        "--metadata", help="data set with a row for each vector, in the same order: its plain columns are kept as well"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="stored as (default: as in the source)")
    parser.add_argument("--normalize", action="store_true", help="divide the vectors by their norm")
    parser.add_argument(
        "--drop_bad", action="store_true", help="leave out vectors with NaN or only zeros, instead of ending"
    )
    parser.add_argument(
        "--verify",
        metavar="COLUMN",
        help=f"encode {SAMPLE} items of this column (text, file names) and compare the vectors",
    )


# ---------------------------------------------------------------- the protocol


def find_protocol(arguments: argparse.Namespace, source: VectorSource) -> tuple[dict[str, Any], Callable]:
    """What the user says made the vectors, checked against their width.

    Returns:
        the entry for `AltMoEConfig.encoders`, and a function that loads `(encoder, AltMoEProcessor)`.

    Raises:
        ValueError: neither or both of --like and --encoder, another modality, another width.
        OSError: no such store, model or encoder.
    """
    modality, like = arguments.modality, arguments.like
    if bool(like) == bool(arguments.encoder):
        raise ValueError("Say what made the vectors: either --like STORE_OR_MODEL, or --encoder NAME_OR_FOLDER.")
    if not like:
        return _protocol_of_encoder(arguments, source)
    is_folder(like, "a LatentStore or a model")
    is_store = (Path(like) / DESCRIPTION).is_file()
    if is_store:
        store = LatentStore.open(like)
        encoders = {store.modality: store.encoder}
    else:
        encoders = AltMoEConfig.from_pretrained(like).encoders
    if modality not in encoders:
        raise ValueError(f"'{like}': {unknown_name_message('modality', modality, encoders)}")
    entry = encoders[modality]
    _check_width(arguments, entry["latent_size"], source)

    def load() -> tuple:
        if not is_store:
            return AltMoEModel.from_pretrained(like).encoders[modality], AltMoEProcessor.from_pretrained(like)
        name, revision = entry.get("name_or_path"), entry.get("revision")
        if not name:
            raise ValueError(
                f"'{like}' does not say where its encoder is: --verify needs --encoder, or a model as --like."
            )
        encoder, commit = load_encoder(name, entry["protocol"], revision=revision, what=f"{modality} encoder")
        verify_encoder(encoder, entry, modality)
        own = load_processor(name, encoder.main_input_name, **({"revision": commit} if commit else {}))
        return encoder, AltMoEProcessor({modality: own}, {modality: entry["protocol"].get("prompt", "")})

    return entry, load


def _protocol_of_encoder(arguments: argparse.Namespace, source: VectorSource) -> tuple[dict[str, Any], Callable]:
    revision = {"revision": arguments.revision} if arguments.revision else {}
    if arguments.combine == "mean":
        with contextlib.suppress(OSError):  # before any weights are loaded; loading them says what is wrong
            _check_width(
                arguments, infer_latent_size(AutoConfig.from_pretrained(arguments.encoder, **revision)), source
            )
    named = argparse.Namespace(**{**vars(arguments), "normalize": not arguments.unnormalized})
    encoder, own, entry = prepare_encoder(named)
    _check_width(arguments, entry["latent_size"], source)
    processor = AltMoEProcessor({arguments.modality: own}, {arguments.modality: arguments.prompt})
    return entry, lambda: (encoder, processor)


def _check_width(arguments: argparse.Namespace, expected: int, source: VectorSource) -> None:
    if expected != source.size:
        raise ValueError(
            f"'{source.name}' holds vectors of width {source.size}; '{arguments.like or arguments.encoder}' makes vectors of "
            f"width {expected}: they are from another encoder."
        )


# ---------------------------------------------------------------- rows with ids and metadata


class Rows:
    """A source together with its ids and metadata: iterates over `(ids, vectors, columns)`.

    Args:
        source: the vectors.
        ids: column, text file, or None.
        metadata: name of a data set of as many rows, or None.

    Raises:
        ValueError: no such column; another number of rows.
        FileNotFoundError: no such file.
    """

    def __init__(self, source: VectorSource, ids: str | None = None, metadata: str | None = None):
        self.source, self.columns, self.data = source, dict(source.columns), None
        if metadata:
            self.data = open_data(metadata)
            self._same_length(metadata, len(self.data))
            plain = {name: f.dtype for name, f in self.data.features.items() if isinstance(f, Value)}
            self.columns.update(plain)
            self._plain = self.data.select_columns(list(plain))
        self.id_lines = None
        self.id_column = "id" if ids is None and "id" in self.columns else ids
        if ids and ids not in self.columns:
            if not Path(ids).is_file():
                raise ValueError(f"--ids: {unknown_name_message('column', ids, self.columns)} Nor is it a file.")
            self.id_column, self.id_lines = None, Path(ids).read_text(encoding="utf-8").splitlines()
            self._same_length(ids, len(self.id_lines))
        for name in (*RESERVED, self.id_column):
            self.columns.pop(name, None)

    def _same_length(self, name: str, count: int) -> None:
        if self.source.rows is not None and count != self.source.rows:
            raise ValueError(f"'{name}' has {count} rows, '{self.source.name}' has {self.source.rows} vectors.")

    def __iter__(self) -> Iterator[tuple[list[str], np.ndarray, dict[str, list]]]:
        start = 0
        for names, vectors, columns in self.source.read():
            stop = start + len(vectors)
            if self.data is not None:
                columns = {**columns, **self._plain[start:stop]}
            if self.id_lines is not None:
                names = self.id_lines[start:stop]
            elif self.id_column is not None:
                names = columns[self.id_column]
            elif names is None:
                names = range(start, stop)
            yield [str(name) for name in names], vectors, {name: columns[name] for name in self.columns}
            start = stop


# ---------------------------------------------------------------- what speaks against the claim


def inspect(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are unusable (NaN, infinity, only zeros), and the norm of each, `(n,)`."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return ~np.isfinite(norms) | (norms == 0), norms


class Inspection:
    """Counts over all rows that were looked at, and a seeded sample of them.

    Args:
        rows: of the source; None if unknown (then the sample is its first rows).
    """

    def __init__(self, rows: int | None):
        chosen = range(SAMPLE)
        if rows is not None and rows > SAMPLE:
            chosen = np.random.default_rng(0).choice(rows, SAMPLE, replace=False)
        self.chosen = {int(row) for row in chosen}
        self.sample: list[tuple[int, np.ndarray, dict[str, Any]]] = []
        self.seen = 0
        self.bad, self.off = 0, 0
        self.first_bad: int | None = None
        self.first_off: tuple[int, float] | None = None

    def add(self, vectors: np.ndarray, columns: dict[str, list]) -> None:
        """Look at some more rows."""
        bad, norms = inspect(vectors)
        off = ~bad & (np.abs(norms - 1) > NORM_TOLERANCE)
        if bad.any() and self.first_bad is None:
            self.first_bad = self.seen + int(bad.argmax())
        if off.any() and self.first_off is None:
            self.first_off = self.seen + int(off.argmax()), float(norms[off.argmax()])
        self.bad, self.off = self.bad + int(bad.sum()), self.off + int(off.sum())
        for place in range(len(vectors)) if len(self.sample) < len(self.chosen) else ():
            if self.seen + place in self.chosen and not bad[place]:
                row = {name: values[place] for name, values in columns.items()}
                self.sample.append((self.seen + place, np.array(vectors[place], dtype=np.float32), row))
        self.seen += len(vectors)


def look(rows: Rows) -> Inspection:
    """Read all rows once (only the first of a database) before anything is written."""
    found = Inspection(rows.source.rows if rows.source.reads_twice else None)
    for _, vectors, columns in rows:
        found.add(vectors, columns)
        if not rows.source.reads_twice:
            break
    return found


def verify(found: Inspection, rows: Rows, column: str, entry: dict, modality: str, load: Callable) -> str:
    """Encode a sample anew and compare it with its vectors; a sentence for the report.

    Raises:
        ValueError: no such column, or the vectors differ: naming the mean cosine, and another pooling if it fits.
    """
    names = rows.data.column_names if rows.data is not None else []
    if column in names:
        raw = {row: rows.data[row][column] for row, *_ in found.sample}
    elif column in rows.columns:
        raw = {row: columns[column] for row, _, columns in found.sample}
    else:
        raise ValueError(f"--verify: {unknown_name_message('column', column, [*rows.columns, *names])}")
    encoder, processor = load()
    items, vectors = [], []
    for row, vector, _ in found.sample:
        with contextlib.suppress(ItemError):  # bad items have no vector to compare with
            items.append(processor.read(modality, raw[row]))
            vectors.append(vector)
    if not items:
        raise ValueError(f"--verify {column}: none of {len(found.sample)} sampled items can be read as {modality}.")
    protocol, tensors = LatentProtocol.from_dict(entry["protocol"]), processor.batch(modality, items)

    def cosines(pooling: str) -> torch.Tensor:
        with torch.inference_mode():
            again = encode_latents(encoder, tensors, dataclasses.replace(protocol, pooling=pooling))
        return torch.cosine_similarity(again.cpu(), torch.from_numpy(np.stack(vectors)))

    here = cosines(protocol.pooling)
    if here.mean() >= ALIKE:
        return (
            f"verified: {len(items)} items encoded anew agree (mean cosine {here.mean():.4f}, lowest {here.min():.4f})"
        )
    hint = ""
    for pooling in POOLINGS if len(protocol.poolings) == 1 else ():
        with contextlib.suppress(ValueError):  # not every encoder has a pooler
            if pooling != protocol.pooling and (other := cosines(pooling).mean()) >= ALIKE:
                hint = f" With --pooling {pooling} it is {other:.4f}: that is what made them."
    raise ValueError(
        f"The vectors of '{rows.source.name}' were not made as you say: {len(items)} items of '{column}' encoded anew have a "
        f"mean cosine of {here.mean():.4f} with their vectors (expected at least {ALIKE}). Check encoder, revision, pooling "
        f"('{protocol.pooling}'), layers and prompt ('{protocol.prompt}').{hint}"
    )


def judge(found: Inspection, name: str, arguments: argparse.Namespace, normalised: bool) -> None:
    """Raise for rows that cannot be taken as they are.

    Raises:
        ValueError: NaN or zero rows (without --drop_bad), or norms that the protocol excludes (without --normalize).
    """
    if found.bad and not arguments.drop_bad:
        raise ValueError(
            f"{found.bad} of {found.seen} vectors of '{name}' hold NaN, infinity or only zeros (the first in row "
            f"{found.first_bad}). Mend them, or leave them out with --drop_bad."
        )
    if normalised and found.off and not arguments.normalize:
        row, norm = found.first_off
        raise ValueError(
            f"The protocol normalises, but {found.off} of {found.seen} vectors of '{name}' have another length "
            f"than 1 (row {row}: {norm:.4g}). Give --normalize to divide them by it, or --unnormalized if the encoder's "
            "vectors are to keep their lengths."
        )


# ---------------------------------------------------------------- the work


def import_vectors(arguments: argparse.Namespace) -> dict[str, int]:
    """Check everything, then write.

    Returns:
        `{"written", "present", "dropped", "rows"}`.

    Raises:
        ValueError: see `open_source`, `find_protocol`, `judge`, `verify`; ids that repeat.
        OSError: no such source, encoder or model; a folder that cannot be written.
        RuntimeError: another process writes to the store.
    """
    options = {"split": arguments.split} if arguments.split else {}
    source = open_source(arguments.source, arguments.vectors, **options)
    if source.warning:
        print(f"note: '{source.name}': {source.warning}")
    rows = Rows(source, arguments.ids, arguments.metadata)
    entry, load = find_protocol(arguments, source)
    protocol = LatentProtocol.from_dict(entry.get("protocol") or {})
    found = look(rows)
    if not found.seen:
        raise ValueError(f"'{source.name}' holds no vectors.")
    judge(found, source.name, arguments, protocol.normalize)
    if arguments.verify:
        print(verify(found, rows, arguments.verify, entry, arguments.modality, load))
    dtype = arguments.dtype or source.dtype
    written, present, dropped = 0, 0, 0
    with (
        LatentStore.create(arguments.out, arguments.modality, entry, dtype=dtype, columns=rows.columns) as store,
        tqdm(total=source.rows, desc="importing", unit="vector") as bar,
    ):
        before = len(store)
        for names, vectors, columns in rows:
            there, (bad, norms) = store.rows_of(names), inspect(vectors)
            part = Inspection(0)
            part.add(vectors, {})
            judge(part, source.name, arguments, protocol.normalize)
            old = (there >= 0) & (there < before)  # what this run wrote itself is a repeated id, which append refuses
            keep = np.flatnonzero(~old & ~bad)
            present, dropped, written = present + int(old.sum()), dropped + int((bad & ~old).sum()), written + len(keep)
            chosen = vectors[keep].astype(np.float32)
            if arguments.normalize:
                chosen = chosen / norms[keep, None].astype(np.float32)
            about = {name: [values[place] for place in keep] for name, values in columns.items()}
            store.append([names[place] for place in keep], chosen, **about)
            bar.update(len(names))
    return {"written": written, "present": present, "dropped": dropped, "rows": len(store)}


def main(arguments: argparse.Namespace) -> None:
    """Run and report."""
    result = import_vectors(arguments)
    print(
        f"{arguments.out}: {result['rows']} latents ({result['written']} new, {result['present']} already there, "
        f"{result['dropped']} bad vectors left out)"
    )

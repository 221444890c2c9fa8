"""`altmoe encode`: every item of a data set through one frozen encoder, once, into a LatentStore.

Comes in: a data set (see `trainer.items`), a column, an encoder (Hub name or folder). Goes out: a store that can be
continued after any interruption, by any number of processes: `torchrun --nproc_per_node 2 -m trainer.encode ...`. A bad
item is reported with its index, skipped and counted; with `--strict` it ends the run.
"""

import json
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from modeling_altmoe import AltMoEProcessor, LatentProtocol, LatentStore
from modeling_altmoe.attaching_altmoe import describe_encoder, load_encoder
from modeling_altmoe.encoding_altmoe import POOLINGS, encode_latents
from modeling_altmoe.processing_altmoe import ItemError
from modeling_altmoe.shards_altmoe import hash_ids, write_file
from trainer.items import Block, Decoder, Item, RawItems, cut

MAIN_INPUTS = {"input_ids": AutoTokenizer, "pixel_values": AutoImageProcessor}
SKIPPED = ".skipped.json"  # stays on this machine: a reason may name a file


@dataclass
class EncodeArguments:
    """Encode one column of a data set with one frozen encoder."""

    out: str = field(metadata={"help": "folder of the LatentStore; an unfinished one is continued"})
    data: str | None = field(
        default=None, metadata={"help": "data set: saved folder, image folder, .jsonl/.csv/.parquet file or Hub name"}
    )
    encoder: str | None = field(default=None, metadata={"help": "encoder: Hub name or local folder"})
    modality: str | None = field(default=None, metadata={"help": "name of the modality, e.g. image, text, audio"})
    column: str | None = field(default=None, metadata={"help": "column to encode (default: the modality's name)"})
    split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    streaming: bool = field(
        default=False, metadata={"help": "read the data set as a stream, without downloading it whole"}
    )
    id_column: str = field(
        default="id",
        metadata={
            "help": "unique ids (default: id; without such a column, the file's place in the folder, or the row number)"
        },
    )
    keep: list[str] | None = field(
        default=None, metadata={"help": "columns kept beside the latents (default: all plain ones)"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the encoder"})
    pooling: str = field(
        default="mean",
        metadata={"help": f"pooling over tokens: {', '.join(POOLINGS)}, or several side by side, as in mean+std"},
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "hidden states to use, e.g. -2 -1 (default: the last)"}
    )
    combine: str = field(
        default="mean", metadata={"help": "several layers: mean, or concat (side by side, each divided by its norm)"}
    )
    prompt: str = field(default="", metadata={"help": "text put before every caption"})
    normalize: bool = field(
        default=True,
        metadata={
            "help": "divide every latent by its L2 norm, as sentence-transformers' normalize_embeddings does; "
            "--no_normalize keeps it as the encoder and the pooling make it, and is another protocol"
        },
    )
    dtype: str = field(default="float32", metadata={"help": "stored as float32 or float16"})
    batch_size: int | None = field(
        default=None, metadata={"help": "items a batch (default: 64 on a GPU; on a CPU 4 pictures or sounds, 32 texts)"}
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "processes that decode (default: none on a CPU and for texts, else up to 8; several ranks share them)"
        },
    )
    shard_seconds: float = field(
        default=120,
        metadata={"help": "write what is encoded at least this often; a killed run loses no more than that"},
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ... or auto"})
    limit: int | None = field(default=None, metadata={"help": "encode only the first so many items"})
    strict: bool = field(default=False, metadata={"help": "end at the first bad item instead of skipping it"})
    check: bool = field(
        default=False,
        metadata={
            "help": "encode nothing: verify the store (with --data, against the data as well); 1 is the exit code of faults"
        },
    )


def load_processor(encoder_name: str, main_input_name: str, **hub_kwargs):
    """The tokenizer, image processor or feature extractor that belongs to an encoder, by its main input.

    Raises:
        OSError: the encoder's repository has none.
    """
    loader = MAIN_INPUTS.get(main_input_name, AutoFeatureExtractor)
    extra = {"backend": "pil"} if loader is AutoImageProcessor else {}  # the same pixels with and without torchvision
    try:
        return loader.from_pretrained(encoder_name, **extra, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"'{encoder_name}' has no usable {loader.__name__.removeprefix('Auto').lower()}: "
            f"{str(error).splitlines()[0]}"
        ) from error


class Todo:
    """Which items are still to be encoded here: this rank's share (by the hash of the id), without those in the store.

    Args:
        store: open for writing.
    """

    def __init__(self, store: LatentStore):
        self.store, self.rows_before = store, len(store)
        self.on_their_way: set[str] = set()  # read, not appended yet: a few batches
        self.present = 0
        self.repeated: list[tuple[int, str]] = []

    def choose(self, block: Block) -> list[Item]:
        """Read the items of a block that are to be encoded."""
        mine = hash_ids(block.ids) % self.store.world == self.store.rank
        rows, there, places = self.store.rows_of(block.ids), self.store.has(block.ids), []
        for place, name in enumerate(block.ids):
            if not mine[place]:
                continue
            if 0 <= rows[place] < self.rows_before:
                self.present += 1
            elif there[place] or name in self.on_their_way:
                self.repeated.append((block.start + place, name))
            else:
                self.on_their_way.add(name)
                places.append(place)
        return block.read(places) if places else []


def prepare_encoder(arguments) -> tuple:
    """Load the encoder and describe what its latents are: `(encoder, its processor, entry for AltMoEConfig.encoders)`.

    Args:
        arguments: with `encoder`, `modality`, `revision`, `pooling`, `layers`, `combine`, `prompt` and `normalize`.

    Raises:
        ValueError, OSError: unknown pooling, no such encoder.
    """
    fields = {"pooling": arguments.pooling, "layers": tuple(arguments.layers or (-1,)), "prompt": arguments.prompt}
    fields |= {"normalize": arguments.normalize, "combine": arguments.combine}
    protocol = LatentProtocol.from_dict(fields)  # before weights are loaded
    encoder, commit = load_encoder(
        arguments.encoder, fields, revision=arguments.revision, what=f"{arguments.modality} encoder"
    )
    own = load_processor(arguments.encoder, encoder.main_input_name, **({"revision": commit} if commit else {}))
    width = None
    if (
        protocol.layers != (-1,) or protocol.parts > 1
    ):  # no configuration tells the widths of all layers: an empty item does
        processor = AltMoEProcessor({arguments.modality: own})
        blank = {"text": "a", "image": Image.new("RGB", (64, 64))}.get(processor.kind(arguments.modality))
        blank = np.zeros(16000, dtype=np.float32) if blank is None else blank
        with torch.inference_mode():
            width = encode_latents(encoder, processor.batch(arguments.modality, [blank]), protocol).shape[-1]
    return encoder, own, describe_encoder(encoder, arguments.encoder, commit, fields, own, latent_size=width)


def encode(arguments: EncodeArguments) -> dict:
    """Encode a data set. Everything that can be wrong with the arguments is checked before the first item.

    Returns:
        `{"written", "present", "skipped": [(index, reason), ...], "rows"}` of all ranks together.

    Raises:
        ValueError, OSError: missing column, unknown pooling, no such encoder, a store of another protocol.
        RuntimeError: another process writes to the store.
        ItemError: a bad item, with `strict`.
    """
    for name in ("data", "encoder", "modality"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is missing: what to encode, with which encoder, and the name of its modality.")
    data = RawItems(
        arguments.data,
        arguments.column or arguments.modality,
        arguments.split,
        arguments.streaming,
        arguments.id_column,
        arguments.keep,
        arguments.limit,
    )
    on_cpu = arguments.device == "cpu" or (arguments.device == "auto" and not torch.cuda.is_available())
    ranks = PartialState(cpu=on_cpu)  # without a GPU accelerate takes every rank for the only one unless it is told
    encoder, own, entry = prepare_encoder(arguments)
    processor = AltMoEProcessor({arguments.modality: own}, {arguments.modality: arguments.prompt})
    kind = processor.kind(arguments.modality)
    if given := data.unlike(kind):
        takes = kind if kind == "text" else f"{kind}s or names of {kind} files"
        raise ValueError(
            f"Column '{data.column}' of '{arguments.data}' holds {given}, but the encoder '{arguments.encoder}' takes "
            f"{takes}: name another --column or another --encoder."
        )
    device = torch.device(arguments.device if arguments.device != "auto" else _best_device(ranks))
    encoder.to(device)
    size = arguments.batch_size
    if device.type == "cpu" and kind != "text":
        # measured on two cores: small batches stay in the cache, and convolutions like channels last (2-3 times faster)
        encoder.to(memory_format=torch.channels_last)
        size = size or 4
    size = size or (64 if device.type != "cpu" else 32)
    workers = arguments.workers
    if workers is None:
        idle = device.type == "cpu" or kind == "text"
        workers = 0 if idle else min(8, (os.cpu_count() or 1) // ranks.num_processes)
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism

    protocol = LatentProtocol.from_dict(entry["protocol"])
    store = LatentStore.create(
        arguments.out,
        arguments.modality,
        entry,
        dtype=arguments.dtype,
        columns=data.columns,
        rank=ranks.process_index,
        world=ranks.num_processes,
    )
    store.shard_seconds = arguments.shard_seconds
    skipped, reasons, written = [], {}, 0

    def skip(position: int, name: str, reason: str) -> None:
        if arguments.strict:
            raise ItemError(f"item {position} (id '{name}'): {reason}. Without --strict it is skipped.")
        skipped.append((position, reason))
        reasons[name] = reason
        tqdm.write(f"skipped item {position} (id '{name}'): {reason}")

    with store:
        todo = Todo(store)
        batches = cut(map(todo.choose, data.blocks()), size, by_length=kind == "text")
        loader = DataLoader(
            Decoder(processor, arguments.modality), batch_sampler=batches, num_workers=workers, collate_fn=_as_it_is
        )
        total = None if data.count is None else data.count // ranks.num_processes
        quiet = {} if ranks.is_main_process else {"disable": True}
        bar = tqdm(total=total, desc=f"encoding {arguments.modality}", unit="item", **quiet)
        passed = 0
        for items, tensors, bad in loader:
            while todo.repeated:
                skip(*todo.repeated.pop(0), "its id was given before")
            for item, reason in bad:
                skip(item.position, item.id, reason)
            if items:
                tensors = {k: v.to(device) for k, v in tensors.items()}
                with torch.inference_mode():
                    latents = encode_latents(encoder, tensors, protocol)
                usable = torch.isfinite(latents.to(getattr(torch, arguments.dtype))).all(1).cpu()
                for place in (~usable).nonzero().flatten().tolist():
                    reason = f"its latent holds NaN or infinity (as {arguments.dtype})"
                    skip(items[place].position, items[place].id, reason)
                good = [item for item, fine in zip(items, usable.tolist(), strict=True) if fine]
                about = {name: [item.columns[name] for item in good] for name in data.columns}
                store.append([item.id for item in good], latents[usable], **about)
                written += len(good)
            todo.on_their_way.difference_update(item.id for item in (*items, *(item for item, _ in bad)))
            if total is not None and todo.present > passed:  # what was there already must not count as speed
                bar.total, passed = max(0, total - todo.present), todo.present
            bar.update(len(items) + len(bad))
        while todo.repeated:
            skip(*todo.repeated.pop(0), "its id was given before")
        bar.close()
    results, reasons = [{"written": written, "present": todo.present, "skipped": skipped}], [reasons]
    if ranks.num_processes > 1:
        results, reasons = gather_object(results), gather_object(reasons)  # every rank has flushed before it comes here
        store.reload()
    if ranks.is_main_process and any(reasons):
        note_skipped(store, {name: reason for part in reasons for name, reason in part.items()})
    result = {key: sum((part[key] for part in results), start=[] if key == "skipped" else 0) for key in results[0]}
    return {**result, "skipped": sorted(result["skipped"]), "rows": len(store)}


def note_skipped(store: LatentStore, reasons: dict[str, str]) -> None:
    """Keep beside a store which items could not be encoded, and why, together with those of earlier runs."""
    text = json.dumps({**read_skipped(store), **reasons}, indent=1) + "\n"
    write_file(store.path, SKIPPED, lambda file: file.write(text.encode()))


def read_skipped(store: LatentStore) -> dict[str, str]:
    """`{id: reason}` of what could not be encoded into a store.

    Raises:
        ValueError: the file is damaged.
    """
    place = store.path / SKIPPED
    try:
        return json.loads(place.read_text()) if place.exists() else {}
    except ValueError as error:
        raise ValueError(f"'{place}' is damaged ({error}). Delete it and run 'altmoe encode' again.") from error


def _as_it_is(batch):
    return batch


def _best_device(ranks: PartialState) -> str:
    return f"cuda:{ranks.local_process_index}" if torch.cuda.is_available() else "cpu"


def main(arguments: EncodeArguments) -> None:
    """Run and report, or check a store."""
    if arguments.check:
        from trainer.checking import main as check

        return check(arguments)
    result = encode(arguments)
    ranks = PartialState()
    ranks.destroy_process_group()
    if not ranks.is_main_process:
        return
    print(
        f"{arguments.out}: {result['rows']} latents ({result['written']} new, {result['present']} already there, "
        f"{len(result['skipped'])} bad items skipped)"
    )
    if not result["rows"]:
        raise ValueError(f"No item of '{arguments.data}' could be encoded.")


if __name__ == "__main__":  # one process of several: torchrun or accelerate launch
    from trainer.cli import main as altmoe

    altmoe(["encode", *sys.argv[1:]])

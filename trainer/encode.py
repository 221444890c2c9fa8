"""`altmoe encode`: every item of a data set through one frozen encoder, once, into a LatentStore.

Comes in: a data set (saved folder, image folder, JSONL/CSV/Parquet file, or Hub name), a column, an encoder (Hub name
or folder). Goes out: a store that can be continued after any interruption. A bad item is reported with its index,
skipped and counted; with `--strict` it ends the run.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Audio, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from modeling_altmoe import AltMoEProcessor, LatentProtocol, LatentStore
from modeling_altmoe.attaching_altmoe import describe_encoder, load_encoder
from modeling_altmoe.configuration_altmoe import unknown_name_message
from modeling_altmoe.encoding_altmoe import POOLINGS, encode_latents
from modeling_altmoe.processing_altmoe import ItemError

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
MAIN_INPUTS = {"input_ids": AutoTokenizer, "pixel_values": AutoImageProcessor}


@dataclass
class EncodeArguments:
    """Encode one column of a data set with one frozen encoder."""

    data: str = field(metadata={"help": "data set: saved folder, image folder, .jsonl/.csv/.parquet file or Hub name"})
    encoder: str = field(metadata={"help": "encoder: Hub name or local folder"})
    out: str = field(metadata={"help": "folder of the LatentStore; an unfinished one is continued"})
    modality: str = field(metadata={"help": "name of the modality, e.g. image, text, audio"})
    column: str | None = field(default=None, metadata={"help": "column to encode (default: the modality's name)"})
    split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    id_column: str = field(
        default="id", metadata={"help": "unique ids (default: id; without such a column, the row number)"}
    )
    keep: list[str] | None = field(
        default=None, metadata={"help": "columns kept beside the latents (default: all plain ones)"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the encoder"})
    pooling: str = field(default="mean", metadata={"help": f"pooling over tokens: {', '.join(POOLINGS)}"})
    layers: list[int] | None = field(
        default=None, metadata={"help": "hidden states to average, e.g. -2 -1 (default: the last)"}
    )
    prompt: str = field(default="", metadata={"help": "text put before every caption"})
    normalize: bool = field(default=True, metadata={"help": "divide latents by their L2 norm"})
    dtype: str = field(default="float32", metadata={"help": "stored as float32 or float16"})
    batch_size: int | None = field(
        default=None, metadata={"help": "items a batch (default: 64 on a GPU; on a CPU 4 pictures or sounds, 32 texts)"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ... or auto"})
    limit: int | None = field(default=None, metadata={"help": "encode only the first so many items"})
    strict: bool = field(default=False, metadata={"help": "end at the first bad item instead of skipping it"})


def open_data(name: str, split: str = "train") -> Dataset:
    """Open a data set by folder, file or Hub name.

    Raises:
        FileNotFoundError, ValueError: nothing usable there, or no such split.
    """
    path = Path(name)
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        data = load_from_disk(str(path))
    elif path.is_dir():
        data = load_dataset("imagefolder", data_dir=str(path))
    elif path.suffix in FILE_KINDS:
        if not path.is_file():
            raise FileNotFoundError(f"No data file at '{name}'.")
        extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
        data = load_dataset(FILE_KINDS[path.suffix], data_files=str(path), **extra)
    else:
        try:
            data = load_dataset(name)
        except Exception as error:  # the Hub's client raises many kinds
            raise FileNotFoundError(
                f"'{name}' is neither a folder nor a data file here, and loading it from the Hub failed: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(unknown_name_message("split", split, data))
        data = data[split]
    return data


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


def _columns(data: Dataset, arguments: EncodeArguments) -> tuple[str, dict[str, str]]:
    column = arguments.column or arguments.modality
    wanted = [column, *(arguments.keep or [])]
    if arguments.id_column != "id":
        wanted.append(arguments.id_column)
    for name in wanted:
        if name not in data.column_names:
            raise ValueError(f"{arguments.data}: {unknown_name_message('column', name, data.column_names)}")
    plain = {n: f.dtype for n, f in data.features.items() if isinstance(f, Value) and n != arguments.id_column}
    kept = plain if arguments.keep is None else {name: plain[name] for name in arguments.keep if name in plain}
    return column, kept


def encode(arguments: EncodeArguments) -> dict:
    """Encode a data set. Everything that can be wrong with the arguments is checked before the first item.

    Returns:
        `{"written", "present", "skipped": [(index, reason), ...], "rows"}`.

    Raises:
        ValueError, OSError: missing column, unknown pooling, no such encoder, a store of another protocol.
        ItemError: a bad item, with `strict`.
    """
    data = open_data(arguments.data, arguments.split)
    if arguments.limit:
        data = data.select(range(min(arguments.limit, len(data))))
    column, kept = _columns(data, arguments)
    fields = {"pooling": arguments.pooling, "layers": tuple(arguments.layers or (-1,)), "prompt": arguments.prompt}
    fields["normalize"] = arguments.normalize
    LatentProtocol.from_dict(fields)  # before weights are loaded
    encoder, commit = load_encoder(
        arguments.encoder, fields, revision=arguments.revision, what=f"{arguments.modality} encoder"
    )
    hub_kwargs = {"revision": commit} if commit else {}
    own = load_processor(arguments.encoder, encoder.main_input_name, **hub_kwargs)
    entry = describe_encoder(encoder, arguments.encoder, commit, fields, own)
    processor = AltMoEProcessor({arguments.modality: own}, {arguments.modality: arguments.prompt})
    for feature in (Image, Audio):  # decode item by item, so that one bad file does not end the run
        if isinstance(data.features[column], feature):
            data = data.cast_column(column, feature(decode=False))
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    size = arguments.batch_size
    if device == "cpu" and processor.kind(arguments.modality) != "text":
        # measured on two cores: small batches stay in the cache, and convolutions like channels last (2-3 times faster)
        encoder.to(memory_format=torch.channels_last)
        size = size or 4
    size = size or (64 if device != "cpu" else 32)

    has_ids = arguments.id_column in data.column_names
    ids = [str(v) for v in data[arguments.id_column]] if has_ids else [str(i) for i in range(len(data))]
    protocol = LatentProtocol.from_dict(entry["protocol"])
    skipped, written = [], 0
    with LatentStore.create(arguments.out, arguments.modality, entry, dtype=arguments.dtype, columns=kept) as store:
        rows = [row for row, name in enumerate(ids) if name not in store.known_ids]
        present = len(data) - len(rows)
        if processor.kind(arguments.modality) == "text":  # batches of equal length waste no padding
            lengths = [len(str(text)) for text in data[column]]
            rows.sort(key=lambda row: lengths[row])
        bar = tqdm(total=len(rows), desc=f"encoding {arguments.modality}", unit="item")
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            good, items = [], []
            for row, item in zip(batch, data[batch][column], strict=True):
                try:
                    items.append(processor.read(arguments.modality, item))
                    good.append(row)
                except ItemError as error:
                    if arguments.strict:
                        raise ItemError(
                            f"item {row} (id '{ids[row]}'): {error}. Without --strict it is skipped."
                        ) from error
                    skipped.append((row, str(error)))
                    tqdm.write(f"skipped item {row} (id '{ids[row]}'): {error}")
            if good:
                tensors = {k: v.to(device) for k, v in processor.batch(arguments.modality, items).items()}
                with torch.inference_mode():
                    latents = encode_latents(encoder, tensors, protocol)
                about = data.select_columns(list(kept))[good] if kept else {}
                store.append([ids[row] for row in good], latents, **about)
                written += len(good)
            bar.update(len(batch))
        bar.close()
    return {"written": written, "present": present, "skipped": skipped, "rows": len(store)}


def main(arguments: EncodeArguments) -> None:
    """Run and report."""
    result = encode(arguments)
    print(
        f"{arguments.out}: {result['rows']} latents ({result['written']} new, {result['present']} already there, "
        f"{len(result['skipped'])} bad items skipped)"
    )
    if not result["rows"]:
        raise ValueError(f"No item of '{arguments.data}' could be encoded.")

"""`altmoe encode`, `--check` and `altmoe store`: every source gives the same latents, and every fault is named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image as Pictures

from modeling_altmoe import LatentStore
from modeling_altmoe.encoding_altmoe import encode_latents
from modeling_altmoe.processing_altmoe import ItemError
from trainer.cli import main as altmoe
from trainer.encode import EncodeArguments, encode
from trainer.items import Item, RawItems, cut

COLORS = ("red", "green", "blue")


@pytest.fixture
def folder(tmp_path):
    """Pictures in folders that are their labels, one of them broken."""
    for label in ("dark", "light"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number, color in enumerate(COLORS):
            image = Pictures.new("RGB", (40, 30), color)
            (image if label == "dark" else image.point(lambda v: v // 2 + 127)).save(
                tmp_path / "pictures" / label / f"{number}.png"
            )
    (tmp_path / "pictures" / "dark" / "1.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def run(encoder_folders, modality: str, out, **arguments) -> tuple[dict, LatentStore]:
    given = {"encoder": encoder_folders[modality], "modality": modality, "out": str(out), **arguments}
    return encode(EncodeArguments(**given)), LatentStore.open(out)


def same_latents(one: LatentStore, other: LatentStore) -> None:
    assert sorted(one.ids) == sorted(other.ids)
    torch.testing.assert_close(one.latents(), other.take(other.rows_of(one.ids)), atol=1e-5, rtol=0)


def write_texts(path: Path, texts: list[str], **columns) -> str:
    rows = [{"text": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


# ---------------------------------------------------------------- sources


def test_a_folder_of_pictures_is_known_by_its_files(folder, encoder_folders, tmp_path):
    result, store = run(encoder_folders, "image", tmp_path / "store", data=str(folder))
    assert sorted(store.ids) == ["dark/0.png", "dark/2.png", *(f"light/{n}.png" for n in range(3))]
    assert [row for row, _ in result["skipped"]] == [1]
    about = store.columns_of(int(store.rows_of(["light/1.png"])[0]))
    assert about == {"label": "light", "path": str(folder / "light" / "1.png")}
    Pictures.new("RGB", (40, 30), "black").save(folder / "dark" / "00.png")  # every row number after it changes
    again, store = run(encoder_folders, "image", tmp_path / "store", data=str(folder))
    assert (again["written"], again["present"]) == (1, 5) and len(store) == 6


def test_a_saved_folder_of_pictures_is_known_by_its_rows(folder, encoder_folders, tmp_path):
    load_dataset(str(folder), split="train").save_to_disk(str(tmp_path / "saved"))  # keeps '0.png', twice
    result, store = run(encoder_folders, "image", tmp_path / "store", data=str(tmp_path / "saved"))
    assert store.ids == ["0", "2", "3", "4", "5"] and [row for row, _ in result["skipped"]] == [1]
    assert store.columns == {"label": "string"}  # no path: there is no such file


@pytest.mark.parametrize(
    ("modality", "column", "words"),
    [
        ("text", "image", r"holds images, but the encoder .* takes text: name another"),
        ("text", "count", r"holds values of type int, but the encoder .* takes text"),
        ("image", "count", r"holds values of type int, but the encoder .* takes images or names of image files"),
        ("image", "caption", r"holds texts \('picture 0'\), but the encoder .* takes images or names of image files"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_the_wrong_type_is_one_error_not_one_an_item(
    folder, encoder_folders, tmp_path, capsys, modality, column, words, streaming
):
    data = load_dataset(str(folder), split="train")
    data = data.add_column("count", list(range(6))).add_column("caption", [f"picture {i}" for i in range(6)])
    data.to_parquet(str(tmp_path / "data.parquet"))
    given = {"data": str(tmp_path / "data.parquet"), "column": column, "streaming": streaming}
    with pytest.raises(ValueError, match=f"Column '{column}' of .* {words}"):
        run(encoder_folders, modality, tmp_path / "store", **given)
    assert not (tmp_path / "store").exists() and "skipped" not in capsys.readouterr().out


def test_names_of_pictures_are_no_texts_though_all_are_missing(encoder_folders, tmp_path):
    data = write_texts(tmp_path / "names.jsonl", [f"{n}.png" for n in range(3)])
    result, _ = run(encoder_folders, "image", tmp_path / "store", data=data, column="text")
    assert len(result["skipped"]) == 3 and "no image file '0.png': check the path" in result["skipped"][0][1]


def test_streams_and_worker_processes_give_the_same(folder, encoder_folders, tmp_path):
    plain, one = run(encoder_folders, "image", tmp_path / "a", data=str(folder))
    for name, how in (("b", {"streaming": True}), ("c", {"workers": 2, "batch_size": 2})):
        result, other = run(encoder_folders, "image", tmp_path / name, data=str(folder), **how)
        assert result == plain and other.columns == one.columns
        same_latents(one, other)


def test_texts_from_every_file_and_as_a_stream_are_the_same(encoder_folders, tmp_path):
    texts = ["a cat", "a red dog", "blue", "a green circle house", "tree"]
    write_texts(tmp_path / "t.jsonl", texts, year=[2000, 2001, 2002, 2003, None])
    data = Dataset.from_json(str(tmp_path / "t.jsonl"))
    data.to_csv(str(tmp_path / "t.csv"))
    data.to_parquet(str(tmp_path / "t.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    _, one = run(encoder_folders, "text", tmp_path / "one", data=str(tmp_path / "t.jsonl"))
    assert sorted(one.ids) == list("01234") and one.columns_of(int(one.rows_of(["3"])[0]))["year"] == 2003
    for streaming in (False, True):
        for name in ("t.jsonl", "t.csv", "t.parquet", "saved"):
            out = tmp_path / f"{name}-{streaming}"
            _, other = run(encoder_folders, "text", out, data=str(tmp_path / name), streaming=streaming, keep=["text"])
            same_latents(one, other)
            assert other.column("text") == [texts[int(name)] for name in other.ids]


def test_a_folder_of_sounds_is_read_and_decoded(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    from transformers import Wav2Vec2FeatureExtractor

    from modeling_altmoe import AltMoEProcessor

    wave = np.sin(np.arange(1600) / 10).astype(np.float32)
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "a.wav", wave, 16000)
    (item,) = next(RawItems(str(tmp_path / "sounds"), "audio").blocks()).read([0])
    assert item.id == "a.wav"
    processor = AltMoEProcessor({"audio": Wav2Vec2FeatureExtractor()})
    for raw in (item.raw, {"bytes": (tmp_path / "sounds" / "a.wav").read_bytes(), "path": None}):
        np.testing.assert_allclose(processor.read("audio", raw), wave, atol=1e-4)
    with pytest.raises(ItemError, match="cannot be read as sound"):
        processor.read("audio", {"bytes": b"noise", "path": None})


def test_batches_hold_texts_of_like_length_and_every_item_once():
    items = [Item(n, str(n), "x" * (n * 37 % 50 + 1), {}) for n in range(103)]
    blocks = [items[start : start + 20] for start in range(0, 103, 20)]
    batches = list(cut(iter(blocks), 8, by_length=True))
    assert sorted(item.position for batch in batches for item in batch) == list(range(103))
    assert [len(batch) for batch in batches] == [8] * 12 + [7]
    padding = sum(
        len(batch) * max(len(item.raw) for item in batch) - sum(len(item.raw) for item in batch) for batch in batches
    )
    assert padding < 103 * 4
    in_order = [item.position for batch in cut(iter(blocks), 8, by_length=False) for item in batch]
    assert in_order == list(range(103))


def test_an_item_whose_latent_overflows_is_skipped_and_named(encoder_folders, tmp_path, monkeypatch):
    original = encode_latents

    def overflowing(*arguments):
        latents = original(*arguments)
        latents[0, 0] = 1e6
        return latents

    monkeypatch.setattr("trainer.encode.encode_latents", overflowing)
    data = write_texts(tmp_path / "t.jsonl", ["a cat", "a red dog tree"])
    result, store = run(encoder_folders, "text", tmp_path / "s", data=data, dtype="float16")
    assert result["skipped"] == [(0, "its latent holds NaN or infinity (as float16)")] and store.ids == ["1"]


# ---------------------------------------------------------------- ids


def test_an_id_given_twice_is_skipped_and_named(encoder_folders, tmp_path):
    ids = ["a", "b", "a", "c", "b"]
    data = write_texts(tmp_path / "t.jsonl", ["cat", "dog", "red", "blue", "tree"], id=ids)
    result, store = run(encoder_folders, "text", tmp_path / "s", data=data, batch_size=2, shard_seconds=0)
    assert result["skipped"] == [(2, "its id was given before"), (4, "its id was given before")]
    assert sorted(store.ids) == ["a", "b", "c"] and store.column("text", store.rows_of(["a"])) == ["cat"]
    with pytest.raises(ValueError, match=r"item 2 \(id 'a'\): its id was given before"):
        run(encoder_folders, "text", tmp_path / "strict", data=data, strict=True)


def test_torchrun_shares_the_items_out(encoder_folders, tmp_path):
    data = write_texts(tmp_path / "t.jsonl", [f"a {color} {n % 3}" for n in range(30) for color in COLORS[:1]])
    words = ["--data", data, "--modality", "text", "--encoder", encoder_folders["text"], "--out", tmp_path / "two"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "trainer.encode", *map(str, words)]  # no --device: as README has it, on a machine without a GPU
    shown = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    here = {"cwd": Path(__file__).parent.parent, "env": {**shown, "CUDA_VISIBLE_DEVICES": ""}}
    done = subprocess.run(command, capture_output=True, text=True, **here)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"encoding text: .* \d+/15 \[\d\d:\d\d<\S+, .*item/s\]", done.stderr)  # rate and time left
    assert "30 latents (30 new, 0 already there, 0 bad items skipped)" in done.stdout
    assert {int(path.stem.split("-")[1]) for path in LatentStore.open(tmp_path / "two").shards} <= {0, 1}
    _, one = run(encoder_folders, "text", tmp_path / "one", data=data)
    same_latents(one, LatentStore.open(tmp_path / "two"))


# ---------------------------------------------------------------- check, look, delete, compact


def check(capsys, *words) -> tuple[int, str]:
    """`altmoe encode --check`: exit code and report."""
    capsys.readouterr()
    code = 0
    try:
        altmoe(["encode", "--check", *map(str, words)])
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out


@pytest.fixture
def sound(encoder_folders, tmp_path):
    """A store without faults, and its data."""
    texts = ["a cat", "a dog", "red", "blue tree", "a cat"]
    data = write_texts(tmp_path / "t.jsonl", texts, id=list("abcde"))
    run(encoder_folders, "text", tmp_path / "store", data=data)
    return tmp_path / "store", data


def test_a_sound_store_passes(sound, capsys):
    folder, data = sound
    code, report = check(capsys, "--out", folder, "--data", data)
    assert code == 0 and "5 'text' latents, 24-d float32, in 1 shards" in report and "data: 5 items" in report
    assert "vectors that equal another one, which may be right: 1 (e.g. " in report and report.endswith("sound\n")


def test_every_fault_is_named(sound, capsys, tmp_path, encoder_folders):
    folder, _ = sound
    more = write_texts(tmp_path / "more.jsonl", ["cat", "dog", "tree"], id=["a", "b", "z"])
    code, report = check(capsys, "--out", folder, "--data", more)
    assert code == 1 and "1 items of the data are not in the store (e.g. z)" in report
    assert "3 rows of the store are not in the data" in report
    store = LatentStore.open(folder)
    with store:
        latents = np.ones((3, 24), np.float32)
        latents[1] = 0
        latents[2] /= np.sqrt(24)
        store.append(["long", "zero", "good"], latents, text=["", "", ""])
    code, report = check(capsys, "--out", folder)
    assert (
        code == 1 and "the norm is not 1 in 1 (e.g. long)" in report and "nothing but zeros in 1 (e.g. zero)" in report
    )
    second = store.shards[1]
    second.with_name(second.name.replace("00001", "00002")).write_bytes(second.read_bytes())  # as no writer would do
    code, report = check(capsys, "--out", folder)
    assert code == 1 and "ids that are there before: 3 (e.g. long, zero, good)" in report
    second.write_bytes(second.read_bytes()[:-100])
    code, report = check(capsys, "--out", folder)
    assert code == 1 and f"Shard '{second}' is damaged" in report


def test_a_changed_bit_is_found(sound, capsys):
    folder, _ = sound
    (shard,) = LatentStore.open(folder).shards
    content = bytearray(shard.read_bytes())
    content[content.index(LatentStore.open(folder).take([2]).numpy().tobytes()) + 1] ^= 1
    shard.write_bytes(content)
    code, report = check(capsys, "--out", folder)
    assert code == 1 and f"shard '{shard.name}': its bytes have changed since it was written" in report


def test_store_shows_deletes_and_compacts(sound, capsys, tmp_path):
    folder, _ = sound
    (tmp_path / "ids.txt").write_text("c\n\nnone\n")
    altmoe(["store", str(folder), "--delete", "a", "--delete_file", str(tmp_path / "ids.txt")])
    shown = capsys.readouterr().out
    assert "rows deleted: 2; ids that were not there: 1 (e.g. none)" in shown
    assert "3 'text' latents" in shown and "2 deleted rows" in shown
    altmoe(["store", str(folder), "--compact"])
    assert "0 deleted rows" in capsys.readouterr().out
    assert sorted(LatentStore.open(folder).ids) == ["b", "d", "e"]


def test_what_is_missing_on_the_command_line_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        altmoe(["encode", "--out", str(tmp_path), "--data", "x.csv", "--modality", "text"])
    assert "--encoder is missing" in capsys.readouterr().err

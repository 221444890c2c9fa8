"""`altmoe import`: vectors from anywhere become a store, and what speaks against their protocol is said first."""

import json
import re
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from safetensors.numpy import save_file

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.encoding_altmoe import LatentProtocol, encode_latents
from trainer.cli import main as altmoe
from trainer.encode import EncodeArguments, encode
from trainer.vectors import KINDS, VectorSource, open_source, source

ROOT = Path(__file__).parent.parent
TEXTS = [
    f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("cat", "dog", "tree", "house", "circle")
]


@pytest.fixture(scope="module")
def matrix(encoder_folders) -> np.ndarray:
    """What another program would have made of `TEXTS` with the text encoder, mean pooling, normalised."""
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = (kind.from_pretrained(encoder_folders["text"]) for kind in (AutoModel, AutoTokenizer))
    with torch.inference_mode():
        tensors = tokenizer(TEXTS, padding=True, return_tensors="pt")
        return encode_latents(encoder, dict(tensors), LatentProtocol()).numpy()


@pytest.fixture
def run(encoder_folders, tmp_path):
    """Import into a store of this name; opens it."""

    def call(name, *words, out="store", encoder=True) -> LatentStore:
        named = ["--encoder", encoder_folders["text"]] if encoder else []
        altmoe(["import", str(name), "--modality", "text", "--out", str(tmp_path / out), *named, *map(str, words)])
        return LatentStore.open(tmp_path / out)

    return call


def refused(capsys, call, *words, **how) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(*words, **how)
    assert ended.value.code == 2
    return capsys.readouterr().err


def write(kind: str, folder: Path, matrix: np.ndarray) -> Path:
    """The matrix as a file of this kind, with years where the kind has room for them."""
    path = folder / f"vectors{kind}"
    years = np.arange(len(matrix)) + 2000
    table = {
        "id": [f"n{i}" for i in range(len(matrix))],
        "year": years.tolist(),
        "text": TEXTS,
        "vector": matrix.tolist(),
    }
    features = Features(
        {"id": Value("string"), "year": Value("int64"), "text": Value("string"), "vector": List(Value("float32"))}
    )
    if kind == ".npy":
        np.save(path, matrix)
    elif kind == ".npz":
        np.savez(path, vectors=matrix, year=years, square=np.eye(2, dtype=int))
    elif kind == ".safetensors":
        save_file({"vectors": matrix, "year": years}, path)
    elif kind == ".parquet":
        Dataset.from_dict(table, features).to_parquet(path)
    elif kind == ".saved":
        Dataset.from_dict(table, features).save_to_disk(path)
    elif kind == ".faiss":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(matrix.shape[1]))
        index.add_with_ids(matrix, years)
        faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("kind", [".npy", ".npz", ".safetensors", ".parquet", ".saved", ".faiss"])
def test_every_source_gives_the_same_rows(kind, matrix, run, tmp_path):
    store = run(write(kind, tmp_path, matrix))
    assert torch.equal(store.latents(), torch.from_numpy(matrix))
    rows = range(len(matrix))
    assert store.ids == [
        f"{'n' if kind in ('.parquet', '.saved') else ''}{i + 2000 * (kind == '.faiss')}" for i in rows
    ]
    if kind not in (".npy", ".faiss"):
        assert store.column("year") == [2000 + i for i in rows]
    if kind in (".parquet", ".saved"):
        assert store.column("text") == TEXTS
    assert store.protocol.pooling == "mean" and store.protocol.encoder.startswith("weights:")


def test_ids_and_metadata_come_from_files_and_columns(matrix, run, tmp_path):
    path = write(".npy", tmp_path, matrix)
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(len(matrix))))
    (tmp_path / "about.jsonl").write_text(
        "\n".join(json.dumps({"key": f"k{i}", "text": t}) for i, t in enumerate(TEXTS))
    )
    store = run(path, "--ids", tmp_path / "names.txt", "--metadata", tmp_path / "about.jsonl", out="a")
    assert store.ids[3] == "name 3" and store.columns_of(3) == {"key": "k3", "text": TEXTS[3]}
    store = run(path, "--ids", "key", "--metadata", tmp_path / "about.jsonl", out="b")
    assert store.ids[3] == "k3" and store.columns_of(3) == {"text": TEXTS[3]}


def test_half_precision_stays_half(matrix, run, tmp_path):
    half = matrix.astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    store = run(tmp_path / "half.npy")
    assert store.dtype == "float16" and torch.equal(store.latents(), torch.from_numpy(half).float())


def test_a_quantised_index_is_taken_with_a_warning_and_one_without_vectors_is_refused(matrix, run, tmp_path, capsys):
    index = faiss.IndexScalarQuantizer(matrix.shape[1], faiss.ScalarQuantizer.QT_8bit)
    index.train(matrix)
    index.add(matrix)
    faiss.write_index(index, str(tmp_path / "rough.faiss"))
    store = run(tmp_path / "rough.faiss")
    assert "approximately" in capsys.readouterr().out
    assert torch.cosine_similarity(store.latents(), torch.from_numpy(matrix)).min() > 0.99
    flat = faiss.IndexFlatL2(matrix.shape[1])
    bits = faiss.IndexIVFSpectralHash(flat, matrix.shape[1], 2, 8, 10.0)
    bits.train(matrix)
    bits.add(matrix)
    faiss.write_index(bits, str(tmp_path / "bits.faiss"))
    message = refused(capsys, run, tmp_path / "bits.faiss", out="bits")
    assert "cannot give its vectors back" in message and "Import what it was built from" in message
    (tmp_path / "no.faiss").write_bytes(b"no index at all")
    assert "cannot be read as a FAISS index" in refused(capsys, run, tmp_path / "no.faiss", out="no")


def test_lists_with_ids_of_their_own_are_put_in_order(matrix, run, tmp_path):
    inverted = faiss.index_factory(matrix.shape[1], "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    inverted.train(matrix)
    inverted.add_with_ids(matrix, np.arange(len(matrix))[::-1] * 7)
    faiss.write_index(inverted, str(tmp_path / "inverted.faiss"))
    store = run(tmp_path / "inverted.faiss")
    assert store.ids == [str(7 * i) for i in range(len(matrix))]
    assert torch.equal(store.latents(), torch.from_numpy(matrix[::-1].copy()))


def test_an_interrupted_import_goes_on(matrix, run, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.vectors.ROWS", 4)
    path, original, calls = write(".npy", tmp_path, matrix), LatentStore.append, []

    def append(self, *arguments, **columns):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *arguments, **columns)

    monkeypatch.setattr(LatentStore, "append", append)
    with pytest.raises(SystemExit) as stopped:
        run(path)
    assert stopped.value.code == 130
    assert len(LatentStore.open(tmp_path / "store")) == 8
    assert torch.equal(run(path).latents(), torch.from_numpy(matrix))


# ---------------------------------------------------------------- the protocol


def test_a_store_or_a_model_names_the_protocol(matrix, run, tmp_path, encoder_folders, capsys):
    path = write(".npy", tmp_path, matrix)
    first = run(path)
    again = run(path, "--like", tmp_path / "store", out="again", encoder=False)
    assert again.protocol == first.protocol
    model = AltMoEModel.from_encoders(encoder_folders, hidden_size=16, moe_intermediate_size=8, num_experts=4, top_k=2)
    model.save_pretrained(tmp_path / "model")
    third = run(path, "--like", tmp_path / "model", out="third", encoder=False)
    third.check("text", model.config.encoders["text"])
    assert third.protocol.pooling == model.protocol("text").pooling
    assert "Unknown modality 'text'" in refused(capsys, run, path, "--like", other_modality(tmp_path), encoder=False)
    assert "either --like STORE_OR_MODEL, or --encoder" in refused(capsys, run, path, encoder=False)


def other_modality(folder) -> Path:
    LatentStore.create(folder / "smells", "smell", {"latent_size": 24})
    return folder / "smells"


def test_the_verified_sample_agrees_or_names_what_would(matrix, run, tmp_path, capsys):
    (tmp_path / "about.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    named = ("--metadata", tmp_path / "about.jsonl", "--verify", "text")
    path = write(".npy", tmp_path, matrix)
    run(path, *named)
    assert re.search(r"verified: 15 items encoded anew agree \(mean cosine 1.0000", capsys.readouterr().out)
    np.save(tmp_path / "mixed.npy", matrix[::-1])
    message = refused(capsys, run, tmp_path / "mixed.npy", *named, out="mixed")
    assert "were not made as you say" in message and "prompt ('')" in message and "--pooling" not in message
    message = refused(capsys, run, path, *named, "--pooling", "cls", out="cls")
    assert "With --pooling mean it is 1.0000" in message
    assert "Did you mean 'text'" in refused(capsys, run, path, *named[:3], "txt", out="typo")
    assert not (tmp_path / "mixed").exists() and not (tmp_path / "cls").exists()
    run(path, *named, "--like", tmp_path / "store", out="like", encoder=False)
    assert "verified" in capsys.readouterr().out


def test_several_layers_side_by_side_are_verified_as_well(run, tmp_path, encoder_folders):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    layers = {"layers": [-1, -2], "combine": "concat"}
    arguments = {"data": str(tmp_path / "t.jsonl"), "encoder": encoder_folders["text"], "modality": "text", **layers}
    encode(EncodeArguments(**arguments, out=str(tmp_path / "encoded")))
    encoded = LatentStore.open(tmp_path / "encoded")
    np.save(tmp_path / "wide.npy", encoded.take(encoded.rows_of([str(i) for i in range(len(TEXTS))])).numpy())
    words = ("--layers", -1, -2, "--combine", "concat", "--metadata", tmp_path / "t.jsonl", "--verify", "text")
    store = run(tmp_path / "wide.npy", *words)
    assert store.latent_size == 48 and store.protocol == encoded.protocol


def test_what_cannot_be_right_is_named_before_anything_is_written(matrix, run, tmp_path, capsys):
    wide, bad, long = np.zeros((3, 25), np.float32), matrix.copy(), matrix * 3
    bad[4, 1], bad[9] = np.nan, 0
    for name, array in (("wide", wide), ("bad", bad), ("long", long), ("empty", matrix[:0])):
        np.save(tmp_path / f"{name}.npy", array)
    assert "vectors of width 25" in refused(capsys, run, tmp_path / "wide.npy")
    message = refused(capsys, run, tmp_path / "bad.npy")
    assert "2 of 15 vectors" in message and "the first in row 4" in message and "--drop_bad" in message
    message = refused(capsys, run, tmp_path / "long.npy")
    assert "15 of 15 vectors" in message and "row 0: 3" in message and "--normalize" in message
    assert "holds no vectors" in refused(capsys, run, tmp_path / "empty.npy")
    np.savez(tmp_path / "two.npz", a=matrix, b=matrix)
    assert "several could be the vectors (a, b): choose with --vectors" in refused(capsys, run, tmp_path / "two.npz")
    assert "No file" in refused(capsys, run, tmp_path / "none.npy")
    assert "'redis://...' is an unknown kind of source" in refused(capsys, run, "redis://here")
    (tmp_path / "short.txt").write_text("one\ntwo")
    message = refused(capsys, run, write(".npy", tmp_path, matrix), "--ids", tmp_path / "short.txt")
    assert "has 2 rows" in message and "has 15 vectors" in message
    assert not (tmp_path / "store").exists()
    kept = run(tmp_path / "bad.npy", "--drop_bad", out="kept")
    assert len(kept) == 13 and "2 bad vectors left out" in capsys.readouterr().out
    scaled = run(tmp_path / "long.npy", "--normalize", out="scaled")
    torch.testing.assert_close(scaled.latents(), torch.from_numpy(matrix))
    lengths = run(tmp_path / "long.npy", "--unnormalized", out="lengths")
    assert torch.equal(lengths.latents(), torch.from_numpy(long)) and not lengths.protocol.normalize


def test_ids_that_repeat_are_refused(matrix, run, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("\n".join(["same"] * len(matrix)))
    assert "Ids must be unique" in refused(capsys, run, write(".npy", tmp_path, matrix), "--ids", tmp_path / "ids.txt")


def test_another_kind_of_source_is_one_function(matrix, run, monkeypatch):
    monkeypatch.setattr("trainer.vectors.KINDS", dict(KINDS))

    @source("table")
    def open_table(name, vectors=None):
        parts = [([f"t{i}"], matrix[i : i + 1], {"text": [TEXTS[i]]}) for i in range(len(matrix))]
        return VectorSource(name, 24, lambda: iter(parts), columns={"text": "string"}, reads_twice=False)

    assert open_source("table://here").size == 24
    store = run("table://here/there", "--verify", "text")
    assert store.ids[2] == "t2" and store.column("text") == TEXTS


# ---------------------------------------------------------------- the README's example


def example() -> tuple[str, list[str]]:
    """The Python and the commands that README prints under "Vectors you have already"."""
    section = (ROOT / "README.md").read_text().split("### Vectors you have already")[1].split("\n#")[0]
    code, commands = (section.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "sh"))
    return code, [line for line in commands.replace("\\\n", " ").splitlines() if line.startswith("altmoe ")]


def test_the_readmes_example_runs_as_printed(capsys, monkeypatch):
    pytest.importorskip("sentence_transformers")
    for needed in ("build/data/stamps", "build/encoders/minilm-l6", "build/hub/altmoe-stamps"):
        if not (ROOT / needed).exists():
            pytest.skip(f"{needed} is not there: run make demo DATA=stamps")
    code, commands = example()
    monkeypatch.chdir(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for command in commands:
        altmoe(command.split()[1:])
    shown = capsys.readouterr().out
    assert "verified: 16 items encoded anew agree" in shown
    assert "image->text" in shown and shown.count("caption: ") == 5


def test_the_readmes_example_runs_with_tiny_encoders(encoder_folders, tmp_path, capsys, monkeypatch, pictures):
    """The same commands; the assets are small, and what sentence-transformers would do is done by hand."""
    _, commands = example()
    assert [command.split()[1] for command in commands] == ["import", "search"]
    monkeypatch.chdir(tmp_path)
    for folder in ("build/stores", "build/hub"):
        Path(folder).mkdir(parents=True)
    model = AltMoEModel.from_encoders(encoder_folders, hidden_size=16, moe_intermediate_size=8, num_experts=4, top_k=2)
    model.save_pretrained("build/hub/altmoe-stamps", self_contained=True)
    processor = AltMoEProcessor(
        {modality: _processor(encoder_folders[modality], modality) for modality in encoder_folders}
    )
    processor.save_pretrained("build/hub/altmoe-stamps")
    pictures[0].save("build/hub/altmoe-stamps/example.png")
    Path("build/captions.jsonl").write_text(
        "\n".join(json.dumps({"id": str(i), "caption": t}) for i, t in enumerate(TEXTS))
    )
    np.save("build/captions.npy", model.encode("text", processor.batch("text", TEXTS)).numpy())
    for command in commands:
        altmoe(command.split()[1:])
    shown = capsys.readouterr().out
    assert "verified: 15 items" in shown and "image->text" in shown and shown.count("caption: a ") == 5


def _processor(folder, modality):
    from transformers import AutoImageProcessor, AutoTokenizer

    return (AutoTokenizer if modality == "text" else AutoImageProcessor).from_pretrained(folder)

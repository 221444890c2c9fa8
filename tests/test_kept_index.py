"""An index kept beside its store: mapped, brought up to date, checked, and never half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import paired_latents
from searching import DIRECTION, ROWS, agreement, ids, scored_model, truth, write

from modeling_altmoe import LatentStore, index_altmoe
from modeling_altmoe.index_altmoe import build
from modeling_altmoe.index_files_altmoe import update
from modeling_altmoe.search_altmoe import LatentIndex
from modeling_altmoe.shards_altmoe import fits_in_memory


@pytest.fixture(scope="module")
def model():
    return scored_model(weight=[0.5, 0.1, 0.1, -0.2], bias=0.0, threshold=0.4)


@pytest.fixture(scope="module")
def latents():
    return paired_latents(ROWS, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, latents):
    return write(tmp_path_factory.mktemp("store"), model, latents)


def test_a_kept_index_is_mapped_and_answers_as_before(model, latents, tmp_path):
    store = write(tmp_path / "s", model, latents)
    made, folder, done = update(model, store, DIRECTION, "RR,IVF8,RaBitQ")
    assert done == "made" and folder.parent == tmp_path / "s" / "index"
    again = LatentIndex(model, LatentStore.open(tmp_path / "s"), DIRECTION)  # auto takes what is there
    assert again.describe() == made.describe()
    assert all(isinstance(array, np.memmap) for part in again.backend.kept.parts for array in part)
    want = LatentIndex(model, store, DIRECTION, build(model, store, DIRECTION, "RR,IVF8,RaBitQ"))
    for a, b in zip(again.search(latents["text"][:20], 5), want.search(latents["text"][:20], 5), strict=True):
        assert [vars(hit) for hit in a] == [vars(hit) for hit in b]
    assert update(model, store, DIRECTION, "RR,IVF8,RaBitQ")[2] == "up to date"
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    files = set(json.loads((folder / "index.json").read_text())["files"])
    assert {path.name for path in folder.iterdir()} == files | {"index.json", ".lock"}


def advice(path) -> set[str]:
    """How the system was told that a file's maps are read (`rr`: here and there)."""
    found, inside = set(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        inside = line.endswith(str(path)) if "-" in line.split()[0] else inside
        found |= set(line.split()[1:]) & {"rr"} if inside and line.startswith("VmFlags") else set()
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells how maps are read")
def test_what_does_not_fit_in_memory_is_read_row_by_row(model, latents, tmp_path, monkeypatch):
    """Systems read megabytes around a page, which a store larger than memory cannot afford."""
    store = write(tmp_path / "s", model, latents)
    made, folder, _ = update(model, store, DIRECTION, "IVF8,Flat")
    vectors = [store.shards[0], *folder.glob("predicted*")]
    expected = ids(LatentIndex(model, store, DIRECTION, made).search(latents["text"][:20], 5))
    assert len(vectors) == 2 and not any(map(advice, vectors))
    monkeypatch.setattr(index_altmoe, "fits_in_memory", lambda size: False)
    opened = LatentIndex(model, LatentStore.open(tmp_path / "s"), DIRECTION)
    assert all(map(advice, vectors)) and ids(opened.search(latents["text"][:20], 5)) == expected
    del store, made
    opened.backend.read_ahead(True)
    assert not any(map(advice, vectors))
    assert fits_in_memory(1 << 20) and not fits_in_memory(1 << 60)


@pytest.mark.parametrize("factory", ["exact", "IVF8,Flat"])
def test_adding_rows_equals_making_it_anew(model, latents, tmp_path, factory):
    grown = write(tmp_path / "grown", model, latents, 0, 400)
    update(model, grown, DIRECTION, factory)
    grown = write(tmp_path / "grown", model, latents, 400, ROWS)
    with pytest.raises(ValueError, match=r"200 rows were added to the store since\. Run 'altmoe index"):
        LatentIndex(model, grown, DIRECTION)
    assert len(LatentIndex(model, grown, DIRECTION, rebuild=True)) == ROWS
    backend, folder, done = update(model, grown, DIRECTION, factory)
    assert done == "200 rows added" and len(backend) == ROWS
    backend.effort["nprobe"] = 8
    anew = build(model, grown, DIRECTION, factory, recall=1.0)
    anew.effort["nprobe"] = 8
    found = [LatentIndex(model, grown, DIRECTION, b).search(latents["text"][:40], 10) for b in (backend, anew)]
    assert ids(found[0]) == ids(found[1]) == truth(model, grown, latents["text"][:40], 10)
    assert len(json.loads((folder / "index.json").read_text())["kept"]) == (0 if factory == "exact" else 2)


@pytest.mark.parametrize("factory", ["exact", "IVF8,Flat"])
def test_deleted_rows_are_never_found_again(model, latents, tmp_path, factory):
    store, queries = write(tmp_path, model, latents, 0, 500), latents["text"][:40]
    store.delete(["i7"])  # before the index is made
    store = LatentStore.open(tmp_path)
    update(model, store, DIRECTION, factory)
    best = [hits[0].id for hits in LatentIndex(model, store, DIRECTION).search(queries, 1)]
    store.delete(sorted(set(best)))
    store = LatentStore.open(tmp_path)
    index = LatentIndex(model, store, DIRECTION)
    assert len(index) == len(store) and f"{len(set(best))} deleted rows left out" in index.describe()
    for where in (None, {"kind": ["a", "b"]}):
        rows = [r for r, value in enumerate(store.column("kind")) if where is None or value in ("a", "b")]
        found = index.search(queries, 10, where)
        assert agreement(ids(found), truth(model, store, queries, 10, rows)) > 0.98
        for hits in found:
            assert [store.id_of(hit.row) for hit in hits] == [hit.id for hit in hits]
    store = write(tmp_path, model, latents, 500, ROWS)  # and added to afterwards
    assert update(model, store, DIRECTION, factory)[2] == "100 rows added"
    found = ids(LatentIndex(model, store, DIRECTION).search(queries, 10))
    assert agreement(found, truth(model, store, queries, 10)) > 0.98
    store.compact()
    store = LatentStore.open(tmp_path)
    with pytest.raises(ValueError, match="compacted or written anew since"):
        LatentIndex(model, store, DIRECTION)
    assert "made anew, because the store was compacted" in update(model, store, DIRECTION, factory)[2]
    assert (
        agreement(ids(LatentIndex(model, store, DIRECTION).search(queries, 10)), truth(model, store, queries, 10))
        > 0.98
    )


def test_auto_that_outgrows_exact_is_made_anew(model, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(index_altmoe, "EXACT_ROWS", 450)
    store = write(tmp_path, model, latents, 0, 400)
    assert update(model, store, DIRECTION)[0].factory == "exact"
    store = write(tmp_path, model, latents, 400, ROWS)
    backend, _, done = update(model, store, DIRECTION)
    assert backend.factory == "RR,IVF64,RaBitQ" and done == "made anew"


def test_another_models_index_is_refused_naming_what_differs(model, latents, tmp_path):
    store = write(tmp_path, model, latents)
    _, folder, _ = update(model, store, DIRECTION, "IVF8,Flat")
    with pytest.raises(ValueError, match=r"made with another model \(connector and scoring differ\)"):
        LatentIndex(scored_model(1), store, DIRECTION)
    other = scored_model(0)
    other.config.scoring[DIRECTION]["beta"] = 0.1
    with pytest.raises(ValueError, match=r"another model \(scoring differ\)"):
        LatentIndex(other, store, DIRECTION)
    assert len(LatentIndex(other, store, DIRECTION, rebuild=True)) == ROWS
    update(other, store, DIRECTION, "IVF8,Flat")  # beside the first
    assert len(list(folder.parent.iterdir())) == 2
    for one in (model, other):
        assert len(LatentIndex(one, store, DIRECTION)) == ROWS


def test_an_index_in_the_wrong_place_is_refused(model, latents, tmp_path):
    update(model, write(tmp_path / "a", model, latents), DIRECTION, "IVF8,Flat")
    other = write(tmp_path / "b", model, {"image": latents["image"].flip(0)})
    (tmp_path / "a" / "index").rename(tmp_path / "b" / "index")
    with pytest.raises(ValueError, match="the store was compacted or written anew"):
        LatentIndex(model, other, DIRECTION)


@pytest.mark.parametrize("harm", ["cut", "missing", "json"])
def test_a_damaged_index_is_named_and_can_be_made_again(model, latents, tmp_path, harm):
    store = write(tmp_path, model, latents)
    _, folder, _ = update(model, store, DIRECTION, "IVF8,Flat")
    vectors = next(folder.glob("*.faiss"))
    if harm == "cut":
        vectors.write_bytes(vectors.read_bytes()[:-100])
    elif harm == "missing":
        vectors.unlink()
    else:
        (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        LatentIndex(model, store, DIRECTION)
    assert update(model, store, DIRECTION, "IVF8,Flat")[2] == "made anew"
    assert len(LatentIndex(model, store, DIRECTION)) == ROWS


def test_an_index_that_cannot_be_written_leaves_the_one_before(model, latents, tmp_path, monkeypatch):
    store = write(tmp_path, model, latents, 0, 400)
    _, folder, _ = update(model, store, DIRECTION, "IVF8,Flat")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = write(tmp_path, model, latents, 400, ROWS)

    def full(*_):
        raise RuntimeError("Error in faiss: write error: No space left on device")

    monkeypatch.setattr("modeling_altmoe.index_files_altmoe.faiss.write_index", full)
    with pytest.raises(OSError, match=r"Cannot write to .*No space left"):
        update(model, store, DIRECTION, "IVF8,Flat")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_processes_do_not_make_one_index(model, store):
    from filelock import FileLock

    from modeling_altmoe.index_files_altmoe import folder_of

    folder = folder_of(model, store, DIRECTION, "HNSW8")
    folder.mkdir(parents=True)
    with (
        FileLock(folder / ".lock", thread_local=False, is_singleton=False),
        pytest.raises(RuntimeError, match="Another process is making"),
    ):
        update(model, store, DIRECTION, "HNSW8")

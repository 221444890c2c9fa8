"""LatentStore: what was written comes back, and nothing else can get in."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modeling_altmoe import LatentStore

ENTRY = {"latent_size": 8, "protocol": {"encoder": "weights:1", "pooling": "mean"}}


def rows(count, seed=0):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.integers(1, 30), min_size=1, max_size=5), shard=st.integers(1, 40))
def test_every_row_comes_back_in_order_whatever_the_shards(tmp_path_factory, parts, shard):
    path = tmp_path_factory.mktemp("store")
    written = rows(sum(parts))
    with LatentStore.create(path, "text", ENTRY, columns={"caption": "string"}, shard_rows=shard) as store:
        start = 0
        for part in parts:
            ids = [f"i{n}" for n in range(start, start + part)]
            store.append(ids, written[start : start + part], caption=[f"c{i}" for i in ids])
            start += part
    again = LatentStore.open(path)
    assert torch.equal(again.latents(), written)
    assert again.ids == [f"i{n}" for n in range(start)] and again.column("caption")[-1] == f"ci{start - 1}"
    order = np.random.default_rng(0).permutation(start)
    assert torch.equal(again.take(order), written[torch.from_numpy(order)])


def test_half_precision_is_kept(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY, dtype="float16") as store:
        store.append(["a", "b"], rows(2))
    again = LatentStore.open(tmp_path)
    assert torch.equal(again.latents(), rows(2).half().float())
    assert again.dataset.features["latent"].feature.dtype == "float16"


def test_reopening_goes_on(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        store.append(["a"], rows(1))
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        assert store.has(["a", "b"]).tolist() == [True, False]
        store.append(["b"], rows(1, 1))
    assert LatentStore.open(tmp_path).ids == ["a", "b"]


def test_a_kill_loses_only_unflushed_rows(tmp_path):
    if not (child := os.fork()):
        store = LatentStore.create(tmp_path, "text", ENTRY, shard_rows=4)
        store.append([str(i) for i in range(10)], torch.ones(10, 8))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        assert store.ids == [str(i) for i in range(8)]
        store.append(["8", "9"], torch.ones(2, 8))
    assert len(LatentStore.open(tmp_path)) == 10


def test_another_protocol_is_refused_naming_the_field(tmp_path):
    LatentStore.create(tmp_path, "text", ENTRY)
    other = {"latent_size": 8, "protocol": {"encoder": "weights:1", "pooling": "cls", "prompt": "query: "}}
    with pytest.raises(ValueError, match=r"pooling: expected 'cls', got 'mean'; prompt: expected 'query: ', got ''"):
        LatentStore.create(tmp_path, "text", other)
    with pytest.raises(ValueError, match="holds 'text' latents, expected 'image'"):
        LatentStore.create(tmp_path, "image", ENTRY)
    with pytest.raises(ValueError, match="width 8, expected 9"):
        LatentStore.open(tmp_path).check("text", {**ENTRY, "latent_size": 9})


def test_a_foreign_shard_is_refused(tmp_path):
    with LatentStore.create(tmp_path / "a", "text", ENTRY) as store:
        store.append(["a"], rows(1))
    other = {"latent_size": 8, "protocol": {"encoder": "weights:2"}}
    LatentStore.create(tmp_path / "b", "text", other)
    shutil.copy(store.shards[0], tmp_path / "b")
    with pytest.raises(ValueError, match="made under protocol"):
        LatentStore.open(tmp_path / "b")


def test_a_damaged_shard_is_named(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        store.append(["a"], rows(1))
    (shard,) = store.shards
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{shard.name}' is damaged"):
        LatentStore.open(tmp_path)


def test_bad_rows_are_refused(tmp_path):
    store = LatentStore.create(tmp_path, "text", ENTRY)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), expected \(n, 8\)"):
        store.append(["a", "b"], torch.zeros(2, 7))
    bad = rows(2)
    bad[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity.*\['b'\]"):
        store.append(["a", "b"], bad)
    with pytest.raises(ValueError, match="columns of length"):
        store.append(["a"], rows(2))
    with pytest.raises(ValueError, match="Ids must be unique"):
        store.append(["a", "a"], rows(2))
    with pytest.raises(ValueError, match=r"Columns \['caption'\] given"):
        store.append(["a"], rows(1), caption=["x"])
    store.append(["a"], rows(1))
    with pytest.raises(ValueError, match="Ids must be unique"):
        store.append(["a"], rows(1))


def test_overflow_of_half_precision_is_refused(tmp_path):
    store = LatentStore.create(tmp_path, "text", ENTRY, dtype="float16")
    with pytest.raises(ValueError, match="as float16"):
        store.append(["a"], torch.full((1, 8), 1e6))


def test_two_writers_are_refused(tmp_path):
    first = LatentStore.create(tmp_path, "text", ENTRY)
    first.append(["a"], rows(1))
    second = LatentStore.open(tmp_path)
    with pytest.raises(RuntimeError, match="Another process is writing"):
        second.append(["b"], rows(1))
    first.flush()
    second.append(["b"], rows(1))
    second.flush()
    assert LatentStore.open(tmp_path).ids == ["a", "b"]


def test_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="altmoe encode"):
        LatentStore.open(tmp_path / "none")
    with pytest.raises(ValueError, match="no column 'captoin'"):
        LatentStore.create(tmp_path, "text", ENTRY).column("captoin")


# ---------------------------------------------------------------- delete, compact, look up


class Against(RuleBasedStateMachine):
    """A store against a dictionary: appends, deletions, compactions and reopenings in any order."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))  # fsync is slow
        self.store = LatentStore.create(self.folder, "text", ENTRY, columns={"caption": "string"}, shard_rows=5)
        self.expected, self.counter, self.contents = {}, 0, {self.store.content}

    def committed(self):
        assert self.store.content not in self.contents
        self.contents.add(self.store.content)

    @rule(count=st.integers(1, 12))
    def append(self, count):
        ids = [str(n) for n in range(self.counter, self.counter + count)]
        latents = rows(count, self.counter)
        self.counter += count
        self.store.append(ids, latents, caption=[f"c{i}" for i in ids])
        assert self.store.has(ids).all()
        self.store.flush()
        self.expected.update(zip(ids, latents, strict=True))
        self.committed()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def delete_some(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.expected)), min_size=1, unique=True))
        before = self.store.content
        assert self.store.delete([*ids, "none"], missing_ok=True) == len(ids)
        for name in ids:
            del self.expected[name]
        self.committed()
        assert self.store.rows_at(before) is None

    @rule()
    def compact(self):
        self.store.compact()
        assert all(len(shard.dead) == 0 for shard in self.store._shards)
        assert len(self.store.shards) == -(-len(self.expected) // 5)

    @rule()
    def reopen(self):
        content = self.store.content
        self.store = LatentStore.open(self.folder)
        assert self.store.content == content

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def write_a_deleted_id_again(self, data):
        name = data.draw(st.sampled_from(sorted(self.expected)))
        before, count = self.store.content, len(self.store)
        self.store.append(["again"], rows(1, 7), caption=["cagain"]) if "again" not in self.expected else None
        self.expected.setdefault("again", rows(1, 7)[0])
        self.store.flush()
        if len(self.store) > count:
            assert self.store.rows_at(before) == count
        assert self.store.has([name, "never"]).tolist() == [True, False]

    @invariant()
    def the_same_rows(self):
        store = self.store
        assert len(store) == len(self.expected) and store.ids == list(self.expected)
        latents = torch.stack(list(self.expected.values())) if self.expected else torch.empty(0, 8)
        assert torch.equal(store.latents(), latents)
        assert store.column("caption") == [f"c{name}" for name in self.expected]
        assert store.rows_of(list(self.expected)).tolist() == list(range(len(store)))
        assert store.arrow("id").to_pylist() == store.dataset["id"][:] == store.ids
        read = [(*batch[0], *batch[2]["caption"]) for batch in store.batches(3)]
        assert [len(part) // 2 for part in read] == [min(3, len(store) - i) for i in range(0, len(store), 3)]
        if len(store):
            last = len(store) - 1
            assert store.columns_of(last) == {"caption": f"c{store.id_of(last)}"}

    def teardown(self):
        shutil.rmtree(self.folder)


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=10, stateful_step_count=8, deadline=None)


def test_ids_that_share_their_hash_are_told_apart(tmp_path, monkeypatch):
    for module in ("shards_altmoe", "latents_altmoe", "writing_altmoe"):
        monkeypatch.setattr(
            f"modeling_altmoe.{module}.hash_ids", lambda ids: np.array([len(name) for name in ids], dtype="<u8")
        )
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        store.append(["b", "a", "cc", "c", "aaa"], rows(5))
    assert store.rows_of(["c", "aaa", "a", "d", "dd", "cc", "dddd"]).tolist() == [3, 4, 1, -1, -1, 2, -1]
    store.delete(["a"])
    assert store.rows_of(["c", "a", "aaa", "b"]).tolist() == [2, -1, 3, 0]


def test_a_few_records_are_those_of_many(tmp_path):
    with LatentStore.create(
        tmp_path, "text", ENTRY, columns={"caption": "string", "year": "int32"}, shard_rows=20
    ) as store:
        store.append([f"i{n}" for n in range(70)], rows(70), caption=[f"c{n}" for n in range(70)], year=list(range(70)))
    store.delete([f"i{n}" for n in range(15, 25)])
    order = np.random.default_rng(0).permutation(len(store))
    many = store.records(order)
    assert many[0] == {"id": store.id_of(order[0]), **store.columns_of(order[0])}
    assert (
        [store.records([row])[0] for row in order]
        == many
        == [r for some in np.split(order, 6) for r in store.records(some)]
    )
    assert {record["year"] for record in many} == set(range(70)) - set(range(15, 25))
    for wrong in (-1, len(store)):
        with pytest.raises(IndexError, match="60"):
            store.records([wrong])


def test_unknown_ids_are_named_and_nothing_is_deleted(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        store.append(["a", "b"], rows(2))
    with pytest.raises(ValueError, match=r"has no ids \['c'\]; nothing was deleted"):
        store.delete(["a", "c"])
    assert len(LatentStore.open(tmp_path)) == 2


def test_a_store_of_format_1_is_read_and_goes_on(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY, shard_rows=2) as store:
        store.append(list("abc"), rows(3))
    for shard in store.shards:  # names and number as the first version wrote them
        shard.rename(tmp_path / f"{shard.stem.rsplit('-', 1)[0]}.arrow")
    description = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**description, "format": 1}))
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        content = store.content
        store.append(["d"], rows(1, 4))
    again = LatentStore.open(tmp_path)
    assert again.ids == list("abcd") and again.content != content and again.rows_at(content) == 3
    again.delete(["b"])
    assert json.loads((tmp_path / "store.json").read_text())["format"] == 2
    again.compact()
    assert LatentStore.open(tmp_path).ids == list("acd")

"""LatentStore: what was written comes back, and nothing else can get in."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        assert store.known_ids == {"a"}
        store.append(["b"], rows(1, 1))
    assert LatentStore.open(tmp_path).ids == ["a", "b"]


def test_a_kill_loses_only_unflushed_rows(tmp_path):
    script = f"""
    import os, signal, torch
    from modeling_altmoe import LatentStore
    store = LatentStore.create({str(tmp_path)!r}, "text", {ENTRY!r}, shard_rows=4)
    store.append([str(i) for i in range(10)], torch.ones(10, 8))
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
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
    (tmp_path / "b" / "shard-00000.arrow").write_bytes((tmp_path / "a" / "shard-00000.arrow").read_bytes())
    with pytest.raises(ValueError, match="made under protocol"):
        LatentStore.open(tmp_path / "b")


def test_a_damaged_shard_is_named(tmp_path):
    with LatentStore.create(tmp_path, "text", ENTRY) as store:
        store.append(["a"], rows(1))
    shard = tmp_path / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"shard-00000.arrow' is damaged"):
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

"""LatentStore under a killed process, a full disk, a read-only folder and several writers: nothing lost, nothing doubled."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_altmoe import LatentStore
from modeling_altmoe.shards_altmoe import hash_ids

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and signals of Unix")
ENTRY = {"latent_size": 4, "protocol": {"encoder": "weights:1"}}


def vector(name: str) -> list[float]:
    """The row that belongs to an id, so that a mixed-up row shows."""
    return np.random.default_rng(int(name)).normal(size=4).astype(np.float32).tolist()


def append(store: LatentStore, ids: list[str]) -> None:
    latents = np.array([vector(name) for name in ids], dtype=np.float32).reshape(-1, 4)
    store.append(ids, latents, caption=[f"c{name}" for name in ids])


@pytest.fixture
def tmp_path():
    """In memory where there is such a place: a disk's fsync would take most of the time here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def create(folder, **ranks) -> LatentStore:
    return LatentStore.create(folder, "text", ENTRY, columns={"caption": "string"}, shard_rows=4, **ranks)


def fork(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def assert_holds(folder, ids) -> None:
    """Exactly these rows, each with its own vector and caption."""
    store = LatentStore.open(folder)
    assert sorted(store.ids, key=int) == sorted(ids, key=int)
    assert store.column("caption") == [f"c{name}" for name in store.ids]
    expected = torch.tensor([vector(name) for name in store.ids]).reshape(-1, 4)
    assert torch.equal(store.latents(), expected)
    assert store.rows_of(store.ids).tolist() == list(range(len(store)))


# ---------------------------------------------------------------- killed


def append_some(store):
    with store:
        append(store, [str(n) for n in range(100, 110) if not store.has([str(n)])[0]])


def delete_some(store):
    store.delete(["1", "4", "5"], missing_ok=True)


def compact(store):
    store.compact()


BEFORE = [str(n) for n in range(12) if n not in (2, 9)]
CHANGES = {
    append_some: [BEFORE + [str(n) for n in range(100, stop)] for stop in (100, 104, 108, 110)],
    delete_some: [BEFORE, [n for n in BEFORE if n not in ("1", "4", "5")]],
    compact: [BEFORE],
}


def killed_at(step: int, change, folder) -> None:
    """Change a store, and die just before its `step`-th file is opened, renamed or removed."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    store = LatentStore.open(folder)
    sys.addaudithook(hook)  # cannot be removed, and need not be: this process is a fork
    change(store)


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_before_any_step_leaves_the_old_rows_or_the_new(tmp_path, change):
    with create(tmp_path / "base") as store:
        append(store, [str(n) for n in range(12)])
    store.delete(["2", "9"])
    possible, seen = CHANGES[change], set()
    for step in range(1, 200):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "base", folder)
        process = fork(killed_at, step, change, folder)
        process.join()
        left = LatentStore.open(folder).ids
        assert left in possible, step
        seen.add(possible.index(left))
        assert_holds(folder, left)
        change(LatentStore.open(folder))  # the same again
        assert_holds(folder, possible[-1])
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(".ids/*.tmp"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert step > 5 and seen == set(range(len(possible)))  # it was killed in every phase


def write_share(folder, ids, rank, world, seed) -> None:
    pause = np.random.default_rng(seed)
    with create(folder, rank=rank, world=world) as store:
        mine = [name for name in ids if hash_ids([name])[0] % world == rank]
        for start in range(0, len(mine), 3):
            some = np.array(mine[start : start + 3])
            append(store, some[~store.has(some)].tolist())
            time.sleep(pause.uniform(0, 0.004))


def test_any_number_of_ranks_killed_at_random_moments_double_and_lose_nothing(tmp_path):
    ids, chance = [str(n) for n in range(120)], np.random.default_rng(0)
    for attempt in range(8):
        world = int(chance.integers(1, 4))
        processes = [fork(write_share, tmp_path, ids, rank, world, attempt) for rank in range(world)]
        time.sleep(chance.uniform(0.01, 0.15))
        for process in processes:
            if chance.random() < 0.7:
                process.kill()
        for process in processes:
            process.join()
        if (tmp_path / "store.json").exists():
            kept = LatentStore.open(tmp_path).ids
            assert len(set(kept)) == len(kept)
            assert_holds(tmp_path, kept)
    for process in [fork(write_share, tmp_path, ids, rank, 2, 0) for rank in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert_holds(tmp_path, ids)


# ---------------------------------------------------------------- several at once


def test_a_rank_has_one_writer_and_all_ranks_count_alike(tmp_path):
    first = create(tmp_path, rank=0, world=2)
    append(first, ["1"])
    with pytest.raises(RuntimeError, match=r"Another process is writing to .* as rank 0"):
        append(create(tmp_path, rank=0, world=2), ["2"])
    with pytest.raises(RuntimeError, match="as 0 of 2 ranks"):
        append(create(tmp_path, rank=0, world=1), ["2"])
    for change in (compact, delete_some):
        with pytest.raises(RuntimeError, match="Another process is writing"):
            change(LatentStore.open(tmp_path))
    second = create(tmp_path, rank=1, world=2)
    append(second, ["2"])
    first.flush()
    second.flush()
    assert_holds(tmp_path, ["1", "2"])
    with pytest.raises(ValueError, match=r"rank=2 of world=2: expected 0 to 1"):
        create(tmp_path, rank=2, world=2)


def test_nobody_writes_while_a_store_is_compacted(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_altmoe.shards_altmoe.PATIENCE", 0.05)
    with create(tmp_path) as store:
        append(store, ["1", "2"])
    original, met = LatentStore._describe, []

    def meanwhile(self, **changes):
        with pytest.raises(RuntimeError, match=r"deleting from .* or compacting it"):
            append(LatentStore.open(tmp_path), ["3"])
        met.append(LatentStore.open(tmp_path).ids)
        original(self, **changes)
        met.append(LatentStore.open(tmp_path).ids)

    monkeypatch.setattr(LatentStore, "_describe", meanwhile)
    store.compact()
    assert met == [["1", "2"], ["1", "2"]]


def test_a_reader_keeps_its_rows_while_others_write_and_compact(tmp_path):
    with create(tmp_path) as store:
        append(store, ["1", "2", "3"])
    reader = LatentStore.open(tmp_path)
    content = reader.content
    store.delete(["1"])
    store.compact()
    assert reader.ids == ["1", "2", "3"] and len(reader.take([0, 1, 2])) == 3 and reader.content == content
    reader.reload()
    assert reader.ids == ["2", "3"] and reader.content != content


# ---------------------------------------------------------------- a disk that takes no more


@contextlib.contextmanager
def no_file_above(size: int):
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_loses_nothing(tmp_path):
    with create(tmp_path) as store:
        append(store, ["1", "2", "3"])
    store.delete(["2"])
    for change in (lambda: append(store, ["4", "5", "6", "7", "8"]), lambda: store.flush(), store.compact):
        with no_file_above(300), pytest.raises(OSError, match=r"Cannot write to .*File too large.* is safe"):
            change()
        assert_holds(tmp_path, ["1", "3"])
    store.flush()  # what was pending
    assert_holds(tmp_path, ["1", "3", "4", "5", "6", "7", "8"])
    for change in (store.compact, lambda: store.delete(["1"])):
        with no_file_above(300), pytest.raises(OSError, match="Cannot write to"):
            change()
        assert_holds(tmp_path, ["1", "3", "4", "5", "6", "7", "8"])
    store.compact()
    assert not list(tmp_path.glob("*.tmp"))
    with no_file_above(300), pytest.raises(OSError, match="Cannot write to"), store:
        append(store, ["9"])
    again = LatentStore.open(tmp_path)  # the lock was given back
    append(again, ["9"])
    again.flush()


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small disk in memory, or mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> object:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a file system")
    yield mount
    while subprocess.run(["umount", place], capture_output=True).returncode == 0:
        pass


def test_a_full_disk_is_named_and_loses_nothing(mounted):
    folder = mounted("size=64k") / "store"
    with create(folder) as store:
        append(store, ["1", "2"])
    (folder.parent / "ballast").write_bytes(bytes(4096 * 8))
    with pytest.raises(OSError, match=r"Cannot write to .*No space left on device"), store:
        for n in range(100, 400):
            append(store, [str(n)])
    kept = LatentStore.open(folder).ids
    assert kept[:2] == ["1", "2"] and len(kept) % 4 == 2
    (folder.parent / "ballast").unlink()
    store.flush()
    assert_holds(folder, [*kept, *(str(n) for n in range(100 + len(kept) - 2, 100 + len(kept) + 2))])


def test_a_read_only_store_is_read_and_not_written(mounted):
    folder = mounted("size=1m") / "store"
    with create(folder) as store:
        append(store, ["1", "2"])
    mounted("remount,ro")
    store = LatentStore.open(folder)
    assert store.rows_of(["2", "3"]).tolist() == [1, -1] and len(store.take([1])) == 1
    for change in (append_some, delete_some, compact):
        with pytest.raises(OSError, match=r"Cannot write to .*Read-only file system"):
            change(store)
    with pytest.raises(OSError, match=r"Cannot write to .*Read-only file system"):
        create(folder.parent / "other")
    assert_holds(folder, ["1", "2"])


# ---------------------------------------------------------------- memory


def grown(folder, pipe) -> None:
    """Memory of its own (not of mapped files) that this process needs to open a store and look things up."""

    def own() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    before = own()
    store = LatentStore.open(folder)
    known = store.rows_of([str(n) for n in range(0, len(store), len(store) // 100)])
    assert (known >= 0).all() and not store.has(["none"]).any()
    store.take(known)
    store.columns_of(len(store) - 1)
    for _ in store.batches(1000):
        pass
    store.arrow("id")
    assert store.content
    pipe.send(own() - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    needed = []
    for count in (20_000, 200_000):
        with LatentStore.create(tmp_path / str(count), "text", {"latent_size": 16}, shard_rows=10_000) as store:
            for start in range(0, count, 10_000):
                store.append([str(n) for n in range(start, start + 10_000)], np.zeros((10_000, 16)))
        here, there = multiprocessing.Pipe()
        process = fork(grown, tmp_path / str(count), there)
        process.join()
        assert process.exitcode == 0
        needed.append(here.recv())
    assert needed[1] < needed[0] + 6_000, f"kB: {needed}"  # ids as Python strings would be 10,000, vectors too


# ---------------------------------------------------------------- encode


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def encode_as(rank: int, world: int, port: int, arguments: dict) -> None:
    from accelerate import PartialState

    from trainer.encode import EncodeArguments, encode

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:
        os.environ.update({name: str(value) for name, value in ranks.items()})
    PartialState._reset_state()
    encode(EncodeArguments(**arguments))
    os._exit(0)  # without waiting for threads that the fork did not bring along


def test_encoding_by_several_ranks_survives_kills(tmp_path, encoder_folders):
    words = "cat dog red blue green square circle tree house".split()
    lines = [{"id": str(n), "text": f"a {words[n % 9]} {words[n // 9 % 9]}"} for n in range(160)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = {"data": str(tmp_path / "texts.jsonl"), "encoder": encoder_folders["text"], "modality": "text"}
    arguments |= {"batch_size": 2, "shard_seconds": 0, "device": "cpu"}
    encode_as_one = fork(encode_as, 0, 1, 0, {**arguments, "out": str(tmp_path / "one")})
    encode_as_one.join()
    assert encode_as_one.exitcode == 0
    folder, seen = tmp_path / "many", []
    for world, workers in ((2, 0), (1, 2), (2, 0)):
        port, last = free_port(), len(seen) == 2
        given = {**arguments, "out": str(folder), "workers": workers}
        processes = [fork(encode_as, rank, world, port, given) for rank in range(world)]
        aim = (seen[-1] if seen else 0) + 30
        while not last and any(process.is_alive() for process in processes):
            time.sleep(0.02)
            if (folder / "store.json").exists() and len(LatentStore.open(folder)) >= aim:
                for process in processes:
                    process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == (0 if last else -signal.SIGKILL)
        seen.append(len(LatentStore.open(folder)))
    assert 30 <= seen[0] < seen[1] < seen[2] == 160
    one, many = LatentStore.open(tmp_path / "one"), LatentStore.open(folder)
    assert sorted(many.ids) == sorted(one.ids)
    torch.testing.assert_close(many.take(many.rows_of(one.ids)), one.latents(), atol=1e-5, rtol=0)

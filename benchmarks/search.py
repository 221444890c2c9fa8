"""Search at any size: build time, latency, throughput, recall, memory and disk, and what our layer costs over bare FAISS.

`python -m benchmarks.search --data stamps` needs the stores that `make demo` leaves. Real latents of both modalities are
rotated into 768 dimensions (nothing that these items span is lost), a connector is trained on them as always, and held-out
captions are the queries: real cross-modal ones, out of the gallery's distribution. Real pictures are few, so a gallery is
made of them: each item lies between a real latent and one of its ten nearest neighbours, with noise of a third of each
dimension's spread. What is measured of the ranking is agreement with an exact search of the same gallery, not retrieval
quality. `--rows 10000000` writes 16 GB of float16 latents in chunks and an index of 18 GB. A run that was interrupted goes on
where its gallery or its index was; both are deleted when they are measured (`--keep` leaves them).
An index is built with all cores, as `altmoe index` does; what is measured runs in a process of its own on one. Latencies
are wall-clock time; what parts of the work cost is processor time, which other users of a machine change less.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, keep, read_results
from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.effort_altmoe import TUNING_K, WIDER, knob_of, search_parameters, shorten
from modeling_altmoe.index_files_altmoe import update
from modeling_altmoe.scoring_altmoe import query_vectors
from modeling_altmoe.search_altmoe import QUERIES, LatentIndex
from trainer.arguments import parse_arguments
from trainer.train import open_parts, train

SIZE = 768
PATH = RESULTS / "search.json"
COCO = {"text->image": (5_000, 25_000), "image->text": (25_000, 5_000)}  # direction: items, queries
DIRECTION = "text->image"
OVERHEAD_BATCH = 1000  # queries; both ways are run four times


# ---------------------------------------------------------------- model and galleries


def rotate(latents: torch.Tensor) -> torch.Tensor:
    """`(n, d)` -> `(n, 768)` by orthonormal columns that span the items, so that all angles and lengths stay."""
    if latents.shape[1] >= SIZE:
        basis = torch.linalg.svd(latents, full_matrices=True).Vh[:SIZE].T  # the n directions first
    else:
        random = torch.randn(SIZE, latents.shape[1], generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(random).Q.T
    return latents @ basis


def prepare(data: str, folder: Path) -> tuple[AltMoEModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model of 768-d latents trained on a demo's pairs; all latents; the latents of its test items."""
    stores = {}
    for modality in ("image", "text"):
        source = LatentStore.open(f"build/stores/{data}/{modality}")
        stores[modality] = folder / "real" / modality
        encoder = {"latent_size": SIZE, "protocol": {**source.encoder["protocol"], "encoder": f"{modality}, rotated"}}
        with LatentStore.create(stores[modality], modality, encoder, columns=source.columns) as store:
            if not len(store):
                columns = {name: source.column(name) for name in source.columns}
                store.append(source.ids, rotate(source.latents()), **columns)
    given = ["--stores", str({m: str(p) for m, p in stores.items()}).replace("'", '"'), "--overwrite", "true"]
    run = folder / "model"
    arguments = parse_arguments(["model_cards/recipes/stamps.yaml", *given, "--output_dir", str(run)])
    if not (run / "model.safetensors").exists():
        arguments.disable_tqdm = True
        train(arguments)
    model = AltMoEModel.from_pretrained(str(run)).eval()
    opened = {modality: LatentStore.open(path) for modality, path in stores.items()}
    test = open_parts(model, opened, vars(arguments))["test"]
    return model, {m: store.latents() for m, store in opened.items()}, {m: test.latents[m] for m in opened}


def expand(real: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """`rows` latents between real ones and their neighbours, of the real ones' length; float16."""
    generator = torch.Generator().manual_seed(seed)
    unit = F.normalize(real - real.mean(0), dim=-1)
    neighbours = (unit @ unit.T).topk(min(11, len(real)), dim=1).indices[:, 1:]
    first = torch.randint(len(real), (rows,), generator=generator)
    second = neighbours[first, torch.randint(neighbours.shape[1], (rows,), generator=generator)]
    weight = torch.rand(rows, 1, generator=generator) / 2
    spread, length = real.std(0) / 3, real.norm(dim=-1).mean()
    result = torch.empty(rows, real.shape[1], dtype=torch.float16)
    noise = torch.empty(512, real.shape[1])  # a few rows at a time, which stay in the processor's cache
    for here in torch.arange(rows).split(len(noise)):
        mixed = torch.lerp(real[first[here]], real[second[here]], weight[here])
        mixed.addcmul_(noise[: len(here)].normal_(generator=generator), spread)
        result[here[0] : here[-1] + 1] = mixed.mul_(length / mixed.norm(dim=1, keepdim=True))
    return result


def gallery(model: AltMoEModel, modality: str, real: torch.Tensor, rows: int, folder: Path) -> LatentStore:
    """A store of the real latents and what `expand` makes of them, float16, written in chunks; column `part`: 0 to 999.

    One that an interrupted run left is gone on with: every chunk has its own seed, and shards end where chunks do.
    """
    encoder, chunk = model.config.encoders[modality], min(100_000, max(20_000, rows // 10))
    layout = {"dtype": "float16", "columns": {"part": "int32"}, "shard_rows": chunk}
    with LatentStore.create(folder, modality, encoder, **layout) as store:
        for start in range(len(store), rows, chunk):
            size = min(chunk, rows - start)
            some = expand(real, size, start) if start else torch.cat([real.half(), expand(real, size, 0)])[:size]
            numbers = range(start, start + size)
            store.append([str(row) for row in numbers], some, part=[(row * 7919) % 1000 for row in numbers])
    return LatentStore.open(folder)


# ---------------------------------------------------------------- measures


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: its own, and pages of mapped files (which the system may drop)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0][:-1]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"own": found["RssAnon"], "mapped": found["RssFile"]}


def seconds(function, *arguments, clock=time.perf_counter) -> float:
    """Of one call."""
    start = clock()
    function(*arguments)
    return clock() - start


def percentiles(function, arguments: list[tuple]) -> dict[str, float]:
    """Of many calls, in milliseconds; `cpu_ms`: the median of the processor's time."""
    wall, cpu = [], []
    for given in arguments:
        start = time.process_time()
        wall.append(seconds(function, *given))
        cpu.append(time.process_time() - start)
    p50, p99 = np.percentile(wall, [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99), "cpu_ms": float(np.median(cpu) * 1e3)}


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of a folder's files in memory, as after a start of the machine."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)  # what is not written yet is not dropped
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def effort_of(index: LatentIndex, k: int) -> tuple[int, object]:
    """The approximate index's short list for `k` results, and FAISS's search parameters."""
    effort, knob = index.backend.effort, knob_of(index.backend.index)
    parameters = search_parameters(index.backend.index, effort[knob], None) if knob else None
    return effort["short_list"] * k // TUNING_K, parameters


def bare_faiss(index: LatentIndex, queries: torch.Tensor, k: int) -> np.ndarray:
    """FAISS called directly: the exact index, or all that the approximate one gives."""
    backend, vectors = index.backend, queries.numpy()
    if backend.factory == "exact":
        return backend.index.search(vectors, k)[1]
    short, parameters = effort_of(index, k)
    return backend.index.search(np.ascontiguousarray(vectors[:, :-1]), WIDER * short, params=parameters)[1]


def bare_search(index: LatentIndex, queries: torch.Tensor, k: int):
    """The same work without our layer: FAISS called directly, its short list ranked again with the stored vectors."""
    backend = index.backend
    if backend.factory == "exact":
        return bare_faiss(index, queries, k)
    short, parameters = effort_of(index, k)
    return backend.rank(
        queries.numpy(), k, shorten(backend.index, queries.numpy(), short, parameters, backend.kept.hubness)
    )


def measure(run: str, folder: str, direction: str, queries: torch.Tensor, batch: int) -> dict:
    """Everything about one kept index, in a process of its own."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    model, store = AltMoEModel.from_pretrained(run).eval(), LatentStore.open(folder)
    source = direction.partition("->")[0]
    forget(Path(folder))
    before, start = memory(), time.perf_counter()
    index = LatentIndex(model, store, direction)
    result: dict = {"index": index.describe(), "open_seconds": time.perf_counter() - start}
    backend, k = index.backend, max(10, TUNING_K)

    def connector(latents):
        return query_vectors(model, index.post, direction, {source: latents})

    singles = [queries[i : i + 1] for i in range(len(queries))]
    result["cold"] = percentiles(index.search, [(one, k) for one in singles])  # each reads its rows from the disk
    result["single"] = percentiles(index.search, [(one, k) for one in singles])
    result["connector"] = percentiles(connector, [(one,) for one in singles])
    vectors = [connector(one) for one in singles]
    result["bare"] = percentiles(bare_search, [(index, one, k) for one in vectors])
    result["faiss"] = percentiles(bare_faiss, [(index, one, k) for one in vectors])

    def bare(latents):
        for part in connector(latents).split(QUERIES):
            bare_search(index, part, k)

    def overhead(latents: list[torch.Tensor]) -> float:  # both ways in turn, so that both meet the same caches
        times = {bare: [], index.search: []}
        for number, some in enumerate(latents):
            for function in sorted(times, key=lambda f: (f is bare) == (number % 2)):
                given = (some,) if function is bare else (some, k)
                times[function].append(seconds(function, *given, clock=time.process_time))
        return float(100 * (np.median(times[index.search]) / np.median(times[bare]) - 1))

    many = queries.repeat(batch // len(queries) + 1, 1)[:batch]
    result["overhead_percent"] = {"single": overhead(2 * singles), "batch": overhead(4 * [many[:OVERHEAD_BATCH]])}
    wall = min(seconds(index.search, many, k) for _ in range(3))
    cpu = min(seconds(index.search, many, k, clock=time.process_time) for _ in range(3))
    result["batch"] = {"queries": batch, "per_second": batch / wall, "per_cpu_second": batch / cpu}
    result["batch"]["connector_cpu_ms"] = 1e3 * min(seconds(connector, many, clock=time.process_time) for _ in range(3))
    after = memory()
    result["memory_mb"] = {name: after[name] - before[name] for name in after}

    # agreement with an exact search by the whole score
    whole = connector(queries).numpy()
    if backend.factory != "exact":
        for name, where in (("recall", None), ("recall_where_1_percent", {"part": {"lt": 10}}),
                            ("recall_where_half", {"part": {"lt": 500}})):  # fmt: skip
            rows = np.arange(len(store)) if where is None else backend._select(where)[0]
            backend.read_ahead(True)  # in order
            truth = backend._scan(whole, 10, rows)[0]
            backend.read_ahead()
            found = [{hit.row for hit in hits} for hits in index.search(queries, 10, where)]
            result[name] = float(np.mean([len(set(t) & f) / 10 for t, f in zip(truth.tolist(), found, strict=True)]))
            if where:
                result[name.replace("recall", "single")] = percentiles(
                    index.search, [(one, 10, where) for one in singles]
                )
    return result


def on_disk(folder: Path) -> float:
    """MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def run_size(model, real, test, run: Path, folder: Path, rows: int, direction: str, index: str, batch: int) -> dict:
    """Write a gallery, index it, measure it. What an interrupted run left in the folder is not done again."""
    source, _, target = direction.partition("->")
    start = time.perf_counter()
    store = gallery(model, target, real[target], rows, folder)
    print(f"{rows:,} rows written in {time.perf_counter() - start:.0f} s", flush=True)
    start, kept = time.perf_counter(), folder / f"built-{index}.json"
    backend, place, done = update(model, store, direction, index)
    if done != "up to date" or not kept.exists():
        kept.write_text(json.dumps({"build_seconds": time.perf_counter() - start}))
    index_mb = on_disk(place)
    result = {"rows": rows, "direction": direction, "store_mb": on_disk(folder) - on_disk(folder / "index")}
    result |= {"factory": backend.factory, "index_mb": index_mb, **json.loads(kept.read_text())}
    print(f"{rows:,} rows indexed in {result['build_seconds']:.0f} s: {backend.describe()}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the new process: what a query costs, not what a machine can hide
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return result | alone.submit(measure, str(run), str(folder), direction, test[source], batch).result()


def table(results: dict) -> str:
    """A row an index, as in the README."""
    lines = [
        "| gallery | index | build s | p50 / p99 ms, one query | from a cold disk | CPU ms: connector + FAISS + ranking again | "
        "queries/s, batch | recall@10 | where 1 % / 50 % match | layer over bare FAISS, one / batch | memory MB, own + mapped | "
        "index MB |",
        "|" + 12 * "---|",
    ]
    for name, r in results.items():
        exact = "recall" not in r
        recall = ["recall", "recall_where_1_percent", "recall_where_half"]
        recall = ["1"] * 3 if exact else [f"{r[key]:.3f}" for key in recall]
        # earlier versions did not measure it
        cold = f"{r['cold']['p50_ms']:.0f} / {r['cold']['p99_ms']:.0f}" if "cold" in r else "-"
        cpu = {key: r[key]["cpu_ms"] for key in ("connector", "faiss", "bare")}
        lines.append(
            f"| {name} | {r['factory']} | "
            f"{r['build_seconds']:.0f} | {r['single']['p50_ms']:.1f} / {r['single']['p99_ms']:.1f} | "
            f"{cold} | {cpu['connector']:.1f} + {cpu['faiss']:.1f} + {cpu['bare'] - cpu['faiss']:.1f} | "
            f"{r['batch']['per_second']:.0f} | {recall[0]} | {recall[1]} / {recall[2]} | "
            f"{r['overhead_percent']['single']:+.0f} % / {r['overhead_percent']['batch']:+.0f} % | "
            f"{r['memory_mb']['own']:.0f} + {r['memory_mb']['mapped']:.0f} | {r['index_mb']:.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """What was measured on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, one thread of {os.cpu_count()} cores, {platform.system()}"


def main() -> None:
    """Measure what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--data", default="stamps", help="a folder of build/stores with an image and a text store")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000], help="sizes of galleries (default: 100000)")
    parser.add_argument("--index", default="auto", help="auto, exact or a FAISS factory string (default: auto)")
    parser.add_argument("--batch", type=int, default=1000, help="queries of the batch (default: 1000)")
    parser.add_argument("--no_coco", action="store_true", help="leave out the shapes of COCO-5K")
    parser.add_argument("--keep", action="store_true", help="leave galleries and their indexes, for another run")
    parser.add_argument("--work", default="build/search", help="where galleries are written (default: build/search)")
    arguments = parser.parse_args()
    work = Path(arguments.work) / arguments.data
    model, real, test = prepare(arguments.data, work)
    results, about = read_results(PATH, "sizes"), {"machine": machine(), "threads": 1}
    tasks = {f"{rows:,}": (DIRECTION, rows, arguments.batch) for rows in arguments.rows}
    if not arguments.no_coco:
        tasks |= {f"COCO-5K, {d}": (d, items, queries) for d, (items, queries) in COCO.items()}
    for name, (direction, rows, batch) in tasks.items():
        name += "" if arguments.index == "auto" else f", {arguments.index}"
        folder = work / f"gallery-{direction.partition('->')[2]}-{rows}"
        measured = run_size(model, real, test, work / "model", folder, rows, direction, arguments.index, batch)
        results = keep(PATH, about, "sizes", [name], measured)
        if not arguments.keep:
            shutil.rmtree(folder)
        print(measured, flush=True)
    print(f"\n{about['machine']}; queries: {len(test['text'])} held-out items of {arguments.data}\n\n{table(results)}")


if __name__ == "__main__":
    main()

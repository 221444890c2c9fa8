"""A world whose truth is known: when do a mixture and alternation help, and what do the gates find?

`python -m benchmarks.synthetic` makes latents of several modalities from a shared factor z and factors of each modality's
own, and trains the project's own connector (no closed form) on pairs:

    latent_m = A_m [ R_{m,c} z ; s_m ] + noise        c: the item's cluster, drawn with z around the cluster's centre

With conflict 0 every R is the identity: one map serves all items. With conflict 1 every (modality, cluster) has its own
rotation, so what is right for one cluster is wrong for another, and the clusters compete for a connector that is
narrower than the latents. Four arms with equal direction updates and equal active parameters: mixture or one dense
expert, alternating or joint. It is a model of a difficulty, not evidence about real encoders.
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

from benchmarks.common import RESULTS, keep, read_results, standard_error
from modeling_altmoe import AltMoEConfig, AltMoEModel
from trainer.arguments import AltMoEArguments
from trainer.fitting import fit_frames
from trainer.measuring import evaluate_pairs
from trainer.pairs import LatentPairs
from trainer.plotting import pyplot
from trainer.trainer import AltMoETrainer

SIZE, SHARED, OWN, CLUSTERS = 32, 12, 6, 8  # latent size; sizes of z and of s_m; clusters
ARMS = {
    "mixture, alternating": ({"num_experts": 8, "top_k": 2, "moe_intermediate_size": 16}, "round_robin"),
    "mixture, joint": ({"num_experts": 8, "top_k": 2, "moe_intermediate_size": 16}, "joint"),
    "dense, alternating": ({"num_experts": 1, "top_k": 1, "moe_intermediate_size": 32}, "round_robin"),
    "dense, joint": ({"num_experts": 1, "top_k": 1, "moe_intermediate_size": 32}, "joint"),
}
PATH = RESULTS / "synthetic.json"


def rotation(generator: torch.Generator, conflict: float) -> torch.Tensor:
    """The identity at conflict 0, a random rotation at 1, between them the orthogonal matrix nearest to their mixture."""
    random, _ = torch.linalg.qr(torch.randn(SHARED, SHARED, generator=generator))
    left, _, right = torch.linalg.svd((1 - conflict) * torch.eye(SHARED) + conflict * random)
    return left @ right


def world(modalities: int, conflict: float, noise: float, rows: int, seed: int) -> tuple[dict, torch.Tensor]:
    """`{modality: (rows, SIZE)}` latents and the cluster of each row `(rows,)`."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLUSTERS, SHARED, generator=generator)
    mix = [torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(modalities)]
    turns = [torch.stack([rotation(generator, conflict) for _ in range(CLUSTERS)]) for _ in range(modalities)]
    cluster = torch.randint(CLUSTERS, (rows,), generator=generator)
    shared = centres[cluster] + torch.randn(rows, SHARED, generator=generator)
    latents = {}
    for number in range(modalities):
        seen = torch.einsum("rij,rj->ri", turns[number][cluster], shared)
        own = torch.randn(rows, OWN, generator=generator)
        latents[f"m{number}"] = torch.cat([seen, own], dim=1) @ mix[number][: SHARED + OWN]
        latents[f"m{number}"] += noise * torch.randn(rows, SIZE, generator=generator)
    return latents, cluster


def shared_information(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Normalised mutual information of two labellings, above what chance gives: 1 for the same, 0 for independent ones.

    I(a; b) / sqrt(H(a) H(b)) minus its mean over 20 permutations, over 1 minus that mean (Vinh et al. 2010).
    """

    def normalised(first, second):
        _, i = np.unique(first, return_inverse=True)
        _, j = np.unique(second, return_inverse=True)
        joint = np.zeros((i.max() + 1, j.max() + 1))
        np.add.at(joint, (i, j), 1 / len(i))
        rows, columns = joint.sum(1), joint.sum(0)
        entropies = [-(p * np.log(p)).sum() for p in (rows, columns)]
        if min(entropies) < 1e-12:
            return 0.0  # a constant says nothing
        filled = joint > 0
        information = (joint[filled] * np.log(joint[filled] / np.outer(rows, columns)[filled])).sum()
        return information / np.sqrt(entropies[0] * entropies[1])

    generator = np.random.default_rng(seed)
    chance = np.mean([normalised(a, generator.permutation(b)) for _ in range(20)])
    return float((normalised(a, b) - chance) / (1 - chance))


@torch.no_grad()
def what_gates_find(model, latents: dict, cluster: torch.Tensor) -> dict:
    """Shared information of the chosen first expert with the item's cluster, and with the direction."""
    chosen, clusters, directions = [], [], []
    for number, direction in enumerate(model.directions):
        source = direction.partition("->")[0]
        output = model.connector({source: latents[source]}, direction)
        for gate in range(output.router_indices.shape[1]):
            chosen.append(output.router_indices[:, gate, 0].numpy())
            clusters.append(cluster.numpy())
            directions.append(np.full(len(cluster), number))
    chosen, clusters, directions = map(np.concatenate, (chosen, clusters, directions))
    return {"cluster": shared_information(chosen, clusters), "direction": shared_information(chosen, directions)}


def run(arm: str, modalities: int, conflict: float, seed: int, given) -> dict:
    """Train one arm in one world and measure it on items it has not seen."""
    changes, schedule = ARMS[arm]
    latents, cluster = world(modalities, conflict, given.noise, given.rows + 300, seed)
    keys = [f"k{i}" for i in range(given.rows + 300)]
    directions = [f"m{a}->m{b}" for a in range(modalities) for b in range(modalities) if a != b]
    parts = {}
    for name, rows in (("train", slice(0, given.rows)), ("test", slice(given.rows, None))):
        held = {m: x[rows] for m, x in latents.items()}
        parts[name] = LatentPairs(held, {m: keys[rows] for m in held}, directions)
    encoders = {m: {"latent_size": SIZE} for m in latents}
    torch.manual_seed(seed)
    config = AltMoEConfig(
        encoders=encoders,
        directions=directions,
        hidden_size=given.width,
        base="none",
        dropout=0.0,
        latent_noise=0.0,
        **changes,
    )
    model = AltMoEModel(config)
    fit_frames(model, parts["train"])
    updates = given.updates * len(directions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = AltMoEArguments(
            output_dir=folder, seed=seed, schedule=schedule, use_cpu=True, disable_tqdm=True,
            max_steps=updates // len(directions) if schedule == "joint" else updates, learning_rate=3e-3,
            per_device_train_batch_size=given.batch, eval_strategy="no", save_strategy="no", logging_steps=10**6,
            load_best_model_at_end=False, early_stopping_patience=0,
        )  # fmt: skip
        start = time.time()
        AltMoETrainer(model, arguments, parts["train"]).train()
    model.eval()
    found = what_gates_find(model, parts["test"].latents, cluster[given.rows :]) if config.num_experts > 1 else {}
    return {
        "recall": evaluate_pairs(model, parts["test"])["mean_recall"],
        "seconds": time.time() - start,
        "gates": found,
    }


def table(results: dict, cells: list[tuple], seeds: list[int]) -> str:
    """A row a world: recall of every arm, paired gains of the mixture and of alternation, what the gates find."""
    lines = [
        f"| modalities | conflict | {' | '.join(ARMS)} | mixture's gain | alternation's gain | gates: cluster | gates: direction |",
        "|---" * (6 + len(ARMS)) + "|",
    ]
    for modalities, conflict in cells:
        of = {arm: [results[f"{modalities}/{conflict}"][arm][str(s)] for s in seeds] for arm in ARMS}
        recall = {arm: 100 * np.array([m["recall"] for m in runs]) for arm, runs in of.items()}
        mixture = (
            recall["mixture, alternating"] - recall["dense, alternating"],
            recall["mixture, joint"] - recall["dense, joint"],
        )
        turns = (
            recall["mixture, alternating"] - recall["mixture, joint"],
            recall["dense, alternating"] - recall["dense, joint"],
        )
        gates = [[m["gates"][name] for m in of["mixture, alternating"]] for name in ("cluster", "direction")]
        values = [*recall.values(), np.mean(mixture, axis=0), np.mean(turns, axis=0)]
        texts = [f"{v.mean():.1f} ± {standard_error(v):.1f}" for v in values]
        texts += [f"{np.mean(v):.2f} ± {standard_error(v):.2f}" for v in gates]
        lines.append(f"| {modalities} | {conflict:g} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(results: dict, cells: list[tuple], seeds: list[int]) -> None:
    """Recall against conflict, a panel for each number of modalities, a line an arm."""
    counts = sorted({modalities for modalities, _ in cells})
    figure, axes = pyplot().subplots(
        1, len(counts), figsize=(4.5 * len(counts), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, count in zip(axes[0], counts, strict=True):
        conflicts = [conflict for modalities, conflict in cells if modalities == count]
        for arm in ARMS:
            values = [[100 * results[f"{count}/{c}"][arm][str(s)]["recall"] for s in seeds] for c in conflicts]
            style = {
                "color": "#1a6fb0" if "mixture" in arm else "#d0743c",
                "linestyle": "-" if "alternating" in arm else "--",
            }
            axis.errorbar(
                conflicts,
                np.mean(values, axis=1),
                yerr=[standard_error(v) for v in values],
                label=arm,
                capsize=3,
                **style,
            )
        axis.set(title=f"{count} modalities, {count * (count - 1)} directions", xlabel="conflict between clusters")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean recall on new items, %")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "synthetic.png", dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print the table, write the JSON, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.add_argument(
        "--modalities", type=int, nargs="+", default=[2, 3], help="2 and more; every ordered pair is trained"
    )
    parser.add_argument("--conflict", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="training pairs")
    parser.add_argument("--updates", type=int, default=150, help="updates of each direction")
    parser.add_argument("--width", type=int, default=32, help="the connector's width")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation on every latent component")
    parser.add_argument(
        "--quick", action="store_true", help="two modalities, the ends of the scale, one seed, 30 updates"
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.modalities, given.conflict, given.seeds, given.updates, given.rows = [2], [0.0, 1.0], [0], 30, 500
    about = {"settings": {name: getattr(given, name) for name in ("rows", "updates", "width", "batch", "noise")}}
    path = PATH.with_name("synthetic-quick.json") if given.quick else PATH
    results = read_results(path, "worlds")
    cells = list(itertools.product(given.modalities, given.conflict))
    for (modalities, conflict), arm, seed in itertools.product(cells, ARMS, given.seeds):
        place = f"{modalities}/{conflict}"
        if str(seed) not in results.get(place, {}).get(arm, {}):
            measured = run(arm, modalities, conflict, seed, given)
            print(
                f"{modalities} modalities, conflict {conflict:g}, seed {seed}, {arm}: {100 * measured['recall']:.1f} %",
                flush=True,
            )
            results = keep(path, about, "worlds", [place, arm, str(seed)], measured)
    print(f"\nmean recall in % ± standard error, {len(given.seeds)} seeds\n\n{table(results, cells, given.seeds)}")
    if not given.quick:
        draw(results, cells, given.seeds)


if __name__ == "__main__":
    main()

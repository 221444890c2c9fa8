"""A world whose truth is known: when do a mixture and alternation help, and what do the gates find?

`python -m benchmarks.synthetic` makes latents of several modalities from a shared factor z and factors of each modality's
own, and trains the project's own connector (no closed form) on pairs:

    latent_m = A_m [ R_{m,c} z ; s_m ] + noise        c: the item's cluster, drawn with z around the cluster's centre

With conflict 0 every R is the identity: one map serves all items. With conflict 1 every (modality, cluster) has its own
rotation, so what is right for one cluster is wrong for another, and the clusters compete for a connector that is
narrower than the latents. Four arms with equal direction updates and equal active parameters: mixture or one dense
expert, alternating or joint. A joint step updates all T directions at once, so at equal updates (equal work) the joint
arms make T times fewer steps; `--updates` with several numbers says what is left of that with more training. It is a
model of a difficulty, not evidence about real encoders.
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import time
from typing import NamedTuple

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


class World(NamedTuple):
    """Latents `{modality: (rows, SIZE)}`, the cluster of each row `(rows,)`, own factors `{modality: (rows, OWN)}`."""

    latents: dict[str, torch.Tensor]
    cluster: torch.Tensor
    own: dict[str, torch.Tensor]


def world(modalities: int, conflict: float, noise: float, rows: int, seed: int) -> World:
    """A seeded world, see the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLUSTERS, SHARED, generator=generator)
    mix = [torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(modalities)]
    turns = [torch.stack([rotation(generator, conflict) for _ in range(CLUSTERS)]) for _ in range(modalities)]
    cluster = torch.randint(CLUSTERS, (rows,), generator=generator)
    shared = centres[cluster] + torch.randn(rows, SHARED, generator=generator)
    latents, own = {}, {}
    for number in range(modalities):
        seen = torch.einsum("rij,rj->ri", turns[number][cluster], shared)
        own[f"m{number}"] = torch.randn(rows, OWN, generator=generator)
        latents[f"m{number}"] = torch.cat([seen, own[f"m{number}"]], dim=1) @ mix[number][: SHARED + OWN]
        latents[f"m{number}"] += noise * torch.randn(rows, SIZE, generator=generator)
    return World(latents, cluster, own)


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
def what_gates_find(model, items: World) -> dict:
    """Shared information of each gate's first expert with what made the item.

    Returns:
        `{"contrastive" | "regression": {"cluster", "own", "direction"}}`: the cluster (the shared part), the octant of the
        source's own factor (its first three signs: as many labels as clusters), and the direction.
    """
    found = {}
    for gate, name in enumerate(("contrastive", "regression")):
        columns = {"expert": [], "cluster": [], "own": [], "direction": []}
        for number, direction in enumerate(model.directions):
            source = direction.partition("->")[0]
            output = model.connector({source: items.latents[source]}, direction)
            columns["expert"].append(output.router_indices[:, gate % output.router_indices.shape[1], 0])
            columns["cluster"].append(items.cluster)
            columns["own"].append(((items.own[source][:, :3] > 0) * torch.tensor([1, 2, 4])).sum(1))
            columns["direction"].append(torch.full_like(items.cluster, number))
        chosen, *others = (torch.cat(parts).numpy() for parts in columns.values())
        found[name] = {
            label: shared_information(chosen, other) for label, other in zip(list(columns)[1:], others, strict=True)
        }
    return found


def run(arm: str, modalities: int, conflict: float, updates: int, seed: int, given) -> dict:
    """Train one arm in one world and measure it on items it has not seen."""
    changes, schedule = ARMS[arm]
    items = world(modalities, conflict, given.noise, given.rows + 300, seed)
    keys = [f"k{i}" for i in range(given.rows + 300)]
    directions = [f"m{a}->m{b}" for a in range(modalities) for b in range(modalities) if a != b]
    parts = {}
    for name, rows in (("train", slice(0, given.rows)), ("test", slice(given.rows, None))):
        held = {m: x[rows] for m, x in items.latents.items()}
        parts[name] = LatentPairs(held, {m: keys[rows] for m in held}, directions)
    encoders = {m: {"latent_size": SIZE} for m in items.latents}
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
    steps = updates if schedule == "joint" else updates * len(directions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = AltMoEArguments(
            output_dir=folder, seed=seed, schedule=schedule, use_cpu=True, disable_tqdm=True,
            max_steps=steps, learning_rate=3e-3,
            per_device_train_batch_size=given.batch, eval_strategy="no", save_strategy="no", logging_steps=10**6,
            load_best_model_at_end=False, early_stopping_patience=0,
        )  # fmt: skip
        start = time.time()
        AltMoETrainer(model, arguments, parts["train"]).train()
    model.eval()
    unseen = World(
        parts["test"].latents, items.cluster[given.rows :], {m: own[given.rows :] for m, own in items.own.items()}
    )
    found = what_gates_find(model, unseen) if config.num_experts > 1 else {}
    return {
        "recall": evaluate_pairs(model, parts["test"])["mean_recall"],
        "seconds": time.time() - start,
        "gates": found,
    }


def place_of(modalities: int, conflict: float, updates: int) -> str:
    """The name of a world and its length of training in the JSON."""
    return f"{modalities}/{conflict}/{updates}"


def recalls(results: dict, place: str) -> dict[str, np.ndarray]:
    """Recall in percent of every arm, of the seeds that all arms have."""
    of = results.get(place, {})
    seeds = sorted(set.intersection(*(set(of.get(arm, {})) for arm in ARMS)))
    return {arm: np.array([100 * of[arm][seed]["recall"] for seed in seeds]) for arm in ARMS}


def _text(values, digits: int = 1) -> str:
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def table(results: dict, cells: list[tuple]) -> str:
    """A row a world and number of updates: recall of every arm, paired gains of the mixture and of alternation."""
    lines = [
        f"| modalities | conflict | updates | seeds | {' | '.join(ARMS)} | mixture's gain | alternation's gain |",
        "|---" * (6 + len(ARMS)) + "|",
    ]
    for cell in cells:
        recall = recalls(results, place_of(*cell))
        alternating, joint, dense, dense_joint = (recall[arm] for arm in ARMS)
        if not len(joint):
            continue
        gains = [(alternating - dense + joint - dense_joint) / 2, (alternating - joint + dense - dense_joint) / 2]
        texts = [_text(values) for values in (*recall.values(), *gains)]
        lines.append(f"| {cell[0]} | {cell[1]:g} | {cell[2]} | {len(joint)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def gates_table(results: dict, cells: list[tuple]) -> str:
    """What the first expert of each gate shares with the item, in the alternating mixture."""
    labels = [(gate, label) for gate in ("contrastive", "regression") for label in ("cluster", "own", "direction")]
    lines = [
        f"| modalities | conflict | updates | seeds | {' | '.join(f'{gate}: {label}' for gate, label in labels)} |",
        "|---" * (4 + len(labels)) + "|",
    ]
    for cell in cells:
        runs = results.get(place_of(*cell), {}).get(next(iter(ARMS)), {}).values()
        runs = [run for run in runs if "contrastive" in run["gates"]]  # earlier versions kept another reading
        if runs:
            texts = [_text([run["gates"][gate][label] for run in runs], 2) for gate, label in labels]
            lines.append(f"| {cell[0]} | {cell[1]:g} | {cell[2]} | {len(runs)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(results: dict, cells: list[tuple]) -> None:
    """Recall against conflict: a panel for each number of modalities and of updates, a line an arm."""
    panels = sorted({(modalities, updates) for modalities, _, updates in cells})
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (count, updates) in zip(axes[0], panels, strict=True):
        for arm in ARMS:
            points = [(c, recalls(results, place_of(m, c, u))[arm]) for m, c, u in cells if (m, u) == (count, updates)]
            points = [(c, values) for c, values in points if len(values)]
            axis.errorbar(
                [c for c, _ in points],
                [values.mean() for _, values in points],
                yerr=[standard_error(values) for _, values in points],
                label=arm,
                capsize=3,
                color="#1a6fb0" if "mixture" in arm else "#d0743c",
                linestyle="-" if "alternating" in arm else "--",
            )
        axis.set_title(f"{count} modalities, {updates} updates a direction", fontsize=9)
        axis.set_xlabel("conflict between clusters")
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
    parser.add_argument("--updates", type=int, nargs="+", default=[150, 600], help="updates of each direction")
    parser.add_argument("--width", type=int, default=32, help="the connector's width")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation on every latent component")
    parser.add_argument(
        "--quick", action="store_true", help="two modalities, the ends of the scale, one seed, 30 updates"
    )
    given = parser.parse_args(arguments)
    if given.quick:
        given.modalities, given.conflict, given.seeds, given.updates, given.rows = [2], [0.0, 1.0], [0], [30], 500
    about = {"settings": {name: getattr(given, name) for name in ("rows", "width", "batch", "noise")}}
    path = PATH.with_name("synthetic-quick.json") if given.quick else PATH
    results = read_results(path, "worlds")
    cells = list(itertools.product(given.modalities, given.conflict, given.updates))
    for seed, cell, arm in itertools.product(given.seeds, sorted(cells, key=lambda cell: cell[2]), ARMS):
        place = place_of(*cell)
        if str(seed) not in results.get(place, {}).get(arm, {}):
            measured = run(arm, *cell, seed, given)
            modalities, conflict, updates = cell
            print(
                f"{modalities} modalities, conflict {conflict:g}, {updates} updates, seed {seed}, {arm}: "
                f"{100 * measured['recall']:.1f} %",
                flush=True,
            )
            results = keep(path, about, "worlds", [place, arm, str(seed)], measured)
    print(f"\nmean recall in % ± standard error over seeds\n\n{table(results, cells)}")
    print(f"\nwhat the gates' first experts share with the item (0: nothing, 1: all)\n\n{gates_table(results, cells)}")
    if not given.quick:
        draw(results, cells)


if __name__ == "__main__":
    main()

"""Which experts fire: how often each gate of each direction chooses each expert on held-out items, measured and drawn.

Comes in: a model and [`LatentPairs`]. Goes out: numbers for evaluation.json, and the picture of a card.
"""

from pathlib import Path

import torch

from trainer.pairs import LatentPairs
from trainer.plotting import pyplot


def gate_names(count: int) -> list[str]:
    """What the gates serve: one for each loss term, or one for both."""
    return ["contrastive gate", "regression gate"] if count > 1 else ["the one gate"]


@torch.no_grad()
def expert_usage(model, pairs: LatentPairs) -> dict[str, dict]:
    """How a model's gates use its experts on pairs.

    Returns:
        `{direction: {"items", "trust", "gates": {gate: {"chosen", "weight", "effective"}}}}`: for every expert the share of
        items that it sees (they add up to top-K) and its mean weight (they add up to one); `effective` is the exponential
        of the mean weights' entropy, so N where all are used alike and 1 where one does everything. `trust` is how far
        the experts' correction counts.
    """
    usage = {}
    for place, direction in enumerate(model.directions):
        batch = pairs.batch(direction, range(len(pairs.rows[direction])))
        output = model.connector({m: x.to(model.device) for m, x in batch["latents"].items()}, direction)
        weights = torch.zeros_like(output.router_logits)  # (items, gates, experts)
        weights.scatter_(2, output.router_indices, output.router_weights.to(weights.dtype))
        chosen = torch.zeros_like(weights).scatter_(2, output.router_indices, 1.0)
        gates = {}
        for gate, name in enumerate(gate_names(weights.shape[1])):
            mean = weights[:, gate].double().mean(0)
            gates[name] = {
                "chosen": [round(share, 4) for share in chosen[:, gate].double().mean(0).tolist()],
                "weight": [round(share, 4) for share in mean.tolist()],
                "effective": round(torch.special.entr(mean / mean.sum()).sum().exp().item(), 2),
            }
        trust = float(model.connector.trust[place])
        usage[direction] = {"items": len(weights), "trust": round(trust, 4), "gates": gates}
    return usage


def draw_usage(usage: dict[str, dict], path: Path) -> None:
    """A row a gate, a column an expert; the darker, the more items it sees.

    Args:
        usage: what `expert_usage` returned.
        path: the picture to write.
    """
    rows = {f"{d}\n{name}": gate["chosen"] for d, its in usage.items() for name, gate in its["gates"].items()}
    experts = len(next(iter(rows.values())))
    size = (2.2 + 0.5 * experts, 0.9 + 0.5 * len(rows))
    figure, axis = pyplot().subplots(figsize=size, layout="constrained")
    axis.imshow([[100 * share for share in shares] for shares in rows.values()], cmap="Greens", vmin=0, vmax=100)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.set_xticks(range(experts), range(1, experts + 1), fontsize=8)
    axis.set_xlabel("expert; in the cell: items that it sees, %")
    for y, shares in enumerate(rows.values()):
        for x, share in enumerate(shares):
            color = "white" if share > 0.6 else "black"
            axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.savefig(path, dpi=110)

"""Competitors that are trained by gradient: heads over frozen latents, and the authors' predictor.

In: what every `Baseline` gets. Out: fitted retrievers. Nonlinear heads see latents with unit variance a component, as
our connector does. All of them share one search (successive halving: every
configuration is trained for a short while, the best few to the end) and one early stopping, by validation mean recall,
so none is tuned harder than another. Nothing here sees test data.
"""

import itertools
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.baselines import Baseline, CentredUnit, both_ways, ends
from trainer.evaluation import RetrievalData, evaluate_retrieval


@dataclass
class HeadRetriever:
    """A trained module behind the interface of a `Retriever`; inputs are centred-unit latents."""

    module: nn.Module
    standard: dict[str, CentredUnit]
    directions: list[str]

    @torch.no_grad()
    def queries(self, direction: str, latents: dict[str, Tensor]) -> Tensor:
        source, _ = ends(direction)
        self.module.eval()
        return F.normalize(self.module.query(direction, self.standard[source](latents[source])), dim=-1)

    @torch.no_grad()
    def gallery(self, direction: str, latents: Tensor) -> Tensor:
        target = ends(direction)[1]
        self.module.eval()
        return F.normalize(self.module.item(direction, self.standard[target](latents)), dim=-1)


class _GLU(nn.Module):
    """`act(gate x) * (up x)`, then `down`: the head of SAIL (Zhang et al. 2024)."""

    def __init__(self, size: int, width: int, out: int, dropout: float):
        super().__init__()
        self.gate, self.up = nn.Linear(size, width), nn.Linear(size, width)
        self.down, self.dropout = nn.Linear(width, out), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])
        return self.down(self.dropout(F.relu(self.gate(x)) * self.up(x)))


class SharedSpaceHeads(nn.Module):
    """One head a modality into a shared space; a learned temperature (and bias, for the sigmoid loss)."""

    def __init__(self, heads: dict[str, nn.Module], scale: float, bias: float = 0.0):
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(bias))

    def query(self, direction: str, x: Tensor) -> Tensor:
        return self.heads[ends(direction)[0]](x)

    def item(self, direction: str, y: Tensor) -> Tensor:
        return self.heads[ends(direction)[1]](y)


class AuthorsPredictor(nn.Module):
    """The authors' published predictor (REFERENCE of arXiv 2409.05929): one gate, one pool, learned target projections.

    A task embedding joins the input; every expert is computed and the top-k are gathered, with weights that are not
    renormalised; no balance loss. Gallery items pass through the learned projection of their modality.
    """

    def __init__(self, sizes: dict[str, int], directions: list[str], width: int, dropout: float, experts=12, top_k=4):
        super().__init__()
        self.top_k = top_k
        self.read = nn.ModuleDict({m: nn.Linear(size, width) for m, size in sizes.items()})
        self.project = nn.ModuleDict({m: nn.Linear(size, width) for m, size in sizes.items()})
        self.task = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in directions})
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)
        self.dropout = nn.Dropout(dropout)

    def query(self, direction: str, x: Tensor) -> Tensor:
        hidden = self.read[ends(direction)[0]](F.layer_norm(x, x.shape[-1:])) + self.task[direction]
        every = torch.einsum("beh,eho->beo", F.gelu(torch.einsum("bh,eho->beo", hidden, self.up)), self.down)
        weights, chosen = self.gate(hidden).softmax(-1).topk(self.top_k, dim=-1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, every.shape[-1]))
        return hidden + self.dropout((weights[..., None] * picked).sum(1))

    def item(self, direction: str, y: Tensor) -> Tensor:
        return self.project[ends(direction)[1]](F.layer_norm(y, y.shape[-1:]))


def symmetric_infonce(logits: Tensor, same: Tensor) -> Tensor:
    """Mean of both ways' cross-entropies `(b, b)`; `same` marks other rows of a row's group: neither right nor wrong."""
    logits, target = logits.masked_fill(same, -torch.inf), torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class TrainedHead(Baseline):
    """The search that all gradient-trained baselines share.

    Every configuration of `grid` runs for `screen_share` of the steps; the best `finalists` run on until validation has
    not improved for `patience` checks. Steps grow with the training rows: at least `min_steps`, and `epochs` passes.
    """

    grid: dict[str, tuple]
    min_steps, epochs, check_every, patience, max_batch = 150, 30, 10, 3, 1024
    screen_share, finalists = 0.2, 3

    def build(self, sizes: dict[str, int], directions: list[str], config: dict) -> nn.Module:
        """A new module, from the global random state."""
        raise NotImplementedError

    def loss(self, module: nn.Module, step: int, rows: dict[str, Tensor], same: Tensor, directions) -> Tensor:
        """Of one batch of paired rows; `same` as in `symmetric_infonce`."""
        raise NotImplementedError

    def candidates(self, train, validation, groups, seed):
        standard = {modality: CentredUnit.fit(train[modality]) for modality in validation.pair}
        rows = {modality: standard[modality](train[modality]) for modality in validation.pair}
        steps = max(self.min_steps, self.epochs * -(-len(groups) // self.max_batch))
        configs = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        self.trials = len(configs)  # most are given up after the first part
        runs = [_Run(self, config, rows, standard, validation, groups, seed) for config in configs]
        if len(runs) > self.finalists:
            for run in runs:
                run.advance(int(steps * self.screen_share))
            runs = sorted(runs, key=lambda run: -run.best_value)[: self.finalists]
        for run in runs:
            run.advance(steps)
            yield run.config, HeadRetriever(run.best, standard, both_ways(validation.pair))


class _Run:
    """One configuration's training, which can be taken up again."""

    def __init__(self, head: TrainedHead, config: dict, rows, standard, validation: RetrievalData, groups, seed: int):
        device = next(iter(rows.values())).device
        self.head, self.config, self.rows, self.groups = head, config, rows, groups.to(device)
        self.standard, self.validation, self.directions = standard, validation, both_ways(validation.pair)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = head.build({m: x.shape[1] for m, x in rows.items()}, self.directions, config).to(device)
            self.generators = [torch, *([] if device.type == "cpu" else [torch.get_device_module(device)])]
            self.random_states = [generator.get_rng_state() for generator in self.generators]
        matrices = [p for p in self.module.parameters() if p.ndim > 1]
        others = [p for p in self.module.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
            lr=config["learning_rate"],
            weight_decay=config["weight_decay"],
        )
        self.step, self.best, self.best_value, self.waited = 0, deepcopy(self.module), -1.0, 0

    def advance(self, until: int) -> None:
        """Train up to step `until`, or until validation stops improving."""
        head, n = self.head, len(self.groups)
        with torch.random.fork_rng():
            for generator, state in zip(self.generators, self.random_states, strict=True):
                generator.set_rng_state(state)
            while self.step < until and self.waited < head.patience:
                self.step += 1
                self.module.train()
                batch = torch.randperm(n)[: head.max_batch]
                same = (self.groups[batch][:, None] == self.groups[batch][None, :]).fill_diagonal_(False)
                rows = {m: x[batch] for m, x in self.rows.items()}
                loss = head.loss(self.module, self.step, rows, same, self.directions)
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                if self.step % head.check_every == 0:
                    self._check()
            self.random_states = [generator.get_rng_state() for generator in self.generators]

    def _check(self) -> None:
        retriever = HeadRetriever(self.module, self.standard, self.directions)
        value = evaluate_retrieval(retriever, self.validation)["mean_recall"]
        self.waited = 0 if value > self.best_value else self.waited + 1
        if value > self.best_value:
            self.best, self.best_value = deepcopy(self.module), value


class LinearInfoNCE(TrainedHead):
    """The CLIP / LiT head: two linear projections, symmetric InfoNCE, learned temperature (Radford et al. 2021).

    The head of transformers' `VisionTextDualEncoderModel` over frozen encoders: no biases, logit scale from ln(1/0.07),
    capped at 100.
    """

    name = "linear_infonce"
    grid = {"learning_rate": (3e-4, 1e-3, 3e-3), "weight_decay": (0.01, 0.1), "size": (256, 512)}

    def build(self, sizes, directions, config):
        heads = {m: nn.Linear(size, config["size"], bias=False) for m, size in sizes.items()}
        for head in heads.values():
            nn.init.normal_(head.weight, std=head.in_features**-0.5)
        return SharedSpaceHeads(heads, 2.6592)

    def loss(self, module, step, rows, same, directions):
        x, y = (F.normalize(module.heads[m](rows[m]), dim=-1) for m in ends(directions[0]))
        return symmetric_infonce(module.scale.clamp(max=4.6052).exp() * x @ y.T, same)


class MLPInfoNCE(LinearInfoNCE):
    """Heads with one hidden layer (GELU, dropout), otherwise the linear head's loss."""

    name = "mlp_infonce"
    grid = {"learning_rate": (3e-4, 1e-3), "weight_decay": (0.1,), "size": (512, 1024), "dropout": (0.3, 0.5, 0.7)}

    def build(self, sizes, directions, config):
        def head(size):
            return nn.Sequential(
                nn.Linear(size, config["size"]),
                nn.GELU(),
                nn.Dropout(config["dropout"]),
                nn.Linear(config["size"], 512),
            )

        return SharedSpaceHeads({m: head(size) for m, size in sizes.items()}, 2.6592)


class SAIL(TrainedHead):
    """Gated-linear-unit heads with the sigmoid loss (SAIL, Zhang et al. 2024; SigLIP, Zhai et al. 2023): t = 20, b = -10."""

    name = "sail"
    grid = {"learning_rate": (3e-4, 1e-3), "weight_decay": (0.1,), "size": (512, 1024), "dropout": (0.3, 0.5, 0.7)}

    def build(self, sizes, directions, config):
        heads = {m: _GLU(size, config["size"], 512, config["dropout"]) for m, size in sizes.items()}
        return SharedSpaceHeads(heads, 2.9957, -10.0)

    def loss(self, module, step, rows, same, directions):
        x, y = (F.normalize(module.heads[m](rows[m]), dim=-1) for m in ends(directions[0]))
        logits = module.scale.exp() * x @ y.T + module.bias
        sign = 2 * torch.eye(len(x), device=x.device) - 1
        return -(F.logsigmoid(sign * logits).masked_fill(same, 0.0)).sum() / len(x)


class AuthorsPublished(TrainedHead):
    """The authors' predictor with their loss, smooth L1 + symmetric InfoNCE at temperature 0.03, both directions a step."""

    name, joint = "authors_published", True
    grid = {"learning_rate": (3e-4, 1e-3, 3e-3), "weight_decay": (0.05,), "size": (128, 256), "dropout": (0.1, 0.3)}

    def build(self, sizes, directions, config):
        return AuthorsPredictor(sizes, directions, config["size"], config["dropout"])

    def loss(self, module, step, rows, same, directions):
        losses = []
        for direction in directions if self.joint else [directions[step % len(directions)]]:
            source, target = ends(direction)
            found, wanted = module.query(direction, rows[source]), module.item(direction, rows[target])
            logits = F.normalize(found, dim=-1) @ F.normalize(wanted, dim=-1).T / 0.03
            losses.append((F.smooth_l1_loss(found, wanted) + symmetric_infonce(logits, same)) / 2)
        return torch.stack(losses).mean()


class AuthorsAlternating(AuthorsPublished):
    """The same predictor, one direction a step, as the paper describes."""

    name, joint = "authors_alternating", False


HEADS = {head.name: head for head in (LinearInfoNCE, MLPInfoNCE, SAIL, AuthorsPublished, AuthorsAlternating)}

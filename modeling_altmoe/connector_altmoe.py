"""The multi-directional mixture-of-experts connector: latents in, predicted latents out. It knows no encoder.

Axes: b = batch, d_m = latent size of modality m, h = hidden size, e = experts, k = experts an item sees, l = gates.

    latent (b, d_m) --Frame--> centred unit latent --project--> (b, h) --l gates, top-k of e experts--> (b, l, h)
        --residual, norm, head of the target--> two predictions (b, d_target)  [+ closed form of the source]

Predictions live in the frame of the target: its own latent space, centred and scaled by two stored numbers, which
`Frame.inverse` undoes exactly. The target's latents are never transformed by anything that is learned, so whatever
has been stored stays valid however often the connector is retrained.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_altmoe import AltMoEConfig
from .scoring_altmoe import PRINT_SIZE

CONTRASTIVE, REGRESSION = 0, 1
TERMS = ("contrastive", "regression")  # in that order
BASE_ROWS = 8192  # sources whose features are in memory at once: there may be many thousand landmarks
HALF_FROM = 4096  # landmarks from which a base is kept in half precision: half the file, and nothing else changes
RECALL_POWER = 3  # how much nearer training items count more in what is recalled


@dataclass
class DirectionOutput:
    """What the connector says about one batch in one direction.

    Args:
        contrastive: `(b, d_target)`, in the target's frame; its cosine with a target latent is the score.
        regression: `(b, d_target)`, in the target's frame; the estimate of the target latent itself.
        router_logits: `(b, l, e)`; -inf where an expert is out of reach.
        router_indices: `(b, l, k)`, the chosen experts.
        router_weights: `(b, l, k)`, their weights, which sum to one.
    """

    contrastive: torch.Tensor
    regression: torch.Tensor
    router_logits: torch.Tensor
    router_indices: torch.Tensor
    router_weights: torch.Tensor


class Frame(nn.Module):
    """The centred and scaled view of one modality's latents: `(x - mean) / scale`, measured once on training latents.

    `scale` is one number (the root mean squared distance from the mean), so angles are kept and the inverse is exact.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, latents: torch.Tensor) -> None:
        """Measure mean and scale on training latents `(n, size)`."""
        mean = latents.double().mean(0)
        scale = (latents.double() - mean).square().sum(-1).mean().sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale.clamp_min(1e-12))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents.to(self.mean.dtype) - self.mean) / self.scale

    def inverse(self, framed: torch.Tensor) -> torch.Tensor:
        """Back to the encoder's own latent space."""
        return framed * self.scale + self.mean

    def unit(self, latents: torch.Tensor) -> torch.Tensor:
        """Centred latents of length one: what cosines compare."""
        return F.normalize(self(latents), dim=-1)


class ClosedFormBase(nn.Module):
    """A closed-form map from a source to a target, under the experts: ridge or kernel ridge regression.

    Ridge: features are the source itself, `(b, d_source)`. Kernel: `exp(gamma (cos(u, landmark) - 1))`, `(b, n)`,
    which on unit vectors is the Gaussian kernel (with all training items as landmarks: exact kernel ridge
    regression; with a subset: Nystroem). Both: `features @ weight + bias`. Fitted by the trainer, never by gradient.
    From `HALF_FROM` landmarks on, these and their weights are numbers of half precision, and saved as such.

    With `has_metric`, `seen` multiplies a prediction by a symmetric matrix `(d_target, d_target)`, so that its inner
    product with a target is the one of partly whitened targets, while the targets themselves stay as they are stored.

    With `recalls` (kernel only), it says a second thing beside its estimate of the target: the sum of the training items'
    partners, each weighted by `max(0, cos(u, landmark)) ** RECALL_POWER` (kernel regression: Nadaraya 1964, Watson
    1964). The two are stacked, `(b, 2, d_target)`, and `seen` gives both one vote. With few pairs they err differently.
    """

    def __init__(
        self,
        kind: str,
        source_size: int,
        target_size: int,
        num_features: int,
        has_metric: bool = False,
        recalls: bool = False,
    ):
        super().__init__()
        self.kind = kind
        if kind == "kernel":
            self.register_buffer("landmarks", torch.zeros(num_features, source_size))
            self.register_buffer("gamma", torch.ones(()))
        self.register_buffer("weight", torch.zeros(num_features, target_size))
        self.register_buffer("bias", torch.zeros(target_size))
        self.has_metric = has_metric
        if has_metric:
            self.register_buffer("metric", torch.eye(target_size))
        self.recalls = recalls
        if recalls:
            self.register_buffer("partners", torch.zeros(num_features, target_size))

    @staticmethod
    def estimate(said: torch.Tensor) -> torch.Tensor:
        """The estimate of the target `(b, d_target)` in what was said."""
        return said[:, 0] if said.ndim == 3 else said

    def seen(self, said: torch.Tensor) -> torch.Tensor:
        """What was said, `(b, d_target)` or `(b, 2, d_target)`, as the score sees it: `(b, d_target)`."""
        estimate = self.estimate(said)
        seen = estimate @ self.metric if self.has_metric else estimate
        if said.ndim == 3:  # half way between the two, and about as long as the estimate
            seen = (seen + F.normalize(said[:, 1], dim=-1) * seen.norm(dim=-1, keepdim=True)) / 2
        return seen

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """What it says of sources `(b, d_source)`: `(b, d_target)`, or `(b, 2, d_target)` if it recalls."""
        parts = [self._say(part) for part in source.split(BASE_ROWS)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _say(self, source: torch.Tensor) -> torch.Tensor:
        features = source
        if self.kind == "kernel":
            cosines = source @ self.landmarks.T
            features = torch.exp(self.gamma * (cosines - 1))
        estimate = features @ self.weight + self.bias
        if not self.recalls:
            return estimate
        return torch.stack([estimate, recall_weights(cosines) @ self.partners], dim=1)


def recall_weights(cosines: torch.Tensor) -> torch.Tensor:
    """How much each training item's partner counts, by its cosine with the source."""
    return cosines.clamp_min(0) ** RECALL_POWER


class ScoreBank(nn.Module):
    """What the corrections of one direction's scores need: vectors and prints of training items, never of queries."""

    def __init__(self, queries: int, gallery: int, size: int, known: int = 0):
        super().__init__()
        self.register_buffer("queries", torch.zeros(queries, size))
        self.register_buffer("gallery", torch.zeros(gallery, size))
        # not kept where there are none, as in checkpoints of earlier versions
        self.register_buffer("known", torch.zeros(known, PRINT_SIZE, dtype=torch.float16), persistent=known > 0)


@use_experts_implementation
class AltMoEExperts(nn.Module):
    """N gated-linear-unit experts as three-dimensional weights: `act(gate x) * (up x)`, then `down`.

    The decorator brings transformers' implementations (`grouped_mm` by default, `batched_mm`); the loop below is
    `"eager"`, the reference they are tested against.
    """

    def __init__(self, config: AltMoEConfig, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(rows, h)`, `(rows, k)`, `(rows, k)` -> `(rows, h)`."""
        result = torch.zeros_like(hidden_states)
        # unbind, not indexing: the backward of W[e] fills a zero tensor of the whole stack for every expert
        stacks = zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        for expert, (gate_up, down) in enumerate(stacks):
            rows, slots = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[rows], gate_up).chunk(2, dim=-1)
            update = F.linear(self.act_fn(gate) * up, down) * top_k_weights[rows, slots, None]
            result = result.index_add(0, rows, update.to(result.dtype))
        return result


class AltMoERouter(nn.Module):
    """L gates over the item and the direction: `softmax(g . [x (+) source (+) target])`, top-K, renormalised.

    REFERENCE: gate = softmax(g . [e_x (+) e_m]), g shared across modalities. The target's embedding joins the
    source's, because one connector serves every direction.
    """

    def __init__(self, config: AltMoEConfig):
        super().__init__()
        self.num_gates, self.top_k = config.num_gates, config.top_k
        self.modalities = config.modalities
        pools = len(self.modalities) if config.expert_pool == "per_modality" else 1
        self.per_modality, self.pool_size = pools > 1, config.num_experts
        self.num_experts = config.num_experts * pools
        self.weight = nn.Parameter(torch.empty(self.num_gates, self.num_experts, 3 * config.hidden_size))
        self.source_embedding = nn.Parameter(torch.empty(len(self.modalities), config.hidden_size))
        self.target_embedding = nn.Parameter(torch.empty(len(self.modalities), config.hidden_size))

    def forward(self, hidden: torch.Tensor, sources: tuple[str, ...], target: str):
        """`(b, h)` -> logits `(b, l, e)`, indices `(b, l, k)`, weights `(b, l, k)`."""
        positions = [self.modalities.index(source) for source in sources]
        source = self.source_embedding[positions].mean(0)
        told = torch.cat([source, self.target_embedding[self.modalities.index(target)]])
        seen = torch.cat([hidden, told.expand(len(hidden), -1)], dim=-1)  # (b, 3h)
        logits = torch.einsum("bf,lef->ble", seen, self.weight)
        if self.per_modality:
            reachable = torch.zeros(self.num_experts, dtype=torch.bool, device=logits.device)
            for position in positions:
                reachable[position * self.pool_size : (position + 1) * self.pool_size] = True
            logits = logits.masked_fill(~reachable, float("-inf"))
        top, indices = logits.float().topk(self.top_k, dim=-1)
        return logits, indices, top.softmax(-1).to(hidden.dtype)  # softmax over the chosen = renormalised softmax


class AltMoEConnector(nn.Module):
    """All directions' shared connector; see the module's docstring for the way of the data."""

    def __init__(self, config: AltMoEConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.frames = nn.ModuleDict({m: Frame(config.latent_size(m)) for m in config.modalities})
        resolved = {direction: config.resolve(direction) for direction in config.directions}
        sources = [m for m in config.modalities if any(m in s for s, _ in resolved.values())]
        targets = [m for m in config.modalities if any(m == t for _, t in resolved.values())]
        self.project = nn.ModuleDict({m: nn.Linear(config.latent_size(m), hidden) for m in sources})
        self.router = AltMoERouter(config)
        self.experts = AltMoEExperts(config, self.router.num_experts)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)
        # one head for each term and target; (target, term) -> (h, d_target)
        self.heads = nn.ModuleDict(
            {m: nn.ModuleList(nn.Linear(hidden, config.latent_size(m)) for _ in range(2)) for m in targets}
        )
        # how far the experts' correction is trusted, set on validation after training; 1 = as trained
        self.register_buffer("trust", torch.ones(max(1, len(config.directions))))
        self.base = nn.ModuleDict()
        for direction, features in config.base_features.items():
            self._add_base(direction, features)

    def _add_base(self, direction: str, num_features: int) -> ClosedFormBase:
        sources, target = self.config.resolve(direction)
        source_size = sum(self.config.latent_size(m) for m in sources)
        target_size = self.config.latent_size(target)
        recalls = direction in self.config.base_recalls
        base = ClosedFormBase(
            self.config.base, source_size, target_size, num_features, self.config.target_metric, recalls
        )
        self.base[direction] = base
        return base

    @torch.no_grad()
    def set_base(self, direction: str, weight, bias, landmarks=None, gamma=None, metric=None, partners=None) -> None:
        """Install a fitted closed form for one direction (and note its size and kind in the configuration).

        Args:
            direction: a direction of the model.
            weight: `(features, d_target)`.
            bias: `(d_target,)`.
            landmarks: `(features, d_source)`, kernel only.
            gamma: kernel width, kernel only.
            metric: `(d_target, d_target)`, only with `config.target_metric`; default: the identity.
            partners: `(features, d_target)`, the landmarks' partners, kernel only; default: nothing is recalled.
        """
        others = [name for name in self.config.base_recalls if name != direction]
        self.config.base_recalls = others if partners is None else sorted([*others, direction])
        device = self.router.weight.device
        base = self._add_base(direction, len(weight)).to(device)
        if base.kind == "kernel" and len(weight) >= HALF_FROM and weight.abs().max() < torch.finfo(torch.half).max:
            weight, landmarks = weight.half(), landmarks.half()
        base.weight.copy_(weight)
        base.bias.copy_(bias)
        if base.kind == "kernel":
            base.landmarks.copy_(landmarks)
            base.gamma.fill_(float(gamma))
        if metric is not None:
            base.metric.copy_(metric)
        if partners is not None:
            base.partners.copy_(partners)
        self.config.base_features[direction] = len(weight)

    @staticmethod
    def as_saved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's state with what is kept in half precision as half precision; nothing is lost."""
        large = [name.removesuffix("landmarks") for name, x in state.items() if name.endswith(".landmarks")]
        large = [base for base in large if len(state[f"{base}landmarks"]) >= HALF_FROM]
        halves = {name: state[name].half() for base in large for name in (f"{base}landmarks", f"{base}weight")}
        return {
            **state,
            **{name: half for name, half in halves.items() if torch.equal(half.float(), state[name].float())},
        }

    def source(self, latents: dict[str, torch.Tensor], direction: str) -> torch.Tensor:
        """Centred unit latents of a direction's sources, side by side, of total length one: `(b, sum of d_source)`."""
        sources, _ = self.config.resolve(direction)
        parts = [self.frames[m].unit(latents[m]) for m in sources]
        return torch.cat(parts, dim=-1) / len(parts) ** 0.5

    def predictions(self, latents: dict[str, torch.Tensor], direction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`(contrastive, regression)` as `forward` gives them, `(b, d_target)` each, and nothing else: outside training,
        experts whose correction is trusted with nothing are not run."""
        if self.training or direction not in self.base or self.trust[self.config.directions.index(direction)]:
            output = self(latents, direction)
            return output.contrastive, output.regression
        base = self.base[direction]
        said = base(self.source(latents, direction))
        return base.seen(said), base.estimate(said)

    def forward(
        self, latents: dict[str, torch.Tensor], direction: str, base_prediction: torch.Tensor | None = None
    ) -> DirectionOutput:
        """Predict the target from the sources.

        Args:
            latents: `{modality: (b, d_m)}` for each source of the direction.
            direction: e.g. `"image->text"`.
            base_prediction: `(b, d_target)` or `(b, 2, d_target)`, replaces what the closed form itself says. In
                training that is what it says of items it was *not* fitted on, so that the experts learn to mend its
                honest errors.
        """
        sources, target = self.config.resolve(direction)
        hidden = 0
        for modality in sources:
            unit = self.frames[modality].unit(latents[modality])
            seen = F.layer_norm(unit, unit.shape[-1:])  # unit variance per component
            if self.training and self.config.latent_noise:
                seen = seen + self.config.latent_noise * torch.randn_like(seen)
            hidden = hidden + self.project[modality](seen.to(self.router.weight.dtype))
        hidden = hidden / len(sources) ** 0.5  # (b, h)

        logits, indices, weights = self.router(hidden, sources, target)
        batch, gates, top_k = indices.shape
        rows = hidden.unsqueeze(1).expand(-1, gates, -1).reshape(batch * gates, -1)  # every gate has its own row
        mixed = self.experts(rows, indices.reshape(-1, top_k), weights.reshape(-1, top_k))
        mixed = self.norm(rows + self.dropout(mixed)).view(batch, gates, -1)  # (b, l, h)

        trust = self.trust[self.config.directions.index(direction)]
        # under a base, heads start at zero and their output is scaled to the base's size, so that a step of Adam
        # moves a unit prediction by a part of its length, whatever the width of the target
        scale = 1.0 if self.config.base == "none" else self.config.head_scale / self.config.latent_size(target) ** 0.5
        predictions = [head(mixed[:, term % gates]) * (trust * scale) for term, head in enumerate(self.heads[target])]
        if base_prediction is None and direction in self.base:
            base_prediction = self.base[direction](self.source(latents, direction))
        if base_prediction is not None:
            predictions[REGRESSION] = ClosedFormBase.estimate(base_prediction) + predictions[REGRESSION]
            seen = self.base[direction].seen(base_prediction) if direction in self.base else base_prediction
            predictions[CONTRASTIVE] = seen + predictions[CONTRASTIVE]
        return DirectionOutput(predictions[CONTRASTIVE], predictions[REGRESSION], logits, indices, weights)

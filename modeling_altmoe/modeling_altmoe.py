"""AltMoEModel = frozen encoders + the connector, as one transformers model.

Comes in: raw tensors (`pixel_values`, `input_ids`, ...) or latents. Goes out: latents, predicted latents, scores and
the loss. A checkpoint holds the connector, its statistics and LoRA weights; encoders stay where they are, by name and
pinned revision, unless `save_pretrained(..., self_contained=True)`.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attaching_altmoe import adapters_off, attach_lora, describe_encoder, freeze, load_encoder, verify_encoder
from .configuration_altmoe import AltMoEConfig, unknown_name_message
from .connector_altmoe import TERMS, AltMoEConnector, DirectionOutput
from .encoding_altmoe import LatentProtocol, encode_latents
from .loss_altmoe import (
    conditional_entropy,
    contrastive_loss,
    information_bound,
    load_balance_loss,
    regression_loss,
    router_z_loss,
)
from .pretrained_altmoe import AltMoEPreTrainedModel
from .retriever_altmoe import RetrieverMixin

# tensors that accompany another tensor of the same modality
COMPANIONS = {"attention_mask": "input_ids", "token_type_ids": "input_ids", "position_ids": "input_ids"}
MAIN_INPUTS = {"image": ("pixel_values",), "text": ("input_ids",), "audio": ("input_values", "input_features")}


@dataclass
class AltMoEOutput(ModelOutput):
    """
    Output of [`AltMoEModel`].

    Args:
        loss (`torch.FloatTensor`, *optional*): mean over the directions that were computed.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`, *optional*):
            Where an image and a text modality are given (those of these names, else the only ones whose encoders take
            images and text): cosine / temperature, averaged over the directions between them.
        logits_per_audio (`torch.FloatTensor` of shape `(sounds, texts)`, *optional*): likewise for sounds.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`, *optional*):
            The transpose of `logits_per_image`, or of `logits_per_audio` where no images are given.
        pooler_output (`torch.FloatTensor` of shape `(batch, latent_size)`, *optional*):
            The latents, where items of one modality are given. Under this name, and as the first output, transformers' own
            `feature-extraction` and `image-feature-extraction` look for them.
        latents (`dict[str, torch.FloatTensor]`): `{modality: (batch, latent_size)}`.
        directions (`dict[str, DirectionOutput]`): both predictions and the router's outputs for each direction.
        loss_terms (`dict[str, torch.FloatTensor]`):
            Detached scalars by name: `regression`, `contrastive`, `load_balance`, `router_z`, and the readings
            `information_bound` (InfoNCE bound on I(x;y), nats) and `conditional_entropy` (Gaussian H(y|x), nats a
            dimension). With several directions, their means.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_audio: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    latents: dict[str, torch.FloatTensor] | None = None
    directions: dict[str, DirectionOutput] | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None


class AltMoEModel(RetrieverMixin, AltMoEPreTrainedModel):
    """
    Frozen single-modality encoders joined by one mixture-of-experts connector, trained one direction at a time.

    Example:

    ```python
    model = AltMoEModel.from_encoders(
        {"image": "facebook/dinov2-large", "text": "sentence-transformers/all-MiniLM-L6-v2"},
        protocols={"image": {"pooling": "cls"}, "text": {"pooling": "mean"}},
    )
    prediction = model.predict({"image": image_latents}, "image->text")   # (batch, text latent size)
    ```
    """

    def __init__(self, config: AltMoEConfig):
        super().__init__(config)
        self.connector = AltMoEConnector(config)
        count = max(1, len(config.directions))
        learn = config.learn_temperature
        self.logit_scale = nn.Parameter(torch.zeros(count), requires_grad=learn)  # log(1 / temperature)
        self.logit_bias = nn.Parameter(torch.zeros(count), requires_grad=config.contrastive == "sigmoid")
        self.score_banks = self.empty_banks(config)
        self.encoders = nn.ModuleDict()
        self.post_init()

    # ---------------------------------------------------------------- encoders

    @classmethod
    def from_encoders(
        cls,
        encoders: dict[str, str | os.PathLike | PreTrainedModel],
        directions: list[str] | None = None,
        *,
        protocols: dict[str, dict] | None = None,
        processors: dict[str, Any] | None = None,
        revisions: dict[str, str] | None = None,
        lora: dict[str, Any] | None = None,
        latent_sizes: dict[str, int] | None = None,
        hub_kwargs: dict[str, Any] | None = None,
        **config_kwargs,
    ) -> "AltMoEModel":
        """Join encoders with a new connector.

        Args:
            encoders: `{modality: Hub name, local folder or loaded model}`.
            directions: e.g. `["image->text", "text->image"]`; None means every ordered pair.
            protocols: how latents are made, where it differs from `LatentProtocol`'s defaults:
                `{modality: {"pooling": ..., "layers": ..., "combine": ..., "prompt": ..., "normalize": ...}}`.
            processors: tokenizers, image processors, ...; their settings join the protocol.
            revisions: branch, tag or commit for each Hub name; the commit found is pinned.
            lora: `{modality: peft.LoraConfig}` for encoders that are adapted.
            latent_sizes: widths that an encoder's configuration does not tell.
            hub_kwargs: `token`, `cache_dir`, ... for the Hub.
            config_kwargs: fields of [`AltMoEConfig`].

        Raises:
            ValueError: unknown modality, direction, pooling or an encoder with missing weights.
            OSError: an encoder that does not exist.
        """
        named = {"protocols": protocols, "processors": processors, "revisions": revisions, "lora": lora}
        for argument, given in {**named, "latent_sizes": latent_sizes}.items():
            for modality in given or {}:
                if modality not in encoders:
                    raise ValueError(f"{argument}: {unknown_name_message('modality', modality, encoders)}")
        if directions is None:
            directions = [f"{source}->{target}" for source in encoders for target in encoders if source != target]
        # a mistyped direction or size must not wait for gigabytes of weights
        placeholders = {modality: {"latent_size": 1} for modality in encoders}
        AltMoEConfig(encoders=placeholders, directions=directions, **config_kwargs)
        modules, entries = {}, {}
        for modality, encoder in encoders.items():
            protocol = (protocols or {}).get(modality)
            LatentProtocol.from_dict(dict(protocol or {}))
            name, commit = None, None
            if not isinstance(encoder, nn.Module):
                name, revision = encoder, (revisions or {}).get(modality)
                encoder, commit = load_encoder(
                    name, protocol, revision=revision, what=f"{modality} encoder", **(hub_kwargs or {})
                )
            modules[modality] = freeze(encoder)
            entries[modality] = describe_encoder(
                encoder,
                name,
                commit,
                protocol,
                (processors or {}).get(modality),
                (lora or {}).get(modality),
                (latent_sizes or {}).get(modality),
            )
        model = cls(AltMoEConfig(encoders=entries, directions=directions, **config_kwargs))
        for modality, encoder in modules.items():
            model.attach_encoder(modality, encoder, verify=False)
            if entries[modality].get("lora"):
                attach_lora(encoder, entries[modality]["lora"])
        return model

    def attach_encoder(self, modality: str, encoder: PreTrainedModel, verify: bool = True) -> None:
        """Put a loaded encoder in place, frozen and in evaluation mode.

        Raises:
            ValueError: if the modality is unknown, or (with `verify`) it is not the encoder the connector was trained on.
        """
        self.config.latent_size(modality)
        if verify:
            verify_encoder(encoder, self.config.encoders[modality], modality)
        self.encoders[modality] = freeze(encoder).to(self.device)

    def protocol(self, modality: str) -> LatentProtocol:
        """How this model's latents of a modality are made."""
        self.config.latent_size(modality)
        return LatentProtocol.from_dict(self.config.encoders[modality].get("protocol") or {})

    def train(self, mode: bool = True):
        """Train the connector; frozen encoders stay in evaluation mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    # ---------------------------------------------------------------- latents and predictions

    def encode(self, modality: str, inputs: dict[str, torch.Tensor], adapted: bool = False) -> torch.Tensor:
        """Raw tensors of one modality -> latents `(batch, latent_size)`.

        Args:
            modality: e.g. `"image"`.
            inputs: what its processor gives, e.g. `{"pixel_values": ...}`.
            adapted: use LoRA weights (sources of a direction do; targets and stored latents never do).

        Raises:
            ValueError: if the modality is unknown, its encoder is not attached, or the width is not the expected one.
        """
        size = self.config.latent_size(modality)
        if modality not in self.encoders:
            raise ValueError(
                f"No {modality} encoder is attached. Load with load_encoders=True, or call "
                f"model.attach_encoder('{modality}', AutoModel.from_pretrained(...))."
            )
        encoder = self.encoders[modality]
        learns = adapted and self.training and any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            if adapted:
                latents = encode_latents(encoder, inputs, self.protocol(modality))
            else:
                with adapters_off(encoder):
                    latents = encode_latents(encoder, inputs, self.protocol(modality))
        if latents.shape[-1] != size:
            raise ValueError(
                f"The {modality} encoder gives latents of width {latents.shape[-1]}, the model expects {size}. "
                "Pass latent_sizes={modality: width} to from_encoders."
            )
        return latents

    def predict(self, latents: dict[str, torch.Tensor] | torch.Tensor, direction: str, term: str = "regression"):
        """Predict target latents, in the target encoder's own latent space.

        Args:
            latents: `{modality: (batch, latent_size)}`, or the tensor alone for a direction with one source.
            direction: e.g. `"image->text"`.
            term: `"regression"` (the estimate of the latent) or `"contrastive"` (whose centred cosine is the score).

        Returns:
            `(batch, latent_size of the target)`.

        Raises:
            ValueError: unknown direction, modality or term, wrong width, or NaN in the latents.
        """
        if term not in TERMS:
            raise ValueError(unknown_name_message("term", term, TERMS))
        said, target = self._run(latents, direction)
        return self.connector.frames[target].inverse(said[TERMS.index(term)])

    def _check_latents(self, modality: str, latents: torch.Tensor) -> None:
        size = self.config.latent_size(modality)
        if latents.dim() != 2 or latents.shape[-1] != size:
            raise ValueError(
                f"{modality} latents have shape {tuple(latents.shape)}, expected (batch, {size}). "
                "Are they from another encoder?"
            )
        if not latents.sum().isfinite() and not latents.isfinite().all():  # a sum tells, at a thirtieth of the cost
            bad = (~torch.isfinite(latents).all(-1)).nonzero().flatten().tolist()
            raise ValueError(f"{modality} latents contain NaN or infinity in {len(bad)} rows, first: {bad[:5]}.")

    def _run(self, latents, direction: str) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
        sources, target = self.config.resolve(direction)
        if isinstance(latents, torch.Tensor):
            latents = {sources[0]: latents}
        for modality in sources:
            if modality not in latents:
                raise ValueError(f"Direction '{direction}' needs latents of '{modality}', got {sorted(latents)}.")
            self._check_latents(modality, latents[modality])
        return self.connector.predictions(latents, direction), target

    def _by_modality(self, inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Sort raw tensors by modality: `"audio__input_values"` says so itself; plain names go to the first encoder,
        by name, whose main input they are or accompany (`attention_mask` goes with `input_ids`)."""
        sorted_inputs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in inputs.items():
            modality, marked, plain = name.partition("__")
            if not marked:
                plain, main = name, COMPANIONS.get(name, name)
                takers = [m for m in sorted(self.encoders) if self.encoders[m].main_input_name == main]
                if not takers:
                    raise ValueError(
                        f"No attached encoder takes '{name}'. Attached: {', '.join(self.encoders) or 'none'}. "
                        "Inputs are named as the processor names them, or '<modality>__<input>'."
                    )
                modality = takers[0]
            self.config.latent_size(modality)
            sorted_inputs.setdefault(modality, {})[plain] = tensor
        return sorted_inputs

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        latents: dict[str, torch.Tensor] | None = None,
        direction: str | None = None,
        positives: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        base_prediction: torch.Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        **inputs,
    ) -> AltMoEOutput:
        """
        Args:
            latents: `{modality: (batch, latent_size)}`; modalities not given here are encoded from `inputs`.
            direction: compute only this one (a step of alternating training); None: all that the inputs allow.
            positives: `(batch, candidates)` boolean, which candidates match which row; default: the diagonal.
            candidates: `(candidates, latent_size)` target latents that the contrastive term ranks; default: the
                batch's own targets. Only with `direction`.
            base_prediction: replaces the closed form's prediction (see the connector). Only with `direction`.
            return_loss: compute the loss; default: whenever rows of sources and target are paired (training, or a
                `direction` was asked for).
            inputs: raw tensors as the processor names them.

        Returns:
            [`AltMoEOutput`] (a tuple with `return_dict=False`).

        Raises:
            ValueError: unknown direction, missing modality, wrong width, NaN, or sizes that do not match.
        """
        targets = dict(latents or {})
        sources = dict(latents or {})
        for modality, tensors in self._by_modality(inputs).items():
            targets[modality] = self.encode(modality, tensors)
            lora = getattr(self.encoders[modality], "_hf_peft_config_loaded", False)
            sources[modality] = self.encode(modality, tensors, adapted=True) if lora else targets[modality]
        for modality, tensor in targets.items():
            self._check_latents(modality, tensor)

        if direction is not None:
            self.config.resolve(direction)
            wanted = [direction]
        else:
            wanted = []
            for name in self.config.directions:
                used = self.config.resolve(name)[0]
                # sources of different numbers are not paired, so there is nothing to fuse
                if set(used) <= set(sources) and len({len(sources[m]) for m in used}) == 1:
                    wanted.append(name)
        if return_loss is None:
            return_loss = self.training or direction is not None
        directions, losses, terms = {}, [], {}
        for name in wanted:
            from_modalities, target = self.config.resolve(name)
            missing = [m for m in from_modalities if m not in sources]
            if missing:
                raise ValueError(f"Direction '{name}' needs {missing}, got {sorted(sources) or 'nothing'}.")
            output = self.connector(sources, name, base_prediction if direction is not None else None)
            directions[name] = output
            if return_loss and target in targets:
                loss, named = self._loss(name, output, targets[target], positives, candidates)
                losses.append(loss)
                for term, value in named.items():
                    terms.setdefault(term, []).append(value)

        per_image, per_audio = (
            self._logits_per("image", directions, targets),
            self._logits_per("audio", directions, targets),
        )
        per_item = per_audio if per_image is None else per_image
        alone = next(iter(targets.values())) if len(targets) == 1 else None
        if alone is not None:
            # transformers' pipelines take such a batch apart again, which they can do with a ModelOutput, not with a dict
            targets, directions = ModelOutput(targets), ModelOutput(directions) if directions else None
        result = AltMoEOutput(
            loss=torch.stack(losses).mean() if losses else None,
            logits_per_image=per_image,
            logits_per_audio=per_audio,
            logits_per_text=None if per_item is None else per_item.T,
            pooler_output=alone,
            latents=targets,
            directions=directions,
            loss_terms={term: torch.stack(values).mean() for term, values in terms.items()} or None,
        )
        return result if return_dict is not False else result.to_tuple()

    def _logits(self, direction: str, output: DirectionOutput, candidates: torch.Tensor) -> torch.Tensor:
        """Cosine / temperature of predictions and candidates: `(batch, candidates)`."""
        _, target = self.config.resolve(direction)
        scale = self.logit_scale[self.config.directions.index(direction)].exp()
        return scale * F.normalize(output.contrastive, dim=-1) @ self.connector.frames[target].unit(candidates).T

    def _meant(self, kind: str) -> str | None:
        """The modality that a name like `logits_per_image` means: the one of this name, else the only one whose encoder
        takes such input."""
        if kind in self.config.encoders:
            return kind
        found = [m for m, encoder in self.encoders.items() if encoder.main_input_name in MAIN_INPUTS[kind]]
        return found[0] if len(found) == 1 else None

    def _logits_per(self, kind: str, directions: dict[str, DirectionOutput], latents: dict[str, torch.Tensor]):
        item, text = self._meant(kind), self._meant("text")
        if item not in latents or text not in latents:
            return None
        there, back = f"{item}->{text}", f"{text}->{item}"
        parts = []
        if there in directions:
            parts.append(self._logits(there, directions[there], latents[text]))
        if back in directions:
            parts.append(self._logits(back, directions[back], latents[item]).T)
        return torch.stack(parts).mean(0) if parts else None

    def _loss(self, direction, output, target_latents, positives, candidates):
        """`alpha L_reg + (1 - alpha) L_cl` and the router's losses, with their names."""
        config = self.config
        _, target = config.resolve(direction)
        rows = len(output.contrastive)
        if len(target_latents) != rows:
            raise ValueError(
                f"Direction '{direction}': {rows} source items and {len(target_latents)} target items. Pairs must "
                "have the same length; to score every source against every target pass return_loss=False."
            )
        candidates = target_latents if candidates is None else candidates
        if positives is None:
            positives = torch.eye(rows, len(candidates), dtype=torch.bool, device=target_latents.device)
        if positives.shape != (rows, len(candidates)) or not positives.any(-1).all():
            raise ValueError(
                f"positives has shape {tuple(positives.shape)}, expected {(rows, len(candidates))} with at least "
                "one True in each row."
            )
        framed = self.connector.frames[target](target_latents)
        regression = regression_loss(output.regression, framed, config.regression)
        logits = self._logits(direction, output, candidates)
        bias = self.logit_bias[config.directions.index(direction)]
        contrastive = contrastive_loss(logits, positives, config.contrastive, bias, config.symmetric)
        balance, z = load_balance_loss(output.router_logits, output.router_indices), router_z_loss(output.router_logits)
        loss = config.alpha * regression + (1 - config.alpha) * contrastive
        loss = loss + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
        named = {"regression": regression, "contrastive": contrastive, "load_balance": balance, "router_z": z}
        if config.contrastive == "infonce" and not config.symmetric:
            named["information_bound"] = information_bound(contrastive, positives)
        named["conditional_entropy"] = conditional_entropy(output.regression, framed)
        return loss, {name: value.detach() for name, value in named.items()}

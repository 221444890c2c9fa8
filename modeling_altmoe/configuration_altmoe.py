"""What is joined: the encoders, how their latents are made, the directions, and the connector's sizes.

Comes in: plain numbers, strings and dictionaries (everything here survives a round trip through `config.json`).
Goes out: one validated `AltMoEConfig`. Nothing here loads a weight or knows a tensor.
"""

import difflib
import re
from functools import lru_cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

MODALITY_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def parse_direction(direction: str) -> tuple[tuple[str, ...], str]:
    """Split `"image+text->label"` into its sources and its target.

    Args:
        direction: `source[+source...]->target`.

    Returns:
        `(sources, target)`, e.g. `(("image", "text"), "label")`.

    Raises:
        ValueError: if the string has not exactly one arrow, or a modality name is empty, repeated or ill-formed.
    """
    return _parse_direction(str(direction))


@lru_cache(maxsize=1024)  # asked for several times a search
def _parse_direction(direction: str) -> tuple[tuple[str, ...], str]:
    parts = [part.strip() for part in direction.split("->")]
    sources = tuple(name.strip() for name in parts[0].split("+"))
    names = (*sources, *parts[1:])
    if len(parts) != 2 or len(set(sources)) != len(sources) or not all(MODALITY_NAME.match(name) for name in names):
        raise ValueError(
            f"'{direction}' is not a direction. Expected 'source->target' or 'source+source->target' with modality "
            "names of lower-case letters, digits and underscores, for example 'image->text' or 'image+text->label'."
        )
    return sources, parts[1]


def check_modality(name: str) -> None:
    """Raise if a string cannot name a modality: such names become folders (`encoder_<modality>/`).

    Raises:
        ValueError: saying what can.
    """
    if not isinstance(name, str) or not MODALITY_NAME.match(name):
        raise ValueError(
            f"{name!r} cannot name a modality: use lower-case letters, digits and underscores, starting with a letter."
        )


def unknown_name_message(what: str, given: str, known) -> str:
    """One sentence for a name that is not known: what was given, what is known, and the nearest known one."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(str(given), known, n=1)
    nearest = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {what} '{given}'. Known: {', '.join(known) or 'none'}.{nearest}"


def _one_of(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(unknown_name_message(name, value, allowed))


class AltMoEConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AltMoEModel`]: frozen single-modality encoders joined by one mixture-of-experts connector.

    Args:
        encoders (`dict[str, dict]`):
            One entry a modality: `latent_size` (int, required), `name_or_path` and `revision` (where the encoder comes
            from; absent for vectors whose encoder is not at hand), `config` (the encoder's own configuration as a
            dictionary), `protocol` (a `LatentProtocol` as a dictionary), `lora` (a `LoraConfig` as a dictionary, or
            absent), `self_contained` (the encoder's weights lie in this checkpoint), `weights` (their hash).
        directions (`list[str]`):
            What is predicted from what, e.g. `["image->text", "text->image"]`.
        hidden_size (`int`): width of the connector (a multiple of 8, as grouped matrix products require).
        moe_intermediate_size (`int`): inner width of one expert (a multiple of 8).
        num_experts (`int`): N; experts in the shared pool, or in each modality's pool.
        top_k (`int`): K; experts that see one item.
        num_gates (`int`): L; 2 = one gate for each loss term (the paper), 1 = both terms share one.
        expert_pool (`str`): `"shared"` (one pool for all) or `"per_modality"` (N experts for each source modality).
        hidden_act (`str`): activation inside the gated-linear-unit experts.
        dropout (`float`): on the experts' output.
        latent_noise (`float`): standard deviation of Gaussian noise added to the standardised source latents in
            training (they have unit variance per component, so 0.5 is half their size).
        base (`str`): closed form under the experts: `"none"`, `"ridge"` or `"kernel"` (kernel ridge regression).
        target_metric (`bool`): the contrastive term's closed form is seen through a metric of the target latents, which
            is fitted with it (see `trainer.target_metric`).
        base_features (`dict[str, int]`): features of the closed form for each direction; written when it is fitted.
        base_recalls (`list[str]`): directions whose closed form also recalls training items' partners; written likewise.
        scoring (`dict[str, dict]`): post-processing of scores by direction; written by `AltMoEModel.set_scoring`.
        head_scale (`float`): size of the experts' correction relative to the closed form's unit predictions.
        alpha (`float`): weight of the regression term; `1 - alpha` weighs the contrastive term (REFERENCE: 0.5).
        regression (`str`): `"cosine"`, `"mse"` (the paper) or `"smooth_l1"` (the authors' code).
        contrastive (`str`): `"infonce"` or `"sigmoid"` (SigLIP).
        temperature (`float`): divides cosines in the contrastive term.
        learn_temperature (`bool`): learn one temperature a direction, starting there.
        sigmoid_bias (`float`): the initial bias of the sigmoid loss.
        symmetric (`bool`): add the term that ranks the batch's predictions for each target (the authors' code).
        router_aux_loss_coef (`float`): weight of the load-balance loss.
        router_z_loss_coef (`float`): weight of the router z-loss.
        initializer_range (`float`): standard deviation of the initial weights of gates and embeddings.
    """

    model_type = "altmoe"

    encoders: dict[str, Any] | None = None
    directions: list[str] | None = None
    hidden_size: int = 128
    moe_intermediate_size: int = 32
    num_experts: int = 12
    top_k: int = 4
    num_gates: int = 2
    expert_pool: str = "shared"
    hidden_act: str = "silu"
    dropout: float = 0.1
    latent_noise: float = 0.5
    base: str = "kernel"
    target_metric: bool = False
    base_features: dict[str, int] | None = None
    base_recalls: list[str] | None = None
    scoring: dict[str, Any] | None = None
    head_scale: float = 1.0
    alpha: float = 0.5
    regression: str = "cosine"
    contrastive: str = "infonce"
    temperature: float = 0.1
    learn_temperature: bool = False
    sigmoid_bias: float = -10.0
    symmetric: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # config.json is written with sorted keys, and embeddings are rows in this order: it must not change in a round trip
        self.encoders = dict(sorted((self.encoders or {}).items()))
        self.directions = list(self.directions or [])
        self.base_features = dict(self.base_features or {})
        self.base_recalls = list(self.base_recalls or [])
        self.scoring = dict(self.scoring or {})
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; `encoders=` given to `AutoModel.from_pretrained` is the model's argument, not a field."""
        given = {"encoders": kwargs.pop("encoders")} if "encoders" in kwargs else {}
        result = super().from_dict(config_dict, **kwargs)
        return (result[0], {**result[1], **given}) if kwargs.get("return_unused_kwargs") else result

    def _check(self) -> None:
        for modality, spec in self.encoders.items():
            check_modality(modality)
            if not isinstance(spec, dict) or not isinstance(spec.get("latent_size"), int) or spec["latent_size"] < 1:
                raise ValueError(
                    f"encoders['{modality}'] needs a positive integer 'latent_size', got {spec!r}. "
                    "Build the configuration with AltMoEModel.from_encoders(...) or from a LatentStore."
                )
        for direction in self.directions:
            self.resolve(direction, known=False)
        if self.top_k < 1 or self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} with num_experts={self.num_experts}: top_k must lie between 1 and num_experts. "
                "Lower top_k or raise num_experts."
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                raise ValueError(
                    f"{name}={getattr(self, name)}: grouped matrix products need a positive multiple of 8. "
                    f"Try {max(8, (getattr(self, name) + 7) // 8 * 8)}."
                )
        if self.num_gates not in (1, 2):
            raise ValueError(f"num_gates={self.num_gates}: expected 2 (one for each loss term) or 1 (shared).")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha}: expected a number from 0 (contrastive only) to 1 (regression only).")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive number, usually 0.01 to 0.2.")
        _one_of("expert_pool", self.expert_pool, ("shared", "per_modality"))
        _one_of("base", self.base, ("none", "ridge", "kernel"))
        _one_of("regression term", self.regression, ("cosine", "mse", "smooth_l1"))
        _one_of("contrastive term", self.contrastive, ("infonce", "sigmoid"))

    @property
    def modalities(self) -> list[str]:
        """Names of the joined modalities, in alphabetical order."""
        return list(self.encoders)

    def latent_size(self, modality: str) -> int:
        """Width of a modality's latents.

        Raises:
            ValueError: if the modality is unknown.
        """
        encoders = self.encoders  # once: transformers looks an attribute up in Python, and searches ask for many
        if modality not in encoders:
            raise ValueError(unknown_name_message("modality", modality, encoders))
        return encoders[modality]["latent_size"]

    def resolve(self, direction: str, known: bool = True) -> tuple[tuple[str, ...], str]:
        """Sources and target of a direction, after checking that the model has it.

        Args:
            direction: e.g. `"image->text"`.
            known: also require that it is one of `directions` (the connector was built for it).

        Raises:
            ValueError: if the direction is ill-formed, unknown, or names an unknown modality.
        """
        sources, target = parse_direction(direction)
        encoders = self.encoders
        for modality in (*sources, target):
            if modality not in encoders:
                raise ValueError(unknown_name_message("modality", modality, encoders))
        if known and direction not in self.directions:
            raise ValueError(unknown_name_message("direction", direction, self.directions))
        return sources, target

    def encoder_config(self, modality: str) -> PreTrainedConfig | None:
        """The encoder's own configuration as an object, or None where only vectors are at hand."""
        self.latent_size(modality)
        fields = self.encoders[modality].get("config")
        return AutoConfig.for_model(**fields) if fields else None

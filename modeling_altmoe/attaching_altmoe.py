"""Where encoders come from and go to: loaded by name, folder or instance, verified, adapted, saved.

Comes in: an entry of `AltMoEConfig.encoders`, or whatever a user passes as an encoder. Goes out: a frozen module in
evaluation mode whose weights are certain. Nothing here knows the connector.
"""

import contextlib
import copy
import os
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils.hub import resolve_revision

from .encoding_altmoe import LatentProtocol, settings_identity, weights_identity
from .sharing_altmoe import is_folder, on_hub

SIZE_NAMES = ("hidden_size", "d_model", "hidden_dim", "dim", "embed_dim")


def infer_latent_size(config) -> int:
    """Width of an encoder's hidden states, read from its configuration.

    Raises:
        ValueError: if no usual field says so.
    """
    for name in SIZE_NAMES:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    if getattr(config, "hidden_sizes", None):
        return config.hidden_sizes[-1]
    raise ValueError(
        f"The latent size of a '{config.model_type}' encoder cannot be read from its configuration. "
        "Pass latent_sizes={modality: width}."
    )


def describe_encoder(
    encoder: nn.Module,
    name_or_path: str | None,
    revision: str | None,
    protocol: dict[str, Any] | None = None,
    processor=None,
    lora=None,
    latent_size: int | None = None,
) -> dict[str, Any]:
    """The entry of `AltMoEConfig.encoders` for one loaded encoder.

    Args:
        encoder: a `PreTrainedModel`.
        name_or_path: Hub name or folder; None for an instance made in memory.
        revision: the commit on the Hub; None for local weights, whose hash then is the protocol's identity.
        protocol: fields of `LatentProtocol` that differ from the defaults (pooling, layers, combine, prompt, normalize).
        processor: its tokenizer, image processor or feature extractor, whose settings join the protocol.
        lora: a peft `LoraConfig` or its dictionary.
        latent_size: width, where the configuration does not tell.
    """
    fields, weights = dict(protocol or {}), weights_identity(encoder)
    fields["encoder"] = str(name_or_path) if revision else weights
    fields["revision"] = revision or ""
    fields["dtype"] = str(encoder.dtype).removeprefix("torch.")
    if processor is not None:
        fields["preprocessing"] = settings_identity(processor)
    if name_or_path is not None and not revision:
        name_or_path = os.path.abspath(name_or_path)  # a folder, wherever the model is loaded later
    protocol = LatentProtocol.from_dict(fields)
    entry = {
        "name_or_path": None if name_or_path is None else str(name_or_path),
        "revision": revision,
        "weights": weights,
        "config": {key: value for key, value in encoder.config.to_dict().items() if key != "_name_or_path"},
        # layers of one width; others: say latent_size
        "latent_size": latent_size or infer_latent_size(encoder.config) * protocol.parts,
        "protocol": protocol.to_dict(),
    }
    if lora is not None:
        lora = lora if isinstance(lora, dict) else lora.to_dict()
        entry["lora"] = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.items() if v is not None}
    return entry


def _report_random(encoder_name: str, info: dict, protocol: LatentProtocol) -> None:
    """Raise if loading left weights at random values that the protocol uses."""
    missing = [key for key in info["missing_keys"] if protocol.pooling == "pooler" or "pooler" not in key]
    if missing or info.get("mismatched_keys"):
        raise ValueError(
            f"Encoder '{encoder_name}' lacks weights its configuration asks for ({', '.join(sorted(missing)[:5])}"
            f"{', ...' if len(missing) > 5 else ''}): they would be random. Use a complete checkpoint."
        )


def load_encoder(
    source: str | os.PathLike,
    protocol: dict | LatentProtocol | None = None,
    *,
    config=None,
    subfolder: str = "",
    revision: str | None = None,
    what: str = "encoder",
    **hub_kwargs,
) -> tuple[nn.Module, str | None]:
    """Load one encoder by Hub name or local folder; `(encoder, commit)`, the commit None for local weights.

    Args:
        source: Hub repository or local folder.
        protocol: its `LatentProtocol` or fields of one (`dtype` and `pooling` matter here).
        config: configuration object or dictionary that overrides the one found there.
        subfolder: folder inside `source`.
        revision: branch, tag or commit.
        what: for error messages: the modality, then "encoder", e.g. "image encoder".
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `trust_remote_code`, ...

    Weights are read from safetensors only: names of encoders come from strangers' files, and a pickle may run code.

    Raises:
        OSError: if there is no such encoder, or only as a pickle, naming it and saying how to pass a local one.
        ValueError: if weights would be left random.
    """
    fields = protocol.to_dict() if isinstance(protocol, LatentProtocol) else dict(protocol or {})
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    try:
        if not is_folder(source, "an encoder", token=hub_kwargs.get("token"), cache_dir=hub_kwargs.get("cache_dir")):
            asked = {k: v for k, v in hub_kwargs.items() if k in ("token", "cache_dir", "local_files_only")}
            # a branch becomes the commit it points to now; where that fails, loading says why
            revision = getattr(resolve_revision(source, revision, **asked), "resolved", revision)
        encoder, info = AutoModel.from_pretrained(
            source,
            config=config,
            subfolder=subfolder,
            dtype=fields.get("dtype", "float32"),
            output_loading_info=True,
            use_safetensors=True,
            **({"revision": revision} if revision else {}),
            **hub_kwargs,
        )
    except OSError as error:
        reason = str(error).splitlines()[0].removesuffix(" Please do not set `use_safetensors=True`.")
        raise OSError(
            f"The {what} '{source}'{f' at revision {revision}' if revision else ''} cannot be loaded: {reason} "
            "Weights are read from safetensors only, never from a pickle (.bin). If it is gated, log in or pass token=...; "
            "if it has moved or you are offline, pass its new name, a local folder or a loaded model: "
            f"AltMoEModel.from_pretrained(..., encoders={{'{what.split()[0]}': name_folder_or_model}})."
        ) from error
    pooling = LatentProtocol(pooling=fields.get("pooling", "mean"))
    _report_random(str(source), info, pooling)
    if os.path.isdir(source):
        return freeze(encoder), None
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise OSError(f"The {what} '{source}' was loaded, but not which commit it is: try again when the Hub answers.")
    return freeze(encoder), revision


def freeze(encoder: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return encoder.eval().requires_grad_(False)


def attach_lora(encoder: nn.Module, lora: dict) -> None:
    """Add trainable LoRA weights to a frozen encoder."""
    from peft import LoraConfig  # not every user trains adapters

    encoder.add_adapter(LoraConfig(**{k: v for k, v in lora.items() if k not in ("peft_type", "auto_mapping")}))


def load_lora(encoder: nn.Module, repo: str, modality: str, is_trainable: bool = False, **hub_kwargs) -> None:
    """Load `adapter_<modality>/` of a checkpoint into an encoder (replacing weights of the same name)."""
    if getattr(encoder, "_hf_peft_config_loaded", False):
        encoder.delete_adapter("default")
    if os.path.isdir(repo):
        encoder.load_adapter(str(Path(repo) / f"adapter_{modality}"), is_trainable=is_trainable)
    else:
        folder = {"subfolder": f"adapter_{modality}", **hub_kwargs}
        encoder.load_adapter(str(repo), adapter_kwargs=folder, is_trainable=is_trainable)


@contextlib.contextmanager
def adapters_off(encoder: nn.Module):
    """Targets are the *base* encoder's latents: with LoRA in place, switch it off to make one."""
    if not getattr(encoder, "_hf_peft_config_loaded", False):
        yield
        return
    encoder.disable_adapters()
    try:
        yield
    finally:
        encoder.enable_adapters()


def verify_encoder(encoder: nn.Module, entry: dict[str, Any], modality: str) -> None:
    """Check that an encoder is the one the connector was trained on.

    Raises:
        ValueError: if the architecture or the weights differ, naming what the connector was trained on.
    """
    name = entry.get("name_or_path") or f"its own encoder_{modality}/"
    trained_on = f"'{name}'" + (f" at revision {entry['revision']}" if entry.get("revision") else "")
    wanted = (entry.get("config") or {}).get("model_type")
    if wanted and encoder.config.model_type != wanted:
        raise ValueError(
            f"The {modality} encoder should be a '{wanted}' model, got '{encoder.config.model_type}'. "
            f"The connector was trained on {trained_on}."
        )
    known = known_weights(entry)
    if known and (found := weights_identity(encoder)) != known:
        raise ValueError(
            f"The {modality} encoder's weights are not those the connector was trained on ({trained_on}: expected {known}, "
            f"got {found}). Pass the original encoder: encoders={{'{modality}': folder_or_model}}."
        )


def known_weights(entry: dict[str, Any]) -> str | None:
    """The hash of the weights a connector was trained on, where its checkpoint has it."""
    identity = (entry.get("protocol") or {}).get("encoder", "")
    return entry.get("weights") or (identity if identity.startswith("weights:") else None)


def base_encoder(encoder: nn.Module) -> nn.Module:
    """The encoder without LoRA: itself, or a copy of its base weights."""
    if not getattr(encoder, "_hf_peft_config_loaded", False):
        return encoder
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in encoder.state_dict().items()
        if ".lora_" not in name
    }
    plain = AutoModel.from_config(copy.deepcopy(encoder.config)).to(encoder.dtype)
    plain.load_state_dict(state)
    return plain


def save_encoder_parts(encoders: nn.ModuleDict, entries: dict[str, dict], folder: str | os.PathLike) -> None:
    """Write `adapter_<modality>/` where LoRA was used, and `encoder_<modality>/` where the entry says `self_contained`."""
    for modality, encoder in encoders.items():
        if getattr(encoder, "_hf_peft_config_loaded", False):
            # what peft shows of the base model: its Hub name, never a folder of this machine
            base = entries[modality] if on_hub(entries[modality]) else {}
            lora = encoder.peft_config["default"]
            lora.base_model_name_or_path, lora.revision = base.get("name_or_path"), base.get("revision")
            encoder.save_pretrained(os.path.join(folder, f"adapter_{modality}"))
        if entries[modality].get("self_contained"):
            base_encoder(encoder).save_pretrained(os.path.join(folder, f"encoder_{modality}"))

"""One frozen encoder and what its latents are: raw tensors in, one pooled vector an item out.

Comes in: an encoder (any `AutoModel`), its input tensors, and a `LatentProtocol`. Goes out: latents `(batch, size)`.
The protocol belongs to the identity of a latent: its fingerprint travels with every stored vector. Nothing here
knows the connector.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

ITEM_LENGTHS = "item_lengths"  # in a batch of items of different lengths: how much of each is its own
POOLINGS = ("mean", "std", "max", "cls", "last_token", "pooler")
COMBINATIONS = ("mean", "concat")


@dataclass(frozen=True)
class LatentProtocol:
    """How an item becomes a vector. Two latents can be compared only if every field agrees.

    Args:
        encoder: the encoder's identity: a Hub repository, or `weights:<sha256>` of a local encoder's weights.
        revision: the repository's commit, or `""` for local weights.
        dtype: in which number format the encoder ran.
        layers: which hidden states are used (`(-1,)` the last; the paper averages the last two, `(-2, -1)`). Where the
            output is not the last of them (a convolutional encoder's head), -1 is the output and -2 the last block.
        combine: what happens to several layers: `"mean"`, or `"concat"`: each is pooled and divided by its norm, then
            they stand side by side (blocks of different widths; early ones see what drawings are made of).
        pooling: over tokens: `"mean"`, `"std"` (standard deviation), `"max"` (all three ignore padding), `"cls"`,
            `"last_token"` or `"pooler"` (the encoder's own). Several, joined by `+`, each divided by its norm, stand side
            by side: `"mean+std"` is statistics pooling (Snyder et al. 2018), `"cls+mean"` what DINOv2's linear probes take.
        prompt: text put before every item (the encoder's native protocol matters by tens of points).
        normalize: divide each latent by its L2 norm.
        adapter: hash of the LoRA weights in use, or `""`.
        preprocessing: hash of the processor's settings, or `""` if unknown.
    """

    encoder: str = ""
    revision: str = ""
    dtype: str = "float32"
    layers: tuple[int, ...] = (-1,)
    pooling: str = "mean"
    prompt: str = ""
    normalize: bool = True
    adapter: str = ""
    preprocessing: str = ""
    combine: str = "mean"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        unknown = [name for name in self.poolings if name not in POOLINGS]
        if unknown:
            raise ValueError(
                f"Unknown pooling '{unknown[0]}'. Known: {', '.join(POOLINGS)}, or several joined by +, as in mean+std."
            )
        if len(set(self.poolings)) < len(self.poolings):
            raise ValueError(f"pooling='{self.pooling}' names one of them twice.")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine='{self.combine}': expected one of {', '.join(COMBINATIONS)}.")
        if "pooler" in self.poolings and (self.combine == "concat" or len(self.poolings) > 1):
            raise ValueError(
                f"pooling='{self.pooling}', combine='{self.combine}': the encoder's own pooler has no hidden states and stands "
                "alone. Use 'mean' or 'cls'."
            )
        if not self.layers:
            raise ValueError("A protocol needs at least one layer, e.g. layers=(-1,).")

    @property
    def poolings(self) -> tuple[str, ...]:
        """The poolings whose vectors stand side by side: usually one."""
        return tuple(self.pooling.split("+"))

    @property
    def parts(self) -> int:
        """How many pooled vectors stand side by side in a latent."""
        return len(self.poolings) * (len(self.layers) if self.combine == "concat" else 1)

    @classmethod
    def from_dict(cls, fields: dict) -> "LatentProtocol":
        """Read the dictionary written by `to_dict`; unknown fields are errors, since they change what a latent is."""
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"Unknown protocol fields {sorted(unknown)}: written by a newer version of altmoe?")
        return cls(**fields)

    def to_dict(self) -> dict:
        """A JSON-ready dictionary; the default `combine` is left out, so fingerprints from before it stay valid."""
        fields = {**dataclasses.asdict(self), "layers": list(self.layers)}
        if self.combine == "mean":
            del fields["combine"]
        return fields

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def check_same(self, other: "LatentProtocol", what: str) -> None:
        """Raise if `other` differs, naming the fields.

        Raises:
            ValueError: naming each field that differs, with both values.
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            details = "; ".join(f"{name}: expected {mine[name]!r}, got {theirs[name]!r}" for name in differing)
            raise ValueError(
                f"{what} were made under another protocol ({details}). Latents of different protocols cannot be "
                "compared: encode again with the expected one, or use a model trained on these."
            )


def weights_identity(module: nn.Module) -> str:
    """`weights:<sha256>` over names, shapes and bytes of a module's state: the identity of a local encoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return f"weights:{digest.hexdigest()[:32]}"


def settings_identity(processor) -> str:
    """Hash of a tokenizer's, image processor's or feature extractor's settings: part of the protocol.

    Paths, class aliases and library versions do not count; what changes the tensors does.
    """
    if hasattr(processor, "backend_tokenizer"):
        fields = {
            "tokenizer": json.loads(processor.backend_tokenizer.to_str()),
            "max_length": int(min(processor.model_max_length, 1_000_000)),
            "padding_side": processor.padding_side,
        }
        # padding and truncation are set by each call
        fields["tokenizer"].pop("padding", None)
        fields["tokenizer"].pop("truncation", None)
    elif hasattr(processor, "to_dict"):
        ignored = ("processor_class", "auto_map", "name_or_path", "transformers_version")
        fields = {key: value for key, value in processor.to_dict().items() if key not in ignored}
    else:
        fields = {"class": type(processor).__name__}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tokens(hidden: torch.Tensor) -> torch.Tensor:
    """Convolutional maps `(batch, channels, height, width)` become tokens `(batch, height * width, channels)`."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def _pool_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One layer, `(batch, tokens, size)` or a map, as one vector an item, `(batch, size)`."""
    tokens = _tokens(hidden)
    if attention_mask is not None and attention_mask.shape[-1] != tokens.shape[1]:
        attention_mask = None  # the mask counts input samples (audio), not tokens
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "last_token":
        if attention_mask is None:
            return tokens[:, -1]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = (attention_mask.to(positions.dtype) * positions).argmax(-1)  # right for left padding, too
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    if pooling == "std":
        mean = _pool_tokens(hidden, attention_mask, "mean")[:, None]
        variance = _pool_tokens((tokens - mean) ** 2, attention_mask, "mean")
        return variance.clamp_min(1e-12).sqrt()  # the root has no gradient at 0
    if attention_mask is None:
        return tokens.amax(1) if pooling == "max" else tokens.mean(1)
    mask = attention_mask.to(tokens.dtype).unsqueeze(-1)
    if pooling == "max":
        return tokens.masked_fill(mask == 0, -torch.inf).amax(1)
    return (tokens * mask).sum(1) / mask.sum(1).clamp_min(1)


def pool(outputs, attention_mask: torch.Tensor | None, protocol: LatentProtocol) -> torch.Tensor:
    """Pool an encoder's output into one vector an item.

    Args:
        outputs: the encoder's output, with `pooler_output`, `last_hidden_state` or `hidden_states` as needed.
        attention_mask: `(batch, tokens)`, 1 for real tokens; None if every token counts.
        protocol: layers, pooling and normalisation.

    Returns:
        Latents `(batch, size)`.

    Raises:
        ValueError: if the encoder does not give what the pooling needs.
    """
    if protocol.pooling == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError("pooling='pooler', but this encoder has no pooler_output. Use 'mean' or 'cls'.")
        latent = pooled.flatten(1)  # (batch, size, 1, 1) of convolutional encoders -> (batch, size)
    else:
        states = [outputs.last_hidden_state]
        if protocol.layers != (-1,):
            known = tuple(outputs.hidden_states)
            if outputs.last_hidden_state.shape != known[-1].shape:
                known += (outputs.last_hidden_state,)
            if any(not -len(known) <= layer < len(known) for layer in protocol.layers):
                raise ValueError(f"layers={protocol.layers}, but this encoder has {len(known)} hidden states.")
            states = [known[layer] for layer in protocol.layers]
        parts = []
        for name in protocol.poolings:
            pooled = [_pool_tokens(state, attention_mask, name).float() for state in states]
            if protocol.combine == "mean":
                if len({part.shape for part in pooled}) > 1:
                    widths = [part.shape[-1] for part in pooled]
                    raise ValueError(
                        f"layers={protocol.layers} have widths {widths}: no mean of them exists, use combine='concat'."
                    )
                pooled = [torch.stack(pooled).mean(0)]  # pooling by the mean is linear: this is the pooled mean
            parts += pooled
        if protocol.combine == "concat" or len(parts) > 1:
            parts = [nn.functional.normalize(part, dim=-1) for part in parts]
        latent = torch.cat(parts, dim=-1)
    return nn.functional.normalize(latent.float(), dim=-1) if protocol.normalize else latent.float()


def join_items(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Input tensors of single items `(1, length, ...)` as one batch; of different lengths, padded with zeros and beside
    their `item_lengths`."""
    lengths = torch.tensor([max(tensor.shape[1] for tensor in item.values() if tensor.dim() > 1) for item in items])
    longest, joined = int(lengths.max()), {}
    for name in items[0]:
        tensors = [item[name] for item in items]
        if len({tensor.shape for tensor in tensors}) > 1:
            room = [(0, 0) * (tensor.dim() - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
            tensors = [nn.functional.pad(tensor, pads) for tensor, pads in zip(tensors, room, strict=True)]
        joined[name] = torch.cat(tensors)
    return joined if bool((lengths == longest).all()) else {**joined, ITEM_LENGTHS: lengths}


def _encode_by_length(encoder, inputs: dict, lengths: torch.Tensor, protocol: LatentProtocol) -> torch.Tensor:
    """Items of one length together, without padding: many encoders of sound (those that normalise over time) give another
    latent for a padded item, whatever the mask says."""
    longest, parts, order = int(lengths.max()), [], []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        own = {name: x[rows][:, :length] if x.shape[1:2] == (longest,) else x[rows] for name, x in inputs.items()}
        parts.append(encode_latents(encoder, own, protocol))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def encode_latents(encoder: nn.Module, inputs: dict, protocol: LatentProtocol) -> torch.Tensor:
    """Run one encoder and pool: input tensors -> latents `(batch, size)`, float32.

    Encoder-decoder models (T5, Whisper) use their encoder alone. A batch with `item_lengths` (see `join_items`) gives the
    latents of its items one by one.
    """
    if ITEM_LENGTHS in inputs:
        rest = {name: tensor for name, tensor in inputs.items() if name != ITEM_LENGTHS}
        return _encode_by_length(encoder, rest, inputs[ITEM_LENGTHS], protocol)
    body = encoder.get_encoder() if getattr(encoder.config, "is_encoder_decoder", False) else encoder
    needs_states = protocol.pooling != "pooler" and protocol.layers != (-1,)
    outputs = body(**inputs, output_hidden_states=True) if needs_states else body(**inputs)
    return pool(outputs, inputs.get("attention_mask"), protocol)

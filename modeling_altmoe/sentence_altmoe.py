"""The door for sentence-transformers: one vector an item, comparable across modalities by cosine.

Comes in: captions, pictures or sounds, one modality a call. Goes out: unit vectors of one joint space. It is made of
blocks: the anchor's latent space (text, where there is one) and the space of each modality m that it is joined with.

    item x of the anchor A:   [ g_A(x),   r_m q_A->m(x), ... ]
    item y of modality m:     [ q_m->A(y), r_m g_m(y) ]           r_m^2 = s_m->A / s_A->m

q, g, s: query vector, gallery vector and scale of `scoring_altmoe`. So x.y is the both-direction score (w = 1, as training
sets it) without its hubness term, up to a factor that all pairs of two modalities share (for two modalities in all:
cosine = score / (1/s + 1/s')).
Either side may be the query. Items of one modality are compared by their own latent and by what they predict; two
modalities that are no anchor, through their predictions of the anchor.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

KINDS = ("text", "image", "audio")  # what sentence-transformers tells apart


class AltMoEEmbedder(nn.Module):
    """
    The only module of `SentenceTransformer(repo, trust_remote_code=True)`.

    Example:

    ```python
    model = SentenceTransformer(repo, trust_remote_code=True)
    texts, pictures = model.encode(["a frog", "a bus"]), model.encode([Image.open("frog.png")])
    model.similarity(texts, pictures)  # (2, 1) cosines
    ```

    Args:
        model: an [`AltMoEModel`] with its encoders.
        processor: its [`AltMoEProcessor`].

    Raises:
        ValueError: no direction of the model joins two modalities.
    """

    save_in_root = True

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.processor = model, processor
        self.anchor, self.joined = joint_space(model)

    # ---------------------------------------------------------------- what sentence-transformers asks for

    @property
    def modalities(self) -> list[str]:
        """The kinds of items it takes, by sentence-transformers' names."""
        return [kind for kind in KINDS if self._meant(kind) is not None]

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a caption; longer ones are cut."""
        return getattr(self.tokenizer, "model_max_length", None)

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self.tokenizer.model_max_length = tokens

    def get_embedding_dimension(self) -> int:
        """Width of the joint space."""
        return sum(self.model.config.latent_size(target) for target in self._blocks())

    def preprocess(self, inputs: list, prompt: str | None = None, **kwargs) -> dict:
        """Raw items of one modality -> the encoder's input tensors and the modality's name.

        Args:
            inputs: captions, PIL images, `{"image": ...}`, `{"array", "sampling_rate"}`; names of files that exist are
                read, as everywhere in sentence-transformers.
            prompt: put before captions.

        Raises:
            ItemError: an item cannot be used.
            ValueError: the model has several modalities (or none) of this kind.
            ImportError: sentence-transformers is older than 6.
        """
        try:  # not at the top: loading a checkpoint needs no sentence-transformers
            from sentence_transformers.base.modality import infer_batch_modality
        except ImportError as error:
            raise ImportError("This needs sentence-transformers 6: pip install -U sentence-transformers.") from error
        kind = infer_batch_modality(inputs, supported_modalities=self.modalities)
        modality = self._meant(kind)
        if modality is None:
            raise ValueError(f"This model has no single modality for {kind} items. It takes: {self.modalities}.")
        items = [item[kind] if isinstance(item, dict) and set(item) == {kind} else item for item in inputs]
        if prompt and kind == "text":
            items = [prompt + item for item in items]
        tensors = self.processor.batch(modality, [self.processor.read(modality, item) for item in items])
        return {**tensors, "modality": modality}

    def forward(self, features: dict, **kwargs) -> dict:
        """What `preprocess` gives -> `sentence_embedding` `(batch, width)`, unit vectors."""
        inputs = dict(features)
        modality = inputs.pop("modality")
        latents = self.model.encode(modality, inputs)
        adapted = latents
        if getattr(self.model.encoders[modality], "_hf_peft_config_loaded", False):
            adapted = self.model.encode(modality, inputs, adapted=True)
        return {**features, "sentence_embedding": self.embed(modality, latents, adapted)}

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token=None,
        cache_folder=None,
        revision=None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        backend: str = "torch",
        **kwargs,
    ) -> "AltMoEEmbedder":
        """Load model and processor with transformers' own classes.

        Raises:
            ValueError: a backend other than torch; whatever the model's `from_pretrained` raises.
        """
        if backend != "torch":
            raise ValueError(f"backend='{backend}': an altmoe model runs on torch only.")
        hub = {"token": token, "cache_dir": cache_folder, "revision": revision, "local_files_only": local_files_only}
        hub["trust_remote_code"] = trust_remote_code
        model = AutoModel.from_pretrained(
            model_name_or_path, **hub, **{**(config_kwargs or {}), **(model_kwargs or {})}
        )
        return cls(model, AutoProcessor.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {})))

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Save model, code and processor; encoders go along if they came along."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    # ---------------------------------------------------------------- the joint space

    def _meant(self, kind: str) -> str | None:
        """The joined modality that takes items of a kind: the one of this name, else the only one."""
        served = [m for m in (self.anchor, *self.joined) if m in self.processor.processors]
        found = [m for m in served if self.processor.kind(m) == kind]
        return kind if kind in found else (found[0] if len(found) == 1 else None)

    def _has(self, source: str, target: str) -> bool:
        return f"{source}->{target}" in self.model.directions

    def _blocks(self) -> list[str]:
        """The latent spaces that the joint space is made of: those that are predicted between anchor and others."""
        to_anchor = [self.anchor] if any(self._has(m, self.anchor) for m in self.joined) else []
        return to_anchor + [m for m in self.joined if self._has(self.anchor, m)]

    def _weight(self, modality: str) -> float:
        """r of a joined modality; 1 where only one direction is there, or scales were never measured."""
        back, there = f"{modality}->{self.anchor}", f"{self.anchor}->{modality}"
        if back not in self.model.directions or there not in self.model.directions:
            return 1.0
        scales = self.model.postprocessing(there).scales
        return (scales.get(back, 1.0) / scales.get(there, 1.0)) ** 0.5

    @torch.no_grad()
    def embed(self, modality: str, latents: torch.Tensor, adapted: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of a joined modality -> unit vectors of the joint space.

        Args:
            modality: the anchor or a joined one.
            latents: `(n, latent_size)`, as a LatentStore holds them.
            adapted: the same items through LoRA, where predictions are made from (default: `latents`).

        Returns:
            `(n, width)`.

        Raises:
            ValueError: a modality that is not joined, or bad latents.
        """
        if modality not in (self.anchor, *self.joined):
            raise ValueError(f"'{modality}' is not in the joint space of {self.anchor} and {', '.join(self.joined)}.")
        self.model._check_latents(modality, latents)
        adapted, parts = latents if adapted is None else adapted, []
        for target in self._blocks():
            weight = 1.0 if target == self.anchor else self._weight(target)
            if target == modality:
                part = self.model.connector.frames[target].unit(latents)
            elif self.anchor in (target, modality) and self._has(modality, target):
                part = self.model.queries(f"{modality}->{target}", {modality: adapted})
            else:
                part = latents.new_zeros(len(latents), self.model.config.latent_size(target))
            parts.append(weight * part)
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)


def joint_space(model) -> tuple[str, list[str]]:
    """The modality that most others are joined with (text among equals), and those others.

    Raises:
        ValueError: no direction with a single source.
    """
    pairs = [tuple(direction.split("->")) for direction in model.directions if "+" not in direction]
    neighbours = {
        m: sorted({b if a == m else a for a, b in pairs if m in (a, b)}) for m in sorted(model.config.modalities)
    }
    anchor = max(neighbours, key=lambda m: (len(neighbours[m]), m == "text"))
    if not neighbours[anchor]:
        raise ValueError(f"No direction joins two modalities; this model has: {', '.join(model.directions)}.")
    return anchor, neighbours[anchor]


def write_sentence_files(folder) -> None:
    """Write what `SentenceTransformer(folder, trust_remote_code=True)` looks for: which class, and how to compare."""
    kind = f"{AltMoEEmbedder.__module__.split('.')[-1]}.{AltMoEEmbedder.__name__}"
    files = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": kind}],
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n")

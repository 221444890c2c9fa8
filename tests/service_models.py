"""What the tests of the service share."""

from pathlib import Path

import torch
from conftest import tiny_bert, tiny_processors, tiny_vit, tiny_wav2vec2
from transformers import Wav2Vec2FeatureExtractor

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore


def write_service(root: Path) -> list[str]:
    """A published model of three modalities, and stores of what can be found; the flags that serve them."""
    encoders = {"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_wav2vec2()}
    processors = {**tiny_processors(root), "audio": Wav2Vec2FeatureExtractor()}
    torch.manual_seed(0)
    model = AltMoEModel.from_encoders(
        encoders,
        ["image->text", "text->image", "audio->text", "audio->image", "image+audio->text"],
        processors=processors,
        protocols={"image": {"pooling": "cls"}},
        base="none",
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=4,
        top_k=2,
    ).eval()
    model.save_pretrained(root / "model", self_contained=True)
    AltMoEProcessor(processors).save_pretrained(root / "model")
    for modality in ("image", "text"):
        columns = {"category": "string", "year": "int32"}
        store = LatentStore.create(root / modality, modality, model.config.encoders[modality], columns=columns)
        latents = torch.nn.functional.normalize(torch.randn(60, model.config.latent_size(modality)), dim=-1)
        kept = {"category": ["animals", "tools", "food"] * 20, "year": list(range(1960, 2020))}
        store.append([f"{modality}{row}" for row in range(60)], latents, **kept)
        store.flush()
    return ["--model", str(root / "model"), *(f"--store={m}={root / m}" for m in ("image", "text")), "--threads", "1"]

"""Small things many tests share: a connector without encoders, tiny encoders, paired latents with a known answer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    EfficientNetImageProcessor,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from modeling_altmoe import AltMoEConfig, AltMoEModel, AltMoEProcessor
from modeling_altmoe.confidence_altmoe import Calibration
from modeling_altmoe.scoring_altmoe import Postprocessing

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog red blue green square circle tree house".split()
torch.set_num_threads(1)


def small_config(**changes) -> AltMoEConfig:
    """Two modalities of vectors, no encoders."""
    settings = {
        "encoders": {"image": {"latent_size": 24}, "text": {"latent_size": 16}},
        "directions": ["image->text", "text->image"],
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 6,
        "top_k": 2,
        "base": "none",
        **changes,
    }
    return AltMoEConfig(**settings)


def small_model(seed: int = 0, **changes) -> AltMoEModel:
    torch.manual_seed(seed)
    return AltMoEModel(small_config(**changes)).eval()


def score_both_ways(model: AltMoEModel) -> AltMoEModel:
    """Image and text each way by both directions, with hubness, and a calibration where images are searched."""
    for there, back in (("text->image", "image->text"), ("image->text", "text->image")):
        sizes = {d: model.config.latent_size(model.config.resolve(d)[1]) for d in (there, back)}
        bank = {d: torch.nn.functional.normalize(torch.randn(20, size), dim=-1) for d, size in sizes.items()}
        model.set_scoring(there, Postprocessing({there: 0.3, back: 0.4}, 0.7, 0.5, 3, bank, bank))
    kept = Calibration([0.5, 1.0, 0.2, -0.1], bias=-0.3, threshold=0.4)
    model.config.scoring["text->image"]["confidence"] = kept.as_dict()
    return model


def paired_latents(rows: int = 96, seed: int = 0, noise: float = 0.1) -> dict[str, torch.Tensor]:
    """Two views of one hidden factor: an image and a text latent of each row."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rows, 6, generator=generator)
    views = {}
    for modality, size in (("image", 24), ("text", 16)):
        mixed = torch.tanh(factor @ torch.randn(6, size, generator=generator))
        mixed = mixed + noise * torch.randn(rows, size, generator=generator)
        views[modality] = torch.nn.functional.normalize(mixed, dim=-1)
    return views


def tiny_vit(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).eval()


def tiny_bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    return BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).eval()


def tiny_wav2vec2() -> Wav2Vec2Model:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return Wav2Vec2Model(config).eval()


def tiny_processors(folder) -> dict:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    images = EfficientNetImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    return {"image": images, "text": tokenizer}


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory):
    """Tiny ViT and BERT saved as a user would have them: weights and processors in one folder each."""
    root = tmp_path_factory.mktemp("encoders")
    processors = tiny_processors(root)
    for modality, encoder in (("image", tiny_vit()), ("text", tiny_bert())):
        encoder.save_pretrained(root / modality)
        processors[modality].save_pretrained(root / modality)
    return {modality: str(root / modality) for modality in ("image", "text")}


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    return AltMoEProcessor(tiny_processors(tmp_path_factory.mktemp("processors")))


@pytest.fixture(scope="module")
def postgres():
    """The address of a real PostgreSQL with pgvector, without a table."""
    from database_servers import postgres_server

    psycopg = pytest.importorskip("psycopg")
    with postgres_server() as address:
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield address


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]

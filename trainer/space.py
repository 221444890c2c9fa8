"""Write a complete Space folder: the search page, the model's code, settings and a card. Pushing it is another step.

Comes in: names of a model, of stores and of a data set. Goes out: a folder for `HfApi.upload_folder(...,
repo_type="space")`. Hub names are loaded by the Space itself; local folders are copied into it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import modeling_altmoe
from modeling_altmoe.sharing_altmoe import is_folder, refuse_local_encoders
from trainer.card import TEMPLATE

SPACE = TEMPLATE.parent / "space"
HANDLER = TEMPLATE.parent / "endpoint" / "handler.py"
FILES = ("app.py", "engine.py", "rendering.py", "settings.py", "style.css", "requirements.txt")
IGNORED = shutil.ignore_patterns(".lock", "*.tmp", "__pycache__", ".cache", ".git")


def _place(folder: Path, inside: str, name: str | os.PathLike) -> tuple[str, bool]:
    """A Hub name as it is; a local folder copied to `inside`. Returns the name to use and whether the Hub has it."""
    if is_folder(name, f"what becomes '{inside}'", "model" if inside == "model" else "dataset"):
        shutil.copytree(name, folder / inside, ignore=IGNORED, dirs_exist_ok=True)
        return inside, False
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise ValueError(f"'{name}' is neither a folder here nor a Hub name.") from error
    return str(name), True


def _check_whole(model: str | os.PathLike) -> None:
    """Raise if a local model's encoders would be missing on another machine."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    refuse_local_encoders(config.get("encoders", {}))


def write_space(
    folder: str | os.PathLike,
    model: str | os.PathLike,
    stores: dict[str, str | os.PathLike],
    data: str | os.PathLike | None = None,
    *,
    title: str = "Search across senses",
    examples: list[str] | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write the folder; files of an earlier call are replaced.

    Args:
        folder: where.
        model: Hub name, or local folder (copied; it must be self-contained or name encoders on the Hub).
        stores: `{modality: Hub data set or local store}`: what can be found.
        data: Hub data set or local folder with columns `id`, a picture, `caption`; ids as in the stores.
        title: heading of the page and name on the Hub.
        examples: texts to click (default: captions of the data set).
        license: of the Space's card.

    Returns:
        the folder's path.

    Raises:
        ValueError: no store, a name that is neither a folder nor a Hub name, or encoders that only this machine has.
        FileNotFoundError: a local model without config.json.
    """
    if not stores:
        raise ValueError("No store: a Space needs at least one, e.g. {'image': 'me/my-latents'}.")
    if wrong := [modality for modality in stores if not re.fullmatch(r"\w+", modality)]:
        raise ValueError(f"{wrong[0]!r} is not the name of a modality.")
    if os.path.isdir(model):
        _check_whole(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_name, model_on_hub = _place(folder, "model", model)
    placed = {modality: _place(folder, f"stores/{modality}", name) for modality, name in stores.items()}
    data_name, data_on_hub = _place(folder, "data", data) if data else (None, False)
    settings = {
        "model": model_name,
        "stores": {modality: name for modality, (name, _) in placed.items()},
        "data": data_name,
        "title": title,
        "examples": examples,
    }
    (folder / "space.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in FILES:
        shutil.copy(SPACE / name, folder / name)
    shutil.copy(HANDLER, folder / "handler.py")
    code = Path(modeling_altmoe.__file__).parent
    (folder / code.name).mkdir(exist_ok=True)
    for source in code.glob("*.py"):
        shutil.copy(source, folder / code.name / source.name)

    requirements = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    on_hub = [name for name, there in placed.values() if there] + ([data_name] if data_on_hub else [])
    card_data = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="green",
        sdk="gradio",
        sdk_version=re.search(r"^gradio==(\S+)$", requirements, re.MULTILINE)[1],
        python_version="3.11",
        app_file="app.py",
        license=license,
        models=[model_name] if model_on_hub else None,
        datasets=list(dict.fromkeys(on_hub)) or None,
        tags=["altmoe", "cross-modal-retrieval"],
    )

    def link(name: str, on_hub: bool, kind: str) -> str:
        return f"[{name}](/{kind}{name})" if on_hub else f"`{name}/` in this Space"

    card = SpaceCard.from_template(
        card_data,
        template_path=str(SPACE / "README.md"),
        title=title,
        searched=" and ".join(stores),
        model=link(model_name, model_on_hub, ""),
        stores=", ".join(link(name, there, "datasets/") for name, there in placed.values()),
        data=link(data_name, data_on_hub, "datasets/") if data_name else None,
    )
    card.save(folder / "README.md")
    return folder

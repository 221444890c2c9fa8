"""`altmoe push`: a published model, a LatentStore or a search page, sent to the Hub."""

import argparse
import json
import re
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from modeling_altmoe import LatentStore
from modeling_altmoe.latents_altmoe import DESCRIPTION
from modeling_altmoe.sharing_altmoe import push_folder, refuse_local_encoders
from trainer.space import write_space


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", help="published model or LatentStore; with --space the model (folder or Hub name)")
    parser.add_argument("repo", help="name on the Hub: NAME or OWNER/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to write to; made if it does not exist (default: main)")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--license", help="licence of a store's latents, e.g. cc-by-4.0")
    parser.add_argument("--space", action="store_true", help="push a page that searches --store with the model")
    parser.add_argument("--store", action="append", default=[], help="MODALITY=NAME, for --space (may be repeated)")
    parser.add_argument("--data", help="for --space the data set with the pictures: Hub name or folder; for a store what was "
                        "encoded, in its card")  # fmt: skip


def _model_card(folder: Path, repo: str) -> bytes:
    """The card, with the repository's name in place of the folder's."""
    path = folder / "README.md"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no card (README.md). Make one: altmoe publish --run {folder} --out FOLDER."
        )
    text = re.sub(r'^repo = ".*"', lambda _: f'repo = "{repo}"', path.read_text(encoding="utf-8"), flags=re.M)
    try:
        ModelCard(text)  # its metadata must be readable before anything is sent; the Hub checks it again
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata of '{path}' cannot be read ({' '.join(str(error).split())}).") from error
    return text.encode()


def push(arguments: argparse.Namespace) -> str:
    """Send it.

    Returns:
        the commit's address.

    Raises:
        FileNotFoundError: no folder, or a model without a card.
        ValueError: neither a model nor a store, a bad name, encoders that only this machine has, pickles.
        PermissionError: the token may not write there.
    """
    validate_repo_id(arguments.repo)
    folder, repo = Path(arguments.folder), arguments.repo
    sent = {"private": arguments.private or None, "revision": arguments.revision, "commit_message": arguments.message}
    if arguments.space:
        stores = dict(item.split("=", 1) for item in arguments.store if "=" in item)
        if len(stores) != len(arguments.store):
            raise ValueError(f"--store {' '.join(arguments.store)}: expected MODALITY=NAME, each modality once.")
        with tempfile.TemporaryDirectory() as place:
            write_space(place, arguments.folder, stores, arguments.data)
            return push_folder(place, repo, "space", **sent)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder '{folder}'.")
    if (folder / DESCRIPTION).is_file():
        return LatentStore.open(folder).push_to_hub(
            repo, license=arguments.license, data=arguments.data, **{k: v for k, v in sent.items() if v}
        )
    config = folder / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if fields.get("model_type") != "altmoe":
        raise ValueError(f"'{folder}' is neither an altmoe model nor a LatentStore: nothing to push.")
    refuse_local_encoders(fields["encoders"])
    return push_folder(folder, repo, replace={"README.md": _model_card(folder, repo)}, **sent)


def main(arguments: argparse.Namespace) -> None:
    """Run and print the address."""
    print(push(arguments))

"""Sharing on the Hub: what may leave this machine, and sending it.

Comes in: a saved folder, or something with `save_pretrained`. Goes out: a commit. Only safetensors, Arrow, JSON, text,
code and pictures are sent: a pickle can run code where it is opened.
"""

import difflib
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name

try:  # the client's own transport; its errors are not the client's
    from httpx2 import TransportError
except ImportError:
    TransportError = ConnectionError

BROKEN = (TransportError, ConnectionError, TimeoutError)  # the last two are those of xet, which sends large files
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
SCRATCH = (
    ".lock*",
    ".ids/*",
    "index/*",
    "*.tmp",
    "*.lock",
    "__pycache__/*",
    "*/__pycache__/*",
    ".cache/*",
    ".git/*",
    "checkpoint-*/*",
)


def is_folder(
    name: str | os.PathLike,
    what: str,
    repo_type: str = "model",
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> bool:
    """Whether a name means a folder of this machine; False: a name on the Hub, which then may be asked for it.

    A mistyped path would be asked of the Hub again and again, for minutes. What begins with `.`, `~` or `/`, or has more
    than one `/`, is no Hub name. Where a folder is called like the owner, the Hub is asked once, and quickly.

    Args:
        name: what a user gave.
        what: for the error, e.g. `"a trained model"`.
        repo_type: `"model"` or `"dataset"`.
        token, cache_dir: as everywhere in huggingface_hub.

    Raises:
        FileNotFoundError: it can only be a path, and there is no such folder.
    """
    text = os.fspath(name)
    if os.path.isdir(text) or "://" in text:
        return "://" not in text
    owner = os.path.dirname(text)
    if not (os.path.isabs(text) or text[:1] in (".", "~") or text.count("/") > 1):
        if not (owner and os.path.isdir(owner)):
            return False
        folder = repo_folder_name(repo_id=text, repo_type=repo_type)
        if os.path.isdir(os.path.join(cache_dir or constants.HF_HUB_CACHE, folder)):
            return False
        try:
            HfApi(token=token).repo_info(text, repo_type=repo_type, timeout=5)
            return False
        except (OSError, TransportError, HFValidationError):
            pass  # neither here nor there, or no way to tell
    if os.path.exists(text):
        raise FileNotFoundError(f"'{text}' is a file: expected {what}, a folder or a name on the Hub (OWNER/NAME).")
    there, missing = Path(text), ""
    while not there.is_dir():
        there, missing = there.parent, there.name
    close = difflib.get_close_matches(missing, sorted(os.listdir(there)), n=1)
    hint = f" Did you mean '{there / close[0]}'?" if close else f" Below '{there}' is no '{missing}'."
    raise FileNotFoundError(f"There is no folder '{text}': expected {what}, a folder or a name on the Hub.{hint}")


def on_hub(entry: dict[str, Any]) -> bool:
    """Whether others can load an encoder by its name: a Hub name at a pinned revision. Any other name is a folder here."""
    return bool(entry.get("name_or_path") and entry.get("revision"))


def without_paths(entry: dict[str, Any]) -> dict[str, Any]:
    """An encoder's entry (of `AltMoEConfig.encoders` or of a store) as others may see it: no folder of this machine."""
    entry = dict(entry)
    if "name_or_path" in entry and not on_hub(entry):
        entry["name_or_path"] = None
    if entry.get("config"):
        entry["config"] = {key: value for key, value in entry["config"].items() if key != "_name_or_path"}
    return entry


def one_line(text) -> str:
    """Foreign text for a line or a cell of Markdown: it opens no other line, cell, code or tag."""
    return re.sub(r"([|`<>\\])", r"\\\1", " ".join(str(text).split()))


def usual_mode(paths: Iterable[str | os.PathLike]) -> None:
    """Let others read files as they may read any new file here (umask): safetensors writes for their owner only."""
    umask = os.umask(0o077)  # it cannot be read without being set
    os.umask(umask)
    for path in paths:
        os.chmod(path, 0o666 & ~umask)


def refuse_local_encoders(entries: dict[str, dict[str, Any]]) -> None:
    """Raise if another machine could not load an encoder: it neither goes along nor has a Hub name.

    Args:
        entries: `AltMoEConfig.encoders`; those without `config` and name are vectors only, and pass.

    Raises:
        ValueError: naming the encoders and what to do.
    """
    local = {
        modality: entry.get("name_or_path") or "a model in memory"
        for modality, entry in entries.items()
        if (entry.get("config") or entry.get("name_or_path")) and not entry.get("self_contained") and not on_hub(entry)
    }
    if local:
        raise ValueError(
            f"These encoders lie on this machine only: {local}. Others could not load the model. Push it with "
            "self_contained=True (`altmoe publish --self_contained`), or push the encoders and load the model with "
            "their Hub names first: AltMoEModel.from_pretrained(folder, encoders={modality: name})."
        )


def upload_saved(saver, folder, before: dict, repo_id=None, private=None, token=None, **commit):
    """`save_pretrained(..., push_to_hub=True)`: send what was written since `before` (names and times of files)."""
    name = repo_id or os.path.basename(os.fspath(folder).rstrip(os.sep))
    repo = HfApi().create_repo(name, exist_ok=True, private=private, token=token).repo_id
    return saver._upload_modified_files(folder, repo, before, token=token, **commit)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    replace: dict[str, bytes] | None = None,
    mirror: str | None = None,
) -> str:
    """Send a whole folder in one commit; run it again after a break, nothing is sent twice.

    Args:
        folder: what to send; lock files, half-written files and training checkpoints stay.
        repo_id: `name` or `owner/name`; made if it does not exist.
        repo_type: `"model"`, `"dataset"` or `"space"`.
        private: visibility of a new repository.
        token: as everywhere in huggingface_hub.
        revision: branch to write to; made if it does not exist.
        commit_message: first line of the commit.
        replace: `{file name: content}` sent instead of files in the folder, or beside them.
        mirror: pattern of files that the same commit removes there if they are not here.

    Returns:
        the commit's address.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: it holds pickles.
        PermissionError: the token may not write there.
        ConnectionError: it broke; the Hub shows what it showed before, or all of the new.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder, replace = Path(folder), dict(replace or {})
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [name for name in found if not any(fnmatch(name, pattern) for pattern in SCRATCH)]
    if not found:
        raise FileNotFoundError(f"Nothing to push in '{folder}'.")
    pickles = [name for name in found if any(fnmatch(name, pattern) for pattern in PICKLES)]
    if pickles:
        raise ValueError(
            f"'{folder}' holds pickles, which can run code where they are opened: {pickles[:5]}. Remove them."
        )
    files = {name: str(folder / name) for name in found} | replace
    api = HfApi(token=token)
    try:
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk).repo_id
        if revision:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        if mirror:
            there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
            gone = [name for name in there if fnmatch(name, mirror) and name not in files]
            operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
        return api.create_commit(
            repo_id, operations, repo_type=repo_type, revision=revision, commit_message=commit_message or "Upload"
        ).commit_url
    except (HfHubHTTPError, *BROKEN, RuntimeError) as error:
        # the client turns what broke the upload of one large file into a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to '{repo_id}' (status {status}). Log in with a token "
                "that may write (`hf auth login`), or choose a name of your own."
            ) from error
        if isinstance(cause, BROKEN) or (status or 0) >= 500:
            raise ConnectionError(
                f"The push to '{repo_id}' broke ({cause}). What is there is as it was before, or complete: push again, "
                "large files that have arrived are not sent twice."
            ) from error
        raise


def shareable(description: dict[str, Any]) -> dict[str, Any]:
    """A store's description without names of folders on this machine; the protocol says what made the latents."""
    return {**description, "encoder": without_paths(description["encoder"])}


STORE_CARD = """---
{metadata}
---

# {name}

{count} latents of modality `{modality}`, {size}-d {dtype}, made once by a frozen encoder and never changed: any connector
trained towards this encoder searches them.

| | |
|---|---|
| encoder | {encoder} |
| protocol | {protocol} |
| fingerprint | `{fingerprint}` |
| columns | {columns} |
| data | {data} |

```python
from modeling_altmoe import LatentStore

store = LatentStore.from_hub("{repo}")
store.take([0])  # (1, {size}) float32
```

`datasets.load_dataset("{repo}")` reads the same rows. A search under another protocol is refused, naming the field that differs.
"""


def store_card(store, repo_id: str, license: str | None = None, data: str | None = None) -> str:
    """README.md of a store on the Hub: protocol, encoder, licence, count, what it was made of and how to open it."""
    from huggingface_hub import DatasetCardData

    entry = store.encoder
    name = entry.get("name_or_path") or "a model in memory"
    encoder = name if on_hub(entry) else os.path.basename(name)
    head = DatasetCardData(
        license=license,
        tags=["altmoe", "embeddings", store.modality],
        size_categories=None,
        configs=[{"config_name": "default", "data_files": "shard-*.arrow"}],
    )
    fields = {k: v for k, v in store.protocol.to_dict().items() if v not in ("", None)}
    return STORE_CARD.format(
        metadata=head.to_yaml().strip(),
        name=repo_id.split("/")[-1],
        repo=repo_id,
        count=len(store),
        modality=one_line(store.modality),
        size=store.latent_size,
        dtype=store.dtype,
        encoder=one_line(encoder),
        protocol=one_line(", ".join(f"{name} {value}" for name, value in fields.items())),
        fingerprint=store.fingerprint,
        columns=one_line(", ".join(["id", "latent", *store.columns])),
        data=one_line((os.path.basename(data) if os.path.exists(data) else data) if data else "not said"),
    )

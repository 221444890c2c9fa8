"""A push that breaks at any point: readers see what was there before or all that is new, and the same push again
finishes it. The real client talks to a Hub on the loopback, in this process."""

import pytest
import torch
from conftest import small_model
from hub_server import WRITE, Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

from modeling_altmoe import AltMoEModel
from trainer.cli import main

CARD = '---\nlibrary_name: transformers\n---\n\nrepo = "here"\n'
ONES = {"image": torch.ones(1, 24)}


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        server.use_here(monkeypatch)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client tries five times, and waits between
        yield server


def saved(folder, seed: int) -> torch.Tensor:
    """A model without encoders, as `altmoe publish` would leave it, and what it predicts."""
    model = small_model(seed)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "example.png").write_bytes(b"a picture of %d" % seed)
    return model.predict(ONES, "image->text")


def pulled(tmp_path, name: str) -> torch.Tensor:
    """What a reader with an empty cache gets."""
    cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
    return AltMoEModel.from_pretrained(name, cache_dir=cache).predict(ONES, "image->text")


def push(folder) -> None:
    main(["push", str(folder), "me/joined"])


def sent(hub: Hub) -> list[int]:
    """Statuses of the uploads of large files, 0 where the connection broke."""
    return [status for method, path, status in hub.requests if method == "PUT" and path.startswith("/lfs/")]


CASES = {
    "weights-of-a-new-model": {"cut_after": 5000},
    "weights": {"cut_after": 5000},
    "commit": {"break_at": "/commit/", "break_how": "asked"},  # all is uploaded, nothing committed
    "server": {"break_at": "/commit/", "break_how": 500},
    "answer": {"break_at": "/commit/", "break_how": "answered"},  # committed, but nobody was told
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_push_shows_nothing_by_halves_and_the_same_push_finishes_it(hub, tmp_path, capsys, case):
    how, new = CASES[case], case.endswith("new-model")
    if not new:
        before = saved(tmp_path / "model", seed=1)
        push(tmp_path / "model")
    here = saved(tmp_path / "model", seed=2)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 2 * 5000
    hub.requests.clear()
    vars(hub).update(how)
    with pytest.raises(SystemExit):
        push(tmp_path / "model")
    shown = capsys.readouterr().err
    assert "push again" in shown and WRITE not in shown
    uploads = sent(hub)
    assert (0 in uploads) == ("cut_after" in how) and uploads.count(200) == (1 if "cut_after" in how else 2)
    if case == "answer":
        assert torch.equal(pulled(tmp_path, "me/joined"), here)
    elif new:
        assert set(hub.files("me/joined")) == {".gitattributes"}
        with pytest.raises(OSError, match=r"config\.json"):
            pulled(tmp_path, "me/joined")
    else:
        assert torch.equal(pulled(tmp_path, "me/joined"), before)

    hub.requests.clear()
    hub.break_at = hub.cut_after = None
    push(tmp_path / "model")
    assert sent(hub) == ([200] if "cut_after" in how else [])  # what had arrived is not sent twice
    assert torch.equal(pulled(tmp_path, "me/joined"), here)
    commits = ["initial commit"] + ["Upload"] * (1 if new else 2)  # none for what was there already
    assert hub.repositories["model", "me/joined"].messages == commits


def test_storage_that_cannot_be_reached_is_a_broken_push_too(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # the client's usual way; this Hub has no such storage
    saved(tmp_path / "model", seed=1)
    with pytest.raises(SystemExit):
        push(tmp_path / "model")
    assert "push again" in capsys.readouterr().err and set(hub.files("me/joined")) == {".gitattributes"}

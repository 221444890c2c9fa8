"""The `altmoe` command itself: help, Ctrl-C, and folders that hold no model."""

import pytest

from modeling_altmoe import AltMoEModel
from trainer.cli import COMMANDS
from trainer.cli import main as altmoe


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.store.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        altmoe(["store", "anywhere"])
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == "stopped"


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json: expected an altmoe checkpoint"):
        AltMoEModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        altmoe([command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 300

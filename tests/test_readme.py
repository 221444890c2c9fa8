"""What the README shows is what the project does."""

import re
import shlex
from pathlib import Path

import pytest

from trainer.arguments import read_recipe
from trainer.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_it_names_exists():
    for name in re.findall(r"`((?:modeling_altmoe|trainer|model_cards|demo|benchmarks|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).exists(), picture


def test_every_command_it_shows_is_known_with_all_its_flags(capsys):
    from trainer.cli import main

    shown = [line for line in README.splitlines() if re.match(r"altmoe \w+ .*(--|\.yaml)", line)]
    assert {shlex.split(line)[1] for line in shown} == set(COMMANDS)
    for line in shown:
        words = shlex.split(line)
        with pytest.raises(SystemExit):
            main([words[1], "--help-all" if words[1] == "train" else "--help"])
        explained = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in explained, f"{flag} in: {line}"


def test_recipes_are_readable():
    recipes = sorted((ROOT / "model_cards" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert read_recipe(recipe)["directions"]


def test_the_stranger_line_only_uses_transformers_and_pillow():
    line = next(line for line in README.splitlines() if line.startswith('python -c "'))
    code = shlex.split(line)[2]
    compile(code, "README", "exec")
    assert set(re.findall(r"from (\w+) import", code)) == {"transformers", "PIL"}

"""Recipes and flags: one dataclass, typed values, unknown keys named with their nearest neighbour."""

import pytest

from trainer.arguments import LARGE_DEFAULTS, parse_arguments


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe):
    path = recipe("learning_rate: 5e-4\nmax_steps: 7\nstores: {image: a, text: b}\n")
    arguments = parse_arguments([path, "--max_steps", "9"])
    assert (arguments.learning_rate, arguments.max_steps, arguments.num_experts) == (5e-4, 9, 12)
    assert arguments.stores == {"image": "a", "text": "b"}
    assert parse_arguments(["--max_steps", "9"], {"max_steps": 3, "alpha": 0.25}).alpha == 0.25


def test_dictionaries_come_as_json_on_the_command_line():
    assert parse_arguments(["--stores", '{"image": "x"}']).stores == {"image": "x"}
    with pytest.raises(ValueError, match="is not JSON"):
        parse_arguments(["--stores", "image=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ("shedule: joint", "Did you mean 'schedule'"),
        ("qqqqqq: 1", "See 'altmoe train --help'"),
        ("- a\n- b", "should hold 'key: value' lines"),
        ("a: [", "is not YAML"),
        ("schedule: roundrobin", "Did you mean 'round_robin'"),
        ("negatives: stores", "Did you mean 'store'"),
        ("test_fraction: 1.5", "expected a share"),
        ("learning_rate: fast", "learning_rate: expected a number, got 'fast'"),
    ],
)
def test_bad_recipes_are_refused(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([recipe(text)])


def test_unknown_flag_names_the_nearest():
    with pytest.raises(ValueError, match=r"'--num_expert'. Did you mean 'num_experts'"):
        parse_arguments(["--num_expert", "3"])


def test_missing_recipe_says_where_examples_are():
    with pytest.raises(FileNotFoundError, match="model_cards/recipes"):
        parse_arguments(["nowhere.yaml"])


def test_help_shows_our_fields(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert "--schedule" in shown and "--learning_rate" in shown and "--hub_private_repo" not in shown
    with pytest.raises(SystemExit):
        parse_arguments(["--help-all"])
    assert "--hub_private_repo" in capsys.readouterr().out


def test_defaults_follow_the_number_of_pairs(tmp_path, monkeypatch):
    class Store:
        rows = 6000

        def __len__(self):
            return self.rows

    monkeypatch.setattr("trainer.arguments.open_store", lambda path: Store())
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stores: {image: a, text: b}\nhidden_size: 256\n")
    large = parse_arguments([str(recipe)])
    assert (
        large.hidden_size == 256 and large.per_device_train_batch_size == LARGE_DEFAULTS["per_device_train_batch_size"]
    )
    assert parse_arguments([str(recipe), "--train_concepts", "500"]).per_device_train_batch_size == 128
    monkeypatch.setattr(Store, "rows", 5000)  # 3,500 remain for training
    assert parse_arguments([str(recipe)]).symmetric is False

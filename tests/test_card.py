"""The model card says what was measured, and strings from others' files stay strings."""

import pytest
import yaml
from conftest import small_config, tiny_bert
from huggingface_hub import ModelCard

from modeling_altmoe import AltMoEModel
from trainer.card import encoder_parts, front_matter, hub_names, write_card

NASTY = "x | y\n---\n# {{ 7 * 7 }} {% for a in () %} `code` <script>alert(1)</script> \\"


def model_of(**changes) -> AltMoEModel:
    entry = {"latent_size": 24, "name_or_path": NASTY, "revision": None, **changes}
    return AltMoEModel(small_config(encoders={"image": entry, "text": {"latent_size": 16}}))


def test_foreign_strings_stay_strings(tmp_path):
    """Names, licences and titles with templates, lines, cells and tags in them change nothing around them."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_text("---\n" + yaml.safe_dump({"license": NASTY}) + "---\n")
    out = tmp_path / "out"
    out.mkdir()
    write_card(out, model_of(), {"note": NASTY}, name=NASTY, license="mit", data=str(data))
    text = (out / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and set(card.data.to_dict()) <= {"library_name", "license", "pipeline_tag", "tags",
                                                                       "model_name"}  # fmt: skip
    plain = text.split("```yaml")[0]
    assert plain.count("{{ 7 * 7 }}") == 2 and "49" not in text  # title and encoder; no template is run
    assert "<script>" not in plain and "`code`" not in plain
    assert len([line for line in text.splitlines() if line.startswith("---")]) == 2
    (row,) = [line for line in text.splitlines() if line.startswith("| image |")]
    assert row.replace("\\|", "").count("|") == 4
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"note": NASTY}


def test_a_head_that_would_make_objects_is_refused(tmp_path):
    bomb = tmp_path / "ran"
    head = f'---\nlicense: !!python/object/apply:os.system ["touch {bomb}"]\n---\n'
    (tmp_path / "README.md").write_text(head)
    with pytest.raises(ValueError, match="is not plain YAML"):
        front_matter(tmp_path)
    assert not bomb.exists()
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    assert front_matter(tmp_path) == {} and front_matter(None) == {} and front_matter(tmp_path / "none") == {}


def test_pushing_a_card_that_would_make_objects_is_refused(tmp_path, capsys):
    from trainer.cli import main

    AltMoEModel(small_config()).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text('---\nlicense: !!python/object/apply:os.system ["true"]\n---\n')
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path), "me/model"])
    assert "metadata of" in capsys.readouterr().err


def test_base_models_are_names_on_the_hub(tmp_path):
    assert hub_names(["lab/vit", "lab/vit", "../up", None, 3, "a b"]) == ["lab/vit"]
    by_name = encoder_parts(model_of(name_or_path="lab/vit", revision="a" * 40))[0]
    assert by_name.base_model == ["lab/vit"] and by_name.source == f'"lab/vit", revision="{"a" * 40}"'
    tiny_bert().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: lab/words\n---\n")
    local = encoder_parts(model_of(name_or_path=str(tmp_path)))[0]
    assert (local.base_model, local.licence, local.name) == (["lab/words"], "mit", tmp_path.name)

"""The benchmarks' own arithmetic: what is merged, counted, compared and drawn."""

import json

import pytest
import torch
from conftest import paired_latents, small_model

from benchmarks import ablation, common, lora
from trainer.arguments import parse_arguments
from trainer.fitting import fit_frames
from trainer.pairs import LatentPairs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_results_are_merged_and_never_lost(tmp_path):
    path = tmp_path / "results" / "r.json"
    common.keep(path, {"data": "d"}, "parts", ["a", "0"], {"x": 1})
    common.keep(path, {"data": "d"}, "parts", ["a", "1"], {"x": 2})
    common.keep(path, {"data": "d"}, "parts", ["a", "0"], {"y": 3})
    assert common.read_results(path, "parts") == {"a": {"0": {"x": 1, "y": 3}, "1": {"x": 2}}}
    assert json.loads(path.read_text())["data"] == "d"
    assert common.read_results(tmp_path / "none.json", "parts") == {}


def test_standard_error():
    assert common.standard_error([1.0]) == 0 and common.standard_error([1.0, 3.0]) == pytest.approx(1.0)


def test_every_part_names_known_settings_and_an_earlier_reference():
    for name, (reference, _) in ablation.PARTS.items():
        assert reference is None or list(ablation.PARTS).index(reference) < list(ablation.PARTS).index(name)
        flat = [text for key, value in ablation.settings_of(name).items() for text in (f"--{key}", str(value))]
        parse_arguments(["--use_cpu", "true", *flat])


def test_joint_at_half_the_steps_makes_as_many_updates():
    steps = parse_arguments(["--use_cpu", "true"]).max_steps
    assert ablation.settings_of(ablation.CONNECTOR)["max_steps"] == steps
    assert 2 * ablation.settings_of("joint, equal updates (steps / T)")["max_steps"] == steps
    assert ablation.settings_of("joint, equal steps (T times the updates)")["max_steps"] == steps
    many = ablation.settings_of("narrow: joint, equal updates", directions=30, updates=40)
    assert many["max_steps"] == 40 and many["hidden_size"] == 16 and "equal" not in many


def test_updates_to_a_level():
    of = {"updates_a_step": 2, "validation": [[25, 0.1], [50, 0.3], [75, 0.2]]}
    assert ablation.updates_to(of, 0.25) == 100
    assert ablation.updates_to(of, 0.5) != ablation.updates_to(of, 0.5)  # NaN: never


def test_differences_are_paired_with_the_reference():
    run = {"seconds": 1.0, "updates_a_step": 1, "validation": [[25, 0.5]], "gradient_cosine": 0.0}
    results = {
        ablation.DEFAULT: {"0": {**run, "mean_recall": 0.5}, "1": {**run, "mean_recall": 0.3}},
        "no target metric": {"0": {**run, "mean_recall": 0.4}, "1": {**run, "mean_recall": 0.2}},
    }
    rows = ablation.summarise(results, list(results), [0, 1])
    assert rows[1]["difference"] == pytest.approx([-10.0, -10.0])
    assert "-10.0 ± 0.0" in ablation.table(rows)


def test_gradients_of_one_and_the_same_direction_agree():
    model, latents = small_model(), paired_latents(12)
    keys = [f"k{i}" for i in range(12)]
    pairs = LatentPairs(latents, {m: keys for m in latents}, model.directions)
    fit_frames(model, pairs)
    model.eval()
    assert -1 <= ablation.gradient_conflict(model, pairs) < 0.999
    model.config.directions = [model.directions[0]] * 2
    torch.testing.assert_close(torch.tensor(ablation.gradient_conflict(model, pairs)), torch.tensor(1.0))


def test_an_adapted_caption_asks_and_the_base_latent_is_found():
    model, latents = small_model(), paired_latents(8)
    adapted = latents["text"].flip(0)
    both = torch.cat([adapted, latents["text"]], dim=1)
    retriever = lora.AdaptedRetriever(model)
    asked = retriever.queries("text->image", {"text": both})
    torch.testing.assert_close(asked, model.queries("text->image", {"text": adapted}))
    found = retriever.gallery("image->text", both)
    torch.testing.assert_close(found, model.gallery("image->text", latents["text"]))
    torch.testing.assert_close(
        retriever.gallery("text->image", latents["image"]), model.gallery("text->image", latents["image"])
    )

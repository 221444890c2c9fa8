"""The quality benchmark on small stores: what it plans, keeps, compares and prints; and where its stores come from."""

import json

import numpy as np
import pytest
import torch
from conftest import paired_latents
from datasets import Dataset

from benchmarks import data_sets, quality, report
from modeling_altmoe import LatentStore
from trainer.encode import note_skipped
from trainer.evaluation import VARIANTS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stores(tmp_path):
    """Three modalities of 90 items: image and text of one factor, sound a copy of the text with noise."""
    latents = paired_latents(90)
    latents["sound"] = latents["text"] + 0.05 * torch.randn(90, 16, generator=torch.Generator().manual_seed(1))
    for modality, rows in latents.items():
        with LatentStore.create(tmp_path / modality, modality, {"latent_size": rows.shape[1]}) as store:
            store.append([f"i{n}" for n in range(90)], rows)
    return {modality: str(tmp_path / modality) for modality in sorted(latents)}


def named(stores: dict) -> list[str]:
    return [f"{modality}={folder}" for modality, folder in stores.items()]


def test_any_stores_are_measured_in_all_directions_and_nothing_twice(stores, monkeypatch, capsys):
    steps = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--use_cpu", "true"]
    monkeypatch.setattr(quality, "FLAGS", steps)
    words = ["--stores", *named(stores), "--name", "three", "--methods", "altmoe", "chance", "ridge", "--jobs", "1"]
    quality.main([*words, "--seeds", "0", "--concepts", "20", "0"])
    printed = capsys.readouterr().out
    kept = json.loads((quality.RESULTS / "quality-three.json").read_text())
    assert set(kept["sizes"]) == {"20", "all"} and "24" in kept["search"]["others"]
    split = kept["sizes"]["all"]["0"]
    assert set(split) == {"image<->sound", "image<->text", "sound<->text"}
    for methods in split.values():
        assert set(methods) == {"altmoe", "chance", "ridge"}
        assert methods["ridge"]["trials"] == 24 and methods["chance"]["trials"] == 1
        assert all(m["cpu_seconds"] > 0 and m["date"] and m["training_rows"] == 63 for m in methods.values())
    assert set(split["sound<->text"]["altmoe"]["confidence"]) == {"sound->text", "text->sound"}
    assert (
        split["sound<->text"]["ridge"][report.BEST]["mean_recall"]
        > split["sound<->text"]["chance"][report.BEST]["mean_recall"]
    )
    assert "three sound<->text | against altmoe" in printed and "20 pairs | 63 pairs" in printed
    assert (quality.RESULTS / "seconds-three-sound-text.png").is_file()
    assert (quality.RESULTS / "curve-three-image-text.png").is_file()

    def refuse(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(quality, "run_job", refuse)
    monkeypatch.setattr(report, "show", lambda *_: None)
    quality.main([*words, "--seeds", "0"])
    with pytest.raises(RuntimeError, match="1 of 1 measurements failed"):
        quality.main([*words, "--seeds", "0", "--again", "ridge"])


def test_baselines_and_altmoe_get_the_same_items(stores):
    parts = quality.open_split(stores, seed=3, concepts=0)
    smaller = quality.open_split(stores, seed=3, concepts=20)
    assert len(set(smaller["train"].keys["text"])) == 20
    assert smaller["test"].keys == parts["test"].keys
    assert set(smaller["train"].keys["text"]) < set(parts["train"].keys["text"])


def test_a_failure_is_named_after_the_others_are_measured(stores):
    jobs = [(quality.Job("p", method, 0, 0), stores) for method in ("nonsense", "ridge")]
    with pytest.raises(RuntimeError, match="1 of 2 measurements failed: p, split 0, all concepts, nonsense"):
        quality.run_all(jobs, 1)
    kept = json.loads((quality.RESULTS / "quality-p.json").read_text())["sizes"]["all"]["0"]
    assert all(set(methods) == {"ridge"} for methods in kept.values())


def test_slow_methods_get_fewer_splits_and_no_curve(stores):
    given = quality.parser().parse_args(["--concepts", "10", "0", "--methods", "ridge", "sail", "altmoe"])
    jobs = quality.plan("d", stores, given)
    count = {(job.method, job.concepts): 0 for job in jobs}
    for job in jobs:
        count[job.method, job.concepts] += 1
    assert count == {("ridge", 0): 5, ("ridge", 10): 3, ("altmoe", 0): 5, ("altmoe", 10): 3, ("sail", 0): 3}
    assert [job.method for job in jobs][-1] == "sail"  # what searches longest comes last
    whole = quality.parser().parse_args(["--concepts", "10", "5000", "--methods", "sail", "--full_curve"])
    assert len(quality.plan("d", stores, whole)) == 3  # 5000 concepts are not there


def test_a_large_set_gets_what_is_quick_unless_more_is_named(stores, monkeypatch):
    monkeypatch.setattr(quality, "LARGE", 50)
    jobs = quality.plan("d", stores, quality.parser().parse_args([]))
    assert {job.seed for job in jobs} == {0, 1, 2} and not {job.method for job in jobs} & set(quality.SLOW)
    named = quality.plan("d", stores, quality.parser().parse_args(["--methods", "sail", "--slow_seeds", "1"]))
    assert [(job.method, job.seed) for job in named] == [("sail", 0)]


def test_leads_are_paired_by_split():
    def figures(value):
        return {name: {"mean_recall": value} for name in VARIANTS}

    results = {
        "all": {
            "0": {"a<->b": {"altmoe": figures(0.5), "ridge": figures(0.4)}},
            "1": {"a<->b": {"altmoe": figures(0.7), "ridge": figures(0.6)}},
            "2": {"a<->b": {"altmoe": figures(0.1)}},
        }
    }
    assert report.lead(results, "all", "a<->b", "ridge") == pytest.approx([-10, -10])
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    outputs = {"0": {"a<->b": {"ridge": figures(0.4)}}, "1": {"a<->b": {"ridge": figures(0.5), "sail": figures(0.2)}}}
    (report.RESULTS / "quality-d.json").write_text(json.dumps({"sizes": {"all": outputs}}))
    for split in results["all"].values():
        for of in split["a<->b"].values():
            of["training_rows"] = 64
    wider = report.layers_table({"d-layers": results}).splitlines()[-1]
    assert wider.startswith("| d-layers, 64 pairs | - | - | - | 43.3 ")
    assert wider.endswith("| +15.0 ± 5.0 (ridge) | +10.0 ± 0.0 (ridge) |")
    assert not report.layers_table({"d": results})
    table = report.main_table({"d": results}, ["ridge", "altmoe", "sail"])
    assert table.splitlines()[2].startswith("| altmoe") and "sail" not in table
    assert "50.0 ± 10.0 (2 splits) | -10.0 ± 0.0" in table


def test_stores_are_named_clearly(stores, capsys):
    assert data_sets.given_stores(named(stores)) == stores
    for wrong in (["image"], ["image=a", "image=b"]):
        with pytest.raises(ValueError, match="each modality once"):
            data_sets.given_stores([*named({"image": stores["image"]}), *wrong])
    with pytest.raises(ValueError, match="at least two"):
        data_sets.given_stores(named({"image": stores["image"]}))
    with pytest.raises(ValueError, match="known are stamps"):
        data_sets.store_folders("nothing")
    with pytest.raises(SystemExit):
        quality.main(["--data", "nothing"])
    assert "known are stamps" in capsys.readouterr().err


def test_what_is_missing_is_made_with_commands_that_are_shown(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(data_sets.subprocess, "run", lambda words, check: called.append(words[1:]))
    assert set(data_sets.prepare("stamps-speech")) == {"image", "speech", "text"}
    encoded = [words for words in called if "encode" in words]
    assert [words[words.index("--column") + 1] for words in encoded] == ["image", "speech", "caption"]
    assert ["-m", "demo.encoders", "audio"] in called and ["-m", "demo.data", "stamps-speech"] in called
    assert "$ python -m trainer.cli encode --data build/data/stamps-speech" in capsys.readouterr().out
    languages = data_sets.store_folders("stamps-languages")
    assert len(quality.directions_of(languages)) == 30
    assert languages["text_fr"] == "build/stores/stamps-speech/text_fr"
    assert np.isclose(quality.TEST + quality.VALIDATION, 0.3)


def test_pictures_by_several_blocks_are_a_data_set_of_their_own(tmp_path, monkeypatch):
    """Only the pictures are encoded anew; captions are those of the plain data set."""
    monkeypatch.chdir(tmp_path)
    called = []
    monkeypatch.setattr(data_sets.subprocess, "run", lambda words, check: called.append(words[1:]))
    folders = data_sets.prepare("stamps-blocks")
    assert folders == {"image": "build/stores/stamps-blocks/image", "text": "build/stores/stamps/text"}
    pictures, captions = [words for words in called if "encode" in words]
    assert pictures[-4:] == ["--combine", "concat", "--pooling", "mean+std"] and "build/data/stamps" in pictures
    assert "--combine" not in captions and captions[captions.index("--out") + 1] == folders["text"]
    called.clear()
    folders = data_sets.prepare("stamps-layers")
    assert folders == {"image": "build/stores/stamps-blocks/image", "text": "build/stores/stamps-layers/text"}
    assert all("--combine" in words for words in called if "encode" in words)


def test_a_store_that_is_not_finished_is_gone_on_with(monkeypatch):
    for modality in ("image", "text"):
        with LatentStore.create(f"build/stores/stamps/{modality}", modality, {"latent_size": 4}) as store:
            store.append(["a", "b"], torch.randn(2, 4))
    called = []
    monkeypatch.setattr(data_sets, "_run", lambda *words: called.append(words[-1]) if "encode" in words else None)
    data_sets.prepare("stamps")  # no data to compare with: brought here as it is
    Dataset.from_dict({"id": ["a", "b", "c"]}).save_to_disk("build/data/stamps")
    note_skipped(LatentStore.open("build/stores/stamps/text"), {"c": "empty"})
    data_sets.prepare("stamps")
    assert called == ["build/stores/stamps/image"]

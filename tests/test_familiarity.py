"""Items the connector was trained on beside new ones: the correction, how it is chosen, kept, searched and measured."""

import dataclasses
import json

import pytest
import torch
from conftest import paired_latents, small_model

from benchmarks import mixed, quality
from modeling_altmoe import AltMoEModel, LatentStore
from modeling_altmoe.index_files_altmoe import model_fingerprint
from modeling_altmoe.scoring_altmoe import Postprocessing, is_known, item_vectors, prints, score_matrix
from modeling_altmoe.search_altmoe import LatentIndex
from trainer.evaluation import evaluate_retrieval
from trainer.fitting import fit_bases, fit_frames
from trainer.measuring import fit_scoring, retrieval_data
from trainer.pairs import LatentPairs

DIRECTION = "text->image"


@pytest.fixture(scope="module")
def trained():
    """A closed form that knows its training items by heart, with all that is fitted afterwards; and its pairs."""
    model = small_model(base="kernel")
    keys = [f"k{i}" for i in range(240)]
    pairs = LatentPairs(paired_latents(240, noise=0.2), {m: keys for m in ("image", "text")}, model.directions)
    parts = pairs.split(0, 0.2, 0.2)
    fit_frames(model, parts["train"])
    held_out, by_heart = {}, {direction: {"gamma": 8.0, "lam": 1e-3} for direction in model.directions}
    fit_bases(model, parts["train"], progress=False, held_out=held_out, chosen=by_heart)
    model.eval().connector.trust.zero_()
    fit_scoring(model, parts["train"], parts["validation"], held_out=held_out)
    return model, parts, held_out


def without(model, direction: str = DIRECTION) -> Postprocessing:
    return dataclasses.replace(model.postprocessing(direction), familiarity=0.0)


def test_training_items_are_recognised_rounded_or_not_and_no_others(trained):
    model, parts, _ = trained
    known = model.postprocessing(DIRECTION).known[DIRECTION]
    for part, expected in (("train", 1.0), ("validation", 0.0), ("test", 0.0)):
        latents = parts[part].latents["image"]
        for rows in (latents, latents.half(), latents.bfloat16()):
            assert is_known(model.gallery(DIRECTION, rows.float()), known).float().mean() == expected
    assert not is_known(torch.eye(3), torch.zeros(0, 32)).any()
    torch.testing.assert_close(prints(torch.eye(5)).norm(dim=1), torch.ones(5))


def test_only_known_items_score_less_and_by_the_same_for_every_query(trained):
    model, parts, _ = trained
    post, old, new = model.postprocessing(DIRECTION), parts["train"].latents, parts["test"].latents
    assert post.familiarity > 0
    for items, change in ((old["image"], -post.familiarity), (new["image"], 0.0)):
        before = score_matrix(model, without(model), DIRECTION, {"text": new["text"]}, items)
        after = model.score(DIRECTION, new["text"], items)
        torch.testing.assert_close(after - before, torch.full_like(before, change), rtol=0, atol=1e-5)


def test_new_items_are_found_among_trained_ones(trained):
    model, parts, _ = trained
    new, old = retrieval_data(parts["test"], ("image", "text")), parts["train"].latents
    for direction in model.directions:
        source, _, target = direction.partition("->")
        latents = torch.cat([new.latents[target], old[target]])
        first = {}
        for name, post in (("without", without(model, direction)), ("with", model.postprocessing(direction))):
            found = score_matrix(model, post, direction, {source: new.latents[source]}, latents).argmax(1)
            first[name] = int((found == torch.arange(len(found))).sum())
        assert first["with"] > first["without"]
        # what is asked for in the very words of the training is still found
        own = model.score(direction, old[source], latents).argmax(1) - len(new.latents[target])
        assert (own == torch.arange(len(own))).float().mean() > 0.9
    plain = evaluate_retrieval(model, new, without(model))
    assert evaluate_retrieval(model, new, model.postprocessing(DIRECTION)) == plain


def test_it_is_saved_with_the_model_and_search_indexes_and_scores_agree(trained, tmp_path):
    model, parts, _ = trained
    model.save_pretrained(tmp_path / "model")
    loaded = AltMoEModel.from_pretrained(tmp_path / "model")
    items = torch.cat([parts[part].latents["image"] for part in ("test", "train")])
    queries = parts["test"].latents["text"][:6]
    scores = model.score(DIRECTION, queries, items)
    torch.testing.assert_close(loaded.score(DIRECTION, queries, items), scores)
    kept = item_vectors(model, model.postprocessing(DIRECTION), DIRECTION, items)
    again = item_vectors(model, model.postprocessing(DIRECTION), DIRECTION, items, correction=kept[:, -1])
    torch.testing.assert_close(again, kept)
    with LatentStore.create(tmp_path / "store", "image", model.config.encoders["image"]) as store:
        store.append([f"i{row}" for row in range(len(items))], items)
    for index in ("exact", "HNSW16"):
        for row, hits in zip(scores, LatentIndex(loaded, store, DIRECTION, index).search(queries, 10), strict=True):
            found = torch.tensor([hit.score for hit in hits])
            torch.testing.assert_close(found, row[[hit.row for hit in hits]], rtol=0, atol=2e-2)
    before = model_fingerprint(loaded, DIRECTION)
    loaded.config.scoring[DIRECTION]["familiarity"] = 0.0
    assert model_fingerprint(loaded, DIRECTION)["scoring"] != before["scoring"]  # what was kept is not used


def test_a_checkpoint_of_an_earlier_version_scores_as_before(trained, tmp_path):
    model, parts, _ = trained
    earlier = small_model(base="kernel")
    earlier.config.base_features = dict(model.config.base_features)
    earlier.config.base_recalls = list(model.config.base_recalls)
    earlier = AltMoEModel(earlier.config).eval()
    for direction in model.directions:
        earlier.set_scoring(direction, dataclasses.replace(without(model, direction), known={}))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".known")}
    assert not [name for name in earlier.state_dict() if name.endswith(".known")]
    earlier.load_state_dict(state)
    earlier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings in config["scoring"].values():
        del settings["familiarity"], settings["known"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AltMoEModel.from_pretrained(tmp_path)
    queries, items = parts["test"].latents["text"], parts["train"].latents["image"]
    expected = score_matrix(model, without(model), DIRECTION, {"text": queries}, items)
    torch.testing.assert_close(loaded.score(DIRECTION, queries, items), expected)


def test_without_held_out_predictions_nothing_is_lowered(trained):
    _, parts, _ = trained
    plain = small_model()
    fit_frames(plain, parts["train"])
    fit_scoring(plain, parts["train"], parts["validation"])
    assert plain.postprocessing(DIRECTION).familiarity == 0


def test_the_benchmark_measures_new_and_trained_items_and_prints_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        quality, "FLAGS", ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--use_cpu", "true"]
    )
    rows = paired_latents(90)
    for modality, latents in rows.items():
        place = tmp_path / "build" / "stores" / "own" / modality
        with LatentStore.create(place, modality, {"latent_size": latents.shape[1]}) as store:
            store.append([f"i{n}" for n in range(90)], latents)
    mixed.main(["--data", "own", "--seeds", "0"])
    assert f"{mixed.NEW}, {mixed.AFTER}" in capsys.readouterr().out
    found = json.loads(mixed.PATH.read_text())["splits"]["own"]["0"]
    assert set(found) == {"image->text", DIRECTION}
    for figures in found.values():
        assert figures[mixed.ALONE][mixed.BEFORE] == figures[mixed.ALONE][mixed.AFTER]
        assert figures[mixed.NEW][mixed.BEFORE]["n_gallery"] == 81
    monkeypatch.setattr(mixed, "run", None)  # nothing is measured twice
    mixed.main(["--data", "own", "--seeds", "0"])
    model, parts = small_model(), {}
    keys = [f"k{n}" for n in range(90)]
    parts = LatentPairs(rows, {m: keys for m in rows}, model.directions).split(0, 0.2, 0.1)
    fit_frames(model, parts["train"])
    captions = parts["train"].latents["text"][:7], torch.arange(7).numpy()
    figures = mixed.measure(model, parts, captions)
    assert figures[DIRECTION][mixed.TRAINED][mixed.AFTER]["n_queries"] == 7
    assert mixed.TRAINED not in figures["image->text"]

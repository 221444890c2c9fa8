"""Confidence: calibrated where the truth is known, and a property of one query alone."""

import numpy as np
import pytest
import torch
from conftest import small_model

from modeling_altmoe.confidence_altmoe import SHORT_LIST, Calibration, score_features
from trainer import confidence
from trainer.confidence import answers, answers_of_few, fit_calibration, measure_confidence
from trainer.fitting import fit_bases, fit_frames
from trainer.measuring import fit_scoring, held_out_scores
from trainer.pairs import LatentPairs


def world(queries=400, items=300, signal=2.5, seed=0):
    """Normal scores; each query's match (item number = query modulo items) is higher by `signal` on average."""
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.zeros(queries, items, dtype=torch.bool)
    relevant[torch.arange(queries), torch.arange(queries) % items] = True
    noise = torch.randn(queries, items, generator=generator)
    strength = signal * 2 * torch.rand(queries, 1, generator=generator)  # some queries are easy, some are hopeless
    return noise + relevant * strength, relevant


def test_confidence_is_calibrated_and_sees_absence_on_fresh_data():
    calibration = fit_calibration([world(seed=0)])
    figures = measure_confidence(calibration, *world(seed=1))
    assert figures["calibration_error"] < 0.05
    assert figures["auroc"] > 0.6
    assert figures["false_alarms"] < figures["coverage"]
    assert figures["precision"] == pytest.approx(0.5, abs=0.1)  # what the threshold was chosen for
    coverage = [point["coverage"] for point in figures["curve"]]
    assert coverage == sorted(coverage) and coverage[-1] == 1


def test_calibration_holds_in_a_larger_collection():
    calibration = fit_calibration([world(queries=300, items=150)])
    figures = measure_confidence(calibration, *world(queries=400, items=1200, seed=3))
    assert figures["calibration_error"] < 0.08


def test_a_handful_of_items_is_asked_with_one_match_and_without():
    scores, relevant = world(queries=50, items=60)
    relevant[:, 0] = True  # some have two matches: one is shown
    asked = answers_of_few(scores, relevant, sizes=(1, 3, 12, 60))
    assert asked.sizes.unique().tolist() == [1, 3, 12]  # sixty that do not match are not there
    assert asked.present.float().mean() == 0.5 and not asked.right[~asked.present].any()
    for size, rows, lists in asked.by_size():
        assert lists.shape == (100, min(size, SHORT_LIST)) and (lists.diff(dim=1) <= 0).all()
        assert size > 1 or torch.equal(asked.right[rows], asked.present[rows])
    shares = [asked.right[asked.present & (asked.sizes == size)].float().mean() for size in (3, 12)]
    assert shares[0] > shares[1]  # more rivals
    assert not len(answers_of_few(scores, torch.ones_like(relevant)).sizes)


def test_confidence_holds_in_a_handful_of_items(monkeypatch):
    asked = answers_of_few(*world(queries=1500, items=150, seed=3), sizes=(2, 3, 5, 7))
    errors = {}
    for name, sizes in (("with", confidence.FEW), ("without", ())):
        monkeypatch.setattr(confidence, "FEW", sizes)
        calibration = fit_calibration([world(queries=1500, items=150, signal=2.5)])
        found = {size: calibration.confidence(lists, size) for size, _, lists in asked.by_size()}
        errors[name] = [
            torch.nn.functional.binary_cross_entropy(found[size], asked.right[rows].double()).item()
            for size, rows, _ in asked.by_size()
        ]
    assert all(few < many for few, many in zip(errors["with"], errors["without"], strict=True)), errors


def test_a_higher_precision_asks_for_more_confidence():
    thresholds = [fit_calibration([world()], target_precision=target).threshold for target in (0.3, 0.5, 0.8)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[2]


def test_one_query_knows_nothing_of_others_and_order_of_items_does_not_matter():
    scores, relevant = world(queries=20)
    calibration = fit_calibration([(scores, relevant)])
    top = scores.topk(SHORT_LIST, dim=1).values
    together = calibration.confidence(top, 300)
    alone = torch.cat([calibration.confidence(row[None], 300) for row in top])
    torch.testing.assert_close(together, alone)
    shuffled = scores[:, torch.randperm(300, generator=torch.Generator().manual_seed(0))].topk(SHORT_LIST, dim=1).values
    torch.testing.assert_close(together, calibration.confidence(shuffled, 300))
    logits = (
        score_features(top.double(), 300) @ torch.tensor(calibration.weight, dtype=torch.float64) + calibration.bias
    )
    torch.testing.assert_close(together, torch.sigmoid(logits))  # it is the logistic model of its features


def test_features_of_short_lists_are_finite():
    one, two = score_features(torch.tensor([[3.0]]), 1), score_features(torch.tensor([[3.0, 1.0]]), 2)
    assert one.tolist() == [[3.0, 0.0, 0.0, 0.0]]
    assert two[0, :3].tolist() == [3.0, 2.0, 2.0]
    copies = score_features(torch.tensor([[3.0, 3.0, 1.0]]), 3)
    assert copies[0, 1] == 2.0  # a copy of the best item is no rival
    with pytest.raises(ValueError, match="top_scores"):
        score_features(torch.zeros(2, 0), 5)
    with pytest.raises(ValueError, match="top_scores"):
        Calibration([1.0] * 4, 0.0).confidence(torch.zeros(2, 0), 5)


def test_every_query_is_asked_with_and_without_its_match():
    scores, relevant = world(queries=50, items=60)
    asked = answers(scores, relevant, shares=(1.0, 0.5))
    assert asked.present.float().mean() == 0.5 and not asked.right[~asked.present].any()
    assert sorted(asked.sizes.unique().tolist()) == [30, 60]
    present = asked.present & (asked.sizes == 60)
    best = scores.argmax(1)
    assert torch.equal(asked.right[present], relevant.gather(1, best[:, None])[:, 0])


def test_all_matches_of_a_query_are_removed():
    scores, relevant = torch.tensor([[9.0, 8.0, 1.0, 0.5, 0.0]] * 4), torch.zeros(4, 5, dtype=torch.bool)
    relevant[:, :2] = True
    asked = answers(scores, relevant)
    assert asked.top_scores[~asked.present][:, 0].tolist() == [1.0] * 4
    assert all(np.isfinite(lists.numpy()).all() and lists.shape[1] == 5 for _, _, lists in asked.by_size())


def test_settings_survive_json_and_bad_ones_are_named():
    calibration = fit_calibration([world()])
    assert Calibration(**calibration.as_dict()) == calibration
    with pytest.raises(ValueError, match="target_precision"):
        fit_calibration([world()], target_precision=1.0)
    with pytest.raises(ValueError, match="at least 4 items"):
        answers(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_caution_asks_for_more_confidence_and_less_the_more_queries_there_are():
    few, many = world(queries=60, items=60), world(queries=3000, items=60)
    gaps = []
    for table in (few, many):
        plain, careful = (fit_calibration([table], 0.5, caution=caution).threshold for caution in (0.0, 1.0))
        assert careful >= plain
        gaps.append(careful - plain)
    assert gaps[1] < gaps[0]
    with pytest.raises(ValueError, match="caution"):
        fit_calibration([few], caution=-1.0)


def test_several_collections_count_together_and_the_ceiling_of_auroc_is_said():
    calibration = fit_calibration(world(queries=100, items=100, seed=seed) for seed in range(4))
    figures = measure_confidence(calibration, *world(seed=9))
    assert figures["calibration_error"] < 0.06
    assert figures["auroc"] < figures["auroc_ceiling"] < 1 and figures["auroc_right"] > 0.8
    with pytest.raises(ValueError, match="at least one table"):
        fit_calibration([])


def test_held_out_scores_are_not_fooled_by_what_the_closed_form_has_learnt_by_heart():
    rows = 60
    generator = torch.Generator().manual_seed(0)
    latents = {m: torch.randn(rows, size, generator=generator) for m, size in (("image", 24), ("text", 16))}
    keys = [f"k{i}" for i in range(rows)]
    model = small_model(base="kernel")
    pairs = LatentPairs(latents, {m: keys for m in latents}, model.directions)
    fit_frames(model, pairs)
    held_out = {}
    fit_bases(model, pairs, progress=False, held_out=held_out)
    model.eval()
    model.connector.trust.zero_()
    fit_scoring(model, pairs, pairs, held_out=held_out)
    for direction in model.directions:
        seen = 0
        for scores, matches in held_out_scores(model, pairs, direction, held_out):
            assert matches.sum() == len(matches) == rows / 5  # whole folds, each row with its one match
            seen += float(matches.gather(1, scores.argmax(1, keepdim=True)).float().sum())
        assert seen / rows < 0.3  # there is nothing to find: chance is 0.08
        assert model.calibration(direction).confidence(torch.tensor([[5.0, 1.0, 1.0]]), 12) < 1

"""Metrics against a naive loop, the shared scoring rule, and that nothing leaks between queries or splits."""

import doctest
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modeling_altmoe.scoring_altmoe import Postprocessing, hubness, score_matrix
from trainer.evaluation import (
    BETAS,
    RetrievalData,
    evaluate_retrieval,
    evaluate_variants,
    fit_postprocessing,
    format_table,
    split_groups,
)
from trainer.metrics.cross_modal_retrieval import cross_modal_retrieval as module

METRIC = Path(module.__file__).parent


class Linear:
    """A retriever with a fixed random map in each direction."""

    directions = ("image->text", "text->image")

    def __init__(self, d_image=6, d_text=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.maps = {
            "image->text": torch.randn(d_image, d_text, generator=generator),
            "text->image": torch.randn(d_text, d_image, generator=generator),
        }

    def queries(self, direction, latents):
        return F.normalize(latents[direction.split("->")[0]] @ self.maps[direction], dim=-1)

    def gallery(self, direction, latents):
        return F.normalize(latents, dim=-1)


class OneWay(Linear):
    directions = ("image->text",)


def latents(n, seed, n_text=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(n, 6, generator=generator),
        "text": torch.randn(n if n_text is None else n_text, 5, generator=generator),
    }


def data(n, seed, n_groups=None):
    return RetrievalData.from_groups(latents(n, seed), torch.arange(n) % (n_groups or n))


# --- the metric ---------------------------------------------------------------------------------------------------

scored = st.integers(1, 6).flatmap(
    lambda n: st.integers(1, 8).flatmap(
        lambda m: st.tuples(
            hnp.arrays(np.float64, (n, m), elements=st.integers(-2, 2).map(float)),  # few values: many ties
            hnp.arrays(np.bool_, (n, m)).map(lambda r: r | (np.arange(r.shape[1]) == 0)),
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_ranks_equal_a_naive_loop(case):
    scores, relevant = case
    for rank, row, positive in zip(module.ranks(scores, relevant), scores, relevant, strict=True):
        best = max(s for s, p in zip(row, positive, strict=True) if p)
        assert rank == 1 + sum(s >= best for s, p in zip(row, positive, strict=True) if not p)


@settings(max_examples=40, deadline=None)
@given(scored, st.randoms(use_true_random=False))
def test_permuting_gallery_or_queries_changes_no_metric(case, random):
    scores, relevant = case
    columns, rows = list(range(scores.shape[1])), list(range(scores.shape[0]))
    random.shuffle(columns)
    random.shuffle(rows)
    before = module.retrieval_metrics(scores, relevant)
    assert module.retrieval_metrics(scores[:, columns], relevant[:, columns]) == before
    assert module.retrieval_metrics(scores[rows], relevant[rows]) == pytest.approx(before)


def test_constant_scores_are_worst_not_best():
    result = module.retrieval_metrics(np.zeros((20, 20)), np.eye(20, dtype=bool))
    assert result["recall@10"] == 0.0 and result["median_rank"] == 20
    infinite = module.retrieval_metrics(np.full((20, 20), -np.inf), np.eye(20, dtype=bool))
    assert infinite["median_rank"] == 20


def test_several_relevant_items_do_not_push_each_other_down():
    scores = np.array([[3.0, 2.0, 1.0, 0.0]])
    assert module.ranks(scores, np.array([[True, True, True, False]]))[0] == 1
    assert module.ranks(scores, np.array([[False, True, True, False]]))[0] == 2


def test_metric_loads_by_folder_and_equals_the_function(tmp_path):
    metric = evaluate.load(str(METRIC), cache_dir=str(tmp_path))
    generator = np.random.default_rng(0)
    scores, relevant = generator.normal(size=(7, 12)), generator.random((7, 12)) < 0.2
    relevant[:, 3] = True
    references = [np.flatnonzero(row).tolist() for row in relevant]
    got = metric.compute(predictions=scores.tolist(), references=references, ks=(1, 3))
    assert got == module.retrieval_metrics(scores, relevant, (1, 3))
    for text in (metric.description, metric.citation, metric.inputs_description):
        assert len(text) > 100
    example = doctest.DocTestParser().get_doctest(
        module._KWARGS_DESCRIPTION, {"evaluate": _Loader(metric)}, "example", None, 0
    )
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


class _Loader:
    """Stands for `evaluate` in the docstring's example, which runs from the repository root."""

    def __init__(self, metric):
        self.metric = metric

    def load(self, path):
        assert path == "trainer/metrics/cross_modal_retrieval"
        return self.metric


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[float("nan"), 1.0]], [[0]], "NaN"),
        ([[0.0, 1.0]], [[]], "no relevant"),
        ([[0.0, 1.0]], [[2]], "0..1"),
        ([[0.0, 1.0]], [[-1]], "0..1"),
        ([[0.0, 1.0], [0.0]], [[0], [0]], "whole gallery"),
        ([], [], "no queries"),
        ([[]], [[]], "gallery is empty"),
    ],
)
def test_metric_names_what_is_wrong(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        module.CrossModalRetrieval()._compute(predictions, references)


@pytest.mark.parametrize("ks", [(), (0,), (1.5,)])
def test_bad_ks_are_refused(ks):
    with pytest.raises(ValueError, match="ks"):
        module.retrieval_metrics(np.eye(3), np.eye(3, dtype=bool), ks)


# --- scoring and post-processing ----------------------------------------------------------------------------------


def test_score_follows_the_formula():
    retriever, train, test = Linear(), latents(40, 1), latents(9, 2)
    post = fit_postprocessing(retriever, train, data(30, 3), betas=(0.5,), reverse_weights=(0.7,), top_k=4)
    images, texts = test["image"], test["text"][:6]
    expected = torch.empty(9, 6)
    for i in range(9):
        for j in range(6):
            value = 0.0
            forward = F.normalize(images[i] @ retriever.maps["image->text"], dim=0)
            backward = F.normalize(texts[j] @ retriever.maps["text->image"], dim=0)
            bank = F.normalize(train["image"] @ retriever.maps["image->text"], dim=1)
            for weight, score, similar, scale in (
                (1.0, forward @ F.normalize(texts[j], dim=0), bank @ F.normalize(texts[j], dim=0), "image->text"),
                (
                    0.7,
                    backward @ F.normalize(images[i], dim=0),
                    F.normalize(train["image"], dim=1) @ backward,
                    "text->image",
                ),
            ):
                hub = similar.sort(descending=True).values[:4].mean()
                value += weight * (score - 0.5 * hub) / post.scales[scale]
            expected[i, j] = value
    torch.testing.assert_close(score_matrix(retriever, post, "image->text", {"image": images}, texts), expected)


def test_scales_are_those_of_non_matching_validation_scores():
    retriever, validation = Linear(), data(30, 3, n_groups=10)
    post = fit_postprocessing(retriever, latents(40, 1), validation)
    for direction in retriever.directions:
        source, target = direction.split("->")
        plain = score_matrix(
            retriever, None, direction, {source: validation.latents[source]}, validation.latents[target]
        )
        different = (torch.arange(30)[:, None] - torch.arange(30)[None, :]) % 10 != 0
        assert post.scales[direction] == pytest.approx(float(plain[different].std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("direction", Linear.directions)
def test_no_query_changes_the_scores_of_another(direction):
    retriever = Linear()
    post = fit_postprocessing(retriever, latents(40, 1), data(30, 3), betas=(0.5,))
    source, target = direction.split("->")
    test = latents(25, 4)
    changed = test[source].clone()
    changed[7] = -100 * changed[7] + 3
    before, after = (
        score_matrix(retriever, post, direction, {source: x}, test[target]) for x in (test[source], changed)
    )
    others = torch.arange(25) != 7
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[7], after[7])


def test_permuting_the_test_gallery_changes_no_metric():
    retriever, test = Linear(), latents(25, 4)
    post = fit_postprocessing(retriever, latents(40, 1), data(30, 3), betas=(0.5,))
    order = torch.randperm(25, generator=torch.Generator().manual_seed(6))
    shuffled = {"image": test["image"], "text": test["text"][order]}
    before = evaluate_retrieval(retriever, RetrievalData(test, torch.eye(25).bool()), post)
    after = evaluate_retrieval(retriever, RetrievalData(shuffled, torch.eye(25).bool()[:, order]), post)
    assert before.pop("mean_recall") == pytest.approx(after.pop("mean_recall"))
    for direction, metrics in before.items():
        assert after[direction] == pytest.approx(metrics)


def test_hubness_is_the_mean_of_the_highest_similarities_and_lowers_hubs():
    items, bank = torch.eye(3), torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.1, 0.2, 0.0]])
    torch.testing.assert_close(hubness(items, bank, 2), torch.tensor([0.85, 0.4, 0.0]))
    torch.testing.assert_close(hubness(items, bank, 10), bank.mean(0))
    retriever, test = OneWay(), latents(12, 4)
    queries = retriever.queries("image->text", latents(40, 1))
    post = Postprocessing(beta=1.0, query_bank={"image->text": queries})
    change = score_matrix(retriever, post, "image->text", {"image": test["image"]}, test["text"]) - score_matrix(
        retriever, None, "image->text", {"image": test["image"]}, test["text"]
    )
    hub = hubness(retriever.gallery("image->text", test["text"]), queries)
    torch.testing.assert_close(change, -hub.expand(12, -1))


def test_chosen_settings_are_the_best_on_validation():
    retriever, train, validation = Linear(), latents(40, 1), data(30, 3)
    chosen = fit_postprocessing(retriever, train, validation, reverse_weights=(0.5, 1.0, 2.0))
    single = {
        (weight, beta): fit_postprocessing(retriever, train, validation, betas=(beta,), reverse_weights=(weight,))
        for weight in (0.5, 1.0, 2.0)
        for beta in BETAS
    }
    for post in single.values():
        recall = evaluate_retrieval(retriever, validation, post)["mean_recall"]
        assert post.validation_mean_recall == pytest.approx(recall, abs=1 / 30)  # one rank may flip on rounding
    assert chosen.validation_mean_recall == max(post.validation_mean_recall for post in single.values())
    assert single[chosen.reverse_weight, chosen.beta].validation_mean_recall == chosen.validation_mean_recall


def test_bank_is_limited_and_seeded():
    retriever, train, validation = Linear(), latents(40, 1), data(30, 3)
    banks = [
        fit_postprocessing(retriever, train, validation, max_bank=8, seed=seed).query_bank["image->text"]
        for seed in (0, 0, 1)
    ]
    assert banks[0].shape == (8, 5)
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


def test_mean_recall_is_the_mean_of_the_six_and_sides_may_differ_in_length():
    relevant = torch.zeros(4, 20, dtype=torch.bool)
    relevant[torch.arange(20) % 4, torch.arange(20)] = True  # five captions an image
    result = evaluate_retrieval(Linear(), RetrievalData(latents(4, 5, n_text=20), relevant))
    assert (result["image->text"]["n_queries"], result["image->text"]["n_gallery"]) == (4, 20)
    assert (result["text->image"]["n_queries"], result["text->image"]["n_gallery"]) == (20, 4)
    six = [result[d][f"recall@{k}"] for d in ("image->text", "text->image") for k in (1, 5, 10)]
    assert result["mean_recall"] == pytest.approx(np.mean(six))


def test_a_one_way_retriever_is_scored_in_its_direction_only():
    variants = evaluate_variants(OneWay(), latents(40, 1), data(30, 3), data(25, 4))
    assert list(variants) == ["one_direction", "both_directions", "both_directions+hubness"]
    assert variants["one_direction"] == variants["both_directions"]
    assert "text->image" not in variants["one_direction"]


def test_wrong_use_is_named():
    retriever, train, validation = Linear(), latents(40, 1), data(30, 3)
    with pytest.raises(ValueError, match="no bank"):
        score_matrix(retriever, Postprocessing(beta=0.5), "image->text", train, train["text"])
    with pytest.raises(ValueError, match="audio->text"):
        score_matrix(retriever, None, "audio->text", train, train["text"])
    with pytest.raises(ValueError, match="every validation pair matches"):
        fit_postprocessing(retriever, train, data(30, 3, n_groups=1))
    with pytest.raises(ValueError, match="training latents"):
        fit_postprocessing(retriever, {"image": train["image"]}, validation)
    with pytest.raises(ValueError, match="boolean"):
        RetrievalData(train, torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="serves"):
        audio = {"audio": train["image"], "text": train["text"]}
        evaluate_retrieval(retriever, RetrievalData(audio, torch.eye(40).bool(), ("audio", "text")))


# --- splits and tables --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40).map(str), min_size=30, max_size=80), st.integers(0, 2**31))
def test_no_group_stands_on_two_sides(groups, seed):
    if len(set(groups)) < 4:
        return
    split = split_groups(groups, seed)
    assert sorted(np.concatenate(list(split.values()))) == list(range(len(groups)))
    names = {side: {groups[i] for i in rows} for side, rows in split.items()}
    assert all(names.values())
    assert not (names["train"] & names["test"] or names["train"] & names["validation"])
    assert not names["validation"] & names["test"]
    assert len(names["test"]) == max(1, round(0.2 * len(set(groups))))
    backwards = split_groups(groups[::-1], seed)  # the order of the rows does not matter
    assert {groups[::-1][i] for i in backwards["test"]} == names["test"]


def test_split_seeds_differ_and_small_or_odd_requests_are_refused():
    groups = [str(i) for i in range(50)]
    assert split_groups(groups, 0)["test"].tolist() != split_groups(groups, 1)["test"].tolist()
    with pytest.raises(ValueError, match="too few"):
        split_groups(["a", "a", "b"], 0)
    with pytest.raises(ValueError, match="fractions"):
        split_groups(groups, 0, 0.9, 0.1)


def test_table_prints_mean_and_standard_error():
    table = format_table({"ours": {"mR": [0.5, 0.6, 0.7], "R@1": [0.25]}, "chance": {"mR": [0.01, 0.01]}})
    assert table.splitlines() == [
        "| method | mR | R@1 |",
        "|---|---|---|",
        "| ours | 60.0 ± 5.8 | 25.0 |",
        "| chance | 1.0 ± 0.0 | - |",
    ]

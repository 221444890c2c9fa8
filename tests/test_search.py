"""Search in one process: the same scores whatever the index, and filters that keep their recall."""

import logging

import numpy as np
import pytest
import torch
from conftest import paired_latents, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import APPROXIMATE, COLUMNS, DIRECTION, ROWS, agreement, ids, scored_model, truth, write

from modeling_altmoe import index_altmoe
from modeling_altmoe.index_altmoe import build, choose_index
from modeling_altmoe.index_files_altmoe import open_local
from modeling_altmoe.search_altmoe import LatentIndex, open_index, parse_where
from modeling_altmoe.where_altmoe import check_where


@pytest.fixture(scope="module")
def model():
    return scored_model(weight=[0.5, 0.1, 0.1, -0.2], bias=0.0, threshold=0.4)


@pytest.fixture(scope="module")
def latents():
    return paired_latents(ROWS, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, latents):
    return write(tmp_path_factory.mktemp("store"), model, latents)


# ---------------------------------------------------------------- scores and ranking


def test_a_small_store_is_searched_exactly_and_says_so(model, store, latents):
    index = LatentIndex(model, store, DIRECTION)
    assert index.describe() == "exact, 600 rows" and len(index) == 600
    assert ids(index.search(latents["text"][:20], 10)) == truth(model, store, latents["text"][:20], 10)


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_an_approximate_index_at_high_effort_finds_what_the_exact_one_finds(model, store, latents, factory):
    queries = latents["text"][:30]
    index = LatentIndex(model, store, DIRECTION, build(model, store, DIRECTION, factory, recall=1.0))
    assert factory in index.describe() and "recall@10" in index.describe()
    index.backend.effort["short_list"] = ROWS  # all that it can give
    assert agreement(ids(index.search(queries, 10)), truth(model, store, queries, 10)) > 0.99


def test_recall_that_is_asked_for_is_measured_with_queries_like_new_ones(model, store):
    low = build(model, store, DIRECTION, "IVF32,RaBitQ", recall=0.5)
    high = build(model, store, DIRECTION, "IVF32,RaBitQ", recall=0.99)
    assert low.effort["nprobe"] < high.effort["nprobe"] and high.effort["recall"] >= 0.99
    with pytest.raises(ValueError, match=r"recall=1\.5: expected a share"):
        build(model, store, DIRECTION, "IVF32,RaBitQ", recall=1.5)


@pytest.mark.parametrize("factory", ["exact", *APPROXIMATE])
def test_every_score_is_the_models_own(model, store, latents, factory):
    queries = latents["text"][:8]
    scores = model.score(DIRECTION, queries, store.latents())
    for row, hits in zip(scores, LatentIndex(model, store, DIRECTION, factory).search(queries, 10), strict=True):
        torch.testing.assert_close(
            torch.tensor([hit.score for hit in hits]), row[[hit.row for hit in hits]], rtol=0, atol=2e-3
        )


def test_without_a_second_direction_nothing_is_kept_but_hubness(store, latents):
    model = scored_model()
    model.config.scoring[DIRECTION]["reverse_weight"] = 0.0
    backend = build(model, store, DIRECTION, "IVF8,Flat", recall=1.0)
    assert backend.kept.parts[0][0].shape == (ROWS, 0)
    found = LatentIndex(model, store, DIRECTION, backend).search(latents["text"][:20], 5)
    assert agreement(ids(found), truth(model, store, latents["text"][:20], 5)) > 0.98


def test_a_model_without_a_training_bank_gets_settings_by_size(store, latents):
    model = small_model()
    backend = build(model, store, DIRECTION, "IVF32,RaBitQ")
    assert backend.effort == {"nprobe": 2, "short_list": 400} and "measured" not in backend.describe()
    assert len(LatentIndex(model, store, DIRECTION, backend).search(latents["text"][:2], 10)[0]) == 10


def test_a_batch_finds_what_each_query_finds_alone(model, store, latents):
    index, queries = LatentIndex(model, store, DIRECTION, "IVF8,RaBitQ"), latents["text"][:80]
    together = index.search(queries, 5)
    for place in (0, 63, 64, 79):
        alone = index.search(queries[place : place + 1], 5)[0]
        assert ids([alone]) == ids([together[place]])
        assert alone.confidence == pytest.approx(together[place].confidence, abs=1e-6)
    assert together[0][0].columns["year"] == 2000 + together[0][0].row % 40


@pytest.mark.parametrize("factory", ["IVF2,Flat", "HNSW8", "SQ8"])
def test_an_approximate_index_of_a_handful(model, latents, tmp_path, factory):
    store = write(tmp_path, model, latents, 0, 5)
    hits = LatentIndex(model, store, DIRECTION, factory).search(latents["text"][:3], 10)
    assert ids(hits) == truth(model, store, latents["text"][:3], 10)


def test_more_results_than_items_are_all_items(model, store, latents):
    for factory in ("exact", "IVF8,RaBitQ"):
        hits = LatentIndex(model, store, DIRECTION, factory).search(latents["text"][:2], 5000)
        assert [len({hit.id for hit in one}) for one in hits] == [ROWS, ROWS]


def test_confidence_is_the_same_for_exact_and_approximate_indexes(model, store, latents):
    queries = latents["text"][:30]
    exact = LatentIndex(model, store, DIRECTION).search(queries, 3)
    backend = build(model, store, DIRECTION, "IVF8,Flat", recall=1.0)
    near = LatentIndex(model, store, DIRECTION, backend).search(queries, 3)
    assert [hits.confidence for hits in near] == pytest.approx([hits.confidence for hits in exact], abs=2e-3)
    assert [hits.found for hits in near] == [hits.found for hits in exact]
    assert len({hits.found for hits in exact}) == 2  # the threshold decides something here


def test_auto_is_chosen_by_the_number_of_rows():
    assert choose_index("auto", 20_000) == "exact" and choose_index("auto", 100_000) == "RR,IVF512,RaBitQ"
    assert choose_index("auto", 1_000_000) == "RR,IVF2048,RaBitQ"
    assert choose_index("HNSW32", 5) == "HNSW32"


def test_a_large_store_without_a_kept_index_says_how_to_keep_one(model, store, monkeypatch, caplog):
    monkeypatch.setattr("modeling_altmoe.index_files_altmoe.EXACT_ROWS", 500)
    with caplog.at_level(logging.WARNING):
        open_local(model, store, DIRECTION, "IVF8,RaBitQ")
    assert "'altmoe index" in caplog.text


def test_mistakes_are_explained(model, store, latents):
    with pytest.raises(ValueError, match="Unknown index 'IVFx': expected auto, exact, a FAISS factory string"):
        build(model, store, DIRECTION, "IVFx")
    with pytest.raises(ValueError, match=r"has 1024 lists, .* only 600 rows"):
        build(model, store, DIRECTION, "IVF1024,RaBitQ")
    with pytest.raises(ValueError, match="k=0"):
        LatentIndex(model, store, DIRECTION).search(latents["text"][:1], 0)
    with pytest.raises(ValueError, match="holds 'image' latents, expected 'text'"):
        open_index(model, store, "image->text")


# ---------------------------------------------------------------- conditions


def test_conditions_are_read_from_words():
    assert parse_where([], COLUMNS) is None
    assert parse_where(["kind=a", "year>=2020", "year<2030", "new=true"], COLUMNS) == {
        "kind": "a", "year": {"ge": 2020, "lt": 2030}, "new": True,
    }  # fmt: skip
    assert parse_where(["kind = a", "kind=b=c", "weight!=1.5"], COLUMNS) == {
        "kind": ["a", "b=c"],
        "weight": {"ne": 1.5},
    }
    assert parse_where(["day>=2024-02-29"], {"day": "date32"})["day"]["ge"].isoformat() == "2024-02-29"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kind"], "no condition: expected column=value"),
        (["knd=a"], "no column 'knd' to filter by. Columns: id, kind, year"),
        (["year=soon"], "'year' is of type int32, which 'soon' is not"),
        (["year=1", "year>=0"], "has conditions with = and with another sign"),
        (["year>1", "year>2"], "has two conditions with >"),
    ],
)
def test_bad_words_are_explained(words, message):
    with pytest.raises(ValueError, match=message):
        parse_where(words, COLUMNS)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"kind": []}, "an empty list"),
        ({"year": {"above": 3}}, "compares nothing. Known"),
        ({"year": 1.5}, "which 1.5 is not"),
        ({"kind": 3}, "which 3 is not"),
        ({"kind": {}}, "compares nothing"),
        (["kind"], "got list"),
    ],
)
def test_bad_conditions_are_explained(where, message):
    with pytest.raises(ValueError, match=message):
        check_where(where, COLUMNS)


VALUES = {"kind": st.sampled_from("abcd"), "year": st.integers(1995, 2045), "weight": st.floats(0, 90, width=32),
          "new": st.booleans(), "id": st.sampled_from([f"i{row}" for row in range(0, 700, 7)])}  # fmt: skip
COMPARED = {"ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "ne": np.not_equal}


def conditions(column: str):
    value = VALUES[column]
    one = st.lists(value, min_size=1, max_size=4) | value
    if column != "new":
        one |= st.dictionaries(st.sampled_from(list(COMPARED)), value, min_size=1, max_size=2)
    return one


WHERE = st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: conditions(name) for name in names})
)


def meets(value, condition) -> bool:
    """Plain Python's reading of a condition."""
    if value is None:
        return False
    if isinstance(condition, dict):
        return all(
            bool(COMPARED[name](value, np.float32(v) if isinstance(v, float) else v)) for name, v in condition.items()
        )
    return value in [np.float32(v) if isinstance(v, float) else v for v in np.atleast_1d(condition).tolist()]


@pytest.fixture(scope="module")
def indexes(model, store):
    return {f: LatentIndex(model, store, DIRECTION, build(model, store, DIRECTION, f)) for f in ("exact", *APPROXIMATE)}


@settings(max_examples=40, deadline=None)
@given(where=WHERE, factory=st.sampled_from(["exact", *APPROXIMATE]), k=st.sampled_from([1, 3, 10]))
def test_a_filter_finds_the_best_of_exactly_the_rows_that_meet_it(model, store, latents, indexes, where, factory, k):
    queries, columns = latents["text"][:3], {name: store.column(name) for name in ("id", *COLUMNS)}
    rows = [row for row in range(ROWS) if all(meets(columns[name][row], c) for name, c in where.items())]
    found = indexes[factory].search(queries, k, where)
    assert [len(hits) for hits in found] == [min(k, len(rows))] * 3
    assert ids(found) == truth(model, store, queries, k, rows)  # so few rows are searched one by one


@pytest.mark.parametrize("factory", APPROXIMATE)
@pytest.mark.parametrize("kind", [["a", "b"], "a", {"ne": "c"}])
def test_a_filter_inside_the_index_keeps_its_recall(model, store, latents, indexes, monkeypatch, factory, kind):
    monkeypatch.setattr(index_altmoe, "EXACT_MATCHES", 0)
    queries, where = latents["text"][:40], {"kind": kind}
    rows = [row for row, value in enumerate(store.column("kind")) if meets(value, kind)]
    found = indexes[factory].search(queries, 10, where)
    assert {hit.row for hits in found for hit in hits} <= set(rows) and {len(hits) for hits in found} == {10}
    assert agreement(ids(found), truth(model, store, queries, 10, rows)) > 0.97


def test_a_filter_that_hides_nearly_everything_from_the_index_still_finds_all(
    model, store, latents, indexes, monkeypatch
):
    monkeypatch.setattr(index_altmoe, "EXACT_MATCHES", 0)
    found = indexes["IVF8,RaBitQ"].search(latents["text"][:5], 10, {"id": ["i3", "i77", "i500"]})
    assert [{hit.id for hit in hits} for hits in found] == [{"i3", "i77", "i500"}] * 5


def test_nothing_meets_a_condition(model, indexes, latents):
    for index in indexes.values():
        hits = index.search(latents["text"][:2], 5, {"kind": "zebra"})[0]
        assert hits == [] and not hits.found and hits.confidence == 0

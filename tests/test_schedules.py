"""Schedules: pure functions of seed, step and history."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.schedules import SCHEDULES, DirectionSchedule

THREE = ["a->b", "b->a", "a->c"]


@given(steps=st.integers(1, 300))
def test_round_robin_covers_each_direction_equally(steps):
    schedule = DirectionSchedule(THREE)
    counts = Counter(schedule.direction(step) for step in range(steps))
    assert max(counts.values()) - min(counts.get(d, 0) for d in THREE) <= 1


@given(length=st.integers(1, 9))
def test_blocks_stay_and_then_switch(length):
    schedule = DirectionSchedule(THREE, "blocks", block_steps=length)
    order = [schedule.direction(step) for step in range(3 * length)]
    assert order == [d for d in THREE for _ in range(length)]


@settings(deadline=None)
@given(kind=st.sampled_from(SCHEDULES), seed=st.integers(0, 9), step=st.integers(0, 10_000))
def test_a_step_always_has_the_same_direction(kind, seed, step):
    directions = {DirectionSchedule(THREE, kind, seed).direction(step) for _ in range(3)}
    assert len(directions) == 1
    assert (directions == {None}) == (kind == "joint")


def test_proportional_follows_its_weights():
    schedule = DirectionSchedule(THREE, "proportional", weights={"a->b": 8, "a->c": 0})
    counts = Counter(schedule.direction(step) for step in range(3000))
    assert counts["a->c"] == 0 and 7.0 < counts["a->b"] / counts["b->a"] < 9.2


def test_adaptive_follows_the_gap_and_forgets_the_future():
    schedule = DirectionSchedule(THREE, "adaptive")
    recalls = {"eval_a->b/recall@1": 0.6, "eval_b->a/recall@1": 0.6, "eval_a->c/recall@1": 0.1}
    history = [{"step": 10, **recalls}]
    assert schedule.probabilities(5, history).tolist() == [1 / 3] * 3  # not yet measured at step 5
    chances = schedule.probabilities(10, history)
    assert chances[2] > 0.9 and chances[0] == chances[1]
    assert schedule.probabilities(50, [*history, {"step": 40, **dict.fromkeys(recalls, 0.5)}]).tolist() == [1 / 3] * 3


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "round-robin"}, "Did you mean 'round_robin'"),
        ({"weights": {"a->d": 1}}, "Unknown direction 'a->d'"),
        ({"weights": dict.fromkeys(THREE, 0)}, "positive sum"),
        ({"block_steps": 0}, "must be positive"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        DirectionSchedule(THREE, **settings_)

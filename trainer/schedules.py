"""Which direction a step trains: a pure function of the seed, the step and the validation results so far.

Comes in: the step's number. Goes out: a direction, or None for all at once (`joint`). A direction belongs to an
*optimiser* step: it stays the same over gradient accumulation and over all processes, and a resumed run meets the
same directions again.
"""

import math

import numpy as np

from modeling_altmoe.configuration_altmoe import unknown_name_message

SCHEDULES = ("round_robin", "blocks", "proportional", "adaptive", "joint")


class DirectionSchedule:
    """
    The order in which directions are trained.

    Args:
        directions: all directions.
        kind: `round_robin` (step i trains direction i mod T), `blocks` (`block_steps` steps in one direction, then
            the next: the paper's multi-step sequences), `proportional` (drawn with fixed probabilities), `adaptive`
            (drawn with probabilities that follow the gap in validation recall, as the authors' code does) or `joint`
            (all directions in each step: the ablation).
        seed: for the drawn ones.
        block_steps: length of a block.
        weights: `{direction: weight}` for `proportional`; default equal.
        temperature: `adaptive` draws with softmax(gap to the best direction's recall / temperature).

    Raises:
        ValueError: unknown schedule or direction, or numbers out of range.
    """

    def __init__(self, directions, kind="round_robin", seed=0, block_steps=10, weights=None, temperature=0.1):
        if kind not in SCHEDULES:
            raise ValueError(unknown_name_message("schedule", kind, SCHEDULES))
        for direction in weights or {}:
            if direction not in directions:
                raise ValueError(unknown_name_message("direction", direction, directions))
        if block_steps < 1 or temperature <= 0:
            raise ValueError(f"block_steps={block_steps}, temperature={temperature}: both must be positive.")
        self.directions, self.kind, self.seed = list(directions), kind, seed
        self.block_steps, self.temperature = block_steps, temperature
        chances = np.array([float((weights or {}).get(direction, 1.0)) for direction in self.directions])
        if (chances < 0).any() or chances.sum() <= 0:
            raise ValueError(f"direction_weights={weights}: expected non-negative numbers with a positive sum.")
        self.chances = chances / chances.sum()

    def probabilities(self, step: int, history: list[dict] | None = None) -> np.ndarray:
        """Chance of each direction at a step.

        Args:
            step: optimiser steps made so far.
            history: the Trainer's `log_history`; the newest evaluation at or before `step` counts.
        """
        if self.kind != "adaptive":
            return self.chances
        for entry in reversed(history or []):
            recalls = [entry.get(f"eval_{direction}/recall@1") for direction in self.directions]
            if entry.get("step", math.inf) <= step and None not in recalls:
                gaps = (max(recalls) - np.array(recalls)) / self.temperature
                weights = np.exp(gaps - gaps.max())
                return weights / weights.sum()
        return np.full(len(self.directions), 1 / len(self.directions))

    def direction(self, step: int, history: list[dict] | None = None) -> str | None:
        """The direction of the optimiser step that follows `step` finished ones; None means all of them."""
        if self.kind == "joint":
            return None
        if self.kind == "round_robin":
            return self.directions[step % len(self.directions)]
        if self.kind == "blocks":
            return self.directions[step // self.block_steps % len(self.directions)]
        chances = self.probabilities(step, history)
        return self.directions[np.random.default_rng([self.seed, step]).choice(len(self.directions), p=chances)]

"""The reference's batch, its microbatches, the weights of losses, and sums of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from stages.grid import Grid
from stages.loss.precision import float_of_losses, rounded_once
from stages.worker.hosted_stage import HostedStage

Array = np.ndarray[Any, Any]
Weights = Mapping[tuple[int, int], Mapping[tuple[int, int], Any]]
"""{(stage by position, head): {(microbatch, window): what its loss weighs}}."""


@dataclass
class Whole:
    """One batch as the reference sees it.

    Attributes:
        inputs: {name: (n, ...)}.
        targets: {output label: (n, ...)}; empty without a loss.
        sample_weights: {output label: array}.
        grid: How it is cut into microbatches and windows.
        loss_scale: Factor on the loss while it is differentiated.
        truncate: How many windows a state's gradient goes back through; None: all.
    """

    inputs: Mapping[str, Any]
    targets: Mapping[str, Any]
    sample_weights: Mapping[str, Any]
    grid: Grid
    loss_scale: float = 1.0
    truncate: int | None = None

    def microbatch(self, k: int) -> Whole:
        """One microbatch as a batch of its own, with tensors."""

        def rows(arrays: Mapping[str, Any]) -> dict[str, Any]:
            whole = Grid(self.grid.sizes)
            return {name: tf.constant(whole.part(array, k, 0, False)) for name, array in arrays.items()}

        grid = Grid((self.grid.sizes[k],), self.grid.lengths)
        inputs, targets, weights = rows(self.inputs), rows(self.targets), rows(self.sample_weights)
        return Whole(inputs, targets, weights, grid, self.loss_scale, self.truncate)

    def begins_block(self, window: int) -> bool:
        """Whether no gradient goes back from a window to the one before it."""
        return self.truncate is not None and window % self.truncate == 0


def owned(hosted: HostedStage) -> list[Any]:
    """A stage's trainable variables without those that an earlier stage has too."""
    others = {tie.place for tie in hosted.ties if tie.stages[0] != hosted.spec.index}
    return [v for place, v in enumerate(hosted.stage.trainable_variables) if place not in others]


def owner(tie: Any, stage: Mapping[int, HostedStage]) -> Any:
    """The first stage's variable of a tie."""
    first = stage[tie.stages[0]]
    place = next(one.place for one in first.ties if one.name == tie.name)
    return first.stage.trainable_variables[place]


def state_names(hosted: HostedStage) -> list[str]:
    """Names of a stage's states that no tensor has."""
    return [f"{hosted.spec.index}/{name}/state" for name in hosted.spec.states]


def of_microbatch(weights: Weights, k: int) -> list[tuple[int, int, int, Any]]:
    """(stage by position, head, window, weight) of one microbatch; weights are tensors, so that no trace is for one."""
    return [
        (i, h, w, tf.constant(weight, float_of_losses()))
        for (i, h), units in weights.items()
        for (m, w), weight in units.items()
        if m == k
    ]


def by_head(weights: Sequence[tuple[int, int, int, Any]]) -> Weights:
    """Inverse of `of_microbatch`: {(stage, head): {(0, window): weight}}."""
    found: dict[tuple[int, int], dict[tuple[int, int], Any]] = {}
    for i, h, w, weight in weights:
        found.setdefault((i, h), {})[0, w] = weight
    return found


def weight_part(batch: Whole, label: str, unit: tuple[int, int], over_time: bool) -> Array | None:
    """A unit's sample weights: one per sample, or per sample and time step."""
    weight = batch.sample_weights.get(label)
    return None if weight is None else batch.grid.part(weight, *unit, over_time and weight.ndim > 1)


def scaled_sum(terms: Sequence[Any], share: float) -> Any | None:
    """Own losses as they count in the batch."""
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * rounded_once(share, total.dtype)


def summed_losses(losses: Sequence[Mapping[int, Sequence[Any]]]) -> dict[int, list[Any]]:
    """Losses of the whole batch, as if it were one microbatch."""
    found: dict[int, list[Any]] = {}
    for index in losses[0]:
        by_head: dict[int, Any] = {}
        for one in losses:
            for h, value in one[index][0].items():
                by_head[h] = value if h not in by_head else by_head[h] + value
        own = [one[index][1] for one in losses if one[index][1] is not None]
        found[index] = [by_head, sum(own[1:], start=own[0]) if own else None]
    return found


def reported(losses: Sequence[Mapping[int, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Losses as workers report them."""
    total = summed_losses(losses)
    return {
        str(index): [[float(heads[h]) for h in sorted(heads)], None if own is None else float(own)]
        for index, (heads, own) in total.items()
    }

"""The trial of a loss: a mean and a sum of parts are told from numbers of a whole batch, whatever the predictions are.

Each loss here is one that a trial of less would take for a mean: its values agree, or its gradient, or one cut.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from stages.grid import Grid
from stages.loss.head import Head
from stages.loss.trial import Example, tried
from stages.loss.ways import Way

RNG = np.random.default_rng(2)
TARGET = RNG.uniform(0.1, 1, (8, 3)).astype("float32")
SAME = np.full((8, 3), 0.25, "float32")
"""What a model that is not trained may give: nothing differs between samples."""


def spread(y: Any, p: Any) -> Any:
    return ops.mean((y - p) ** 2) - ops.mean(ops.var(p, axis=0))


def value_of_parts(y: Any, p: Any) -> Any:
    """The mean of the targets, whose gradient depends on the whole batch."""
    other = ops.sum(p * ops.mean(p))
    return ops.mean(y) + other - ops.stop_gradient(other)


def pairs(y: Any, p: Any) -> Any:
    return ops.mean(ops.reshape(p - y, (4, 2, 3))[:, 0] ** 2)


def far_away(y: Any, p: Any) -> Any:
    return ops.relu(ops.max(p) - ops.min(p) - 0.5) + ops.mean(p * y)


def cross(y: Any, p: Any) -> Any:
    return -ops.mean(ops.sum(y * ops.log(p), axis=-1))


def cross_summed(y: Any, p: Any) -> Any:
    return -ops.sum(y * ops.log(p))


@pytest.mark.parametrize(
    ("loss", "way"),
    [
        (spread, Way.WHOLE),
        (value_of_parts, Way.WHOLE),
        (pairs, Way.WHOLE),
        (far_away, Way.WHOLE),
        (lambda y, p: ops.mean((y - p) ** 2) + 1e-3 * ops.max(p), Way.WHOLE),
        (cross, Way.PARTS),
        (cross_summed, Way.SUM),
        (keras.losses.MeanSquaredError(reduction="sum"), Way.PARTS),
    ],
)
def test_the_way_of_a_loss(loss: Any, way: Way) -> None:
    for prediction in (SAME, RNG.dirichlet([1, 1, 1], 8).astype("float32")):
        found = tried(Head(loss), Example(TARGET, prediction, None, Grid((4, 4))))
        assert found is not None and found.loss is way


def test_sample_weights_are_part_of_the_trial() -> None:
    def mean(y: Any, p: Any) -> Any:
        return ops.mean((y - p) ** 2)

    weight = RNG.uniform(0.1, 2, 8).astype("float32")
    for given, way in ((None, Way.PARTS), (weight, Way.WHOLE)):
        found = tried(Head(mean), Example(TARGET, SAME, given, Grid((4, 4))))
        assert found is not None and found.loss is way


def test_nothing_finite_says_nothing_and_a_failing_loss_tells_why() -> None:
    example = Example(TARGET, SAME, None, Grid((4, 4)))
    assert tried(Head(lambda y, p: ops.mean(y) + ops.sum(ops.log(-ops.abs(p) - 1))), example) is None
    with pytest.raises(ZeroDivisionError):
        tried(Head(lambda y, p: ops.mean(p) * (1 / 0)), example)

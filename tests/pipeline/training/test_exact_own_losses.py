"""Regularisers, activity regularisers and `add_loss`, in any stage, count once a batch.

Keras divides an activity regulariser by the batch and leaves a weight regulariser alone; the whole batch under one tape
over the unsplit model decides for both.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import in_turn
from tests.models import Spread, cross_entropy, grouped, part, stack
from tests.one_tape import OneTape, assert_same_bits, difference
from tests.pipeline.batch.test_whole_batch import full_batch

layers = keras.layers
SAMPLES, MICROBATCHES = 11, 4


def parts(place: int) -> list[Any]:
    """Five parts with one of each kind of own loss at one place; the last place has the loss too."""
    keras.utils.set_random_seed(6)
    parts = []
    for i in range(5):
        shape, units = ((6,) if i == 0 else (8,)), (3 if i == 4 else 8)
        if i == place:
            own = {
                "kernel_regularizer": keras.regularizers.L2(0.05),
                "activity_regularizer": keras.regularizers.L1(0.02),
            }
            parts.append(part(shape, layers.Dense(units, **own), Spread(0.3)))
        else:
            parts.append(part(shape, layers.Dense(units, "tanh")))
    return parts


@pytest.mark.parametrize(
    ("place", "stages", "run_eagerly", "recompute"),
    in_turn(
        [
            (2, 5, True, True),
            (1, 2, True, False),
            (0, 3, False, False),
            (2, 5, False, True),
            (4, 3, False, False),
            (0, 5, True, False),
            (4, 5, True, False),
            (3, 1, True, False),
        ],
        5,
        8,
        several=True,
    ),
)
def test_own_losses_count_once_a_batch(place: int, stages: int, run_eagerly: bool, recompute: bool) -> None:
    """Gradients and loss equal the unsplit model's on the whole batch, of unequal microbatches."""
    x, y = stack("dense").data(SAMPLES)
    models = grouped(parts(place), stages)
    expected, value = full_batch(models, cross_entropy(), x, y, None)
    with Pipeline(models, MICROBATCHES, "1f1b", "inproc", recompute=recompute) as pipe:
        pipe.compile("sgd", cross_entropy(), run_eagerly=run_eagerly)
        found = list(pipe.gradients(x, y).values())
        assert difference(found, expected) <= 1e-6
        assert pipe.train_on_batch(x, y) == pytest.approx(value, rel=1e-6)
    without = full_batch(
        [part((6,), *(layer for model in parts(place) for layer in model.layers if not isinstance(layer, Spread)))],
        cross_entropy(),
        x,
        y,
        None,
    )
    assert abs(value - without[1]) > 1e-3


def test_own_losses_are_one_tape_bit_for_bit() -> None:
    """In eager stages the weights after some steps have the bits of one tape with the same own losses."""
    x, y = stack("dense").data(SAMPLES)
    models = [*parts(0)[:1], *parts(1)[1:2], *parts(3)[2:4], *parts(4)[4:]]
    tape = OneTape(models, cross_entropy(), keras.optimizers.SGD(0.1, momentum=0.9))
    with Pipeline(models, MICROBATCHES, "1f1b", "inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1, momentum=0.9), cross_entropy(), run_eagerly=True)
        for _ in range(5):
            pipe.train_on_batch(x, y)
        ours = pipe.get_weights()
        for _ in range(5):
            tape.train(x, y, MICROBATCHES)
        theirs = tape.weights()
    assert_same_bits(ours, theirs, "weight")


def test_evaluation_counts_them_too() -> None:
    """`evaluate` adds own losses once a batch, as Keras does on the unsplit model."""
    x, y = stack("dense").data(SAMPLES)
    models = parts(1)
    whole = keras.Sequential([keras.Input((6,)), *models])
    whole.compile("sgd", cross_entropy(), run_eagerly=True)
    with Pipeline(models, MICROBATCHES, "gpipe", "inproc") as pipe:
        pipe.compile("sgd", cross_entropy(), run_eagerly=True)
        ours = pipe.evaluate(x, y, batch_size=8, verbose=0)
    assert ours == pytest.approx(whole.evaluate(x, y, batch_size=8, verbose=0), rel=1e-6)
    assert np.isfinite(ours)

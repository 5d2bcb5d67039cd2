"""When the bits of one tape are kept where gradients meet, and when only all but the last of them.

A tensor or variable that is used k times receives k gradients, and a tape adds them in the order in which its walk
back through the whole model meets them. Two numbers have one sum. Three or more have several, and a pipeline keeps the
tape's wherever one stage has all the uses: with a cut between them each stage adds its own first.

    x ──► y0 ─┐           all uses of x in one stage, or two of them      the bits of one tape
    x ──► y1 ─┤ cut       three, of which a cut takes some apart          the sum's last bits may differ
    x ──► y2 ─┘
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from pipeline import Pipeline

SEED = 1


def readers(count):
    """One tensor that several layers read."""
    inputs = keras.Input((16,))
    x = layers.Dense(16, activation="tanh", name="x")(inputs)
    read = [layers.Dense(16, activation="tanh", name=f"y{i}")(x) for i in range(count)]
    return keras.Model(inputs, layers.Dense(1)(layers.Concatenate(name="all")(read)))


def uses(count):
    """One layer that is called several times."""
    inputs = keras.Input((16,), name="x")
    shared = layers.Dense(16, activation="tanh", name="shared")
    called = [shared(layers.Rescaling(1.0 + i, name=f"r{i}")(inputs)) for i in range(count)]
    read = [layers.Dense(16, name=f"y{i}")(one) for i, one in enumerate(called)]
    return keras.Model(inputs, layers.Dense(1)(layers.Concatenate(name="all")(read)))


def difference(build, count, at):
    """Between a pipeline's weights and Keras's after one step, of the largest change of a weight."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(64, 16)).astype("float32"), random.normal(size=(64, 1)).astype("float32")
    keras.utils.set_random_seed(SEED)
    model = build(count)
    before = model.get_weights()
    model.compile("sgd", "mse", run_eagerly=True)
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(build(count), at=at, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        model.train_on_batch(x, y)
        pipe.train_on_batch(x, y)
        ours, theirs = pipe.get_weights(), model.get_weights()
    change = max(np.abs(a - b).max() for a, b in zip(before, theirs, strict=True))
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) / change


@pytest.mark.parametrize("build", [readers, uses])
@pytest.mark.parametrize("at", [["y0"], ["all"], [["y0", "y1"]]])
def test_two_gradients_have_one_sum(build, at):
    assert difference(build, 2, at) == 0


@pytest.mark.parametrize(
    ("build", "at"),
    [(readers, ["x"]), (readers, ["all"]), (readers, ["x", ["y0", "y1", "y2"]]), (uses, ["r0"]), (uses, ["all"])],
)
def test_three_gradients_in_one_stage_are_added_as_by_one_tape(build, at):
    assert difference(build, 3, at) == 0


@pytest.mark.parametrize(
    ("build", "at"), [(readers, ["y0"]), (readers, ["x", "y0"]), (uses, ["shared"]), (uses, ["y0"])]
)
def test_three_gradients_from_several_stages_differ_by_rounding_only(build, at):
    """Less than 8 eps; not zero in these: another order is another sum."""
    assert 0 < difference(build, 3, at) <= 8 * np.finfo("float32").eps

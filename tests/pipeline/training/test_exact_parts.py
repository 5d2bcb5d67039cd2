"""Unusual parts are exact too: several inputs, integers, nothing to train, weights that the loss does not reach."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from tests.levels import in_turn
from tests.models import Unused, cross_entropy, part
from tests.one_tape import OneTape, assert_same_bits, difference, plus

layers = keras.layers
MODES = pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])


def joined_gradients(parts: list[Any], x: list[Any], y: Any, microbatches: int) -> list[Any]:
    """Of one model that is the composition of parts which take and give several tensors."""
    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in parts[0].inputs]
    h: Any = inputs
    for model in parts:
        h = model(h)
    whole = keras.Model(inputs, h)
    total: list[Any] = [None] * sum(len(model.trainable_variables) for model in parts)
    for rows in np.array_split(np.arange(len(y)), microbatches):
        with tf.GradientTape() as tape:
            found = whole([tf.constant(array[rows]) for array in x], training=True)
            value = cross_entropy()(y[rows], found) * np.float32(len(rows) / len(y))
        sources = [variable for model in parts for variable in model.trainable_variables]
        total = [plus(a, b) for a, b in zip(total, tape.gradient(value, sources), strict=True)]
    return [tf.convert_to_tensor(gradient).numpy() for gradient in total]


def first() -> Any:
    """Words and numbers in, two tensors out; one of the two goes past the middle of the part."""
    words, numbers = keras.Input((4,), dtype="int32", name="words"), keras.Input((3,), name="numbers")
    h = layers.Flatten()(layers.Embedding(7, 3)(words))
    return keras.Model([words, numbers], [layers.Dense(6, "tanh")(h), layers.Dense(2, "relu")(numbers)])


def second() -> Any:
    a, b = keras.Input((6,)), keras.Input((2,))
    return keras.Model([a, b], layers.Dense(3)(layers.Concatenate()([a, layers.Dense(4, "tanh")(b)])))


@MODES
def test_several_inputs_of_several_kinds(run_eagerly: bool) -> None:
    """Words and numbers enter the first stage, and two tensors cross the cut."""
    rng = np.random.default_rng(1)
    x = [rng.integers(0, 7, (9, 4)).astype("int32"), rng.normal(size=(9, 3)).astype("float32")]
    y = rng.integers(0, 3, 9).astype("int32")
    keras.utils.set_random_seed(2)
    parts = [first(), second()]
    expected = joined_gradients(parts, x, y, 4)
    with Pipeline(parts, 4, "1f1b", "inproc") as pipe:
        pipe.compile("sgd", cross_entropy(), run_eagerly=run_eagerly)
        found = list(pipe.gradients(x, y).values())
    if run_eagerly:
        assert_same_bits(found, expected, "gradient")
    assert difference(found, expected) <= 1e-6


@MODES
@pytest.mark.parametrize("place", in_turn([1, 0, 3], 1, 3))
def test_a_stage_with_nothing_to_train(place: int, run_eagerly: bool) -> None:
    """It passes gradients on, at either end and in the middle; frozen layers get none."""
    keras.utils.set_random_seed(3)
    frozen = part((6,), layers.Dense(6, "tanh", trainable=False), layers.Dropout(0.3))
    parts = [part((6,), layers.Dense(6, "tanh")) for _ in range(3)]
    parts.insert(place, frozen)
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(10, 6)).astype("float32"), rng.integers(0, 6, 10).astype("int32")
    tape = OneTape(parts, cross_entropy(), keras.optimizers.Adam(0.01))
    with Pipeline(parts, 4, "1f1b", "inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), cross_entropy(), run_eagerly=run_eagerly)
        found = list(pipe.gradients(x, y).values())
        expected = tape.gradients(x, y, 4)[1]
        for _ in range(5):
            pipe.train_on_batch(x, y)
            tape.train(x, y, 4)
        ours, theirs = pipe.get_weights(), tape.weights()
    assert len(found) == 6
    if run_eagerly:
        assert_same_bits([*found, *ours], [*expected, *theirs], "gradient or weight")
    assert difference(found, expected) <= 1e-6
    assert difference(ours, theirs) <= 1e-5


@MODES
def test_a_weight_that_the_loss_does_not_reach(run_eagerly: bool) -> None:
    """Its gradient is None, as the tape's, not zeros, and no update touches it: not even decay of weights."""
    keras.utils.set_random_seed(5)
    parts = [part((6,), Unused()), part((4,), layers.Dense(4, "tanh")), part((4,), Unused())]
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(10, 6)).astype("float32"), rng.integers(0, 4, 10).astype("int32")
    with Pipeline(parts, 4, "1f1b", "inproc") as pipe:
        pipe.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), cross_entropy(), run_eagerly=run_eagerly)
        found = pipe.gradients(x, y)
        assert [name for name, g in found.items() if g is None] == [name for name in found if name.endswith("idle")]
        assert difference(list(found.values()), OneTape(parts, cross_entropy()).gradients(x, y, 4)[1]) <= 1e-6
        pipe.train_on_batch(x, y)
        names = [weight.path for model in parts for weight in model.weights]
        idle = [w for name, w in zip(names, pipe.get_weights(), strict=True) if name.endswith("idle")]
    assert len(idle) == 2
    assert_same_bits(idle, [np.ones(2, "float32")] * 2, "idle weight")

"""Verdicts are those of the code as it runs, compiled or not; and whoever follows the advice gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import explain, explaining

layers = keras.layers


def looped(w: Any, before: Callable[[Any], Any] = tf.identity) -> Any:
    data = tf.data.Dataset.from_tensor_slices([2.0, 3.0])

    @tf.function
    def product() -> Any:
        total = tf.reduce_sum(before(w))
        for one in data:
            total = total * one
        return total

    return product()


def looped_from_zeros(w: Any) -> Any:
    return looped(w, lambda v: tf.nn.relu(-v))


def looped_from_infinity(w: Any) -> Any:
    return looped(w, lambda v: tf.sqrt(v - v))


def infinite_if_compiled(w: Any) -> Any:
    return tf.function(lambda: tf.reduce_sum(tf.sqrt(w - w) if tf.inside_function() else w * w))()


def branched(w: Any) -> Any:
    @tf.function
    def chosen() -> Any:
        return tf.cond(w[0] > 0.0, lambda: tf.constant(3.0) * 1.0, lambda: tf.reduce_sum(w))

    return chosen()


def computed_again(w: Any) -> Any:
    return tf.reduce_sum(tf.recompute_grad(lambda x: x * w)(tf.constant([1.0, 2.0])))


def compiled(w: Any) -> Any:
    return tf.function(lambda: tf.reduce_sum(w * w))()


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (looped, "not connected", "compiled"),
        (looped_from_zeros, "not connected", "compiled"),
        pytest.param(looped_from_infinity, "not connected", "compiled", marks=pytest.mark.gate),
        (infinite_if_compiled, "not finite", "not finite gradient"),
        (branched, "zero", "branch"),
        (computed_again, "connected", ""),
        (compiled, "connected", ""),
    ],
)
def test_the_verdict_is_that_of_the_code_as_it_runs(function: Callable[[Any], Any], status: str, reason: str) -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    with tf.GradientTape() as tape:
        target = function(w)
    gradient = tape.gradient(target, w)
    plain = "not connected" if gradient is None else "connected" if np.any(gradient) else "zero"
    if gradient is not None and not np.isfinite(gradient).all():
        plain = "not finite"
    row = explain(lambda: function(w), variables=[w]).of("w")
    assert (row.status, row.reason) == (status, reason)
    assert row.status == plain


def test_a_loop_that_ran_eagerly_in_a_block_is_noted() -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    with explaining() as explanation, tf.GradientTape() as tape:
        assert tape.gradient(looped(w), w) is not None
    assert explanation.of("w").status == "connected"
    assert any("no gradient through a loop over a data set" in note for note in explanation.notes)


def test_a_function_leaves_its_variables_as_they_were() -> None:
    """It ran twice: eagerly, and as it is."""
    w, count = tf.Variable([1.0, 2.0], name="w"), tf.Variable(0.0, name="count")

    @tf.function
    def counted() -> Any:
        count.assign_add(1.0)
        return tf.reduce_sum(w) * count

    explain(counted, variables=[w])
    assert float(count) == 0.0


def saturated(w: Any) -> Any:
    return tf.reduce_sum(keras.activations.hard_sigmoid(w * 100.0))


def zeros_of_ones_own(w: Any) -> Any:
    return tf.reduce_sum(tf.custom_gradient(lambda x: (x * 2.0, tf.zeros_like))(w))


@pytest.mark.parametrize(
    ("function", "reason", "why"),
    [(saturated, "saturated", "flat below 0 and above 6"), (zeros_of_ones_own, "custom gradient", "gives zeros")],
)
def test_a_zero_is_blamed_on_what_makes_it(function: Callable[[Any], Any], reason: str, why: str) -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    row = explain(lambda: function(w), variables=[w]).of("w")
    assert (row.status, row.reason) == ("zero", reason)
    assert why in row.why


def test_a_size_is_not_to_blame_for_places() -> None:
    w = tf.Variable([1.0, 2.0], name="w")
    row = explain(lambda: tf.reduce_sum(tf.cast(tf.argsort(w), tf.float32) * 2.0), variables=[w]).of("w")
    assert (row.reason, row.blockers[0].operation) == ("integer result", "TopKV2")


def averages(w: Any) -> Any:
    keeps = tf.train.ExponentialMovingAverage(0.9)
    keeps.apply([w])
    return tf.reduce_sum(keeps.average(w))


def hard_choice(w: Any) -> Any:
    return tf.reduce_sum(tf.gather(tf.constant([[1.0], [5.0]]), tf.argmax(w)))


def straight_through(w: Any) -> Any:
    return tf.reduce_sum(w + tf.stop_gradient(tf.round(w) - w))


def loop_outside(w: Any) -> Any:
    total = tf.reduce_sum(w)
    for one in tf.data.Dataset.from_tensor_slices([2.0, 3.0]):
        total = total * one
    return total


def looked_up(w: Any) -> Any:
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, default_value=0.0)
    table.insert(tf.constant([0, 1], tf.int64), w)
    return tf.reduce_sum(table.lookup(tf.constant([1, 1], tf.int64)))


ADVISED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "average": (averages, lambda w: tf.reduce_sum(w)),
    "assignment": (lambda w: tf.reduce_sum(tf.Variable(w * 2.0) * 3.0), lambda w: tf.reduce_sum(w * 2.0 * 3.0)),
    "compiled": (looped, loop_outside),
    "argmax": (hard_choice, lambda w: tf.reduce_sum(tf.nn.softmax(w)[:, None] * tf.constant([[1.0], [5.0]]))),
    "rounding": (lambda w: tf.reduce_sum(tf.round(w)), straight_through),
    "comparison": (
        lambda w: tf.reduce_sum(tf.cast(w > 1.5, tf.float32)),
        lambda w: tf.reduce_sum(tf.sigmoid(10.0 * (w - 1.5))),
    ),
    "branch": (
        lambda w: tf.reduce_sum(w) * 0.0 + 1.0 if w[0] < 0.0 else tf.constant(2.0) * 1.0,
        lambda w: tf.where(w[0] < 0.0, tf.reduce_sum(w), w[0] * 2.0),
    ),
    "table": (looked_up, lambda w: tf.reduce_sum(tf.gather(w, [1, 1]))),
    "NumPy": (lambda w: tf.constant(np.sum(w.numpy())) * 1.0, lambda w: keras.ops.sum(w) * 1.0),
    "cast": (lambda w: tf.reduce_sum(tf.cast(tf.cast(w, tf.int32), tf.float32)), lambda w: tf.reduce_sum(w)),
    "stop_gradient": (lambda w: tf.reduce_sum(tf.stop_gradient(w)), lambda w: tf.reduce_sum(w)),
    "numpy_function": (
        lambda w: tf.reduce_sum(tf.numpy_function(np.sin, [w], tf.float32)),
        lambda w: tf.reduce_sum(tf.sin(w)),
    ),
}
"""{reason: (code that has it, the same as the advice says)}."""


@pytest.mark.parametrize("reason", ADVISED)
def test_whoever_follows_the_advice_gets_a_gradient(reason: str) -> None:
    broken, mended = ADVISED[reason]
    w = tf.Variable([1.0, 2.0], name="w")
    assert explain(lambda: broken(w), variables=[w]).of("w").reason == reason
    assert explain(lambda: mended(w), variables=[w]).of("w").status == "connected"

"""Gradients that are zero or not finite, and what leaves TensorFlow: the explanation names the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import explain
from tests.pipeline.runtime import blocking_layers as blocking
from tests.stages.explanation.models_around import PyFunction, around

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.ones((4, 2), "float32")


# -- what leaves TensorFlow --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leave",
    [
        lambda t: np.sqrt(t),  # a ufunc takes the memory of the tensor: nothing can see that
        lambda t: np.array(t) + 1.0,
        lambda t: np.stack([t, t])[0],
        lambda t: np.asarray([float(one) for one in t], "float32"),
        lambda t: keras.ops.convert_to_numpy(t) * 3.0,
        lambda t: t.numpy().copy(),
    ],
    ids=["ufunc", "array", "function", "floats", "convert_to_numpy", "numpy"],
)
def test_a_way_through_numpy_is_found_by_changing_the_variable(leave: Callable[[Any], Any]) -> None:
    w, v = tf.Variable([1.0, 2.0], name="w"), tf.Variable([3.0, 4.0], name="v")
    found = explain(lambda: tf.reduce_sum(tf.constant(leave(w * 2.0), tf.float32) * v))
    row = found.of("w")
    assert row.reason in ("NumPy", "Python") and row.certain
    assert "test_explain_values.py" in row.blocker.line
    assert found.of("v").ok
    np.testing.assert_array_equal(w.numpy(), [1.0, 2.0])


def test_what_is_only_logged_is_not_to_blame() -> None:
    w, v = tf.Variable([1.0, 2.0], name="w"), tf.Variable(3.0, name="v")
    data = np.array([7.0, 9.0], "float32")

    def loss() -> Any:
        assert np.mean(w * 2.0) == 3.0 or True
        return tf.reduce_sum(tf.constant(data) * v)

    assert explain(loss).of("w").reason == "no dependence"


def test_noise_from_outside_is_not_taken_for_a_variable() -> None:
    """The constant changes from run to run by itself."""
    w, v = tf.Variable([1.0, 2.0], name="w"), tf.Variable(3.0, name="v")
    drawn = iter(range(100))

    def loss() -> Any:
        assert float(w[0]) > 0.0
        return v * tf.constant(float(next(drawn)))

    row = explain(loss).of("w")
    assert (row.reason, row.certain) == ("not followed", False)
    assert "another one with every run" in row.why


# -- zero and not finite -----------------------------------------------------------------------------------------


def test_a_dead_relu() -> None:
    dead = layers.Dense(4, activation="relu", bias_initializer=keras.initializers.Constant(-50.0), name="dead")
    found = explain(around(dead), X, Y, loss="mean_squared_error")
    row = found.of("before/kernel")
    assert (row.status, row.reason, row.blocker.operation) == ("zero", "dead unit", "Relu")
    assert row.blocker.layer == "net/dead" and "none of the 16 inputs is above 0" in row.why
    assert found.of("behind/kernel").reason == "multiplied by zero"
    assert found.of("behind/bias").ok


def test_a_saturated_sigmoid() -> None:
    steep = layers.Dense(4, activation="sigmoid", bias_initializer=keras.initializers.Constant(200.0), name="steep")
    row = explain(around(steep), X).of("before/kernel")
    assert (row.status, row.reason, row.blocker.operation) == ("zero", "saturated", "Sigmoid")


def test_a_gate_that_is_shut() -> None:
    gate = tf.Variable(0.0, name="gate")
    w = tf.Variable([1.0, 2.0], name="w")
    found = explain(lambda: tf.reduce_sum(gate * tf.tanh(w)))
    assert (found.of("w").reason, found.of("w").blocker.operation) == ("multiplied by zero", "Mul")
    assert found.of("gate").ok


def test_numpy_inside_py_function_gives_zeros_and_not_none() -> None:
    row = explain(around(PyFunction(name="fault"), wide=3), X).of("before/bias")
    assert (row.status, row.reason) == ("zero", "py_function")
    assert (row.blocker.operation, row.blocker.layer) == ("EagerPyFunc", "net/fault")


def test_the_first_value_that_is_not_finite() -> None:
    """Zeros are divided by their length: NaN in the forward pass."""
    found = explain(around(blocking.Unfinished(name="unit")), np.zeros((2, 3), "float32"), np.ones((2, 2)), loss="mse")
    for name in ("before/kernel", "behind/kernel"):
        row = found.of(name)
        assert (row.status, row.reason, row.blocker.operation) == ("not finite", "not finite value", "RealDiv")
        assert row.blocker.layer == "net/unit" and "x / tf.sqrt" in row.blocker.line


def test_a_derivative_that_is_not_finite() -> None:
    """The root of 0 is 0, its derivative is not."""
    w = tf.Variable([0.0, 1.0], name="w")
    row = explain(lambda: tf.reduce_sum(tf.sqrt(w * 2.0))).of("w")
    assert (row.status, row.reason, row.blocker.operation) == ("not finite", "not finite gradient", "Sqrt")
    assert "0 to 2" in row.blocker.what


def test_data_and_variables_that_are_not_finite() -> None:
    model = around(layers.Dense(3, name="middle"))
    bad = X.copy()
    bad[1, 1] = np.nan
    row = explain(model, bad).of("before/kernel")
    assert row.reason == "not finite value" and "takes a value that is not finite" in row.blocker.what
    model.layers[1].kernel.assign(np.full((4, 3), np.inf))
    row = explain(model, X).of("before/kernel")
    assert "reads a variable that is not finite" in row.blocker.what and row.blocker.layer == "net/middle"

"""`explain` names the operation, the layer and the stage for each fault, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import Stage, explain, explaining
from tests.pipeline.runtime import blocking_layers as blocking
from tests.stages.explanation.models_around import around

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.ones((4, 2), "float32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(5)


class Hue(layers.Layer):
    """An operation for which TensorFlow has no gradient."""

    def call(self, x: Any) -> Any:
        return tf.reshape(tf.raw_ops.AdjustHue(images=tf.reshape(x, (-1, 1, 1, 3)), delta=0.1), tf.shape(x))


class OneInput(layers.Layer):
    """A custom gradient that forgot what comes in."""

    def call(self, x: Any) -> Any:
        return tf.custom_gradient(lambda t: (t * 2.0, lambda upstream: None))(x)


class Compiled(layers.Layer):
    """The fault is inside of a compiled function, in a branch, in a loop."""

    @tf.function
    def call(self, x: Any) -> Any:
        def step(i: Any, t: Any) -> tuple[Any, Any]:
            return i + 1, tf.cond(i > 0, lambda: tf.floor(t), lambda: t * 2.0)

        return tf.while_loop(lambda i, t: i < 2, step, [0, x])[1]


FAULTS = {
    "stop_gradient": (blocking.Stop, "StopGradient"),
    "rounding": (blocking.Grades, "Round"),
    "comparison": (blocking.Hard, "Greater"),
    "NumPy": (blocking.ByNumPy, ".numpy()"),
    "numpy_function": (blocking.ByNumPyFunction, "numpy_function"),
    "assignment": (blocking.Memory, "AssignVariableOp"),
    "no registered gradient": (Hue, "AdjustHue"),
    "custom gradient": (OneInput, None),
}
every_fault = pytest.mark.parametrize("reason", FAULTS)


def faulty(reason: str) -> Any:
    return around(FAULTS[reason][0](name="fault"), wide=3)


# -- the reasons, in models --------------------------------------------------------------------------------------


@every_fault
def test_a_fault_is_named_with_operation_layer_and_stage(reason: str) -> None:
    operation = FAULTS[reason][1]
    found = explain(Stage(faulty(reason), name="bottom"), X, Y, loss="mean_squared_error")
    for name in ("before/kernel", "before/bias"):
        row = found.of(name)
        assert row.name == f"bottom/net/{name}"
        assert (row.status, row.reason) == ("not connected", reason)
        assert operation in (None, row.blocker.operation)
        assert (row.blocker.layer, row.blocker.stage) == ("fault", "bottom")
        assert ("blocking_layers.py" if operation not in (None, "AdjustHue") else "test_explain.py") in row.blocker.line
    assert found.of("behind/kernel").status == "connected"
    assert not found.ok


@every_fault
def test_the_verdict_is_that_of_a_plain_tape(reason: str) -> None:
    model = faulty(reason)
    found = explain(model, X)
    with tf.GradientTape() as tape:
        y = model(X, training=True)
    if reason == "no registered gradient":
        with pytest.raises(LookupError):
            tape.gradient(y, model.trainable_variables)
        assert "LookupError" in found.notes[0]
        return
    gradients = tape.gradient(y, model.trainable_variables)
    assert [row.status for row in found.rows] == ["not connected" if g is None else "connected" for g in gradients]


def test_a_fault_inside_a_compiled_function_is_found() -> None:
    row = explain(around(Compiled(name="fault")), X).of("before/kernel")
    assert (row.reason, row.blocker.operation, row.blocker.layer) == ("rounding", "Floor", "net/fault")
    assert "tf.floor(t)" in row.blocker.line


def test_an_argmax_and_what_indexes_with_it() -> None:
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, name="scores"),
            blocking.Classes(name="classes"),
            layers.Embedding(4, 2, name="words"),
        ]
    )
    found = explain(model, X)
    row = found.of("scores/kernel")
    assert (row.reason, row.blocker.operation, row.blocker.layer.split("/")[-1]) == ("argmax", "ArgMax", "classes")
    assert found.of("words/embeddings").ok


def test_a_cast_in_a_function_of_ones_own() -> None:
    w = tf.Variable([1.5, 2.5], name="w")
    row = explain(lambda: tf.reduce_sum(tf.cast(tf.cast(w, tf.int32), tf.float32))).of("w")
    assert (row.reason, row.blocker.operation, row.blocker.what) == ("cast", "Cast", "gives int32")


def test_the_one_of_two_results_that_has_no_gradient() -> None:
    """top_k gives values, which have a gradient, and places, which have none."""
    w, v = tf.Variable([1.0, 3.0, 2.0], name="w"), tf.Variable([1.0, 2.0, 3.0], name="v")

    def both() -> Any:
        values, places = tf.math.top_k(w, 2)
        return {"values": tf.reduce_sum(values), "places": tf.reduce_sum(tf.gather(v, places))}

    found = explain(both)
    assert found.of("w", target="values").ok
    row = found.of("w", target="places")
    assert (row.reason, row.blocker.operation, row.blocker.what) == ("integer result", "TopKV2", "gives int32")


def test_an_operation_that_is_declared_not_differentiable() -> None:
    w = tf.Variable([1.0, 3.0, 2.0], name="w")

    def loss() -> Any:
        return tf.cast(tf.random.stateless_categorical(w[None], 1, seed=[1, 2])[0, 0], tf.float32)

    row = explain(loss).of("w")
    assert (row.status, row.reason) == ("not connected", "not differentiable")


def test_a_number_that_two_things_share_makes_them_no_kin() -> None:
    """The target was not computed from what the tensor was made of, only scaled alike."""
    scale = tf.constant(7.0)
    w, v = tf.Variable([1.0], name="w"), tf.Variable([1.0], name="v")
    with explaining() as explanation, tf.GradientTape() as tape:
        other = w * scale
        loss = v * scale
        tape.gradient(loss, {"other": other})
    assert explanation.of("other").reason == "no dependence"


def test_a_weight_that_is_not_used() -> None:
    found = explain(around(blocking.Greedy(name="greedy")), X)
    assert found.of("greedy/used").ok
    row = found.of("greedy/spare")
    assert (row.reason, row.blockers) == ("no dependence", ())
    assert "nothing was computed from it" in row.why


def test_a_normalisation_in_front_is_not_to_blame() -> None:
    """It stops the gradient of its own mean and writes statistics, and the flow goes on past both."""
    model = around(blocking.Grades(name="fault"))
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3), layers.BatchNormalization(), layers.Dropout(0.5), model]
    )
    for row in explain(model, X).rows[:4]:
        assert row.reason == "rounding"
        assert [blocker.operation for blocker in row.blockers] == ["Round"]


def test_a_frozen_layer_is_no_fault() -> None:
    model = around(layers.BatchNormalization(name="norm"))
    model.layers[0].trainable = False
    found = explain(model, X)
    assert found.ok
    row = found.of("before/kernel")
    assert (row.status, row.reason, row.frozen) == ("connected", "trainable=False", True)
    assert not any("moving" in row.name for row in found.rows)
    assert "2 frozen" in found.summary()


def test_a_variable_that_no_tape_watches() -> None:
    step = tf.Variable(2.0, trainable=False, name="step")
    row = explain(lambda: step * step, variables=[step]).of("step")
    assert (row.status, row.reason, row.frozen) == ("not connected", "trainable=False", True)


def test_a_stateful_layer() -> None:
    rnn = layers.GRU(2, stateful=True, name="gru")
    first, second = tf.ones((1, 2, 3)), tf.ones((1, 2, 3)) * 0.5

    def second_window() -> Any:
        rnn(first)
        return tf.reduce_sum(rnn(second))

    found = explain(second_window, variables={"first": first, "second": second})
    row = found.of("first")
    assert (row.reason, row.blocker.layer) == ("stateful layer", "gru")
    assert found.of("second").ok


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_every_dtype_that_has_gradients(dtype: str) -> None:
    w, s = tf.Variable(tf.cast([1.0, 2.0], dtype), name="w"), tf.Variable(tf.cast(0.0, dtype), name="s")

    def loss() -> Any:
        left = tf.constant((w * 3.0).numpy()[0]) if dtype != "complex64" else tf.stop_gradient(w[0])
        return tf.math.real(tf.reduce_sum(s * s) + left)

    found = explain(loss)
    assert found.of("w").reason == ("stop_gradient" if dtype == "complex64" else "NumPy")
    assert found.of("s").status == "zero"


@pytest.mark.parametrize("named", [True, False])
def test_several_targets(named: bool) -> None:
    w = tf.Variable([1.0, 2.0], name="w")

    def both() -> Any:
        smooth, hard = tf.reduce_sum(w * w), tf.reduce_sum(tf.sign(w) + tf.round(w))
        return {"smooth": smooth, "hard": hard} if named else (smooth, hard)

    found = explain(both)
    assert len(found.rows) == 2
    assert found.of("w", target="smooth" if named else "target 0 of 2").ok
    hard = found.of("w", target="hard" if named else "target 1 of 2")
    assert (hard.status, hard.reason) == ("zero", "rounding")


def test_a_stage_with_a_loss_and_states() -> None:
    x = keras.Input((2, 3))
    h = keras.Input((2,))
    out, state = layers.GRU(2, return_sequences=True, return_state=True, name="gru")(x, initial_state=h)
    stage = Stage(keras.Model([x, h], [layers.Dense(1, name="out")(out), state]), "middle", states=("h",))
    found = explain(stage, np.ones((4, 2, 3), "float32"))
    assert [row.target for row in found.rows[:1]] == ["out"] and found.rows[-1].target == "h"
    assert found.of("gru_cell/kernel", target="h").ok
    assert found.of("out/kernel", target="h").reason == "no dependence"
    judged = Stage(faulty("rounding"), "top", loss="mean_squared_error")
    assert explain(judged, X, Y).of("behind/kernel", target="loss").ok
    assert explain(judged, X, Y).of("top/net/before/kernel").reason == "rounding"


# -- any model ---------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], Any]] = {
    "dense": lambda: layers.Dense(3, activation="tanh"),
    "dropout": lambda: layers.Dropout(0.5),
    "norm": lambda: layers.BatchNormalization(),
    "layer norm": lambda: layers.LayerNormalization(),
    "silu": lambda: layers.Activation("silu"),
    "stop": blocking.Stop,
    "grades": blocking.Grades,
    "hard": blocking.Hard,
    "memory": blocking.Memory,
    "numpy function": blocking.ByNumPyFunction,
    "lambda": lambda: layers.Lambda(lambda t: t[:, ::-1] * 2.0),
}


@settings(max_examples=10)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), st.booleans())
def test_random_models_have_a_tapes_verdict_and_a_known_reason(kinds: list[str], skip: bool) -> None:
    inputs = keras.Input((3,))
    tensor = layers.Dense(3)(inputs)
    for kind in kinds:
        out = BLOCKS[kind]()(tensor)
        tensor = layers.Add()([out, tensor]) if skip and kind in ("grades", "norm", "stop") else out
    model = keras.Model(inputs, tensor)
    before = [v.numpy() for v in model.variables]
    found = explain(model, X)
    for ours, now in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(ours, now.numpy())
    with tf.GradientTape() as tape:
        y = model(X, training=True)
    for row, gradient in zip(found.rows, tape.gradient(y, model.trainable_variables), strict=True):
        assert (row.status == "not connected") == (gradient is None), row
        assert row.reason != "unknown" and row.certain
        if row.status == "not connected":
            assert row.blocker is not None and row.blocker.operation in {
                *("StopGradient", "Round", "Greater", "AssignVariableOp", "numpy_function")
            }

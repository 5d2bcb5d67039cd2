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

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
Y = np.ones((4, 2), "float32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(5)


def around(layer: Any, *, shape: tuple[int, ...] = (3,), wide: int = 4) -> Any:
    """A model with a layer in the middle: what is before it should learn from what is behind it."""
    return keras.Sequential(
        [keras.Input(shape), layers.Dense(wide, name="before"), layer, layers.Dense(2, name="behind")], name="net"
    )


class PyFunction(layers.Layer):
    def call(self, x: Any) -> Any:
        out = tf.py_function(lambda t: np.tanh(t.numpy()), [x], tf.float32)
        out.set_shape(x.shape)
        return out


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
    assert "test_explain.py" in row.blocker.line
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

    assert explain(loss).of("w").reason == "no dependence"


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

"""No explanation contradicts a run with the variable changed: what moves the target is never "no dependence"."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage, explain, explaining

layers = keras.layers
WAYS: dict[str, tuple[Callable[[Any], Any], str, str]] = {}
"""{name: (variable -> target, reason of `explain`, reason of `explaining`)}."""


def way(again: str, recorded: str = "") -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def add(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        WAYS[function.__name__] = function, again, recorded or again
        return function

    return add


@way("tf.data")
def through_an_iterator(w: Any) -> Any:
    return tf.reduce_sum(next(iter(tf.data.Dataset.from_tensor_slices(w * 2.0).batch(2))) ** 2)


@way("tf.data")
def read_inside_of_a_map(w: Any) -> Any:
    data = tf.data.Dataset.range(3).map(lambda i: tf.cast(i, tf.float32) * tf.reduce_sum(w))
    return tf.add_n(list(data))


@way("hidden way", "not followed")
def from_a_generator(w: Any) -> Any:
    spec = tf.TensorSpec((), tf.float32)
    return tf.add_n(list(tf.data.Dataset.from_generator(lambda: iter([float(w[1])]), output_signature=spec)))


@way("queue")
def through_a_queue(w: Any) -> Any:
    queue = tf.queue.FIFOQueue(2, [tf.float32], shapes=[(2,)])
    queue.enqueue(w * 2.0)
    return tf.reduce_sum(queue.dequeue())


@way("table")
def through_a_table(w: Any) -> Any:
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, default_value=0.0)
    keys = tf.constant([0, 1], tf.int64)
    table.insert(keys, w * 2.0)
    return tf.reduce_sum(table.lookup(keys))


@way("hidden way", "not followed")
def closed_over_by_a_py_function(w: Any) -> Any:
    return tf.reduce_sum(tf.py_function(lambda: w * 2.0, [], tf.float32))


@way("hidden way", "not followed")
def closed_over_by_a_numpy_function(w: Any) -> Any:
    return tf.numpy_function(lambda: np.float32(w.numpy().sum()), [], tf.float32) * 1.0


@way("branch", "not followed")
def the_number_of_turns(w: Any) -> Any:
    total = tf.constant(1.0) * 1.0
    for _ in range(int(abs(w[1]) + 1)):
        total = total * 1.5
    return total


@way("Python")
def losses_in_a_list_of_numbers(w: Any) -> Any:
    return tf.reduce_sum(tf.constant([float(w[0] * 2.5), float(w[1] * 3.5)]) * 0.5)


@way("NumPy", "not followed")
def a_ufunc_of_numpy(w: Any) -> Any:
    return tf.reduce_sum(tf.constant([2.0, 3.0]) * np.exp(w * 0.1))


@way("branch", "not followed")
def turns_of_a_loop_in_a_function(w: Any) -> Any:
    @tf.function
    def powers() -> Any:
        total = tf.constant(1.0)
        for _ in tf.range(tf.cast(w[1], tf.int32)):
            total = total * 2.0
        return total

    return powers()


@way("hidden way", "not followed")
def written_to_a_file_and_read(w: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tf.io.write_file(f"{folder}/w", tf.io.serialize_tensor(w))
        return tf.reduce_sum(tf.io.parse_tensor(tf.io.read_file(f"{folder}/w"), tf.float32))


def changed(function: Callable[[Any], Any], by: float) -> float:
    return float(function(tf.Variable([1.0 + by, 2.0 + by])))


@pytest.mark.parametrize("name", WAYS)
def test_what_moves_the_target_is_never_called_no_dependence(name: str) -> None:
    function, again, recorded = WAYS[name]
    assert changed(function, 0.0) != changed(function, 3.0)
    w = tf.Variable([1.0, 2.0], name="w")
    assert explain(lambda: function(w), variables=[w]).of("w").reason == again
    with explaining() as explanation, tf.GradientTape() as tape:
        assert tape.gradient(function(w), w) is None
    row = explanation.of("w")
    assert row.reason == recorded
    assert row.blockers and row.certain == (recorded != "not followed")


def test_weights_copied_into_another_model_lead_to_its_output() -> None:
    one, two = (keras.Sequential([keras.Input((2,)), layers.Dense(2, name="d")], name=name) for name in ("a", "b"))
    x = tf.ones((1, 2))
    with explaining() as explanation, tf.GradientTape() as tape:
        two.set_weights(one.get_weights())
        tape.gradient(tf.reduce_sum(two(x)), one.trainable_variables)
    assert {row.reason for row in explanation.rows} == {"NumPy"}
    with explaining() as explanation:
        two.set_weights(one.get_weights())
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(two(x))
        tape.gradient(loss, one.trainable_variables)
    assert {row.reason for row in explanation.rows} == {"NumPy"}, "a tape around it would not help"


def test_what_was_there_before_is_no_doubt_and_a_second_run_confirms() -> None:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="used")])
    unused = tf.Variable([1.0], name="unused")
    x, y = np.ones((3, 2), "float32"), np.full((3, 2), 0.25, "float32")

    def loss() -> Any:
        tf.square(unused)
        return tf.reduce_mean(keras.losses.mean_squared_error(y, model(x)))

    with explaining() as explanation, tf.GradientTape() as tape:
        tape.gradient(loss(), [unused])
    for row in (explanation.of("unused"), explain(loss, variables=[unused]).of("unused")):
        assert (row.reason, row.certain) == ("no dependence", True)
    assert "run again" in row.why


def test_what_cannot_be_run_again_is_not_and_says_so() -> None:
    """A second run would wait for ever on the queue."""
    w, queue = tf.Variable(1.0, name="w"), tf.queue.FIFOQueue(1, [tf.float32], shapes=[()])
    queue.enqueue(3.0)
    row = explain(lambda: queue.dequeue() * 2.0, variables=[w]).of("w")
    assert (row.reason, row.certain) == ("not followed", False)
    assert "QueueDequeueV2" in row.why


def test_jacobians_and_forward_products_are_seen() -> None:
    w, x = tf.Variable([1.0, 2.0], name="w"), tf.constant([[1.0, 2.0]])
    with explaining() as explanation:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y, z = tf.stop_gradient(w) * x, w * x
        assert tape.jacobian(y, w) is None
        assert not np.any(tape.batch_jacobian(tf.round(x) * tf.stop_gradient(w), x, unconnected_gradients="zero"))
        tape.jacobian(z, {"product of": w})
        with tf.autodiff.ForwardAccumulator(w, tf.ones(2)) as forward:
            back = tf.round(w)
        assert forward.jvp(back) is None
    reasons = [(row.name, row.status, row.reason) for row in explanation.rows]
    assert reasons[0] == ("w", "not connected", "stop_gradient")
    assert reasons[1][:2] == ("x", "zero")
    assert reasons[2] == ("product of", "connected", "")
    assert reasons[3] == ("w", "not connected", "rounding")


def test_a_second_derivative_that_is_zero_by_mathematics_is_no_fault() -> None:
    w, b = tf.Variable([[1.0, 2.0]], name="w"), tf.Variable([0.5, 0.5], name="b")
    with explaining() as explanation, tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(x := tf.constant([[3.0]]))
            y = tf.reduce_sum(tf.nn.relu(x @ w + b)) + tf.reduce_sum(b)
        penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
        outer.gradient(penalty, [w, b])
    row = explanation.of("b")
    assert (row.status, row.reason) == ("zero", "second derivative")
    assert "nothing is wrong" in row.advice
    with explaining() as explanation, tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y = tf.reduce_sum(w * 3.0)
        outer.gradient(inner.gradient(y, w), w)
    row = explanation.of("w", target="target") if len(explanation.rows) < 2 else explanation.rows[-1]
    assert (row.status, row.reason) == ("not connected", "second derivative")


def test_what_another_tape_recorded_is_handed_over() -> None:
    bottom, top = Stage(keras.Sequential([keras.Input((2,)), layers.Dense(2, name="low")])), layers.Dense(1, name="up")
    top.build((None, 2))
    with explaining() as explanation:
        out = bottom.forward(np.ones((1, 2), "float32"))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(top(out))
        tape.gradient(loss, [*bottom.trainable_variables, {"out": out}])
    for name in ("low/kernel", "out"):
        row = explanation.of(name)
        assert row.reason == "another tape" and "output_gradients=" in row.advice

"""The influence map is the exact size of every block of the Jacobian, and tells "no path" from "zero here"."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import stages
from stages import influence
from stages.step_influence import influence as influence_module
from tests.levels import in_turn

layers = keras.layers


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(3)


@pytest.fixture(params=["eagerly", "in a loop", "in blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way in which rows are evaluated."""
    if request.param != "eagerly":
        monkeypatch.setattr(influence_module, "FEW_ROWS", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(influence_module._Derivatives, "_rows_that_fit", lambda _: 5)
    return request.param


def recurrent(steps: int = 3, dtype: str = "float32") -> Any:
    cell = layers.SimpleRNN(4, return_sequences=True, dtype=dtype, name="rnn")
    return keras.Sequential([keras.Input((steps, 2), dtype=dtype), cell])


def norms(jacobian: Any, rank: int, rows: Any, columns: Any) -> float:
    """The norm of a block of TensorFlow's own Jacobian: rows index its first `rank` axes."""
    block = jacobian.numpy()[rows]
    return float(np.linalg.norm(block[(slice(None),) * (rank - sum(isinstance(r, int) for r in rows)) + columns]))


# -- sizes -------------------------------------------------------------------------------------------------------


def test_sizes_are_those_worked_out_by_hand(way: str) -> None:
    """out[i] = sum over j of c[i, j] x[j]: each block is c[i, j] times the identity of batch x features."""
    batch, features = 3, 2
    c = np.array([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 3.0], [1e-30, 1.0, 0.0, 0.0]])
    found = influence(lambda x: tf.einsum("ij,bjf->bif", tf.constant(c), x), np.ones((batch, 4, features)))
    np.testing.assert_allclose(found.matrix, np.abs(c) * math.sqrt(batch * features), rtol=1e-15)
    assert found.outputs == ("output[0]", "output[1]", "output[2]")
    assert found.sources == ("input[0]", "input[1]", "input[2]", "input[3]")
    assert found.matrix.dtype == np.float64 and found.connected.all()
    np.testing.assert_array_equal(found.flows, c != 0)


@pytest.mark.parametrize("dtype", in_turn(["float32", "float64"], 1, 2))
def test_sizes_are_those_of_the_whole_jacobian(way: str, dtype: str) -> None:
    model, x = recurrent(dtype=dtype), tf.random.normal((2, 3, 2), dtype=dtype)
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        out = model(x)
    found = influence(model, x, sources=[slice(None), *model.trainable_variables])
    rows = [(slice(None), i) for i in range(3)]
    whole = tape.jacobian(out, x)
    expected = [[norms(whole, 3, row, (slice(None), j)) for j in range(3)] for row in rows]
    for variable in variables:
        whole = tape.jacobian(out, variable)
        for row, sizes in zip(rows, expected, strict=True):
            sizes.append(norms(whole, 3, row, ()))
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-6 if dtype == "float32" else 1e-12)
    assert found.sources[3:] == tuple(v.path for v in model.trainable_variables)
    # A recurrent layer sees nothing of the future, and its first step nothing of the recurrent weights.
    np.testing.assert_array_equal(found.flows[:, :3], np.tril(np.ones((3, 3), bool)))
    np.testing.assert_array_equal(found.flows[:, 4], [False, True, True])


def test_sizes_neither_vanish_nor_overflow() -> None:
    """Squares of 1e-200 and 1e200 are out of range; their norms are not."""
    for scale in (1e-200, 1e200):
        found = influence(lambda x, s=scale: x * s, np.ones((2, 2, 2)))
        np.testing.assert_allclose(np.diag(found.matrix), 2 * scale, rtol=1e-15)
        np.testing.assert_array_equal(found.flows, np.eye(2, dtype=bool))


def test_what_cancels_in_a_sum_is_seen() -> None:
    """The gradient of the sum of a softmax is zero; its derivative is not."""
    x = tf.constant([[[1.0, 2.0, 3.0]]])
    found = influence(lambda x: tf.nn.softmax(x), x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(tf.nn.softmax(x))
    assert np.abs(tape.gradient(total, x)).max() < 1e-7 < found.matrix[0, 0]


def test_not_a_number_flows() -> None:
    found = influence(lambda x: tf.pow(x, 0.5) / x, np.zeros((1, 1, 1), "float32"))
    assert found.flows.all() and np.isnan(found.matrix).all()


def test_an_embedding_adds_its_repeated_rows() -> None:
    table = tf.Variable(tf.ones((5, 2)), name="table")
    words = np.array([[1, 1, 3]], "int32")
    found = influence(lambda w: tf.reduce_sum(tf.gather(table, w), axis=1), words, outputs=[()], sources=[table])
    # Each of 2 output elements depends on word 1 twice (2) and on word 3 once: the root of 2 * (2² + 1).
    assert found.size("output", "table:0") == pytest.approx(math.sqrt(10))


# -- connected and flowing -----------------------------------------------------------------------------------------


def test_no_path_and_zero_are_told_apart() -> None:
    def function(given: Any) -> Any:
        a, b, c = given["a"], given["b"], given["c"]
        return {
            "slice": a[:, 0],
            "dead": tf.nn.relu(-tf.abs(b) - 1),
            "stopped": tf.stop_gradient(a) + b,
            "rounded": tf.cast(tf.cast(a, tf.int32), tf.float32),
            "state": tf.tanh(a + c),
        }

    given = {name: np.full((2, 3), 0.5, "float32") for name in "abc"}
    names = ["slice", "dead", "stopped", "rounded", "state"]
    found = influence(function, given, outputs=names, sources=["a", "b", "c", ("a", 0), ("a", 1), "state"])
    assert found.cells()[0][3:5] == ["1.41", "0"]
    t, f = True, False
    np.testing.assert_array_equal(
        found.connected,
        [[t, f, f, t, t, f], [f, t, f, f, f, f], [f, t, f, f, f, f], [f, f, f, f, f, f], [t, f, t, t, t, t]],
    )
    np.testing.assert_array_equal(
        found.flows,
        [[t, f, f, t, f, f], [f, f, f, f, f, f], [f, t, f, f, f, f], [f, f, f, f, f, f], [t, f, t, t, t, t]],
    )
    assert found.size("dead", "b") == 0 and found.size("dead", "a") is None
    assert "not connected" in found.explain("dead", "a")
    assert "derivative is exactly zero" in found.explain("dead", "b")
    assert "A gradient flows from state to c: the norm of the derivative is" in found.explain("state", "c")


class TwoLevels:
    """Case D: A gives IR[i] step by step; B is run steps[i] times on IR[i]."""

    def __init__(self, runs_on: bool, steps: tuple[int, ...] = (3, 4, 2)) -> None:
        self.a, self.b = layers.SimpleRNNCell(4), layers.SimpleRNNCell(4)
        self.runs_on, self.steps = runs_on, steps

    def __call__(self, x: Any) -> dict[str, Any]:
        state_a = state_b = tf.zeros((x.shape[0], 4))
        middle, out = [], []
        for i, count in enumerate(self.steps):
            state_a, _ = self.a(x[:, i], [state_a])
            middle.append(state_a)
            state_b = state_b if self.runs_on else tf.zeros_like(state_b)
            out.append([])
            for _ in range(count):
                state_b, _ = self.b(state_a, [state_b])
                out[-1].append(state_b)
        return {"IR": middle, "Out": out}


def test_out_0_1_and_out_2_0_are_connected_if_the_state_runs_on() -> None:
    """Case D4, with every pair of steps: later steps depend on all earlier ones, or on those of their own element."""
    x = tf.random.normal((2, 3, 4))
    every = [("Out", i, slice(None)) for i in range(3)]
    element = np.repeat([0, 1, 2], [3, 4, 2])
    earlier = np.tril(np.ones((9, 9), bool))
    for runs_on in (True, False):
        found = influence(TwoLevels(runs_on), x, outputs=every, sources=every)
        assert found.outputs == found.sources and found.outputs[1] == "Out[0][1]" and found.outputs[7] == "Out[2][0]"
        expected = earlier & (runs_on | (element[:, None] == element[None]))
        np.testing.assert_array_equal(found.connected, expected)
        np.testing.assert_array_equal(found.flows, expected)
        assert bool(found.size("Out[2][0]", "Out[0][1]")) is runs_on
        assert found.size("Out[0][1]", "Out[2][0]") is None
        np.testing.assert_allclose(np.diag(found.matrix), math.sqrt(2 * 4))


@pytest.mark.parametrize("runs_on", [True, False])
def test_two_outputs_have_a_common_cause_in_the_lower_model(runs_on: bool) -> None:
    """Through A's state Out[2][0] learns from all elements of x, also if B's state is reset."""
    found = influence(TwoLevels(runs_on), tf.random.normal((2, 3, 4)), outputs=[("Out", 0, 1), ("Out", 2, 0)])
    np.testing.assert_array_equal(found.flows, [[True, False, False], [True, True, True]])
    model = TwoLevels(runs_on)
    found = influence(model, tf.random.normal((2, 3, 4)), outputs=[("Out", 0, 1)], sources=[("IR", slice(None))])
    np.testing.assert_array_equal(found.connected, [[True, False, False]])


def test_one_pair_is_tensorflows_own_derivative() -> None:
    """d Out[2][0] / d Out[0][1]: the product of B's steps in between, evaluated by hand."""
    model, x = TwoLevels(True), tf.random.normal((1, 3, 4))
    found = influence(model, x, outputs=[("Out", 2, 0)], sources=[("Out", 0, 1)])
    returned = model(x)
    states = [state.numpy()[0].astype(np.float64) for row in returned["Out"] for state in row]
    product = np.eye(4)
    for state in states[2:8]:  # h' = tanh(IR kernel + h recurrent + bias): dh'/dh = diag(1 - h'²) recurrentᵀ
        product = np.diag(1 - state**2) @ model.b.recurrent_kernel.numpy().astype(np.float64).T @ product
    assert found.matrix[0, 0] == pytest.approx(np.linalg.norm(product), rel=1e-5)


def test_a_padded_tensor_has_the_same_steps(way: str) -> None:
    """(0, 1) indexes a tensor (batch, elements, longest, units) from its axis 1; padding depends on nothing."""
    model, x = TwoLevels(True), tf.random.normal((2, 3, 4))

    def padded(x: Any) -> Any:
        rows = [row + [tf.zeros((2, 4))] * (4 - len(row)) for row in model(x)["Out"]]
        return tf.stack([tf.stack(row, axis=1) for row in rows], axis=1)

    found = influence(padded, x, outputs=[(0, 1), (2, 0), (0, 3), (2, slice(2, None))])
    assert found.outputs == ("output[0][1]", "output[2][0]", "output[0][3]", "output[2][2]", "output[2][3]")
    alone = influence(model, x, outputs=[("Out", 0, 1), ("Out", 2, 0)])
    np.testing.assert_allclose(found.matrix[:2], alone.matrix, rtol=1e-5)
    assert not found.flows[2:].any() and found.connected.all()
    leading = influence(lambda x: tf.transpose(padded(x), (1, 2, 0, 3)), x, outputs=[(0, 1), (2, 0)], output_axis=0)
    np.testing.assert_allclose(leading.matrix, alone.matrix, rtol=1e-5)


def test_a_source_that_was_returned_is_direct_if_stacked_and_total_if_not() -> None:
    """Steps of a stacked tensor hold each other fixed; steps in a list carry what goes on from step to step."""
    w = tf.constant(0.5)

    def function(x: Any) -> dict[str, Any]:
        first = x[:, 0]
        second = w * first
        stacked = tf.stack([first, second], axis=1)
        return {"steps": [first, second], "stacked": stacked, "sum": tf.reduce_sum(stacked, axis=1)}

    x = np.ones((1, 2, 1), "float32")
    found = influence(function, x, outputs="sum", sources=[("steps", slice(None)), ("stacked", slice(None))])
    np.testing.assert_allclose(found.matrix, [[1.5, 1.0, 1.0, 1.0]])


# -- windows -------------------------------------------------------------------------------------------------------


def test_the_map_shows_where_a_stateful_layer_stops_the_gradient() -> None:
    """Between two calls of a stateful layer the state is a variable: values go on, gradients do not (case B)."""
    layer = layers.SimpleRNN(4, return_sequences=True, stateful=True)
    layer.build((2, 3, 4))
    x = tf.random.normal((2, 6, 4))

    def windows(given: Any) -> Any:
        layer.reset_state()
        first, second = given if isinstance(given, list) else (given[:, :3], given[:, 3:])
        return [layer(first), layer(second)]

    steps = [(window, slice(None)) for window in range(2)]
    found = influence(windows, x, outputs=steps)
    within = np.kron(np.eye(2), np.tril(np.ones((3, 3)))).astype(bool)
    np.testing.assert_array_equal(found.flows, within)
    apart = influence(windows, [x[:, :3], x[:, 3:]], outputs=steps)
    np.testing.assert_array_equal(apart.flows, within)
    np.testing.assert_array_equal(apart.connected, np.kron(np.eye(2), np.ones((3, 3))).astype(bool))
    assert apart.sources[0] == "input[0][0]" and apart.size("output[1][0]", "input[0][2]") is None
    assert found.size("output[1][0]", "input[2]") == 0  # one tensor in two slices: connected, and nothing flows

    handed = influence(lambda x: _handed_over(layer.cell, x), x, outputs=range(6))
    np.testing.assert_array_equal(handed.flows, np.tril(np.ones((6, 6), bool)))
    np.testing.assert_allclose(handed.matrix[within], found.matrix[within], rtol=1e-5)


def _handed_over(cell: Any, x: Any) -> list[Any]:
    """The same two windows, the state handed over as a tensor."""
    state, out = tf.zeros((2, 4)), []
    for window in (x[:, :3], x[:, 3:]):
        for t in range(3):
            state, _ = cell(window[:, t], [state])
            out.append(state)
    return out


def test_a_truncated_gradient_shows_as_a_band() -> None:
    cell = layers.SimpleRNNCell(3)

    def truncated(x: Any) -> list[Any]:
        state, out = tf.zeros((1, 3)), []
        for t in range(6):
            state, _ = cell(x[:, t], [tf.stop_gradient(state) if t in (2, 4) else state])
            out.append(state)
        return out

    found = influence(truncated, tf.random.normal((1, 6, 2)))
    np.testing.assert_array_equal(found.flows, np.kron(np.eye(3), np.tril(np.ones((2, 2)))).astype(bool))


def test_an_initial_state_is_a_source() -> None:
    layer = layers.SimpleRNN(3, return_sequences=True, return_state=True)
    layer.build((1, 4, 2))

    def function(given: Any) -> dict[str, Any]:
        out, last = layer(given["x"], initial_state=given["h"])
        return {"out": out, "h": last}

    given = {"x": tf.random.normal((1, 4, 2)), "h": tf.random.normal((1, 3))}
    found = influence(function, given, outputs=[("out", slice(None)), "h"], sources=[("input", "h"), ("x", -1)])
    assert found.outputs[-1] == "output.h" and found.sources == ("input.h", "x[3]")
    assert found.flows[:, 0].all() and found.flows[:, 1].tolist() == [False, False, False, True, True]
    assert (np.diff(found.matrix[:4, 0]) < 0).all()  # forgetting


def test_a_compiled_function_is_looked_into() -> None:
    """In one compiled call there would be no path from one output to another."""

    @tf.function
    def compiled(x: Any) -> Any:
        first = tf.tanh(x)
        return [first, tf.sin(first), tf.cos(x)]

    assert not tf.config.functions_run_eagerly()
    found = influence(compiled, np.ones((1, 2), "float32"), outputs=[(0,), (1,), (2,)], sources=[("output", 0)])
    np.testing.assert_array_equal(found.connected[:, 0], [True, True, False])
    assert not tf.config.functions_run_eagerly()
    with pytest.raises(ZeroDivisionError):
        influence(lambda x: 1 / 0, np.ones((1, 1)))
    assert not tf.config.functions_run_eagerly()


# -- variables and state -------------------------------------------------------------------------------------------


def test_variables_by_path_or_themselves_trainable_or_not() -> None:
    x = keras.Input((3,))
    h = layers.BatchNormalization(name="norm")(layers.Dense(2, name="low")(x))
    model = keras.Model(x, {"a": layers.Dense(2, name="a")(h), "b": layers.Dense(2, name="b")(h)})
    model.get_layer("low").trainable = False
    kernels = ["low/kernel", "norm/moving_mean", "a/kernel", model.get_layer("b").kernel]
    found = influence(model, tf.random.normal((4, 3)), outputs=["a", "b"], sources=kernels)
    assert found.sources == ("low/kernel", "norm/moving_mean", "a/kernel", "b/kernel")
    np.testing.assert_array_equal(found.connected, [[True, True, True, False], [True, True, False, True]])
    with pytest.raises(ValueError, match="'bias' is the name of the variable low/bias and of the variable a/bias and"):
        influence(model, tf.random.normal((4, 3)), outputs="a", sources="bias")
    training = influence(model, tf.random.normal((4, 3)), outputs="a", sources="norm/moving_mean", training=True)
    assert not training.flows.any()  # statistics of the batch are used instead


def test_variables_of_a_plain_function() -> None:
    used, frozen, other = tf.Variable(2.0), tf.Variable(3.0, trainable=False), tf.Variable(1.0)
    found = influence(lambda x: used * x + frozen, np.ones((1, 1), "float32"), sources=[used, frozen, other, 0])
    assert found.cells() == [["1", "1", "none", "2"]]
    assert found.sources == ("Variable:0", "Variable:0#2", "Variable:0#3", "input[0]")


def test_a_models_own_state_is_put_back() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)])
    before = [v.numpy() for v in model.non_trainable_variables]
    first = influence(model, np.arange(12.0, dtype="float32").reshape(4, 3), training=True)
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    again = influence(model, np.arange(12.0, dtype="float32").reshape(4, 3), training=True)
    np.testing.assert_array_equal(first.matrix, again.matrix)  # the same dropout mask
    with pytest.raises(ValueError, match="no 'x'"):
        influence(model, np.ones((4, 3), "float32"), outputs="x", training=True)
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_integers_are_no_default_source_or_output() -> None:
    given = {"words": np.array([[1, 2]], "int32"), "x": np.ones((1, 2), "float32")}
    found = influence(lambda g: {"n": g["words"] + 1, "y": tf.cast(g["words"], tf.float32) * g["x"]}, given)
    assert found.outputs == ("y",) and found.sources == ("x",)
    np.testing.assert_allclose(found.matrix, [[math.sqrt(5)]])


def test_the_function_is_exported_and_is_no_module() -> None:
    assert stages.influence is influence is influence_module.influence

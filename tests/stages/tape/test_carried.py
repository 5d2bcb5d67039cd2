"""States handed from window to window: equal to one tape over the same windows and to the full length."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import HandoffError, Stage
from stages.tape.contract import PassKey

layers = keras.layers
STEPS, FEATURES, UNITS = 6, 3, 4
MODES = pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])


def cell_model(dtype: str = "float32", regularizer: Any = None) -> Any:
    """x (n, time, 3), h (n, 4) → y (n, time, 4), h': a SimpleRNN with its state outside, and a Dense on every step."""
    x, h = keras.Input((None, FEATURES), dtype=dtype), keras.Input((UNITS,), dtype=dtype)
    rnn = layers.SimpleRNN(
        UNITS, return_sequences=True, return_state=True, kernel_regularizer=regularizer, dtype=dtype, name="rnn"
    )
    y, last = rnn(x, initial_state=h)
    return keras.Model([x, h], [layers.Dense(UNITS, dtype=dtype, name="dense")(y), last])


def data(samples: int = 5, dtype: str = "float32") -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return tuple(random.normal(size=(samples, STEPS, n)).astype(dtype) for n in (FEATURES, UNITS))


def handed(model: Any, x: Any, y: Any, windows: int, **options: Any) -> tuple[list[Any], Stage, Any]:
    """dL/dvariables and dL/dx of L = sum((f(x) - y) ** 2), one window after the other."""
    stage = Stage(model, states=("h",), **options)
    xs, ys = np.split(x, windows, axis=1), np.split(y, windows, axis=1)
    outs = [stage.forward(part, window=w) for w, part in enumerate(xs)]
    dx: list[Any] = [None] * windows
    for w in reversed(range(windows)):
        dx[w] = stage.backward(2 * (outs[w] - ys[w]), window=w)
    return list(stage.gradients().values()), stage, np.concatenate(dx, axis=1)


def full_length(model: Any, x: Any, y: Any) -> list[Any]:
    """The same by one tape over the whole sequence, dL/dx last."""
    source, h = tf.constant(x), tf.zeros((len(x), UNITS), x.dtype)
    with tf.GradientTape() as tape:
        tape.watch(source)
        loss = tf.reduce_sum((model([source, h])[0] - y) ** 2)
    return [np.asarray(g) for g in tape.gradient(loss, [*(v.value for v in model.trainable_variables), source])]


@pytest.mark.parametrize("windows", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("dtype", "allowed", "run_eagerly"), [("float32", 1e-6, True), ("float32", 1e-6, False), ("float64", 1e-12, True)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_windows_are_the_full_length(
    windows: int, dtype: str, allowed: float, recompute: bool, run_eagerly: bool
) -> None:
    x, y = data(dtype=dtype)
    model = cell_model(dtype)
    found, _, dx = handed(model, x, y, windows, run_eagerly=run_eagerly, recompute=recompute)
    expected = full_length(model, x, y)
    largest = max(np.abs(g).max() for g in expected)
    for ours, theirs in zip([*found, dx], expected, strict=True):
        assert np.abs(ours - theirs).max() <= allowed * largest


@pytest.mark.parametrize("windows", range(1, 7))
def test_windows_are_one_tape_over_the_same_windows_bit_for_bit(windows: int) -> None:
    """Each window reads the variables once more, and later windows are added first, as back-propagation meets them."""
    x, y = data()
    x, y = np.repeat(x, windows, axis=1)[:, : windows * 2], np.repeat(y, windows, axis=1)[:, : windows * 2]
    model = cell_model()
    found, _, _ = handed(model, x, y, windows)
    variables = model.trainable_variables
    h = tf.zeros((len(x), UNITS))
    total, reads = tf.zeros(()), []
    with tf.GradientTape() as tape:
        for xs, ys in zip(np.split(x, windows, axis=1), np.split(y, windows, axis=1), strict=True):
            reads.append([tf.identity(v.value) for v in variables])
            before = [v._value for v in variables]
            for v, read in zip(variables, reads[-1], strict=True):
                v._value = read
            out, h = model([tf.constant(xs), h])
            for v, old in zip(variables, before, strict=True):
                v._value = old
            total = total + tf.reduce_sum((out - ys) ** 2)
    parts = tape.gradient(total, reads)
    expected = parts[-1]
    for part in reversed(parts[:-1]):
        expected = [a + b for a, b in zip(expected, part, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@MODES
def test_given_and_final_states_and_their_gradients(run_eagerly: bool) -> None:
    """Case E1: a loss on the final state reaches the cell and the initial state, and not the dense layer: None."""
    x, _ = data()
    start = np.random.default_rng(1).normal(size=(5, UNITS)).astype("float32")
    model = cell_model()
    stage = Stage(model, states=("h",), run_eagerly=run_eagerly)
    for w, part in enumerate(np.split(x, 3, axis=1)):
        stage.forward(part, window=w, state=[start] if w == 0 else None)
    (final,) = stage.state()
    for w in reversed(range(3)):
        stage.backward(None, window=w, state_gradient=[2 * final] if w == 2 else None)
    source, h = tf.constant(x), tf.constant(start)
    with tf.GradientTape() as tape:
        tape.watch(h)
        loss = tf.reduce_sum(model([source, h])[1] ** 2)
    *expected, dh = tape.gradient(loss, [*(v.value for v in model.trainable_variables), h])
    found = list(stage.gradients().values())
    assert [g is None for g in found] == [g is None for g in expected] == [False, False, False, True, True]
    for ours, theirs in zip([*found[:3], *stage.initial_state_gradients()], [*expected[:3], dh], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@MODES
def test_microbatches_have_states_of_their_own(run_eagerly: bool) -> None:
    """Forward and backward of two microbatches interleaved; the sum is that of the whole batch."""
    x, y = data(5)
    model = cell_model()
    stage = Stage(model, states=("h",), run_eagerly=run_eagerly)
    rows = [slice(0, 2), slice(2, 5)]
    outs = {}
    for w in range(2):
        for k in (1, 0):
            outs[k, w] = stage.forward(np.split(x[rows[k]], 2, axis=1)[w], microbatch=k, window=w)
    for w in (1, 0):
        for k in (0, 1):
            target = np.split(y[rows[k]], 2, axis=1)[w]
            stage.backward(2 * (outs[k, w] - target), microbatch=k, window=w)
    for ours, theirs in zip(stage.gradients().values(), full_length(model, x, y), strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@MODES
def test_a_weight_regulariser_counts_once_in_all_windows(run_eagerly: bool) -> None:
    x, y = data()
    gradients = {}
    for regularizer in (None, "l2"):
        keras.utils.set_random_seed(3)
        model = cell_model(regularizer=regularizer)
        for windows in (1, 3):
            found, _, _ = handed(model, x, y, windows, run_eagerly=run_eagerly)
            gradients[regularizer, windows] = found[0]
    kernel = model.get_layer("rnn").trainable_variables[0].numpy()
    for windows in (1, 3):
        added = gradients["l2", windows] - gradients[None, windows]
        np.testing.assert_allclose(added, 2 * 0.01 * kernel, rtol=1e-3, atol=1e-4)


@MODES
@pytest.mark.parametrize("recompute", [False, True])
def test_bug_a_recomputed_regulariser_is_told_once_in_all_windows(run_eagerly: bool, recompute: bool) -> None:
    """The own losses that windows report add up to the regulariser; recomputing eagerly reported it in each."""
    x, _ = data()
    model = cell_model(regularizer="l2")
    stage = Stage(model, states=("h",), run_eagerly=run_eagerly, recompute=recompute)
    parts = np.split(x, 3, axis=1)
    told = [stage.forward_flat([tf.constant(part)], PassKey(0, w), True).own_loss for w, part in enumerate(parts)]
    kernel = model.get_layer("rnn").trainable_variables[0].numpy()
    np.testing.assert_allclose(sum(float(one) for one in told if one is not None), 0.01 * (kernel**2).sum(), rtol=1e-5)


@MODES
def test_evaluation_hands_states_over_on_a_way_of_its_own(run_eagerly: bool) -> None:
    x, _ = data()
    model = cell_model()
    stage = Stage(model, states=("h",), run_eagerly=run_eagerly)
    stage.forward(x[:, :3])
    outs = [stage.forward(part, training=False, window=w) for w, part in enumerate(np.split(x, 2, axis=1))]
    whole, last = model([tf.constant(x), tf.zeros((5, UNITS))])
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stage.state(training=False)[0], last, rtol=1e-5, atol=1e-6)
    stage.backward(np.ones((5, 3, UNITS), "float32"))  # the training one still waits for its backward


def growing() -> Any:
    x, h = keras.Input((None, FEATURES)), keras.Input((None,))
    return keras.Model([x, h], [x * 1.0, layers.Concatenate()([h, h])])


WRONG = {
    "a window left out": (
        lambda s, x: (s.forward(x), s.forward(x, window=2)),
        "handed over by window 1, the last.* is 0",
    ),
    "no first window": (lambda s, x: s.forward(x, window=1), "the last window that went forward is none"),
    "backward out of order": (
        lambda s, x: (s.forward(x), s.forward(x, window=1), s.backward(np.zeros((5, 6, 4), "float32"))),
        "backward of microbatch 0, window 0: window 1 has not gone backward yet",
    ),
    "states to a later window": (
        lambda s, x: (s.forward(x), s.forward(x, window=1, state=[np.zeros((5, 4))])),
        "given to window 0 only",
    ),
    "a wrong initial shape": (
        lambda s, x: s.forward(x, state=[np.zeros((5, 3))]),
        r"initial state 'h' must have the shape \(5, 4\), received float32 \(5, 3\)",
    ),
    "too many initial states": (lambda s, x: s.forward(x, state=[0, 0]), r"carries 1 state\(s\) \(h\), received 2"),
    "a gradient too many": (
        lambda s, x: (s.forward(x), s.backward(None, state_gradient=[None, None])),
        r"expected 1 state gradient\(s\) \(h\), received 2",
    ),
    "a final gradient too early": (
        lambda s, x: (
            s.forward(x),
            s.forward(x, window=1),
            s.backward(None, window=1),
            s.backward(None, state_gradient=[np.zeros((5, 4), "float32")]),
        ),
        "belongs to the last window, 1",
    ),
    "no state yet": (lambda s, x: s.state(), "no window of microbatch 0 went forward yet"),
    "no initial gradient yet": (lambda s, x: (s.forward(x), s.initial_state_gradients()), "has not gone backward yet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told(case: str) -> None:
    act, message = WRONG[case]
    stage = Stage(cell_model(), name="low", states=("h",))
    with pytest.raises(HandoffError, match=f"stage 'low'.*{message}"):
        act(stage, data()[0])


def test_a_state_keeps_its_shape() -> None:
    x, h = keras.Input((None, FEATURES)), keras.Input((2,))
    wider = keras.Model([x, h], [x * 1.0, layers.Concatenate()([h, h])])
    with pytest.raises(HandoffError, match=r"'h' came in as float32 \(5, 2\) and went out as float32 \(5, 4\)"):
        Stage(wider, states=("h",)).forward(data()[0])
    with pytest.raises(HandoffError, match=r"'h' has a free size, .*give the initial state"):
        Stage(growing(), states=("h",)).forward(data()[0])


def test_what_has_no_states_says_so() -> None:
    plain = Stage(keras.Sequential([keras.Input((2,)), layers.Dense(2)]))
    with pytest.raises(HandoffError, match=r"carries no states; make it with Stage\(model, states="):
        plain.forward(np.zeros((1, 2), "float32"), state=[np.zeros((1, 2))])
    with pytest.raises(HandoffError, match="carries no states"):
        plain.state()
    with pytest.raises(HandoffError, match="takes them behind its inputs"):
        Stage(plain.model, states=("h",))

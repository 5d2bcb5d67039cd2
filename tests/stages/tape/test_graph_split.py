"""A traced function cut in two computes what it computed whole, and each operation runs on its side of the cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.tape.graph_split import SplitFunctions, Traced, split_functions

X = tf.TensorSpec((None, 3), tf.float32)


def split(function: Callable[..., Any], sources: Sequence[Any], signature: Sequence[Any] = (X,)) -> SplitFunctions:
    """Cut `function` and its gradient with respect to its inputs and `sources`."""

    def joint(*inputs: Any) -> Traced:
        with tf.GradientTape() as tape:
            tape.watch([x for x in inputs if x.dtype.is_floating])
            y = function(*inputs)
        seed = tf.compat.v1.placeholder(y.dtype, y.shape)
        floating = [x for x in inputs if x.dtype.is_floating]
        found = tape.gradient(y, [*floating, *sources], output_gradients=seed)
        return Traced([y], [seed], [None if g is None else tf.convert_to_tensor(g) for g in found])

    return split_functions(joint, signature, lambda gradients: [g for g in gradients if g is not None])


def values(*shape: int, seed: int = 0) -> Any:
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def whole(function: Callable[..., Any], inputs: Sequence[Any], sources: Sequence[Any], seed: Any) -> tuple[Any, Any]:
    with tf.GradientTape() as tape:
        tape.watch([x for x in inputs if x.dtype.is_floating])
        y = function(*inputs)
    floating = [x for x in inputs if x.dtype.is_floating]
    found = tape.gradient(y, [*floating, *sources], output_gradients=seed)
    return y, [g for g in found if g is not None]


def assert_halves_are_the_whole(
    function: Callable[..., Any], sources: Sequence[Any], inputs: Sequence[Any], signature: Sequence[Any] = (X,)
) -> SplitFunctions:
    halves = split(function, sources, signature)
    y, *kept = halves.forward(*inputs)
    seed = values(*y.shape, seed=9)
    expected, gradients = whole(function, inputs, sources, seed)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    found = halves.backward(*kept, seed)
    assert len(found) == len(gradients) > 0
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, tf.convert_to_tensor(b), rtol=1e-5, atol=1e-6)
    return halves


def test_the_halves_are_the_whole() -> None:
    """Products, branches, reshapes by the batch's size, and a part that no gradient needs."""
    w = tf.Variable(values(3, 4, seed=1))

    def function(x: Any) -> Any:
        h = tf.tanh(tf.matmul(x, w))
        flat = tf.reshape(h, (tf.shape(x)[0] * 2, 2))
        return tf.reshape(tf.square(flat), (-1, 4)) + tf.round(h)

    for rows in (5, 2):
        assert_halves_are_the_whole(function, [w], [values(rows, 3)])


def test_a_loop_is_cut_too() -> None:
    """A while loop, as recurrent layers make it: its gradient is a loop in the backward half."""
    w = tf.Variable(values(3, 3, seed=1))

    def function(x: Any) -> Any:
        _, h = tf.while_loop(lambda i, _: i < 4, lambda i, h: (i + 1, tf.tanh(tf.matmul(h, w))), (0, x))
        return h

    assert_halves_are_the_whole(function, [w], [values(5, 3)])


def test_integers_are_kept_as_integers() -> None:
    """Indices that the backward half reads cross with their values, though int32 cannot leave a function directly."""
    table = tf.Variable(values(6, 2, seed=1))
    words = tf.constant([[0, 5, 5], [1, 2, 0]], tf.int32)

    def function(x: Any) -> Any:
        return tf.square(tf.gather(table, x + 0))

    halves = split(function, [table], [tf.TensorSpec((None, 3), tf.int32)])
    y, *kept = halves.forward(words)
    seed = values(*y.shape)
    (found,) = halves.backward(*kept, seed)
    with tf.GradientTape() as tape:
        y = function(words)
    expected = tape.gradient(y, table, output_gradients=seed)
    np.testing.assert_allclose(found, tf.convert_to_tensor(expected), rtol=1e-5, atol=1e-6)
    assert tf.int32 in {tensor.dtype for tensor in halves.kept}


def test_the_backward_half_has_no_forward_work() -> None:
    """Rule 1: what does not depend on a seed is not computed again; what only the forward half needs is not kept."""
    w = tf.Variable(values(3, 3, seed=1))
    runs = tf.Variable(0)

    def function(x: Any) -> Any:
        runs.assign_add(1)
        return tf.exp(tf.matmul(x, w)) + tf.reduce_sum(tf.sin(tf.stop_gradient(x)))

    halves = split(function, [w])
    runs.assign(0)
    x = values(5, 3)
    y, *kept = halves.forward(x)
    assert int(runs) == 1
    halves.backward(*kept, tf.ones_like(y))
    assert int(runs) == 1
    kinds = {tensor.op.type for tensor in halves.kept}
    assert "Sin" not in kinds and "Sum" not in kinds
    assert "Exp" in kinds, "the derivative of exp is its value"


def test_backward_uses_the_weights_of_its_forward() -> None:
    """Rule 3: values of variables are kept, so an update in between changes nothing."""
    w = tf.Variable(values(3, 2, seed=1))
    old = w.numpy()
    halves = split(lambda x: tf.matmul(x, w), [w])
    y, *kept = halves.forward(values(4, 3))
    w.assign(w * 10)
    dx, _ = halves.backward(*kept, tf.ones_like(y))
    np.testing.assert_allclose(dx, np.ones((4, 2), "float32") @ old.T, rtol=1e-6)


def test_random_numbers_are_drawn_once() -> None:
    """Rule 4: the mask of the forward half is the one that the backward half applies."""
    state = tf.Variable([1, 2], dtype=tf.int64)

    def function(x: Any) -> Any:
        mask = tf.random.stateless_uniform(tf.shape(x), tf.cast(state, tf.int32)) > 0.5
        state.assign_add([1, 1])
        return tf.where(mask, x * 2, 0)

    halves = split(function, [])
    state.assign([1, 2])
    masks = []
    for _ in range(2):
        y, *kept = halves.forward(tf.ones((8, 3)))
        (dx,) = halves.backward(*kept, tf.ones_like(y))
        np.testing.assert_array_equal(dx, y)
        masks.append(y.numpy())
    np.testing.assert_array_equal(state, [3, 4])
    assert not np.array_equal(*masks)


def test_microbatches_do_not_share_what_they_keep() -> None:
    """Two forwards before two backwards, the later first."""
    w = tf.Variable(values(3, 2, seed=1))
    halves = split(lambda x: tf.tanh(tf.matmul(x, w)), [w])
    inputs = [values(4, 3, seed=2), values(2, 3, seed=3)]
    opened = [halves.forward(x) for x in inputs]
    for x, (y, *kept) in reversed(list(zip(inputs, opened, strict=True))):
        dx, dw = halves.backward(*kept, tf.ones_like(y))
        _, (ex, ew) = whole(lambda x: tf.tanh(tf.matmul(x, w)), [x], [w], tf.ones_like(y))
        np.testing.assert_allclose(dx, ex, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dw, ew, rtol=1e-5, atol=1e-6)

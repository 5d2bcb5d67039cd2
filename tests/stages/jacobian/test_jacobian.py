"""The chain rule with full Jacobians equals one tape, whatever the layers, and says what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages.errors import HandoffError
from stages.jacobian.chain_rule import ChainRule, chain_rule
from tests.levels import in_turn

layers = keras.layers


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(7)


def model(*parts: Any, shape: tuple[int | None, ...], dtype: str = "float32") -> Any:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *parts])


def one_tape(segments: list[Any], x: Any, loss: Callable[[Any], Any]) -> tuple[float, list[list[Any]], Any]:
    """L, dL/dvariables of every segment and dL/dx from one tape over everything, random state as before."""
    state = [v for s in segments for v in s.non_trainable_variables]
    before = [v.numpy() for v in state]
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch([x] if x.dtype.is_floating else [])
        y = x
        for segment in segments:
            y = segment(y, training=True)
        total = loss(y)
        for own in (own for segment in segments for own in segment.losses):
            total += tf.cast(own, total.dtype)
    sources = [[v.value for v in segment.trainable_variables] for segment in segments]
    found, dx = tape.gradient(total, (sources, x), unconnected_gradients="none")
    for variable, old in zip(state, before, strict=True):
        variable.assign(old)
    return float(total), found, dx


def assert_agrees(result: ChainRule, segments: list[Any], expected: list[list[Any]], tolerance: float) -> None:
    dense = [[None if g is None else np.array(tf.convert_to_tensor(g)) for g in part] for part in expected]
    largest = max(np.abs(g).max() for part in dense for g in part if g is not None)
    assert largest > 0
    for segment, found, wanted in zip(segments, result.segments, dense, strict=True):
        assert list(found.gradients) == [v.path for v in segment.trainable_variables]
        for (path, ours), theirs in zip(found.gradients.items(), wanted, strict=True):
            assert (ours is None) == (theirs is None), path
            if ours is not None:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, path
                assert np.abs(ours - theirs).max() <= tolerance * largest, path


def founding_case() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    segments = [
        model(layers.Conv2D(6, 2, activation="relu"), shape=(10, 10, 1)),
        model(layers.Conv2D(6, 2, activation="relu"), shape=(9, 9, 6)),
        model(layers.Flatten(), layers.Dense(1, activation="sigmoid"), shape=(8, 8, 6)),
    ]
    x = np.random.uniform(size=(3, 10, 10, 1)).astype("float32")
    y = np.array([[0.0], [1.0], [1.0]], "float32")
    return segments, x, lambda out: tf.reduce_mean((out - y) ** 2)


def normalised() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    """The middle segment looks across the batch."""
    segments = [
        model(layers.Dense(5, activation="tanh"), shape=(4,)),
        model(layers.Dense(6), layers.BatchNormalization(), layers.ReLU(), shape=(5,)),
        model(layers.Dense(2), shape=(6,)),
    ]
    x = np.random.normal(size=(6, 4)).astype("float32")
    y = np.random.normal(size=(6, 2)).astype("float32")
    return segments, x, lambda out: tf.reduce_mean((out - y) ** 2)


def recurrent() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    """A mask made by the first segment reaches the second; some ids occur twice."""
    segments = [
        model(layers.Embedding(9, 4, mask_zero=True), shape=(5,), dtype="int32"),
        model(layers.GRU(3, return_sequences=True), layers.LSTM(4), shape=(5, 4)),
        model(layers.Dense(3, activation="softmax"), shape=(4,)),
    ]
    x = np.array([[1, 2, 2, 0, 0], [3, 1, 8, 4, 0], [5, 5, 5, 5, 5]], "int32")
    y = np.array([0, 2, 1])
    cross_entropy = keras.losses.SparseCategoricalCrossentropy()
    return segments, x, lambda out: cross_entropy(y, out)


def attention() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    given = keras.Input((4, 6))
    mixed = layers.LayerNormalization()(given + layers.MultiHeadAttention(2, 3)(given, given))
    segments = [
        model(layers.Dense(6, activation="gelu"), layers.Dropout(0.4), shape=(4, 5)),
        keras.Model(given, mixed),
        model(layers.GlobalAveragePooling1D(), layers.Dense(1), shape=(4, 6)),
    ]
    x = np.random.normal(size=(3, 4, 5)).astype("float32")
    return segments, x, lambda out: tf.reduce_sum(out**2)


def with_own_losses() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    segments = [
        model(layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l1"), shape=(3,)),
        model(layers.Dense(4, activity_regularizer="l2"), layers.ReLU(), shape=(4,)),
        model(layers.Dense(1, bias_regularizer="l2"), shape=(4,)),
    ]
    x = np.random.normal(size=(4, 3)).astype("float32")
    return segments, x, lambda out: tf.reduce_mean(out**2)


def pooled() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    segments = [
        model(layers.Conv2D(4, 3, padding="same", activation="relu"), layers.MaxPooling2D(2), shape=(6, 6, 2)),
        model(layers.DepthwiseConv2D(2), layers.AveragePooling2D(2), layers.Flatten(), shape=(3, 3, 4)),
        model(layers.Dense(2), shape=(4,)),
    ]
    x = np.random.normal(size=(2, 6, 6, 2)).astype("float32")
    return segments, x, lambda out: tf.reduce_sum(out**2)


# Keras warns, cut or not, that the second Sequential does not hand the mask on.
masked = pytest.mark.filterwarnings("ignore:.*does not support masking")
CASES = [founding_case, normalised, attention, with_own_losses, pooled, pytest.param(recurrent, marks=masked)]


@pytest.mark.parametrize("blocked", in_turn([False, True], 1, 2))
@pytest.mark.parametrize("case", in_turn(list(CASES), 5, 6))
def test_equals_one_tape(case: Callable[[], Any], blocked: bool) -> None:
    segments, x, loss = case()
    total, expected, dx = one_tape(segments, x, loss)
    # 2 MiB makes several blocks of rows where there are enough of them.
    limit = 1 << 21 if blocked else None
    result = chain_rule(segments, x, loss, blocked=blocked, memory_limit=limit, input_gradient=True)
    assert_agrees(result, segments, expected, 1e-6)
    assert result.loss == pytest.approx(total, rel=1e-6)
    (found,) = result.segments[0].input_gradients
    assert (found is None) == (dx is None)
    if found is not None:
        assert np.abs(found - dx).max() <= 1e-6 * np.abs(dx).max()
    assert all((segment.blocks > 0) == blocked for segment in result.segments)


def test_several_blocks_are_added_up() -> None:
    segments, x, loss = founding_case()
    _, expected, _ = one_tape(segments, x, loss)
    result = chain_rule(segments, x, loss, blocked=True, memory_limit=1 << 19)
    bottom, middle, top = (segment.blocks for segment in result.segments)
    assert bottom > 3 and middle > 3
    assert top == 2  # one for its weights, one for its input
    assert_agrees(result, segments, expected, 1e-6)


@pytest.mark.parametrize("blocked", [False, True])
def test_equals_one_tape_to_rounding_in_double_precision(blocked: bool) -> None:
    old = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        segments = [
            model(layers.Conv2D(4, 2, activation="tanh"), shape=(6, 6, 1), dtype="float64"),
            model(layers.BatchNormalization(), layers.Conv2D(3, 2), shape=(5, 5, 4), dtype="float64"),
            model(layers.Flatten(), layers.Dense(1, activation="sigmoid"), shape=(4, 4, 3), dtype="float64"),
        ]
    finally:
        keras.config.set_dtype_policy(old)
    x = np.random.uniform(size=(4, 6, 6, 1))
    y = np.array([[0.0], [1.0], [1.0], [0.0]])
    loss = lambda out: tf.reduce_mean((out - y) ** 2)  # noqa: E731
    _, expected, _ = one_tape(segments, x, loss)
    result = chain_rule(segments, x, loss, blocked=blocked)
    assert result.segments[0].gradients[segments[0].trainable_variables[0].path].dtype == np.float64
    assert_agrees(result, segments, expected, 1e-12)


def test_what_is_handed_down_equals_the_gradient_of_one_tape_at_the_cut() -> None:
    segments, x, loss = founding_case()
    with tf.GradientTape() as tape:
        cuts = [segments[0](x)]
        cuts.append(segments[1](cuts[0]))
        cuts.append(segments[2](cuts[1]))
        value = loss(cuts[2])
    expected = tape.gradient(value, cuts)
    result = chain_rule(segments, x, loss)
    for segment, above, wanted in zip(result.segments, [*result.segments[1:], None], expected, strict=True):
        (found,) = segment.output_gradients
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
        if above is not None:
            assert np.array_equal(above.input_gradients[0], found)


def test_moving_statistics_and_random_seeds_move_as_in_one_forward_pass() -> None:
    segments, x, loss = normalised()
    segments[0] = model(layers.Dense(5), layers.Dropout(0.5), shape=(4,))
    before = [v.numpy() for s in segments for v in s.non_trainable_variables]
    y = x
    for segment in segments:
        y = segment(y, training=True)
    wanted = [v.numpy() for s in segments for v in s.non_trainable_variables]
    for variable, old in zip((v for s in segments for v in s.non_trainable_variables), before, strict=True):
        variable.assign(old)
    chain_rule(segments, x, loss)
    found = [v.numpy() for s in segments for v in s.non_trainable_variables]
    assert len(found) == 3
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("blocked", [False, True])
def test_segments_may_be_plain_callables_of_several_tensors(blocked: bool) -> None:
    w = tf.Variable(np.random.normal(size=(3, 4)), name="w")
    other = tf.Variable(np.random.normal(size=(3, 2)), name="w")
    unused = tf.Variable(1.0, name="unused", dtype=tf.float64)
    x = {"a": np.random.normal(size=(5, 3)), "ids": np.arange(5)}

    def bottom(given: dict[str, Any]) -> dict[str, Any]:
        return {"left": given["a"] @ w, "right": given["a"] @ other + 0 * unused, "ids": given["ids"]}

    def top(given: dict[str, Any]) -> tuple[Any, Any]:
        scale = tf.cast(given["ids"], tf.float64)[:, None]
        return tf.nn.tanh(given["left"]) * scale, tf.reduce_sum(given["left"], axis=1)

    def loss(given: tuple[Any, Any]) -> Any:
        return tf.reduce_sum(given[0] ** 2) + tf.reduce_sum(tf.sin(given[1]))

    with tf.GradientTape() as tape:
        value = loss(top(bottom({"a": tf.constant(x["a"]), "ids": tf.constant(x["ids"])})))
    wanted = tape.gradient(value, w)
    result = chain_rule([bottom, top], x, loss, blocked=blocked)
    assert set(result.gradients()) == {"bottom/w:0", "bottom/w:0#2", "bottom/unused:0"}
    shapes = {path: None if g is None else g.shape for path, g in result.segments[0].gradients.items()}
    assert sorted(shapes.values(), key=str) == [(3, 4), None, None]  # "right" goes nowhere
    (found,) = [g for g in result.segments[0].gradients.values() if g is not None]
    assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()
    ids, left, right = result.segments[1].input_gradients  # by key
    assert ids is None and left is not None and right is None
    assert result.segments[1].independent is True


def test_a_part_without_gradient_to_the_loss_gets_none() -> None:
    segments, x, _ = founding_case()
    cut_off = [segments[0], lambda h: tf.stop_gradient(h) + 0.0, segments[1], segments[2]]
    result = chain_rule(cut_off, x, lambda out: tf.reduce_mean(out))
    assert set(result.segments[0].gradients.values()) == {None}
    assert all(g is not None for g in result.segments[2].gradients.values())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    segments, x, _ = founding_case()
    with pytest.raises(HandoffError, match=r"scalar.*\(3, 1\).*reduce_mean"):
        chain_rule(segments, x, lambda out: out**2)


def test_a_loss_that_does_not_depend_on_the_outputs_is_refused_and_state_restored() -> None:
    segments, x, _ = normalised()
    before = [v.numpy() for s in segments for v in s.non_trainable_variables]
    with pytest.raises(HandoffError, match="does not depend"):
        chain_rule(segments, x, lambda out: tf.reduce_mean(tf.constant(out.numpy())))
    after = [v.numpy() for s in segments for v in s.non_trainable_variables]
    assert before and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocked": "yes"}, "blocked"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"independent_samples": [True]}, "one answer for each of 3"),
        ({"segments": []}, "at least one segment"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    segments, x, loss = founding_case()
    with pytest.raises(ValueError, match=message):
        chain_rule(**{"segments": segments, "inputs": x, "loss": loss, **change})


def test_complex_outputs_are_refused() -> None:
    with pytest.raises(TypeError, match="real"):
        chain_rule([lambda x: tf.cast(x, tf.complex64)], np.ones((2, 3), "float32"), lambda y: tf.abs(tf.reduce_sum(y)))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_cross_entropy_that_looks_behind_its_activation(activation: str) -> None:
    """Keras differentiates it by the logits; a loss that uses both logits and output needs both."""
    segments = [
        model(layers.Dense(4, activation="tanh"), shape=(3,)),
        model(layers.Dense(2, activation=activation), shape=(4,)),
    ]
    x = np.random.normal(size=(5, 3)).astype("float32")
    y = np.eye(2, dtype="float32")[[0, 1, 1, 0, 1]]
    kind = keras.losses.CategoricalCrossentropy if activation == "softmax" else keras.losses.BinaryCrossentropy
    entropy = kind()
    for loss in (lambda out: entropy(y, out), lambda out: entropy(y, out) + tf.reduce_mean(out**2)):
        total, expected, _ = one_tape(segments, x, loss)
        result = chain_rule(segments, x, loss)
        assert_agrees(result, segments, expected, 1e-6)
        assert result.loss == pytest.approx(total, rel=1e-6)

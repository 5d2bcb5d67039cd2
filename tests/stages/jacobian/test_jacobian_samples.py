"""Whether samples are independent is found out, not assumed: `batch_jacobian` is silently wrong where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import HandoffError
from stages.jacobian.chain_rule import chain_rule
from stages.jacobian.sample_independence import samples_are_independent

layers = keras.layers


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(7)


def verdict(function: Callable[[Any], Any], x: Any) -> bool:
    x = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = function(x)
    return samples_are_independent(tape, [y], [x])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype("float32")


INDEPENDENT: dict[str, Any] = {
    "dense": lambda x: layers.Dense(3)(x),
    "normalisation of a sample": lambda x: layers.LayerNormalization()(x),
    "normalisation in inference": lambda x: layers.BatchNormalization()(x, training=False),
    "recurrence over time": lambda x: layers.GRU(3)(x[..., None]),
    "dropout": lambda x: layers.Dropout(0.5)(x, training=True),
    "constant": lambda x: tf.ones_like(x) * 2.0,
    "only through state": lambda x: x - tf.stop_gradient(tf.reduce_mean(x, axis=0)),
}
DEPENDENT: dict[str, Any] = {
    "batch statistics": lambda x: layers.BatchNormalization()(x, training=True),
    "mean removed": lambda x: x - tf.reduce_mean(x, axis=0),
    "softmax over the batch": lambda x: tf.nn.softmax(x, axis=0),
    "permuted": lambda x: tf.reverse(x, axis=[0]),
    "first sample to all": lambda x: x + x[:1],
    "last sample from its neighbour": lambda x: tf.concat([x[:-1], x[-1:] + x[-2:-1]], axis=0),
    "attention over the batch": lambda x: tf.nn.softmax(x @ tf.transpose(x)) @ x,
    "whose sum is constant": lambda x: tf.concat([tf.reverse(x, [0]), -tf.reverse(x, [0])], axis=1),
    "transposed": lambda x: tf.transpose(x[:, : x.shape[0]]),
}


@pytest.mark.parametrize("batch", [2, 3, 6])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_samples_are_recognised(name: str, batch: int) -> None:
    assert verdict(INDEPENDENT[name], normal(batch, 7))


@pytest.mark.parametrize("batch", [2, 3, 6])
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_samples_are_recognised(name: str, batch: int) -> None:
    assert not verdict(DEPENDENT[name], normal(batch, 7))


@given(batch=st.integers(2, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_one_dependent_pair_is_found_wherever_it_is(batch: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(0, batch - 1))
    source = data.draw(st.integers(0, batch - 1).filter(lambda i: i != target))
    mixing = np.eye(batch, dtype="float32")
    assert verdict(lambda x: tf.constant(mixing) @ x, normal(batch, 2))
    mixing[target, source] = 1e-20
    assert not verdict(lambda x: tf.constant(mixing) @ x, normal(batch, 2))


def test_one_sample_is_independent_and_a_lost_batch_axis_is_not() -> None:
    assert verdict(lambda x: tf.nn.softmax(x, axis=0), normal(1, 3))
    assert not verdict(lambda x: tf.reduce_sum(x, axis=0), normal(4, 3))
    assert not verdict(tf.reduce_sum, normal(4, 3))


def test_a_gradient_that_is_not_a_number_counts_as_a_dependence() -> None:
    assert not verdict(lambda x: x * np.inf, normal(4, 3))


def test_the_test_leaves_random_state_alone() -> None:
    tf.random.set_seed(3)
    np.random.seed(3)
    wanted = tf.random.normal((2,)).numpy(), np.random.normal()
    tf.random.set_seed(3)
    np.random.seed(3)
    assert verdict(tf.sin, normal(8, 3))
    assert np.array_equal(tf.random.normal((2,)), wanted[0]) and np.random.normal() == wanted[1]


def normalising_chain() -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    segments = [
        keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh")]),
        keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), layers.Dense(3)]),
    ]
    y = normal(6, 3)
    return segments, normal(6, 4), lambda out: tf.reduce_mean((out - y) ** 2)


def reference(segments: list[Any], x: Any, loss: Callable[[Any], Any], training: bool) -> np.ndarray:
    with tf.GradientTape() as tape:
        value = loss(segments[1](segments[0](x, training=training), training=training))
    return np.array(tape.gradient(value, segments[0].trainable_variables[0].value))


@pytest.mark.parametrize("blocked", [False, True])
def test_bug_batch_jacobian_is_silently_wrong_with_batch_statistics(blocked: bool) -> None:
    segments, x, loss = normalising_chain()
    wanted = reference(segments, x, loss, training=True)
    path = segments[0].trainable_variables[0].path
    results = {
        forced: chain_rule(segments, x, loss, independent_samples=forced, blocked=blocked)
        for forced in (None, False, True)
    }
    error = {
        forced: np.abs(result.segments[0].gradients[path] - wanted).max() / np.abs(wanted).max()
        for forced, result in results.items()
    }
    assert results[None].segments[1].independent is False
    assert error[None] < 1e-6 and error[False] < 1e-6
    assert error[True] > 0.05  # what the user is protected from, and what the user may force


def test_in_inference_the_same_chain_is_independent_and_cheaper() -> None:
    segments, x, loss = normalising_chain()
    wanted = reference(segments, x, loss, training=False)
    result = chain_rule(segments, x, loss, training=False)
    top = result.segments[1]
    assert top.independent is True
    assert top.jacobians.inputs_independent == top.jacobians.inputs_dependent // 6
    found = result.segments[0].gradients[segments[0].trainable_variables[0].path]
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_one_answer_a_segment() -> None:
    segments, x, loss = normalising_chain()
    result = chain_rule(segments, x, loss, independent_samples=[True, False], input_gradient=True)
    assert [segment.independent for segment in result.segments] == [True, False]


def test_forcing_independence_without_a_common_batch_axis_is_refused() -> None:
    segments = [lambda x: 2.0 * x, lambda x: tf.reduce_sum(x, axis=0)]
    with pytest.raises(HandoffError, match=r"segment 1.*\(4, 3\).*\(3,\).*say False"):
        chain_rule(segments, normal(4, 3), tf.reduce_sum, independent_samples=True)


@pytest.mark.parametrize("blocked", [False, True])
def test_samples_without_a_feature_axis(blocked: bool) -> None:
    """`batch_jacobian` refuses rank 1; one number a sample is still one sample."""
    w = tf.Variable(normal(3, 1))
    segments = [lambda x: tf.squeeze(x @ w, 1), tf.sin, lambda h: tf.stack([h, h * h], axis=1)]
    x = tf.constant(normal(5, 3))
    with tf.GradientTape() as tape:
        h = tf.sin(tf.squeeze(x @ w, 1))
        value = tf.reduce_sum(h**3) + tf.reduce_sum((h * h) ** 3)
    wanted = tape.gradient(value, w)
    result = chain_rule(segments, x, lambda out: tf.reduce_sum(out**3), blocked=blocked)
    assert [s.independent for s in result.segments] == [None, True, True]
    (found,) = result.segments[0].gradients.values()
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()

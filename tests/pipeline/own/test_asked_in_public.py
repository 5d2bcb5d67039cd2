"""Losses, metrics, layers and optimizers that people asked about in public: on a pipeline what they are in Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import FirstBatchError, Pipeline
from tests.levels import in_turn

layers, ops = keras.layers, keras.ops
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(24, 6)).astype("float32")
Y = X[:, :1] ** 2
WEIGHTS = DRAW.uniform(0.1, 2, 24).astype("float32")
EVENTS = np.concatenate([DRAW.uniform(size=(24, 1)) > 0.4, DRAW.uniform(size=(24, 1))], 1).astype("float32")


def mlp(*middle: Any, units: int = 1, activation: str | None = None) -> Any:
    keras.utils.set_random_seed(0)
    low = [keras.Input((6,)), layers.Dense(8, "relu", name="low")]
    return keras.Sequential([*low, *middle, layers.Dense(units, activation, use_bias=False)])


class Standardised(layers.Dense):
    """A Dense layer whose kernel is standardised in every call (joe-siyuan-qiao/WeightStandardization 21)."""

    def call(self, inputs: Any, training: Any = None) -> Any:
        kernel = self.kernel - ops.mean(self.kernel, axis=0)
        return ops.matmul(inputs, kernel / (ops.std(kernel, axis=0) + 1e-5)) + self.bias


class Regularised(keras.losses.Loss):
    """One number a batch, from a class (tensorflow 42446)."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.mean(ops.square(y_true - y_pred)) + 0.1 * ops.mean(ops.square(0.5 - y_pred))


class Centralised(keras.optimizers.RMSprop):
    """Gradients without their means (keras-io 497)."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply([g - ops.mean(g, axis=0, keepdims=True) for g in grads], trainable_variables)


def each(y_true: Any, y_pred: Any) -> Any:
    """A number a sample (keras 3058)."""
    return ops.sum(ops.abs(y_true - y_pred), axis=-1)


def four(y_true: Any, y_pred: Any) -> Any:
    """A number for each of four coordinates (matterport/Mask_RCNN 1599)."""
    return ops.abs(y_true - y_pred) * ops.convert_to_tensor([1.0, 2.0, 3.0, 4.0])


def focal(y_true: Any, y_pred: Any) -> Any:
    """A sum over the batch (umbertogriffo/focal-loss-keras 5)."""
    return -ops.sum((1 - y_pred) ** 2 * y_true * ops.log(ops.clip(y_pred, 1e-7, 1)))


def survival(y_true: Any, y_pred: Any) -> Any:
    """A number of the whole batch: risks are summed over those who are still there (keras 5682)."""
    return -ops.sum((y_pred - ops.log(ops.cumsum(ops.exp(y_pred), axis=0))) * y_true[:, :1])


Asked = tuple[Callable[[], Any], Any, dict[str, Any], Any]
ASKED: dict[str, Callable[[], Asked]] = {
    "a sum over the batch": lambda: (lambda: mlp(activation="sigmoid"), Y, {"loss": focal}, None),
    "a number of the whole batch": lambda: (mlp, EVENTS, {"loss": survival, "optimizer": "rmsprop"}, None),
    "one number, weighted": lambda: (mlp, Y, {"loss": Regularised()}, WEIGHTS),
    "gradients that are changed": lambda: (mlp, Y, {"loss": "mse", "optimizer": Centralised(1e-2)}, None),
    "a kernel that is changed": lambda: (lambda: mlp(Standardised(8)), Y, {"loss": "mse"}, None),
    "a number a sample": lambda: (mlp, Y, {"loss": each}, WEIGHTS),
    "a number a coordinate": lambda: (lambda: mlp(units=4), X[:, :4], {"loss": four}, None),
}


@pytest.mark.filterwarnings("ignore:the loss .* is a number of the whole batch")
@pytest.mark.parametrize("what", in_turn(list(ASKED), 1, 7))
def test_it_trains_as_in_keras_and_verifies(what: str) -> None:
    make, y, given, weights = ASKED[what]()
    options: dict[str, Any] = {"optimizer": "sgd", "run_eagerly": True, **given}
    whole, twin = make(), make()
    with Pipeline.split(whole, stages=2, microbatches=4, transport="inproc") as pipe:
        pipe.compile(**options)
        losses = [pipe.train_on_batch(X, y, weights) for _ in range(2)]
        pipe.verify(X, y, weights, checks="own").raise_if_failed()
        found = pipe.get_weights()
    twin.compile(**{**options, **ASKED[what]()[2]})
    np.testing.assert_allclose(losses, [twin.train_on_batch(X, y, weights) for _ in range(2)], rtol=1e-6)
    for ours, theirs in zip(found, twin.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


class Confusion(keras.metrics.Metric):
    """Keeps what it counts in attributes, as confusion matrices in the wild do."""

    def __init__(self, name: str = "hits") -> None:
        super().__init__(name=name)
        self.matrix: Any = None
        self.seen: list[int] = []

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        found = tf.math.confusion_matrix(tf.argmax(y_true, -1), tf.argmax(y_pred, -1), num_classes=3)
        self.matrix = found if self.matrix is None else self.matrix + found
        self.seen.append(len(y_true))

    def result(self) -> Any:
        return tf.constant(0) if self.matrix is None else 1000 * sum(self.seen) + tf.linalg.trace(self.matrix)

    def reset_state(self) -> None:
        self.matrix = None
        self.seen.clear()


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:the metric 'hits' .* counts in attributes of Python")
def test_what_a_metric_keeps_in_attributes_counts_as_without_the_look() -> None:
    """Asked in public (tensorflow/tfx 2861); neither the look nor a verification leaves something in it."""
    x, y = X, np.eye(3, dtype="float32")[np.arange(len(X)) % 3]
    whole = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(3, "softmax")])
    weights, options = whole.get_weights(), {"batch_size": 8, "verbose": 0, "shuffle": False}
    with Pipeline.split(whole, stages=2, microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "categorical_crossentropy", metrics=[Confusion()], run_eagerly=True)
        ours = [
            pipe.fit(x, y, batch_size=8, verbose=0, shuffle=False, verify_every=2).history["hits"] for _ in range(2)
        ]
        ours.append(pipe.evaluate(x, y, batch_size=8, verbose=0)[1:])
    whole.set_weights(weights)
    whole.compile("sgd", "categorical_crossentropy", metrics=[Confusion()], run_eagerly=True)
    theirs = [whole.fit(x, y, **options).history["hits"] for _ in range(2)]
    assert [*theirs, whole.evaluate(x, y, batch_size=8, verbose=0)[1:]] == ours


@pytest.mark.gate
def test_a_loss_that_reaches_no_variable_is_refused_as_by_keras() -> None:
    """Asked in public (keras 4920): a loss that counts."""

    def misses(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.cast(keras.ops.abs(y_true - y_pred) > 1, "float32"), axis=-1)

    whole = mlp()
    with Pipeline.split(whole, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", misses, run_eagerly=True)
        with pytest.raises(FirstBatchError, match="no variable has a gradient of the loss"):
            pipe.train_on_batch(X, Y)
        pipe.test_on_batch(X, Y)
    whole.compile("sgd", misses, run_eagerly=True)
    with pytest.raises(ValueError, match="No gradients provided"):
        whole.train_on_batch(X, Y)

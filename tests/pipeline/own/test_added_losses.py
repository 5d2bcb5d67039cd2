"""A loss that a layer adds counts in microbatches as in the whole batch, or the layer is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import FirstBatchError, Pipeline
from pipeline.own.added_losses import no_mean
from pipeline.own.layer_calls import LayerCall
from tests.pipeline.reference.twins import assert_same_arrays

layers, ops = keras.layers, keras.ops
X = np.random.default_rng(3).normal(size=(24, 6)).astype("float32")
Y = X[:, :1] ** 2


class Adding(layers.Layer):
    """Adds a loss of what it is given."""

    def __init__(self, loss: Callable[..., Any], training_only: bool = False) -> None:
        super().__init__(name="adding")
        self.loss, self.training_only = loss, training_only

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training or not self.training_only:
            self.add_loss(self.loss(inputs))
        return inputs


class Noised(layers.Layer):
    """Adds the mean square of what it draws by a generator of its own: a mean over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs: Any) -> Any:
        noised = inputs + keras.random.normal(ops.shape(inputs), seed=self.seeds)
        self.add_loss(ops.mean(ops.square(noised)))
        return inputs


class Holding(layers.Layer):
    """A layer in a layer, whose call knows nothing of training."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


class Encoding(layers.Layer):
    """Adds a loss of what it computes with a normalisation inside, as an encoder with a divergence does."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__(name="adding")
        self.dense, self.norm, self.loss = layers.Dense(4), layers.BatchNormalization(), loss

    def call(self, inputs: Any, training: bool = False) -> Any:
        code = self.norm(self.dense(inputs), training=training)
        self.add_loss(self.loss(code))
        return code


def model(*middle: Any) -> Any:
    keras.utils.set_random_seed(1)
    first = layers.Dense(4, "softmax", kernel_initializer="zeros", name="low")
    return keras.Sequential([keras.Input((6,)), first, *middle, layers.Dense(1)])


def split(whole: Any, **options: Any) -> Pipeline:
    pipe = Pipeline.split(whole, at=["low"], **{"microbatches": 4, "transport": "inproc", **options})
    pipe.compile("sgd", "mse", run_eagerly=True)
    return pipe


@pytest.mark.filterwarnings("ignore:.*takes its statistics from each microbatch")
@pytest.mark.parametrize(
    ("middle", "what"),
    [
        (lambda: [Adding(lambda x: ops.sum(x**2))], "a sum over samples"),
        (lambda: [Adding(lambda x: ops.sum(x**2), training_only=True)], "a sum over samples"),
        (lambda: [layers.BatchNormalization(), Holding(Adding(lambda x: ops.sum(x)))], "a sum over samples"),
        (lambda: [Encoding(lambda x: ops.sum(x**2))], "a sum over samples"),
        (lambda: [Adding(lambda x: ops.sqrt(ops.mean(x**2) + 1e-3))], "neither"),
        (lambda: [Adding(lambda x: ops.sum(ops.mean(x, axis=0) ** 2))], "neither"),  # equal predictions at the start
        (lambda: [layers.Dense(4, activity_regularizer=lambda x: ops.mean(x**2), name="adding")], "neither"),
    ],
    ids=[
        "sum",
        "in training only",
        "in a layer",
        "behind a normalisation in it",
        "root of a mean",
        "product of means",
        "activity regulariser",
    ],
)
def test_what_would_count_otherwise_is_refused_by_name_before_it_trains(middle: Any, what: str) -> None:
    with split(model(*middle())) as pipe:
        before = pipe.get_weights()
        for _ in range(2):  # whoever tries again is refused again
            with pytest.raises(FirstBatchError, match=rf"layer 'adding' adds a loss .* {what}.*microbatches=4"):
                pipe.fit(X, Y, verbose=0)
        assert_same_arrays(pipe.get_weights(), before)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: [Adding(lambda x: ops.mean(ops.abs(x))), layers.Dense(4, activity_regularizer="l2")],
        lambda: [Adding(lambda x: 0.3 * ops.cast(ops.shape(x)[1], "float32"), training_only=True)],
        lambda: [layers.Dense(4, kernel_regularizer="l1"), Holding(Adding(lambda x: ops.mean(ops.sum(x, 1) ** 2)))],
    ],
    ids=["means", "constant", "in a layer"],
)
def test_means_and_constants_are_trained_as_by_keras(middle: Any) -> None:
    with split(model(*middle())) as pipe:
        pipe.train_on_batch(X, Y)
        ours = pipe.get_weights()
    whole = model(*middle())
    whole.compile("sgd", "mse", run_eagerly=True)
    whole.train_on_batch(X, Y)
    for a, b in zip(ours, whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*takes its statistics from each microbatch")
def test_a_layers_own_chance_and_what_is_in_front_of_it_raise_no_alarm() -> None:
    noisy = [layers.BatchNormalization(), layers.Dropout(0.5), Adding(lambda x: ops.mean(x**2)), Noised()]
    with split(model(*noisy)) as pipe:
        pipe.train_on_batch(X, Y)


@pytest.mark.filterwarnings("ignore:.*takes its statistics from each microbatch")
def test_a_mean_behind_a_normalisation_in_the_same_layer_raises_no_alarm() -> None:
    """What it takes from a microbatch is told of the normalisation, not of the loss."""
    regularised = layers.BatchNormalization(activity_regularizer="l2")
    with split(model(Encoding(lambda x: ops.mean(ops.sum(ops.exp(x) - x, axis=-1))), regularised)) as pipe:
        pipe.train_on_batch(X, Y)


def test_a_sum_is_refused_also_where_a_batch_of_one_sample_came_first() -> None:
    with split(model(Adding(lambda x: ops.sum(x**2)))) as pipe:
        pipe.train_on_batch(X[:1], Y[:1])
        before = pipe.get_weights()
        with pytest.raises(FirstBatchError, match=r"layer 'adding' adds a loss .* a sum over samples"):
            pipe.fit(X, Y, verbose=0)
        assert_same_arrays(pipe.get_weights(), before)


def test_one_microbatch_trains_a_sum_as_keras_does() -> None:
    whole = model(Adding(lambda x: ops.sum(x**2)))
    before = whole.get_weights()
    with split(whole, microbatches=1) as pipe:
        pipe.train_on_batch(X, Y)
        ours = pipe.get_weights()
    whole.set_weights(before)
    whole.compile("sgd", "mse", run_eagerly=True)
    whole.train_on_batch(X, Y)
    assert_same_arrays(ours, whole.get_weights())


@pytest.mark.parametrize(("loss", "refused"), [(lambda x: ops.mean(ops.square(x)), False), (ops.sum, True)])
def test_half_precision_is_rounding_and_no_sum(loss: Callable[..., Any], refused: bool) -> None:
    layer = Adding(loss)
    layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    values = tf.cast(np.abs(X) + 1.0, "bfloat16")
    calls = [LayerCall(layer, ((values[begin:end],), {}), True) for begin, end in ((0, 12), (12, 24))]
    layer(values)
    assert bool(no_mean(calls, 2, training=True)) == refused

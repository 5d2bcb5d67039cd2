"""A layer whose samples depend on each other is named where microbatches show it fewer of them than Keras does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import FirstBatchError, Pipeline
from tests.levels import in_turn
from tests.pipeline.own.test_added_losses import Adding

layers, ops = keras.layers, keras.ops
X = np.random.default_rng(3).normal(size=(24, 6)).astype("float32")
Y = X[:, :1] ** 2


class Centred(layers.Layer):
    """Takes the mean of the batch from each sample; in training only, if so wanted, as normalisations of a batch do."""

    def __init__(self, training_only: bool = False) -> None:
        super().__init__(name="centred")
        self.training_only = training_only

    def call(self, inputs: Any, training: bool = False) -> Any:
        off = ops.mean(inputs, axis=0, keepdims=True)
        return inputs - off if training or not self.training_only else inputs


class Around(layers.Layer):
    """Holds a layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__(name="around")
        self.inner = inner

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


def model(*middle: Any) -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    tensor = layers.Dense(8, name="low")(inputs)
    for layer in middle:
        tensor = layer(tensor)
    return keras.Model(inputs, layers.Dense(1)(tensor))


def split(whole: Any, microbatches: int = 4) -> Pipeline:
    pipe = Pipeline.split(whole, at=["low"], microbatches=microbatches, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    return pipe


COUPLING: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "in training only": (lambda: [layers.BatchNormalization(), layers.Dropout(0.3), Centred(True)], "layer 'centred'"),
    "in a layer": (lambda: [layers.Dense(8), Around(Centred())], "layer 'centred'"),
    "a layer of Keras": (lambda: [layers.Softmax(axis=0, name="centred")], "layer 'centred'"),
    "an activation": (lambda: [layers.Dense(8, lambda x: ops.softmax(x, axis=0), name="centred")], "layer 'centred'"),
    "between layers": (lambda: [lambda x: x - ops.mean(x, axis=0, keepdims=True)], "^an operation between layers"),
}


@pytest.mark.filterwarnings("ignore:.*takes its statistics from each microbatch")
@pytest.mark.parametrize("case", in_turn(list(COUPLING), 1, 5))
def test_what_couples_samples_is_named_once_with_what_to_do(case: str) -> None:
    middle, name = COUPLING[case]
    with split(model(*middle())) as pipe:
        with pytest.warns(UserWarning, match=rf"{name} lets the samples .* microbatches of 6 .* the batch of 24"):
            pipe.fit(X, Y, batch_size=24, verbose=0, validation_data=(X, Y))
        pipe.predict(X, verbose=0)


@pytest.mark.gate
def test_it_is_named_where_the_pipeline_only_predicts() -> None:
    with split(model(Centred())) as pipe, pytest.warns(UserWarning, match="layer 'centred' lets the samples"):
        pipe.predict(X, verbose=0)


@pytest.mark.gate
def test_what_couples_in_training_only_is_named_when_training_begins() -> None:
    """Nothing is to be said of it where the pipeline predicts or evaluates, which may come first."""
    with split(model(Centred(training_only=True))) as pipe:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.predict(X, verbose=0)
            pipe.test_on_batch(X, Y)
        with pytest.warns(UserWarning, match="layer 'centred' lets the samples"):
            pipe.train_on_batch(X, Y)


@pytest.mark.gate
@pytest.mark.parametrize("call", ["fit", "train_on_batch", "verify"])
def test_what_is_said_points_at_the_users_line(call: str) -> None:
    with split(model(layers.BatchNormalization(), Centred())) as pipe:
        with pytest.warns(UserWarning, match="layer 'centred' lets the samples") as told:
            getattr(pipe, call)(X, Y, **{"fit": {"verbose": 0}, "verify": {"checks": "own"}}.get(call, {}))
        assert any("takes its statistics from each microbatch" in str(one.message) for one in told)
        assert {one.filename for one in told} == {__file__}


@pytest.mark.gate
def test_one_microbatch_is_keras_and_nothing_is_said() -> None:
    whole = model(Centred())
    with split(whole, microbatches=1) as pipe:
        np.testing.assert_array_equal(pipe.predict(X, verbose=0), np.asarray(whole(X)))


class Pairs(layers.Layer):
    """Each sample sees its neighbour; a batch has an even number of samples."""

    def call(self, inputs: Any) -> Any:
        pairs = ops.reshape(inputs, (-1, 2, ops.shape(inputs)[-1]))
        return ops.reshape(pairs + ops.flip(pairs, axis=1), ops.shape(inputs))


class Noise(layers.Layer):
    """Draws by a generator of its own, in inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs: Any) -> Any:
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seeds)


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:.*takes its statistics from each microbatch")
@pytest.mark.parametrize("mode", in_turn(["train_on_batch", "test_on_batch"], 1, 2))
def test_what_treats_each_sample_by_itself_raises_no_alarm(mode: str) -> None:
    """Normalisations, chance, attention over other axes, deep chains that magnify rounding, pairs."""
    deep = [layer for _ in range(6) for layer in (layers.Dense(8, "relu"), layers.BatchNormalization())]
    rows = [
        layers.Reshape((4, 2)),
        layers.GRU(2, return_sequences=True),
        layers.GroupNormalization(1),
        layers.Flatten(),
    ]
    with split(model(*deep, *rows, layers.Dropout(0.3), layers.GaussianNoise(1.0), Noise())) as pipe:
        getattr(pipe, mode)(X, Y)
    with split(model(Pairs())) as pipe:
        getattr(pipe, mode)(X, Y)


def test_verify_alone_says_and_refuses_it_as_well() -> None:
    """Nothing was trained before, so no first batch was looked at."""
    with split(model(Centred())) as pipe:
        with pytest.warns(UserWarning, match="layer 'centred' lets the samples"):
            assert pipe.verify(X, Y, checks="own").ok
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.verify(X, Y, checks="own")
            pipe.train_on_batch(X, Y)
    with split(model(Adding(lambda x: ops.sum(x**2)))) as pipe:
        before = pipe.get_weights()
        for _ in range(2):
            with pytest.raises(FirstBatchError, match=r"layer 'adding' adds a loss .* a sum over samples"):
                pipe.verify(X, Y, checks="own")
        for a, b in zip(pipe.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)

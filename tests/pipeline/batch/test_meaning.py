"""A batch means what it means in Keras, for losses and metrics of one's own too: no mean over samples, no assumption.

The other side is plain Keras: the unsplit model, `fit`, the same batches. The batch of 10 is cut in 4 unequal parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from pipeline import Pipeline
from pipeline.errors import CompileError
from tests.levels import in_turn
from tests.one_tape import difference

L = keras.layers
RNG = np.random.default_rng(5)
X, Y = RNG.normal(size=(20, 4)).astype("float32"), RNG.normal(1, 2, (20, 3)).astype("float32")
WEIGHT = RNG.uniform(0.2, 3, 20).astype("float32")
WORDS, NEXT = RNG.integers(0, 7, (20, 5)), RNG.integers(0, 7, (20, 5))
NEXT[:, 3:] *= RNG.integers(0, 2, (20, 2))


def total(y: Any, p: Any) -> Any:
    return ops.sum((y - p) ** 2)


def rmse(y: Any, p: Any) -> Any:
    return ops.sqrt(ops.mean((y - p) ** 2))


def dice(y: Any, p: Any) -> Any:
    y, p = ops.sigmoid(y), ops.sigmoid(p)
    return 1 - 2 * ops.sum(y * p) / (ops.sum(y) + ops.sum(p))


def correlation(y: Any, p: Any) -> Any:
    y, p = y - ops.mean(y, axis=0), p - ops.mean(p, axis=0)
    return -ops.mean(ops.sum(y * p, axis=0) / ops.sqrt(ops.sum(y**2, axis=0) * ops.sum(p**2, axis=0) + 1e-6))


def in_batch_negatives(y: Any, p: Any) -> Any:
    return keras.losses.categorical_crossentropy(ops.eye(ops.shape(p)[0]), ops.matmul(y, ops.transpose(p)), True)


def spread(y: Any, p: Any) -> Any:
    return -ops.var(p, axis=0) + 0 * ops.sum(y)


def samples(y: Any, p: Any) -> Any:
    return ops.mean(ops.abs(y - p), axis=-1)


def mean(y: Any, p: Any) -> Any:
    return ops.mean(ops.abs(y - p))


def counted_words(y: Any, p: Any) -> Any:
    there = ops.cast(y != 0, "float32")
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, p, True) * there) / ops.sum(there)


class Root(keras.losses.Loss):
    """A loss of one's own with a reduction, over a value that is no sample's."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return ops.sqrt(ops.mean((y_true - y_pred) ** 2, axis=0))


class Halved(keras.losses.Loss):
    """One that calls the reduction by itself, and is a mean all the same."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return ops.mean((y_true - y_pred) ** 2) / 2


class Worst(keras.metrics.Metric):
    """The mean over batches of the largest error of a batch."""

    def __init__(self) -> None:
        super().__init__(name="worst")
        self.worst = self.add_weight(shape=(), initializer="zeros")
        self.batches = self.add_weight(shape=(), initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.worst.assign_add(ops.max(ops.abs(y_true - y_pred)))
        self.batches.assign_add(1.0)

    def result(self) -> Any:
        return self.worst / self.batches


def dense() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), L.Dense(3)])


def gpt() -> Any:
    """A small language model that knows no padding; its loss does."""
    keras.utils.set_random_seed(1)
    words = keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 6)(words)
    x = x + L.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)
    return keras.Model(words, L.Dense(7)(L.LayerNormalization()(x)))


@contextmanager
def said(about: str | None) -> Iterator[None]:
    """Exactly one warning that begins so; none for None."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    texts = [str(one.message) for one in found]
    assert len(texts) == (about is not None), texts
    assert about is None or about in texts[0]


def fitted(model: Any, x: Any, y: Any, weight: Any, **compiled: Any) -> tuple[Any, Any]:
    """History and weights of plain Keras."""
    model.compile(**compiled)
    history = model.fit(x, y, sample_weight=weight, batch_size=10, epochs=2, shuffle=False, verbose=0).history
    return history, model.get_weights()


LOSSES: dict[str, tuple[Any, str]] = {
    "samples": (samples, ""),
    "mean": (mean, ""),
    "Halved": (Halved(), ""),
    "total": (total, ""),
    "rmse": (rmse, "gpipe"),
    "dice": (dice, "gpipe"),
    "correlation": (correlation, "gpipe"),
    "in_batch_negatives": (in_batch_negatives, "gpipe"),
    "spread": (spread, "gpipe"),
    "Root": (Root(), "gpipe"),
    "Root, summed": (Root(reduction="sum"), "gpipe"),
}
"""What is compiled, and the schedule that it needs."""


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_losses_of_a_batch_train_as_in_keras(run_eagerly: bool) -> None:
    """One update with each loss, the next one from where it leads: loss, and how far the weights move."""
    model, plain = dense(), dense()
    weighted = ("samples", "mean", "total", "rmse")
    with Pipeline.split(model, stages=2, microbatches=4, transport="inproc") as pipe:
        for name in LOSSES if run_eagerly else ("samples", "total", "correlation", "Root"):
            loss, needs = LOSSES[name]
            for weight in (None, WEIGHT[:10]) if name in weighted else (None,):
                if weight is not None and name != "samples":
                    needs = "gpipe"  # a scalar times the sample weights is no sum of its parts
                start = plain.get_weights()
                plain.compile(keras.optimizers.SGD(0.01), loss, run_eagerly=run_eagerly)
                expected = plain.train_on_batch(X[:10], Y[:10], sample_weight=weight)
                pipe.compile(keras.optimizers.SGD(0.01), loss, run_eagerly=run_eagerly)
                pipe.set_weights(start)
                with said(f"the loss {getattr(loss, '__name__', type(loss).__name__)} is" if needs else None):
                    found = pipe.train_on_batch(X[:10], Y[:10], sample_weight=weight)
                assert found == pytest.approx(expected, rel=2e-6), name
                moves = [[b - a for a, b in zip(start, m.get_weights(), strict=True)] for m in (pipe, plain)]
                assert difference(*moves) <= 2e-4, name  # of float32 weights that are some thousand times as large
                assert max(np.abs(move).max() for move in moves[1]) > 1e-4, name


def test_a_sum_keeps_the_schedule_and_has_the_whole_batchs_value() -> None:
    model = dense()
    with Pipeline.split(model, stages=2, microbatches=4, transport="inproc") as pipe:
        for loss in (total, mean, samples):
            pipe.compile("sgd", loss)
            with said(None):
                assert pipe.test_on_batch(X, Y) == pytest.approx(float(ops.mean(loss(Y, model(X)))), rel=1e-6)
                pipe.train_on_batch(X, Y)
            model = pipe.merge()
        pipe.compile("sgd", rmse)
        with said(None):
            assert pipe.test_on_batch(X, Y) == pytest.approx(float(rmse(Y, model(X))), rel=1e-6)


@pytest.mark.parametrize(("schedule", "run_eagerly"), in_turn([("1f1b", False), ("gpipe", True)], 1, 2, several=True))
def test_metrics_of_a_batch_count_whole_batches(schedule: str, run_eagerly: bool) -> None:
    """Functions that give one number, losses as metrics and objects that count batches; also beside such a loss."""

    def metrics() -> list[Any]:
        return [rmse, Worst(), keras.losses.MeanSquaredError(name="m"), "mae"]

    for loss in ("mse", rmse):
        given: dict[str, Any] = {"loss": loss, "run_eagerly": run_eagerly}
        model, optimizer = dense(), keras.optimizers.SGD(0.01)
        expected, weights = fitted(
            dense(), X, Y, None, optimizer=optimizer, metrics=metrics(), weighted_metrics=[dice], **given
        )
        with Pipeline.split(model, stages=2, microbatches=4, schedule=schedule, transport="inproc") as pipe:
            pipe.compile(keras.optimizers.SGD(0.01), metrics=metrics(), weighted_metrics=[dice], **given)
            with said("the loss rmse" if loss is rmse and schedule == "1f1b" else None):
                history = pipe.fit(X, Y, batch_size=10, epochs=2, shuffle=False, verbose=0).history
            assert list(history) == list(expected)
            for log, values in expected.items():
                assert history[log] == pytest.approx(values, rel=2e-6), log
            assert difference(pipe.get_weights(), weights) <= 1e-6


def test_a_mean_over_all_words_of_a_batch() -> None:
    expected, weights = fitted(gpt(), WORDS, NEXT, None, optimizer=keras.optimizers.SGD(0.1), loss=counted_words)
    with Pipeline.split(gpt(), stages=2, microbatches=4, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), counted_words)
        with said("the loss counted_words is"):
            history = pipe.fit(WORDS, NEXT, batch_size=10, epochs=2, shuffle=False, verbose=0).history
        assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert difference(pipe.get_weights(), weights) <= 2e-6


@pytest.mark.gate
def test_verify_knows_losses_and_metrics_of_a_batch() -> None:
    with Pipeline.split(dense(), stages=2, microbatches=4, schedule="gpipe", transport="inproc") as pipe:
        for loss, metric in ((rmse, "mae"), (total, Worst())):
            pipe.compile(keras.optimizers.SGD(0.01), loss, metrics=[metric], run_eagerly=True)
            pipe.verify(X[:10], Y[:10], checks=["tape", "chain", "batch", "steps"]).raise_if_failed()


def test_what_needs_the_whole_batch_is_refused_in_windows() -> None:
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, L.Dense(2)(L.LSTM(3, return_sequences=True)(inputs)))
    x, y = RNG.normal(size=(6, 4, 4)).astype("float32"), RNG.normal(size=(6, 4, 2)).astype("float32")
    with Pipeline.split(model, stages=2, microbatches=2, windows=2, transport="inproc") as pipe:
        along_time = keras.losses.CosineSimilarity(axis=1)
        for loss, metrics, told in (
            (rmse, [], "the loss rmse is no mean or sum over samples and time steps alike"),
            (along_time, [], "the loss CosineSimilarity is no mean or sum over samples and time steps"),
            ("mse", [rmse], "a metric of the output"),
        ):
            pipe.compile("sgd", loss, metrics=metrics)
            with pytest.raises(CompileError, match=told):
                pipe.train_on_batch(x, y)
        pipe.compile("sgd", total, metrics=[])
        assert pipe.test_on_batch(x, y) == pytest.approx(float(total(y, model(x))), rel=1e-6)
        pipe.train_on_batch(x, y)


def test_batch_normalization_under_microbatches_is_said_once() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(5), L.BatchNormalization(name="norms"), L.Dense(3)])
    told = r"the layer 'norms' \(BatchNormalization\) takes its statistics from each microbatch of 3 samples, .* of 10"
    with Pipeline.split(model, stages=2, microbatches=4, transport="inproc") as pipe:
        pipe.compile("sgd", "mse")
        with pytest.warns(UserWarning, match=told) as found:
            pipe.fit(X, Y, batch_size=10, epochs=2, verbose=0)
        assert len(found) == 1
        model.get_layer("norms").trainable = False
        pipe.compile("sgd", "mse")
        with said(None):
            pipe.train_on_batch(X, Y)
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe, said(None):
        model.get_layer("norms").trainable = True
        pipe.compile("sgd", "mse")
        pipe.train_on_batch(X, Y)

"""Metric objects have the value after training that they have in Keras; metrics inside of layers are in the logs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from pipeline import Pipeline
from tests.levels import in_turn

L = keras.layers
RNG = np.random.default_rng(4)
X, Y = RNG.normal(size=(16, 4)).astype("float32"), RNG.integers(0, 3, 16)
FIT = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


class Sized(L.Layer):
    """Logs how large what passes is, and adds a loss."""

    def __init__(self) -> None:
        super().__init__(name="sized")
        self.size = keras.metrics.Mean(name="size")

    def call(self, x: Any) -> Any:
        self.size.update_state(ops.mean(ops.abs(x)))
        self.add_loss(0.1 * ops.mean(x**2))
        return x


class Reading(keras.callbacks.Callback):
    """Reads a metric object where an epoch ends."""

    def __init__(self, metric: Any) -> None:
        super().__init__()
        self.metric, self.read = metric, []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.read.append(float(self.metric.result()))


def made() -> Any:
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), Sized(), L.Dense(3, "softmax")])


def metrics() -> list[Any]:
    iou = keras.metrics.MeanIoU(3, sparse_y_pred=False, name="iou")
    return ["accuracy", keras.metrics.SparseCategoricalCrossentropy(name="ce"), iou]


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:the metric 'size' inside of a layer counts every microbatch:UserWarning")
@pytest.mark.parametrize(
    ("run_eagerly", "recompute"), in_turn([(True, True), (False, True), (False, False)], 1, 2, several=True)
)
def test_metrics_in_layers_and_metric_objects_are_those_of_keras(run_eagerly: bool, recompute: bool) -> None:
    plain, model, theirs, ours = made(), made(), metrics(), metrics()
    plain.compile("sgd", "sparse_categorical_crossentropy", metrics=theirs[:2], weighted_metrics=theirs[2:])
    reading = Reading(theirs[1])
    expected = plain.fit(X, Y, validation_data=(X[:8], Y[:8]), callbacks=[reading], **FIT).history
    with Pipeline.split(model, stages=2, microbatches=2, recompute=recompute, transport="inproc") as pipe:
        pipe.compile(
            "sgd",
            "sparse_categorical_crossentropy",
            metrics=ours[:2],
            weighted_metrics=ours[2:],
            run_eagerly=run_eagerly,
        )
        found = Reading(ours[1])
        history = pipe.fit(X, Y, validation_data=(X[:8], Y[:8]), callbacks=[found], **FIT).history
        assert history.keys() == expected.keys() and "val_size" in history
        for name, values in expected.items():
            assert history[name] == pytest.approx(values, rel=1e-5), name
        assert found.read == pytest.approx(reading.read, rel=1e-5)
        assert list(pipe.evaluate(X, Y, verbose=0)) == pytest.approx(plain.evaluate(X, Y, verbose=0), rel=1e-5)
        for own, other in zip(ours[1:], theirs[1:], strict=True):
            assert float(own.result()) == pytest.approx(float(other.result()), rel=1e-5)
        size = [float(one.get_layer("sized").size.result()) for one in (model, plain)]
        assert size[0] == pytest.approx(size[1], rel=1e-5)
        pipe.verify(X[:8], Y[:8], checks=["tape", "steps"]).raise_if_failed()


def test_a_metric_in_a_layer_under_microbatches_is_said() -> None:
    with Pipeline.split(made(), stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "sparse_categorical_crossentropy")
        with pytest.warns(UserWarning, match="the metric 'size' inside of a layer counts every microbatch") as found:
            pipe.fit(X, Y, **FIT)
        assert len(found) == 1


class Counting(keras.metrics.Metric):
    """Counts in an attribute of Python."""

    seen = 0

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.seen += len(y_true)

    def result(self) -> Any:
        return ops.convert_to_tensor(float(self.seen))

    def reset_state(self) -> None:
        self.seen = 0


def test_a_metric_that_counts_in_python_is_in_the_logs_and_said_not_to_be_in_the_object() -> None:
    mine, f1 = Counting(name="seen"), keras.metrics.F1Score(average="macro", name="f1")  # which gets variables later
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, "softmax")])
    with Pipeline.split(model, stages=1, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "categorical_crossentropy", metrics=[mine, f1], run_eagerly=True)
        with pytest.warns(UserWarning, match="the metric 'seen' .Counting. counts in attributes of Python") as told:
            history = pipe.fit(X, np.eye(3)[Y], **FIT).history
    assert history["seen"] == [16.0, 16.0] and mine.seen == 0
    assert sum("counts in attributes" in str(one.message) for one in told) == 1

"""The first batch is looked at: what becomes another model in the workers is refused before it trains, what is right is
left alone, bit for bit."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CompileError, FirstBatchError, Pipeline
from stages.loss.head import Head
from tests.levels import in_turn
from tests.one_tape import assert_same_bits
from tests.pipeline.parts import Counted

layers = keras.layers
MAIN = threading.main_thread()


@keras.saving.register_keras_serializable("tests.first_batch")
class ElsewhereDoubled(layers.Layer):
    """A layer that depends on where it runs: in a worker it doubles."""

    def call(self, x: Any) -> Any:
        return x if threading.current_thread() is MAIN else 2 * x


@keras.saving.register_keras_serializable("tests.first_batch")
class Noisy(layers.Layer):
    """A layer that draws from TensorFlow's own generator: no two runs are alike."""

    def call(self, x: Any) -> Any:
        return x + tf.random.normal(tf.shape(x))


@keras.saving.register_keras_serializable("tests.first_batch")
class OnlyInWorkers(layers.Layer):
    """A layer that cannot be called with values in the user's process."""

    def call(self, x: Any) -> Any:
        if threading.current_thread() is MAIN and tf.executing_eagerly():
            raise RuntimeError("not here")
        return x


@keras.saving.register_keras_serializable("tests.first_batch")
class Pairs(layers.Layer):
    """A layer that adds to both samples of a pair their mean: it wants an even number of them."""

    def call(self, x: Any) -> Any:
        pairs = keras.ops.reshape(x, (-1, 2, x.shape[-1]))
        return x + keras.ops.reshape(keras.ops.mean(pairs, axis=1, keepdims=True) + 0 * pairs, keras.ops.shape(x))


class Many(layers.Layer):
    """A layer with more attributes than are compared before a step."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(200):
            setattr(self, f"number{k}", k)

    def call(self, inputs: Any) -> Any:
        return inputs


class CountedError(keras.metrics.MeanAbsoluteError):
    """A metric that counts its updates in a plain number, and asks its targets and weights what only tensors know."""

    updates = 0

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        assert y_true.shape.rank == y_true.get_shape().rank == 2 and y_true.dtype.is_floating
        assert sample_weight is None or sample_weight.dtype.is_floating
        self.updates += 1
        return super().update_state(y_true, y_pred, sample_weight)


class CountedScore(keras.metrics.F1Score):
    """A metric that makes its variables with its first update, and counts updates in a plain number."""

    updates = 0

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        self.updates += 1
        return super().update_state(y_true, y_pred, sample_weight)


def batch(samples: int = 24) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.normal(size=(samples, 6)).astype("float32"), draw.normal(size=(samples, 1)).astype("float32")


def model(*middle: Any) -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), *middle, layers.Dense(1, name="top")])


def split(whole: Any, **options: Any) -> Pipeline:
    pipe = Pipeline.split(whole, at=[whole.layers[-2].name], transport="inproc", **options)
    pipe.compile("sgd", "mean_squared_error")
    return pipe


def test_a_layer_that_is_another_one_in_the_workers_is_refused_before_anything_is_trained() -> None:
    with split(model(ElsewhereDoubled(name="doubled")), microbatches=2) as pipe:
        before = pipe.get_weights()
        with pytest.raises(FirstBatchError, match="first to differ is stage 'stage0'"):
            pipe.fit(*batch(), verbose=0)
        assert_same_bits(before, pipe.get_weights(), "weights")


@pytest.mark.parametrize("mode", ["predict", "test_on_batch"])
def test_prediction_and_evaluation_are_looked_at_too(mode: str) -> None:
    with split(model(ElsewhereDoubled())) as pipe, pytest.raises(FirstBatchError, match="first to differ"):
        pipe.predict(batch()[0], verbose=0) if mode == "predict" else pipe.test_on_batch(*batch())


def test_a_loss_that_is_another_one_in_the_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Head.value
    monkeypatch.setattr(Head, "value", lambda self, *given: 1.001 * right(self, *given))
    with split(model()) as pipe, pytest.raises(FirstBatchError, match=r"in the last stage \('stage1'\) or in a loss"):
        pipe.train_on_batch(*batch())


def test_whoever_means_it_switches_the_look_off() -> None:
    with split(model(ElsewhereDoubled()), check_first_batch=False) as pipe:
        pipe.train_on_batch(*batch())


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_what_is_right_trains_to_the_bits_of_a_training_without_the_look(eager: bool) -> None:
    trained = []
    for look in (True, False):
        keras.utils.set_random_seed(2)  # layers draw their seeds when they are made
        whole = model(
            layers.BatchNormalization(), layers.Dropout(0.4), layers.Dense(4, "relu", kernel_regularizer="l2")
        )
        with Pipeline.split(whole, stages=2, microbatches=3, transport="inproc", check_first_batch=look) as pipe:
            pipe.compile("adam", "mean_squared_error", metrics=["mae"], run_eagerly=eager)
            logs = [pipe.train_on_batch(*batch(), return_dict=True) for _ in range(2)]
            trained.append((pipe.get_weights(), logs))
    assert_same_bits(trained[0][0], trained[1][0], "weights")
    assert trained[0][1] == trained[1][1]


def test_the_users_own_variables_are_left_as_they_were() -> None:
    whole = model(layers.BatchNormalization(), layers.Dropout(0.4))
    before = [variable.numpy() for variable in whole.variables]
    with split(whole) as pipe:
        pipe.train_on_batch(*batch())
        assert_same_bits(before, [variable.numpy() for variable in whole.variables], "variables")


@pytest.mark.gate
def test_several_outputs_weights_and_masks_raise_no_alarm() -> None:
    words = keras.Input((5,), dtype="int32")
    read = layers.LSTM(6, return_sequences=True, name="lstm")(layers.Embedding(9, 4, mask_zero=True)(words))
    whole = keras.Model(words, {"tag": layers.Dense(3, name="tag")(read), "all": layers.Dense(1, name="all")(read)})
    draw = np.random.default_rng(0)
    x = draw.integers(0, 9, (10, 5))
    y = {"tag": draw.integers(0, 3, (10, 5)), "all": draw.normal(size=(10, 5, 1)).astype("float32")}
    weights = {"tag": draw.uniform(size=(10, 5)).astype("float32"), "all": np.ones((10, 5), "float32")}
    with Pipeline.split(whole, at=["lstm"], microbatches=3, transport="inproc") as pipe:
        losses = {"tag": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "all": "mae"}
        pipe.compile("sgd", losses, loss_weights={"tag": 0.3, "all": 2.0})
        pipe.train_on_batch(x, y, weights)


def test_a_deep_model_that_magnifies_rounding_raises_no_alarm() -> None:
    deep = [layer for _ in range(12) for layer in (layers.Dense(16, "relu"), layers.BatchNormalization())]
    with split(model(*deep)) as pipe:
        pipe.train_on_batch(*batch(96))


def test_numbers_that_nobody_can_repeat_raise_no_alarm_and_are_named_once() -> None:
    with split(model(Noisy(name="hiss"))) as pipe:
        with pytest.warns(UserWarning, match="layer 'hiss' .RandomStandardNormal. draws random numbers"):
            pipe.train_on_batch(*batch())
        pipe.test_on_batch(*batch())


def test_of_several_losses_the_one_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = keras.Input((6,))
    low = layers.Dense(4, name="low")(inputs)
    whole = keras.Model(inputs, {"a": layers.Dense(1, name="a")(low), "b": layers.Dense(1, name="b")(low)})
    right = Head.value

    def wrong(self: Head, *given: Any) -> Any:
        return right(self, *given) * (1.0 if isinstance(self.loss, keras.losses.MeanSquaredError) else 1.001)

    monkeypatch.setattr(Head, "value", wrong)
    x, y = batch()
    with Pipeline.split(whole, at=["low"], transport="inproc") as pipe:
        pipe.compile("sgd", {"a": keras.losses.MeanSquaredError(), "b": keras.losses.MeanAbsoluteError()})
        with pytest.raises(FirstBatchError, match="the loss of 'b' in the workers differs"):
            pipe.train_on_batch(x, {"a": y, "b": y})


def test_a_model_that_cannot_be_called_here_is_trained_with_a_warning() -> None:
    with split(model(OnlyInWorkers())) as pipe:
        pipe.train_on_batch(*batch())
        with pytest.warns(UserWarning, match="RuntimeError"):  # only now is it known that the batch is not at fault
            pipe.train_on_batch(*batch())


def test_it_is_looked_once_after_each_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.own.model import OwnModel

    runs: list[bool] = []
    right = OwnModel.run

    def run(self: OwnModel, few: Any, training: bool) -> Any:
        if len(few.sizes) > 1:  # once more in one, to see whether samples depend on each other
            runs.append(training)
        return right(self, few, training)

    monkeypatch.setattr(OwnModel, "run", run)
    with split(model()) as pipe:
        pipe.fit(*batch(), batch_size=8, verbose=0, validation_data=batch())
        assert runs == [True, False]
        pipe.compile("sgd", "mean_absolute_error")
        pipe.train_on_batch(*batch())
        assert runs == [True, False, True]


@keras.saving.register_keras_serializable("tests.first_batch")
class ErrorElsewhereDoubled(keras.metrics.MeanAbsoluteError):
    """A metric that depends on where it runs."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        factor = 1.0 if threading.current_thread() is MAIN else 2.0
        return super().update_state(factor * y_true, factor * y_pred, sample_weight)


def test_a_metric_that_is_another_one_in_the_workers_is_refused() -> None:
    whole = model()
    with Pipeline.split(whole, stages=2, microbatches=4, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", metrics=["mae", ErrorElsewhereDoubled(name="error")])
        with pytest.raises(FirstBatchError, match=r"the metric 'error' .* is another one in the workers"):
            pipe.train_on_batch(*batch())


@pytest.mark.filterwarnings("ignore:.*is computed over the whole batch")
def test_metrics_that_are_right_raise_no_alarm_and_count_as_without_the_look() -> None:
    """Metrics that jump, on predictions that are all alike; that weigh; that give a number a batch or one a class."""

    def spread(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.sqrt(keras.ops.mean(keras.ops.reshape(keras.ops.cast(y_true, "float32"), (-1, 1)) * y_pred))

    x, y = batch()
    labels, weights = (y[:, 0] > 0).astype("int32"), np.linspace(0.1, 2, len(x)).astype("float32")
    logs = []
    for look in (True, False):
        whole = keras.Sequential(
            [keras.Input((6,)), layers.Dense(8), layers.Dense(3, "softmax", kernel_initializer="zeros")]
        )
        with Pipeline.split(whole, stages=2, microbatches=3, transport="inproc", check_first_batch=look) as pipe:
            metrics = ["accuracy", spread, keras.metrics.SparseTopKCategoricalAccuracy(2)]
            pipe.compile("sgd", "sparse_categorical_crossentropy", metrics=metrics, weighted_metrics=["accuracy"])
            logs.append(pipe.train_on_batch(x, labels, weights, return_dict=True))
    assert logs[0] == logs[1]


@keras.saving.register_keras_serializable("tests.first_batch")
class Stepping(layers.Layer):
    """Counts its calls in training, and grows with them."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False, name="steps")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.steps.assign_add(1.0)
        return x * (1 + self.steps)


def test_a_layer_that_changes_itself_in_every_microbatch_is_named_once() -> None:
    for microbatches in (3, 1):
        with split(model(Stepping(name="stepping")), microbatches=microbatches) as pipe:
            if microbatches > 1:
                with pytest.warns(UserWarning, match=r"'stepping' changes .*/steps' .* each of 3 microbatches") as told:
                    pipe.train_on_batch(*batch())
                assert told[0].filename == __file__
            pipe.train_on_batch(*batch())
            pipe.test_on_batch(*batch())


def test_a_layer_that_changes_itself_is_named_also_where_a_batch_of_one_sample_came_first() -> None:
    with split(model(Stepping(name="stepping")), microbatches=3) as pipe:
        pipe.train_on_batch(*batch(1))
        with pytest.warns(UserWarning, match=r"'stepping' changes .* each of 3 microbatches"):
            pipe.train_on_batch(*batch())


def test_a_model_that_wants_even_microbatches_is_compared_in_such() -> None:
    with split(model(Pairs()), microbatches=3) as pipe:
        for _ in range(2):
            pipe.train_on_batch(*batch())
    wrong = split(model(Pairs(), ElsewhereDoubled()), microbatches=3)
    with wrong, pytest.raises(FirstBatchError, match="first to differ is stage 'stage0'"):
        wrong.train_on_batch(*batch())


def test_targets_and_weights_are_tensors_and_what_objects_count_in_the_look_is_no_change_of_the_users() -> None:
    """Of a metric, which is run after the model, and of layers that are run again to see what rounding does."""
    x, y = batch()
    metrics = {"metrics": [CountedError(name="a")], "weighted_metrics": [CountedError(name="b")]}
    deep = [layer for _ in range(6) for layer in (layers.Dense(16, "relu"), layers.BatchNormalization())]
    with Pipeline.split(model(*deep, Counted()), stages=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", **metrics)
        logs = pipe.train_on_batch(x, y, np.ones(len(x), "float32"), return_dict=True)
        assert logs["a"] == pytest.approx(logs["b"])
        pipe.test_on_batch(x, y)
        pipe.fit(x, y, verbose=0)


def test_what_a_metric_counts_when_its_variables_are_made_is_no_change_of_the_users() -> None:
    with Pipeline.split(model(), stages=2, transport="inproc", check_first_batch=False) as pipe:
        pipe.compile("sgd", "mean_squared_error", metrics=[CountedScore(threshold=0.5)], run_eagerly=True)
        for _ in range(2):
            pipe.fit(*batch(), verbose=0)


def test_a_metric_that_cannot_be_called_here_is_trained_with_a_warning() -> None:
    def error(y_true: Any, y_pred: Any) -> Any:
        from threading import current_thread, main_thread

        if current_thread() is main_thread() and y_true.shape[0] > 1:
            raise RuntimeError("not here")
        return keras.ops.abs(y_true - y_pred)

    whole = model()
    with Pipeline.split(whole, stages=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", metrics=[error])
        pipe.train_on_batch(*batch())
        with pytest.warns(UserWarning, match="RuntimeError"):
            pipe.train_on_batch(*batch())


def test_what_was_changed_is_refused_also_where_the_own_model_is_about_to_be_called() -> None:
    """The look at the first prediction, and a verification, call it and keep what it became, but not the change."""
    drop = layers.Dropout(0.5, name="drop")
    whole = keras.Sequential([keras.Input((6,)), layers.Dense(2), Many(), drop, layers.Dense(1)])
    with Pipeline.split(whole, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.train_on_batch(*batch())
        drop.rate = 0.9
        for ask in (partial(pipe.predict_on_batch, batch()[0]), partial(pipe.verify, *batch(), checks="own")):
            with pytest.raises(CompileError, match=r"'drop' got rate=0.9 \(it was 0.5\)"):
                ask()

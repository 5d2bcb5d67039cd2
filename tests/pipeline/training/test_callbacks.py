"""Keras's own callbacks do on a pipeline what they do on the unsplit model; those that cannot say so at the start."""

from importlib.util import find_spec

import keras
import numpy as np
import pytest

from pipeline import CompileError, Pipeline
from tests.levels import in_turn
from tests.pipeline.reference.twins import (
    callback_model,
    classes,
    classifier,
    crossentropy,
    numbers,
    regressor,
    squares,
    twins,
)

# Keras 3.15 itself reads variables in a way that NumPy 2 warns about, in its callbacks and when it saves.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
TENSORBOARD = find_spec("tensorboard") is not None

X, Y = classes(20)
XN, YN = numbers(20)


def diverging():
    return {"optimizer": keras.optimizers.SGD(1e12), "loss": "mse"}


@pytest.mark.parametrize(
    ("build", "compiled", "data", "callbacks", "arguments"),
    [
        pytest.param(
            classifier,
            crossentropy,
            (X, Y),
            lambda: [keras.callbacks.EarlyStopping("val_accuracy", patience=1, restore_best_weights=True)],
            {"validation_split": 0.3, "epochs": 5},
            id="EarlyStopping with an automatic mode",
            marks=pytest.mark.gate,
        ),
        pytest.param(
            regressor,
            lambda: {"optimizer": keras.optimizers.SGD(1.5), "loss": "mse"},
            (XN, YN),
            lambda: [keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True)],
            {"epochs": 6},
            id="EarlyStopping goes back to the best weights",
        ),
        pytest.param(
            regressor,
            squares,
            (XN, YN),
            lambda: [keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=10)],
            {"epochs": 4},
            id="ReduceLROnPlateau",
        ),
        pytest.param(
            regressor,
            squares,
            (XN, YN),
            lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)],
            {"epochs": 3},
            id="LearningRateScheduler",
            marks=pytest.mark.gate,
        ),
        pytest.param(
            regressor,
            diverging,
            (XN, YN),
            lambda: [keras.callbacks.TerminateOnNaN()],
            {"epochs": 3},
            id="TerminateOnNaN",
        ),
        pytest.param(regressor, diverging, (XN, YN), list, {"epochs": 2}, id="NaN goes on as in Keras"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_training_under_a_callback_is_that_of_keras(build, compiled, data, callbacks, arguments):
    with twins(build, compiled) as pair:
        theirs = pair.assert_fit_alike(*data, batch_size=4, callbacks=callbacks, **arguments)
        assert theirs["loss"]
        rates = [twin.optimizer.learning_rate.numpy() for twin in (pair.model, pair.pipe)]
        assert rates[0] == rates[1]


def test_learning_rate_is_read_and_set_between_fits():
    with twins(regressor, squares) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=10)
        pair.both(lambda twin: setattr(twin.optimizer, "learning_rate", 0.001))
        assert float(pair.pipe.optimizer.learning_rate) == np.float32(0.001)
        pair.assert_fit_alike(XN, YN, batch_size=10)


def test_learning_rate_schedules_count_the_steps_of_all_fits():
    def compiled():
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5)
        return {"optimizer": keras.optimizers.Adam(schedule), "loss": "mse"}

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=7)
        pair.both(lambda twin: twin.train_on_batch(XN, YN))
        pair.assert_fit_alike(XN, YN, batch_size=7)
        rates = [float(twin.optimizer.learning_rate) for twin in (pair.model, pair.pipe)]
        assert rates[0] == rates[1] < 0.1
        assert int(pair.pipe.optimizer.iterations) == 7


def test_weights_become_their_averages_at_the_end_as_in_keras():
    def compiled():
        return {"optimizer": keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "loss": "mse"}

    def callbacks():
        return [keras.callbacks.EarlyStopping("loss", patience=0, min_delta=10, restore_best_weights=True)]

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=5, epochs=2)
        pair.assert_fit_alike(XN, YN, batch_size=5, epochs=4, callbacks=callbacks)


def test_a_callback_sees_what_it_would_see_in_keras():
    def seen_by(twin):
        seen = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                seen.append((batch, dict(logs), int(self.model.optimizer.iterations)))

            def on_epoch_end(self, epoch, logs=None):
                seen.append((epoch, dict(logs), [w.sum() for w in self.model.get_weights()]))
                seen.append([m.name for m in self.model.metrics])
                seen.append(self.params)

        twin.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[Watch()])
        return seen

    with twins(classifier, crossentropy) as pair:
        theirs, ours = pair.both(seen_by)
        assert ours == theirs


def test_stop_training_and_lambda_callbacks():
    with twins(regressor, squares) as pair:

        def stop_after_two(twin):
            def stop(batch, logs):
                model.stop_training = batch == 1

            model = callback_model(twin)
            callback = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
            return twin.fit(XN, YN, batch_size=4, epochs=3, verbose=0, callbacks=[callback]).history

        theirs, ours = pair.both(stop_after_two)
        assert ours == theirs and len(ours["loss"]) == 1
        pair.assert_weights_alike()


class Evaluating(keras.callbacks.Callback):
    """Looks at other data after every batch, with the same metrics."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.evaluate(XN[:8], YN[:8], verbose=0)


class Predicting(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.predict(XN[:8], verbose=0)


@pytest.mark.parametrize("callback", in_turn([Predicting, Evaluating], 0, 2))
def test_a_callback_that_runs_the_model_leaves_the_logs_of_keras(callback):
    """An evaluation counts in the same metrics, as in Keras, so that an epoch ends with it; a prediction does not."""
    with twins(regressor, lambda: {**squares(), "metrics": ["mae"]}) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=8, epochs=2, callbacks=lambda: [callback()])


def test_a_callback_that_freezes_or_compiles_is_told_that_nothing_would_hear_it():
    def freeze(model):
        model.trainable = False

    with Pipeline.split(regressor(), stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(**squares(), run_eagerly=True)
        for deed in (freeze, lambda model: model.compile("sgd", "mae")):
            late = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs, deed=deed: deed(pipe._trainer))
            with pytest.raises(CompileError, match="the workers would not hear of"):
                pipe.fit(XN, YN, verbose=0, callbacks=[late])
        pipe.compile(**squares(), run_eagerly=True)
        assert pipe.fit(XN, YN, verbose=0, epochs=2).epoch == [0, 1]


@pytest.mark.parametrize("microbatches", in_turn([4, 1], 1, 2))
def test_metric_objects_have_the_values_of_keras_whenever_they_are_read(microbatches):
    """After every batch in a callback, after `fit`, `evaluate` and `train_on_batch`; of one that builds itself too."""
    made = []

    def compiled():
        made.append([keras.metrics.MeanAbsoluteError(name="mae"), keras.metrics.R2Score(name="r2")])
        return {**squares(), "metrics": made[-1][:1], "weighted_metrics": made[-1][1:]}

    def seen_by(twin, metrics):
        def note(*_, **__):
            seen.append([float(metric.result()) for metric in metrics])

        seen = []
        every = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: note() if epoch else None, on_train_batch_end=note, on_epoch_end=note
        )
        twin.fit(XN, YN, batch_size=8, epochs=2, validation_split=0.2, verbose=0, shuffle=False, callbacks=[every])
        for ask in (
            lambda: twin.evaluate(XN[:7], YN[:7], verbose=0),
            lambda: twin.train_on_batch(XN[:8], YN[:8]),
            lambda: twin.test_on_batch(XN[8:], YN[8:]),
        ):
            if isinstance(twin, keras.Model):
                twin.reset_metrics()  # as Keras 3.15 does by itself for a batch alone, and older ones do not
            ask()
            note()
        return seen

    with twins(regressor, compiled, microbatches=microbatches) as pair:
        theirs, ours = seen_by(pair.model, made[0]), seen_by(pair.pipe, made[1])
        assert theirs[0] != theirs[1]
        np.testing.assert_allclose(ours, theirs, rtol=0 if microbatches == 1 else 1e-5)

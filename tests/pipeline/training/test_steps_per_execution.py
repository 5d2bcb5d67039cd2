"""`steps_per_execution`: what Keras shows of it, the bits of single steps, and one undoing for all of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import CompileError, DataError, WorkerError
from stages.worker import kept_values
from tests.pipeline.runtime.test_mistakes import BAD, Refuses, states

X = np.random.default_rng(0).normal(size=(28, 4)).astype("float32")
Y = np.abs(X[:, :1])
GOOD = X[:8]


class Seen(keras.callbacks.Callback):
    """Notes every batch that a callback is told of, with its logs."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.told, self.stop_at = [], stop_at

    def note(self, what):
        def noted(number, logs=None):
            self.told.append((what, number, sorted(logs or {}), [float(one) for one in (logs or {}).values()]))
            if (what, number) == ("end", self.stop_at):
                self.model.stop_training = True

        return noted

    def set_model(self, model):
        super().set_model(model)
        self.on_train_batch_begin, self.on_train_batch_end = self.note("begin"), self.note("end")
        self.on_test_batch_begin, self.on_test_batch_end = self.note("test"), self.note("tested")
        self.on_epoch_end = self.note("epoch")


def model():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "relu"), layers.Dropout(0.25, seed=3), layers.Dense(4), layers.Dense(1)]
    )


def piped(several, *, eager=True, optimizer=None, transport="inproc", own=None):
    pipe = Pipeline.split(own or model(), stages=2, microbatches=2, transport=transport)
    rate = keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)
    how = {"metrics": ["mae"], "run_eagerly": eager, "steps_per_execution": several}
    pipe.compile(optimizer or keras.optimizers.Adam(rate), "mean_squared_error", **how)
    return pipe


@pytest.mark.gate
@pytest.mark.parametrize(("several", "stop_at"), [(3, None), (4, 7), (100, None)], ids=["rest", "stopped", "all"])
def test_callbacks_and_logs_are_those_of_keras(several, stop_at):
    data = {"batch_size": 4, "shuffle": False, "verbose": 0, "epochs": 2, "validation_data": (X[:18], Y[:18])}
    plain, theirs, ours = model(), Seen(stop_at), Seen(stop_at)
    plain.layers[1].rate = 0.0
    plain.compile("sgd", "mean_squared_error", metrics=["mae"], steps_per_execution=several)
    expected = plain.fit(X, Y, callbacks=[theirs], **data).history
    own = model()
    own.layers[1].rate = 0.0
    with piped(several, optimizer=keras.optimizers.SGD(), own=own) as pipe:
        found = pipe.fit(X, Y, callbacks=[ours], **data).history
        predicted = pipe.predict(X, batch_size=4, verbose=0)
    np.testing.assert_allclose(predicted, plain.predict(X, batch_size=4, verbose=0), rtol=1e-5, atol=1e-6)
    assert [one[:3] for one in ours.told] == [one[:3] for one in theirs.told]
    for mine, other in zip(ours.told, theirs.told, strict=True):
        np.testing.assert_allclose(mine[3], other[3], atol=2e-4)
    assert {name: len(values) for name, values in found.items()} == {n: len(v) for n, v in expected.items()}


@pytest.mark.parametrize(
    ("eager", "transport"),
    [
        pytest.param(True, "inproc", id="eager"),
        pytest.param(False, "auto", id="compiled, processes", marks=pytest.mark.gate),
    ],
)
def test_bits_are_those_of_single_steps(eager, transport):
    """With statistics of chance, a schedule of rates, a smaller last batch, and a last execution of fewer steps."""
    found = []
    for several in (1, 3):
        with piped(several, eager=eager, transport=transport) as pipe:
            history = pipe.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0).history
            found.append((history, states(pipe), int(pipe.optimizer.iterations)))
    assert found[0] == found[1]


def failing(pipe, most=3):
    steps = pipe.session.steps
    return steps.train_several([(GOOD, Y[:8], None), (BAD, Y[:8], None), (GOOD, Y[:8], None)][:most])


def refusing(several=3):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    own = keras.Sequential(
        [
            *(keras.Input((4,)), layers.Dense(5), layers.Dropout(0.3, seed=3, name="one")),
            *(Refuses(name="second"), layers.BatchNormalization(), layers.Dense(1)),
        ]
    )
    pipe = Pipeline.split(own, at=["one"], microbatches=4, transport="inproc")
    pipe.compile(keras.optimizers.Adam(0.01), "mean_squared_error", metrics=["mae"], steps_per_execution=several)
    pipe.session.steps.look = lambda mode, batch: None
    return pipe


@pytest.mark.filterwarnings("ignore:the layer .* .BatchNormalization.")
def test_an_execution_that_fails_is_undone_in_every_stage_and_the_run_goes_on(monkeypatch):
    """The step in front of the one that fails was updated already, and those behind it were ordered already."""
    with refusing() as pipe:
        pipe.session.steps.train(GOOD, Y[:8], None)
        before, count = states(pipe), int(pipe.optimizer.iterations)
        for most in (3, 2):
            with pytest.raises(WorkerError, match="too large a number") as caught:
                failing(pipe, most)
            assert caught.value.undone and states(pipe) == before and int(pipe.optimizer.iterations) == count
        pipe.session.steps.train_several([(GOOD, Y[:8], None)] * 2)
        after = states(pipe)
        with refusing() as twin:
            for _ in range(3):
                twin.session.steps.train(GOOD, Y[:8], None)
            assert states(twin) == after
        monkeypatch.setattr(kept_values, "_changed_by_updates", lambda hosted: [])  # a negative control
        with pytest.raises(WorkerError):
            failing(pipe)
        assert states(pipe) != after


def test_what_does_not_fit_is_refused_behind_what_was_trained_before_it():
    batches = [(GOOD, Y[:8], None), (GOOD, Y[:8], None), (GOOD[:, :2], Y[:8], None)]
    with piped(3) as pipe, piped(1) as twin:
        with pytest.raises(DataError, match="must have the shape"):
            pipe.session.steps.train_several(batches)
        for x, y, _ in batches[:2]:
            twin.session.steps.train(x, y, None)
        assert states(pipe) == states(twin)


def test_data_that_end_in_an_error_are_trained_up_to_it():
    def data():
        yield from [(GOOD, Y[:8])] * 4
        raise OSError("the disk is gone")

    def trained(pipe):
        return [array.tobytes() for what in ("model", "optimizer") for array in pipe.session.values.read(what)[1]]

    with piped(3) as pipe, piped(1) as twin:
        with pytest.raises(Exception, match="the disk is gone"):
            pipe.fit(data(), shuffle=False, verbose=0)
        for _ in range(4):
            twin.session.steps.train(GOOD, Y[:8], None)
        assert trained(pipe) == trained(twin)


@pytest.mark.gate
@pytest.mark.filterwarnings("error")
def test_where_something_is_decided_between_steps_they_go_one_by_one_and_that_is_said():
    found = []
    for several in (1, 2):
        with piped(several, optimizer=keras.optimizers.Adam(0.02, global_clipnorm=0.1)) as pipe:
            data = {"batch_size": 7, "shuffle": False, "verbose": 0}
            if several == 1:
                pipe.fit(X, Y, **data)
            else:
                with pytest.warns(
                    UserWarning, match="makes no step faster here, since the norm of all gradients"
                ) as told:
                    pipe.fit(X, Y, **data)
                assert told[0].filename == __file__
            found.append(states(pipe))
    assert found[0] == found[1]


def test_only_whole_numbers_are_taken():
    pipe = Pipeline.split(model(), stages=2, transport="inproc")
    for several in (0, -1, 2.0, True, "auto"):
        with pytest.raises(CompileError, match="steps_per_execution must be a whole number of at least 1"):
            pipe.compile("sgd", "mean_squared_error", steps_per_execution=several)
    pipe.close()

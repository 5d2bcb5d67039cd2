"""A user's mistake costs nothing: the pipeline goes on, bit for bit as if it had not been made."""

from __future__ import annotations

import functools
import os
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from pipeline.errors import DataError, PipelineClosedError, WorkerError
from pipeline.runtime import crew, interrupts
from stages.worker import base, kept_values
from tests.levels import in_turn
from transport.errors import MessageTooLarge
from transport.limits import Limits
from transport.registry import open_transport

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.abs(X[:, :1])
BAD = np.where(np.arange(8)[:, None] < 6, X, 1e9).astype("float32")
"""Only the last of four microbatches has what the layer refuses: the others have gone through all stages by then."""


@keras.saving.register_keras_serializable("tests")
class Refuses(keras.layers.Layer):
    """Raises on numbers above a million, eagerly and compiled."""

    def call(self, x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), 1e6, "too large a number")]):
            return tf.identity(x)


@keras.saving.register_keras_serializable("tests")
class Interrupts(keras.layers.Layer):
    """Two Ctrl-C for the main thread, while the numbers are above a million."""

    def call(self, x):
        if tf.executing_eagerly() and float(tf.reduce_max(x)) > 1e6:
            block, heard = interrupts._blocks[-1], threading.Event()
            for count in (1, 2):
                os.kill(os.getpid(), signal.SIGINT)
                while block.signals < count:
                    heard.wait(0.001)
        return x


def made(layer, eager=True, units=6):
    """Three stages with everything that a step changes: statistics, seeds, metrics, sums of gradients, slots."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            *(keras.Input((4,)), layers.Dense(units), layers.Dropout(0.3, seed=3, name="one")),
            *(layer(name="second"), layers.Dense(5), layers.BatchNormalization()),
            *(layers.Dropout(0.2, seed=4, name="two"), layers.Dense(1, name="third")),
        ]
    )
    pipe = Pipeline.split(model, at=["one", "two"], microbatches=4, transport="inproc")
    optimizer = keras.optimizers.Adam(0.01, global_clipnorm=1.0)
    pipe.compile(optimizer, "mean_squared_error", metrics=["mae"], run_eagerly=eager)
    pipe.session.steps.look = lambda mode, batch: None  # the first batch is looked at elsewhere
    return pipe


def states(pipe):
    """The bits of everything that the workers hold."""
    return [
        [array.tobytes() for array in arrays]
        for what in ("model", "optimizer", "metrics")
        for arrays in pipe.session.values.read(what).values()
    ]


def trained(pipe, mistakes):
    """Metrics that go on counting over two steps, with a mistake behind each."""
    steps, logs = pipe.session.steps, []
    for _ in range(2):
        logs.append(steps.train(X, Y, None)[0])
        before = states(pipe)
        for mistake in mistakes:
            mistake(pipe)
            assert states(pipe) == before
        logs.append(steps.test(X, Y, None)[0])
    return [(one.loss, one.metrics) for one in logs], states(pipe)


def refused(call):
    def mistake(pipe):
        with pytest.raises(WorkerError, match="too large a number") as caught:
            call(pipe)
        assert caught.value.undone

    return mistake


BY_DATA = [
    refused(lambda pipe: pipe.session.steps.train(BAD, Y, None)),
    refused(lambda pipe: pipe.session.steps.test(BAD, Y, None)),
    refused(lambda pipe: pipe.predict(BAD, verbose=0)),
    refused(lambda pipe: pipe.gradients(BAD, Y)),
    refused(lambda pipe: pipe.timeline(BAD, Y)),
]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_what_a_layer_refuses_leaves_the_run_bit_for_bit_as_it_was(eager):
    with made(Refuses, eager) as pipe, made(Refuses, eager) as twin:
        assert trained(pipe, BY_DATA) == trained(twin, ())


@pytest.mark.gate
@pytest.mark.parametrize("left_out", in_turn(["gradients", "states", "metrics"], 1, 1))
def test_the_oracle_sees_what_is_not_undone(left_out, monkeypatch):
    """A negative control: each thing that is left out of the undoing makes another run."""
    if left_out == "gradients":
        monkeypatch.setattr(
            "stages.flat_stage.FlatStage.zero_gradients", lambda stage, failed=False: stage._forget_open()
        )
    else:
        right = kept_values._changed_by_steps
        some = {"states": 1, "metrics": 0}[left_out]

        def without(hosted):
            other = {id(getattr(one, "value", one)) for one in hosted.variables(("metrics", "states")[some])}
            return [one for one in right(hosted) if id(one) not in other]

        monkeypatch.setattr(kept_values, "_changed_by_steps", without)
    with made(Refuses) as pipe, made(Refuses) as twin:
        steps, again = pipe.session.steps, twin.session.steps
        for one in (steps, again):
            one.train(X, Y, None)
        with pytest.raises(WorkerError):
            steps.train(BAD, Y, None)
        found, expected = steps.train(X, Y, None)[0], again.train(X, Y, None)[0]
        assert (found.metrics, states(pipe)) != (expected.metrics, states(twin))


def test_a_step_that_is_interrupted_twice_is_undone():
    def interrupted(pipe):
        with pytest.raises(KeyboardInterrupt):
            pipe.session.steps.train(BAD, Y, None)

    with made(Interrupts) as pipe, made(Interrupts) as twin:
        assert trained(pipe, [interrupted]) == trained(twin, ())


def test_a_message_that_is_too_large_is_taken_back(monkeypatch):
    """In the user's process (the batch) and in a worker (what a stage gives), while its neighbours wait."""
    limits = Limits(max_bytes=4000)
    for module in (crew, base):
        monkeypatch.setattr(module, "open_transport", functools.partial(open_transport, limits=limits))
    long = np.ones((400, 4), "float32")  # 6400 bytes; a microbatch of 60 rows of 18 numbers has 4320
    tall = np.ones((240, 4), "float32")

    def of_the_batch(pipe):
        words = (
            r"^input '.+' has shape \(400, 4\) of float32, 6400 bytes, which is above the limit of 4000 bytes a message"
            r"; a batch goes whole to every stage that takes some of it: give smaller batches \(batch_size=\)$"
        )
        with pytest.raises(MessageTooLarge, match=words):
            pipe.session.steps.train(long, long[:, :1], None)

    def of_a_stage(pipe):
        words = (
            r"^stage 'stage0' failed in step \d+, forward of microbatch 0: MessageTooLarge: output '.+' has shape "
            r"\(60, 18\) of float32, 4320 bytes, which is above the limit of 4000 bytes a message; take more "
            r"microbatches \(microbatches=\), or cut the model where its tensors are smaller\n"
        )
        with pytest.raises(WorkerError, match=words) as caught:
            pipe.session.steps.train(tall, tall[:, :1], None)
        assert caught.value.kind == "MessageTooLarge"

    with made(Refuses, units=18) as pipe, made(Refuses, units=18) as twin:
        assert trained(pipe, [of_the_batch, of_a_stage]) == trained(twin, ())


@pytest.mark.filterwarnings("ignore:the layer .* is stateful")
def test_a_batch_of_another_size_than_the_only_one_is_refused_before_anything_is_sent():
    remembers = [keras.layers.Reshape((1, 4)), keras.layers.SimpleRNN(5, stateful=True)]
    model = keras.Sequential([keras.Input(batch_shape=(8, 4)), *remembers, keras.layers.Dense(1)])
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("adam", "mean_squared_error", run_eagerly=True)
        before = pipe.predict(X, verbose=0)
        step = pipe.session.workers.driver()._step
        with pytest.raises(DataError, match=r"takes batches of 8 samples only .* received 5; give"):
            pipe.predict(X[:5], verbose=0)
        assert pipe.session.workers.driver()._step == step
        assert len(pipe.get_weights()) == 5
        pipe.reset_state()
        np.testing.assert_array_equal(pipe.predict(X, verbose=0), before)


def test_an_error_between_a_step_and_its_update_undoes_the_step():
    def failing(pipe):
        batch = pipe.session.steps.batch(X, Y, None, pipe.session.workers.needs_compile("a test").judged)

        def look(driver):
            raise RuntimeError("before the update")

        with pytest.raises(RuntimeError, match="before the update"):
            pipe.session.steps.step(batch, look=look)

    with made(Refuses) as pipe, made(Refuses) as twin:
        assert trained(pipe, [failing]) == trained(twin, ())


@keras.saving.register_keras_serializable("tests")
class Breaks(keras.optimizers.SGD):
    """Raises behind its first variable's update."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)
        raise ArithmeticError("no more \x1b[1mof\x1b[0m this\x1b]0;title\x07")


@pytest.mark.gate
def test_an_update_that_raises_ends_the_run_and_says_why_it_cannot_be_taken_back():
    with made(Refuses) as pipe:
        pipe.compile(Breaks(0.1), "mean_squared_error", run_eagerly=True)
        pipe.session.steps.look = lambda mode, batch: None
        with pytest.raises(WorkerError, match=r"while its optimizer updated it: ArithmeticError: no more") as caught:
            pipe.session.steps.train(X, Y, None)
            pipe.get_weights()  # an update is not waited for
        assert not caught.value.undone
        assert "no more of this\\x1b]0;title\\x07\n" in str(caught.value)  # no power over the terminal
        assert not {"\x1b", "\x07"} & {*str(caught.value), *caught.value.worker_traceback}
        assert "may have made this update already, which cannot be taken back: the pipeline is over" in str(
            caught.value
        )
        assert "Load the last checkpoint" in str(caught.value)
        with pytest.raises(PipelineClosedError, match="while its optimizer updated it"):
            pipe.get_weights()

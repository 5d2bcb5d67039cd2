"""Real steps are traced as they ran, training does not notice, and what was made slow on purpose is what is named.

The slow-downs are planted and large; what is judged is the name of the cause, never a time.
"""

import time
from importlib.util import find_spec
from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CompileError, Pipeline, TimelineError, TraceSteps
from pipeline.runtime.watcher import StepWatcher
from stages.worker.worker import Worker
from tests import trace_events

X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
Y = X[:, :1] ** 2
LONG = 0.02
"""Seconds: what a planted slow-down takes; a step without one takes a tenth of it."""


class Slow(keras.layers.Layer):
    """A layer whose eager forward takes its time."""

    def __init__(self, seconds, **options):
        super().__init__(**options)
        self.seconds = seconds

    def call(self, x):
        time.sleep(self.seconds)
        return tf.identity(x)


def pipe_of(seconds=(0.0, 0.0), microbatches=4, eager=True, **options):
    keras.utils.set_random_seed(3)
    parts = [layer for k, each in enumerate(seconds) for layer in (keras.layers.Dense(4), Slow(each, name=f"slow{k}"))]
    model = keras.Sequential([keras.Input((6,)), *parts, keras.layers.Dense(1)])
    cuts = [f"slow{k}" for k in range(len(seconds) - 1)]
    options = {"transport": "inproc", "check_first_batch": False} | options
    pipe = Pipeline.split(model, at=cuts, microbatches=microbatches, **options)
    pipe.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=eager)
    return pipe


def fitted(pipe, *callbacks, epochs=5, **arguments):
    return pipe.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, shuffle=False, callbacks=[*callbacks], **arguments)


@pytest.mark.gate
def test_training_is_bit_for_bit_what_it_is_without_and_the_steps_are_there(tmp_path):
    with pipe_of() as plain:
        history = fitted(plain, epochs=3).history
        weights = plain.get_weights()
    trace = TraceSteps(tmp_path / "trace.json", first=4, steps=2, every=2, log_dir=tmp_path / "logs")
    with pipe_of() as pipe, tf.summary.record_if(False):  # as Keras's TensorBoard(update_freq=) says of most steps
        assert fitted(pipe, trace, epochs=3).history == history
        assert all(np.array_equal(a, b) for a, b in zip(pipe.get_weights(), weights, strict=True))
    assert len(trace.timelines) == 2
    written = trace_events.read(tmp_path / "trace.json")
    assert trace_events.faults(written) == []
    names = trace_events.tracks(written)
    assert list(names.values()) == ["driver", "worker 0: stage0", "worker 1: stage1"]
    forwards = [(names[e["tid"]][:8], e["args"]["microbatch"]) for e in trace_events.slices(written, "forward")]
    assert sorted(forwards) == sorted([(f"worker {w}", m) for w in (0, 1) for m in range(4)] * 2)
    sent = [e["args"] for e in trace_events.slices(written, "send") if e["args"]["from"] == "worker 0"]
    assert [each["bytes"] for each in sent] == [2 * 4 * 4] * 8  # two samples, four floats
    driver = {e["name"] for e in trace_events.slices(written, "driver")}
    both = {
        "callbacks",
        "data",
        "watch the batch",
        "prepare",
        "send the batch",
        "wait for the workers",
        "decide, order the update",
    }
    assert driver == both
    updates = [names[e["tid"]][:8] for e in trace_events.slices(written, "update")]
    assert sorted(updates) == ["worker 0"] * 3 + ["worker 1"] * 3  # before each step, and behind the last
    assert "held back by" in str(trace)
    read_back(tmp_path / "logs" / "pipeline", trace)


def read_back(folder, trace):
    """TensorBoard's own reader finds the figures, at the steps that were traced."""
    if find_spec("tensorboard") is None:
        return
    found = {}
    [file] = folder.iterdir()
    for event in tf.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    assert set(found) == set(trace.figures())
    assert all(list(each) == [4, 6] for each in found.values())
    for step, timeline in zip((4, 6), trace.timelines, strict=True):
        assert found["step"][step] == pytest.approx(timeline.events.period, rel=1e-6)
        assert found["bubble"][step] == pytest.approx(timeline.bubble, rel=1e-6)
        assert found["samples per second"][step] == pytest.approx(8 / timeline.events.period, rel=1e-6)
        assert found["wait/worker 0: stage0"][step] == pytest.approx(timeline.idle[0], rel=1e-5)


@pytest.mark.gate
def test_processes_are_traced_on_one_clock_and_the_timeline_of_a_pipeline_too(tmp_path):
    with pipe_of(transport="auto", eager=False) as pipe:
        trace = TraceSteps(tmp_path / "fit.json", first=2, steps=2)
        fitted(pipe, trace)
        timeline = pipe.timeline(X, Y, repeats=1)
        timeline.save(tmp_path / "timeline.json")
    for one in (*trace.timelines, timeline):
        assert one.events.offsets == (0.0, 0.0)
        assert all(t.sent <= t.taken for t in one.events.transits)
    for name in ("fit.json", "timeline.json"):
        assert trace_events.faults(trace_events.read(tmp_path / name)) == []
    assert trace_events.slices(trace_events.read(tmp_path / "fit.json"), "wait")


@pytest.mark.gate
def test_in_executions_of_several_steps_no_span_overlaps_or_ends_before_it_begins():
    trace = TraceSteps(first=1, steps=4)
    with pipe_of() as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True, steps_per_execution=2)
        with pytest.warns(UserWarning, match="steps_per_execution=2 makes no step faster"):
            fitted(pipe, trace, epochs=2)
    assert len(trace.timelines) == 4
    for timeline in trace.timelines:
        driver = timeline.events.driver
        assert all(span.start <= span.end for span in driver)
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(driver))
        assert timeline.events.period >= timeline.step_time


@pytest.mark.gate
def test_a_training_that_fails_leaves_what_was_traced_so_far(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise RuntimeError("the user's own")

    trace = TraceSteps(tmp_path / "trace.json", first=1, steps=5)
    with pipe_of() as pipe, pytest.raises(RuntimeError, match="the user's own"):
        fitted(pipe, trace, Fails())
    assert not (tmp_path / "trace.json").exists()
    trace.save(tmp_path / "trace.json")
    assert trace_events.faults(trace_events.read(tmp_path / "trace.json")) == []


def test_where_no_step_was_traced_it_is_said():
    trace = TraceSteps(first=100)
    with pipe_of() as pipe:
        fitted(pipe, trace, epochs=1)
    assert str(trace) == "no step was traced: training made 2, and the first to be traced is step 100"
    for ask in (lambda: trace.bottleneck, trace.figures, lambda: trace.save("trace.json")):
        with pytest.raises(TimelineError, match="no step was traced"):
            ask()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"first": 0}, "first expects a whole number of steps"),
        ({"every": 1.5}, "every expects"),
        ({"steps": True}, "steps expects"),
        ({"filepath": "trace.pb"}, "is written as .json"),
        ({"filepath": "trace.json", "steps": None}, "too large to open"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, complaint):
    with pytest.raises(CompileError, match=complaint):
        TraceSteps(**arguments)


def named(pipe, *callbacks, data=None):
    """What is said to hold back the fourth step of a training, in the middle of an epoch."""
    trace = TraceSteps(first=4, steps=1)
    with pipe:
        if data is None:
            fitted(pipe, trace, *callbacks, epochs=2)
        else:
            pipe.fit(data, steps_per_epoch=4, verbose=0, shuffle=False, callbacks=[trace, *callbacks])
    return trace.bottleneck


def test_a_slow_stage_is_named():
    found = named(pipe_of((0.001, LONG)))
    assert (found.cause, found.name) == ("stage", "'stage1'")


@pytest.mark.gate
def test_few_microbatches_are_named():
    found = named(pipe_of((LONG, LONG, LONG), microbatches=1))
    assert found.cause == "bubble"
    assert any("microbatches in place of 1" in each.what for each in found.helps)


@pytest.mark.gate
@pytest.mark.parametrize("where", ["sending", "under way"])
def test_a_slow_way_is_named(monkeypatch, where):
    """The sender is kept while it sends, or the receiver gets later what was sent."""
    plain = {"sending": Worker._send, "under way": Worker._take}[where]

    def slow_send(self, message):
        if message.kind == "activation":
            time.sleep(LONG)
        plain(self, message)

    def slow_take(self, key):
        message = plain(self, key)
        if key.kind == "activation" and key.source >= 0:
            time.sleep(LONG)
        return message

    monkeypatch.setattr(Worker, *{"sending": ("_send", slow_send), "under way": ("_take", slow_take)}[where])
    found = named(pipe_of((0.001, 0.001)))
    assert (found.cause, found.name) == ("transfer", "'stage0'")


@pytest.mark.gate
def test_a_slow_generator_is_named():
    def slow():
        while True:
            time.sleep(10 * LONG)
            yield X[:8], Y[:8]

    found = named(pipe_of(), data=slow())
    assert found.cause == "driver"
    assert "meanwhile it has: data" in found.detail


@pytest.mark.gate
@pytest.mark.parametrize("when", ["on_train_batch_begin", "on_train_batch_end"])
def test_a_slow_callback_is_named(when):
    """Also one that stands behind the tracing one, and works where a batch begins."""
    slow = keras.callbacks.Callback()
    setattr(slow, when, lambda batch, logs=None: time.sleep(4 * LONG))
    found = named(pipe_of(), slow)
    assert found.cause == "driver"
    assert "meanwhile it has: callbacks" in found.detail


@pytest.mark.gate
def test_what_looks_at_the_batch_is_named_and_not_the_data():
    class Looks(StepWatcher):
        def before_step(self, session, data):
            time.sleep(4 * LONG)
            return super().before_step(session, data)

    found = named(pipe_of(), Looks())
    assert found.cause == "driver"
    assert "meanwhile it has: watch the batch" in found.detail

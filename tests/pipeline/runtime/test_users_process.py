"""A pipeline in a user's process: dropped, cleared, used by several threads, forked, copied."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import UsageError
from pipeline.runtime.launch.shared import shared_server
from tests.failures import DEADLINE
from tests.levels import SOAK
from tests.pipeline.runtime.launch.processes import children, open_files

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :1] ** 2


def made(transport="inproc", eager=True, metrics=()):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    pipe = Pipeline.split(model, stages=2, microbatches=2, transport=transport, check_first_batch=False)
    pipe.compile("adam", "mean_squared_error", run_eagerly=eager, metrics=list(metrics))
    return pipe


DROPPED = """
import gc, warnings
warnings.simplefilter("error")
import keras, numpy as np
from pipeline import Pipeline
from pipeline.runtime.launch.shared import shared_server
from tests.pipeline.runtime.launch.processes import children
x = np.ones((8, 4), "float32")
for transport in ("ipc", "tcp"):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    pipe = Pipeline.split(model, stages=2, microbatches=2, transport=transport)
    pipe.compile("sgd", "mse", run_eagerly=True)
    pipe.fit(x, x[:, :1], verbose=0)
    pipe.me = [pipe]
    keras.utils.clear_session()
    assert np.isfinite(pipe.train_on_batch(x, x[:, :1]))
    del pipe, model
    if transport == "tcp":  # the collector finalises in any order; then a pipeline's own finaliser does not come first
        del Pipeline.__del__
    keras.utils.clear_session()
    gc.collect()
    assert children(shared_server().pid) == []
print("done")
"""


@pytest.mark.gate
def test_dropped_pipelines_in_a_search_loop_neither_hang_nor_warn(script):
    program = script(DROPPED)
    code, output = program.finish()
    lines = [line for line in output.splitlines() if not line.startswith(("I0", "W0", "E0", "WARNING: All log"))]
    assert (code, lines[-1:]) == (0, ["done"]), output
    assert "Exception ignored" not in output
    assert "Warning" not in output
    assert program.relatives() == []
    assert program.directories() == []


def beside(call):
    """What a call gives in another thread: a value, or the exception."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    return thread, found


def test_calls_of_several_threads_come_one_after_the_other():
    """Each thread trains or predicts; the losses are those of one thread, in some order, and no prediction is mixed."""
    with made() as pipe, made() as twin:
        one, two = X[:8], X[8:]
        expected = [twin.train_on_batch(X, Y) for _ in range(12)]
        kept = made()
        with kept:
            right = kept.predict(one, verbose=0), kept.predict(two, verbose=0)
            jobs = [beside(lambda part=part: [kept.predict_on_batch(part) for _ in range(10)]) for part in (one, two)]
            for thread, _ in jobs:
                thread.join(DEADLINE)
            for (_, (found,)), wanted in zip(jobs, right, strict=True):
                for each in found:
                    np.testing.assert_array_equal(each, wanted)
        jobs = [beside(lambda: [pipe.train_on_batch(X, Y) for _ in range(4)]) for _ in range(3)]
        for thread, _ in jobs:
            thread.join(DEADLINE)
        assert sorted(loss for _, (losses,) in jobs for loss in losses) == sorted(expected)


def test_fit_with_a_thread_that_predicts_trains_as_without():
    with made(metrics=["mae"]) as pipe, made(metrics=["mae"]) as twin:
        seen, refusals, done = [], [], threading.Event()

        class Watch(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                thread, found = beside(lambda: (pipe.predict(X, verbose=0), pipe.get_weights()))
                thread.join(DEADLINE)
                seen.append(found[0])
                for call in (pipe.fit, pipe.evaluate, pipe.train_on_batch):
                    thread, found = beside(lambda call=call: call(X, Y))
                    thread.join(DEADLINE)
                    refusals.append(str(found[0]))

        thread, found = beside(lambda: [pipe.predict(X, verbose=0) for _ in iter(done.is_set, True)])
        history = pipe.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[Watch()])
        done.set()
        thread.join(DEADLINE)
        assert isinstance(found[0], list)
        expected = twin.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        assert history.history == expected.history
        for one, other in zip(pipe.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        assert [type(one).__name__ for one in seen] == ["tuple"] * 2
        assert len(refusals) == 6
        for name, text in zip(("fit", "evaluate", "train_on_batch") * 2, refusals, strict=True):
            assert text.startswith("fit() of this pipeline is running in the thread 'MainThread' and counts losses")
            assert f"{name}() in the thread 'other' would mix them up" in text


def test_a_forked_copy_of_the_process_is_refused_at_once_and_leaves_the_pipeline_alone():
    with made("ipc") as pipe:
        before = pipe.predict_on_batch(X)
        reading, writing = os.pipe()
        gc.collect()  # data sets' iterators of other tests, whose threads the copy has not, would be waited for there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of threads and fork
            child = os.fork()
        if not child:
            told = []
            for call in (pipe.predict, pipe.predict_on_batch, pipe.get_weights, pipe.merge, pipe.fit):
                try:
                    call(*([X] if "predict" in call.__name__ else []))
                except UsageError as error:
                    told.append(str(error)[:32])
            pipe.close()
            del pipe
            gc.collect()
            os.write(writing, "\n".join(told).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answers:
            lines = answers.read().splitlines()
        os.waitpid(child, 0)
        assert lines == ["this pipeline belongs to process"] * 5
        np.testing.assert_array_equal(pipe.predict_on_batch(X), before)


def test_a_pipeline_can_be_neither_copied_nor_pickled_and_goes_on():
    with made() as pipe:
        before = pipe.predict_on_batch(X)
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="a Pipeline has processes, so it can be neither copied nor pickled"):
                call(pipe)
        gc.collect()
        np.testing.assert_array_equal(pipe.predict_on_batch(X), before)


def held():
    """Descriptors, threads and workers of this process."""
    gc.collect()
    return len(open_files()), threading.active_count(), len(children(shared_server().pid))


def resident():
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.gate
@pytest.mark.timeout(1800 if SOAK else 120)
def test_rounds_of_opening_training_and_closing_hold_nothing():
    def a_round():
        with made("ipc") as pipe:
            pipe.train_on_batch(X, Y)

    for _ in range(20 if SOAK else 1):
        a_round()
    before, memory = held(), resident()
    for _ in range(200 if SOAK else 2):
        a_round()
    assert held() == before
    assert resident() - memory < (60 if SOAK else 30)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_10000_steps_hold_nothing():
    with made("ipc", eager=False, metrics=["mae"]) as pipe:
        for _ in range(500):
            pipe.train_on_batch(X, Y)
        before, memory = held(), resident()
        for _ in range(10_000):
            pipe.train_on_batch(X, Y)
        assert held() == before
        assert resident() - memory < 20

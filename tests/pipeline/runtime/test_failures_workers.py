"""What goes wrong in a worker reaches the user as one error, soon, with the stage's name and the worker's traceback."""

from __future__ import annotations

import functools
import time

import keras
import numpy as np
import pytest

from pipeline import Pipeline, Segment
from pipeline.errors import StalledError, WiringError, WorkerDiedError, WorkerError
from pipeline.runtime import workers
from pipeline.runtime.driver import Driver
from tests import failing_parts
from tests.failures import NOTICED_SECONDS, X, Y, tripping
from tests.levels import in_turn
from tests.sources import ROOT

pytestmark = pytest.mark.usefixtures("nothing_left")


def built(*segments, **options):
    pipe = Pipeline(segments, microbatches=2, **options)
    pipe.compile("sgd", "mse", run_eagerly=True)
    return pipe


def test_builder_that_raises(line):
    good = Segment(failing_parts.part, name="good")
    bad = Segment(failing_parts.raising_builder, kwargs={"line": line.path}, name="bad")
    pipe = built(good, bad)
    with pytest.raises(WorkerError) as caught:
        pipe.fit(X, Y, verbose=0)
    assert time.monotonic() - line.hear()["time"] < NOTICED_SECONDS
    error = caught.value
    assert str(error).startswith(
        "stage 'bad' failed while it built its model: RuntimeError: the builder gave up\n--- traceback of the"
    )
    assert (error.stage, error.kind, error.action, error.step) == ("bad", "RuntimeError", "", -1)
    assert "in raising_builder" in error.worker_traceback


@pytest.mark.parametrize(
    ("builder", "says"),
    [
        ("tests.failing_parts:careless_builder", "must return a built Keras model, it returned str"),
        ("tests.failing_parts:no_such_builder", "the worker cannot import 'tests.failing_parts:no_such_builder'"),
        ("no_such_module:build", "the worker cannot import 'no_such_module:build'"),
    ],
)
def test_builder_that_builds_nothing_or_is_not_there(builder, says):
    with pytest.raises(WorkerError, match=f"(?s)stage 'bad' failed while it built its model: .*{says}"):
        built(Segment(builder, name="bad")).train_on_batch(X, Y)


def test_stages_whose_shapes_do_not_fit_are_named_before_the_first_step():
    parts = [
        Segment(failing_parts.part, kwargs={"units": units, "inputs": inputs}, name=name)
        for name, inputs, units in (("bottom", 4, 5), ("middle", 6, 4), ("top", 4, 4))
    ]
    with pytest.raises(WiringError) as caught:
        built(*parts).fit(X, Y, verbose=0)
    assert str(caught.value) == (
        "the segments do not fit together: stage 'middle' takes 'y0' with the shape (None, 6) (None is any size), "
        "stage 'bottom' gives (None, 5)"
    )


@pytest.mark.parametrize("backward", in_turn([True, False], 1, 2), ids=["backward", "forward"])
def test_layer_that_raises_in_step_7(line, backward):
    """Two microbatches a step, so the second one of step 7 is the 14th call."""
    trip = {"do": "raise", "call_number": 14, "backward": backward, "line": line.path}
    pipe = tripping({}, trip, {})
    with pytest.raises(WorkerError) as caught:
        pipe.fit(np.repeat(X, 8, axis=0), np.repeat(Y, 8, axis=0), batch_size=8, shuffle=False, verbose=0)
    assert time.monotonic() - line.hear()["time"] < NOTICED_SECONDS
    error = caught.value
    action = "backward of microbatch 1" if backward else "forward of microbatch 1"
    assert f"stage 'middle1' failed in step 7, {action}" in str(error)
    assert (error.stage, error.step, error.action, error.kind) == ("middle1", 7, action, "ValueError")
    assert "the layer tripped" in str(error)
    assert "failing_parts.py" in error.worker_traceback
    assert error.undone
    assert str(error).endswith("the pipeline goes on with the values from before.")
    with pipe:
        assert int(pipe.optimizer.iterations.numpy()) == 6
        assert np.isfinite(pipe.train_on_batch(X, Y))


def test_what_a_worker_prints_is_seen_where_the_user_prints(capfd):
    with tripping({"do": "print"}, {}) as pipe:
        pipe.train_on_batch(X, Y)
    out, err = capfd.readouterr()
    assert "said on stdout\n" in out
    assert "said on stderr\n" in err


def test_loss_of_nan_goes_on_as_in_keras():
    with tripping({"do": "nan", "call_number": 3}, {}) as pipe:
        history = pipe.fit(np.tile(X, (4, 1)), np.tile(Y, (4, 1)), batch_size=8, epochs=2, shuffle=False, verbose=0)
        assert np.isnan(history.history["loss"]).tolist() == [True, True]
        assert np.isnan(pipe.get_weights()[0]).all(), "the weights took what the loss gave"


def test_terminate_on_nan_stops_at_the_step():
    seen = []
    batches = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    with tripping({"do": "nan", "call_number": 3}, {}) as pipe:
        callbacks = [keras.callbacks.TerminateOnNaN(), batches]
        pipe.fit(np.tile(X, (4, 1)), np.tile(Y, (4, 1)), batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    assert np.isnan(seen).tolist() == [False, True]


def test_run_in_which_everybody_waits_says_who_waits_for_whom(monkeypatch):
    """Workers that lose every gradient: the top is done, the others wait for gradients that never come."""
    entry = "tests.failing_parts:forgetful"
    monkeypatch.setattr(workers, "Driver", functools.partial(Driver, entry=entry, look_seconds=0.3))
    pipe = tripping({}, {}, {}, schedule="gpipe")
    with pytest.raises(StalledError) as caught:
        pipe.train_on_batch(X, Y)
    assert str(caught.value).splitlines() == [
        "every worker waits and nobody runs",
        "  stage 'bottom' waits for stage 'middle1' to begin step 1, backward of microbatch 0 (action 3 of its "
        "program)",
        "  stage 'middle1' waits for stage 'top' to begin step 1, backward of microbatch 0 (action 3 of its program)",
        "  stage 'top' waits for the driver",
    ]


def test_module_of_the_users_that_hides_ours_in_the_worker(monkeypatch, tmp_path):
    """Here it is ours, but the worker, which looks along the same path later, would find another one."""
    theirs = tmp_path / "pipeline.py"
    theirs.write_text("raise SystemExit('it must not be run')")
    pipe = tripping({}, {})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkerDiedError) as caught:
        pipe.train_on_batch(X, Y)
    assert "exit status 1, raised ImportError: another module has the name 'pipeline'" in str(caught.value)
    assert f"\n  {theirs}\n    hides {ROOT / 'pipeline' / '__init__.py'}\nRename that file" in str(caught.value)
    assert "check_origins" in caught.value.worker_traceback

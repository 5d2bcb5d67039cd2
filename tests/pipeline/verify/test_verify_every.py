"""Verification during training: it sees every batch it should, changes no bit of training, and ends a wrong one."""

from __future__ import annotations

import os
import signal

import keras
import numpy as np
import pytest

from pipeline import CompileError, Pipeline, VerificationError
from pipeline.report.report import SingleTapeError
from pipeline.verify.by_own import ByOwn
from pipeline.verify.every import VerifyEvery
from stages.worker import step_program
from tests.levels import in_turn
from tests.pipeline.reference.twins import (
    SEED,
    assert_same_arrays,
    assert_same_logs,
    classes,
    classifier,
    numbers,
    regressor,
)

X, Y = classes(20)
XN, YN = numbers(20)


def running(eager=True, transport="inproc", build=classifier, optimizer=None, **options):
    keras.utils.set_random_seed(SEED)
    pipe = Pipeline.split(build(), **{"stages": 2, "microbatches": 2, "transport": transport, **options})
    loss = "sparse_categorical_crossentropy" if build is classifier else "mse"
    pipe.compile(
        optimizer or keras.optimizers.Adam(0.02), loss, metrics=["accuracy"] if build is classifier else None,
        run_eagerly=eager,
    )  # fmt: skip
    return pipe


def trained(pipe, **arguments):
    """The history, and everything that training changes: variables, seeds, optimizer, and where the data went on."""
    keras.utils.set_random_seed(SEED + 1)
    history = pipe.fit(X, Y, batch_size=8, epochs=2, verbose=0, validation_split=0.2, **arguments).history
    session = pipe.session
    values = [*session.values.read("model").values(), *session.values.read("optimizer").values()]
    after = pipe.train_on_batch(X[:7], Y[:7], return_dict=True)
    drawn = [np.random.random(), float(keras.random.uniform(()))]
    return history, [array for part in values for array in part], after, drawn


@pytest.mark.gate
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_training_is_bit_for_bit_that_without_it(eager):
    """Two epochs of a shuffled data set with a smaller last batch; every step verified, its updates too."""
    every = VerifyEvery(1, checks=("tape", "steps"))
    with running(eager) as plain:
        history, values, after, drawn = trained(plain)
    with running(eager) as verified:
        found = trained(verified, verify_every=every)
    assert_same_logs(found[0], history)
    assert_same_arrays(found[1], values)
    assert found[2:] == (after, drawn)
    assert list(every.reports) == list(every.seconds) == [1, 2, 3, 4]
    assert all(report.ok and report.gradients for report in every.reports.values())
    assert "verified 4 of 4 steps: all right" in str(every)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    in_turn(
        [
            ({"every": 3}, [1, 4, 7]),
            ({"every": None, "at": [2, 7]}, [2, 7]),
            ({"every": 5, "at": (2,)}, [1, 2, 6]),
        ],
        2,
        3,
        several=True,
    ),
    ids=["every third", "at two", "both"],
)
def test_it_verifies_the_steps_asked_for(arguments, steps, shared):
    every = VerifyEvery(**arguments)
    shared.fit(XN, YN, batch_size=5, epochs=2, verbose=0, callbacks=[[every]])
    assert list(every.reports) == steps and every.step == 8
    assert set(every.seconds) == set(steps) and min(every.seconds.values()) > 0 < every.training_seconds


@pytest.fixture(scope="module")
def shared():
    with running(build=regressor, optimizer="sgd") as pipe:
        yield pipe


def test_steps_count_over_all_fits_and_a_number_will_do(shared):
    every = VerifyEvery(4)
    for _ in range(2):
        shared.fit(XN, YN, batch_size=8, verbose=0, verify_every=every)
    assert list(every.reports) == [1, 5]
    shared.fit(XN, YN, batch_size=8, verbose=0, verify_every=2)
    assert shared._trainer._watchers == ()


def test_it_is_the_batch_that_is_trained_on_next(shared):
    """The losses that the reports have are those of the steps, in the order of a shuffled epoch."""
    every, losses = VerifyEvery(1), []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    shared.fit(XN, YN, batch_size=10, verbose=0, verify_every=every, callbacks=watch)
    first, second = (report.loss for report in every.reports.values())
    assert losses == [pytest.approx(first), pytest.approx((first + second) / 2)]
    assert first != second


def test_reports_of_long_runs_are_forgotten_but_for_the_latest(shared):
    every = VerifyEvery(1, keep=2)
    shared.fit(XN, YN, batch_size=4, verbose=0, verify_every=every)
    assert list(every.reports) == [4, 5] and len(every.seconds) == 5


def wrong_from(monkeypatch, step):
    """From a training step on stage 0 gets its gradients halved; the check "own", which makes steps, is left out."""
    monkeypatch.setattr(ByOwn, "refused", "left out by a test")
    right = step_program.Program._output_gradients

    def halved(self, hosted, action):
        gradients = right(self, hosted, action)
        if hosted.spec.index or int(hosted.optimizer.iterations) < step - 1:
            return gradients
        return [gradient / 2 for gradient in gradients]

    monkeypatch.setattr(step_program.Program, "_output_gradients", halved)


def test_a_hand_off_that_goes_wrong_ends_fit_at_its_step(monkeypatch):
    """Step, epoch and culprit are named; the values are those from before the step, and all can go on."""
    with running(build=regressor) as pipe, running(build=regressor) as other:
        arguments = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 3}
        other.fit(XN, YN, **arguments | {"epochs": 1})
        other.fit(XN[:8], YN[:8], **arguments | {"epochs": 1})
        wrong_from(monkeypatch, 5)
        every = VerifyEvery(2)
        with pytest.raises(SingleTapeError) as caught:
            pipe.fit(XN, YN, verify_every=every, **arguments)
        said = str(caught.value)
        assert said.startswith("step 5 (epoch 2, batch 2): the hand-off is not right: NOT equal to one tape: ")
        assert "stage 'stage0'" in said.splitlines()[0], said
        assert caught.value.report is every.reports[5]
        assert every.reports[3].ok and not every.reports[5].ok and every.first_failed == 5
        assert "first wrong at step 5" in str(every)
        assert_same_arrays(pipe.get_weights(), other.get_weights())
        monkeypatch.undo()
        assert pipe.verify(XN, YN).ok
        pipe.fit(XN, YN, verify_every=1, **arguments)


def test_a_warning_lets_training_go_on(monkeypatch):
    wrong_from(monkeypatch, 2)
    with running(build=regressor) as pipe:
        every = VerifyEvery(None, at=[1, 2, 3], on_failure="warn", keep=1)
        with pytest.warns(
            RuntimeWarning, match=r"^step [23] \(epoch 1, batch [23]\): the hand-off is not right"
        ) as all_:
            pipe.fit(XN, YN, batch_size=5, verbose=0, callbacks=every)
        assert len(all_) == 2
        assert list(every.reports) == [2, 3] and every.first_failed == 2


@pytest.mark.gate
def test_a_named_check_that_cannot_be_made_is_no_success():
    with running(build=classifier) as pipe:
        with pytest.raises(VerificationError, match=r"step 1 .*asked for by name, but not checked: 'batch'"):
            pipe.fit(X, Y, verbose=0, verify_every=VerifyEvery(1, checks="batch"))
        every = VerifyEvery(1, checks="all")
        pipe.fit(X[:4], Y[:4], verbose=0, verify_every=every)
        assert not {check.name: check for check in every.reports[1].checks}["batch"].ran


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VerifyEvery(0), CompileError, "at least 1.*every=0"),
        (lambda: VerifyEvery(True), CompileError, "every=True"),
        (lambda: VerifyEvery(2.5), CompileError, "every=2.5"),
        (lambda: VerifyEvery(None), CompileError, "every=None"),
        (lambda: VerifyEvery(1, at=[0]), CompileError, r"at=\[0\]"),
        (lambda: VerifyEvery(1, on_failure="ignore"), CompileError, "'raise' or 'warn'"),
        (lambda: VerifyEvery(1, checks="tapes"), VerificationError, "received 'tapes'"),
    ],
    ids=["never", "true", "fraction", "no step", "step zero", "unknown outcome", "unknown check"],
)
def test_what_cannot_be_meant_is_refused_at_once(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.gate
def test_one_reference_serves_all_verifications_and_nothing_is_left(nothing_left):
    """With processes: the same process each time; a failure leaves the workers serving, close leaves nothing."""
    with running(build=regressor, transport="auto", eager=False) as pipe:
        seen = []
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(pipe.session.reference.driver.pids)
        )
        every = VerifyEvery(2)
        pipe.fit(XN, YN, batch_size=5, verbose=0, verify_every=every, callbacks=[watch])
        assert list(every.reports) == [1, 3] and len({tuple(pids) for pids in seen}) == 1
        with pytest.raises(VerificationError, match=r"^step 1 "):
            pipe.fit(XN, YN, verbose=0, verify_every=VerifyEvery(1, tolerance=-1.0))
        assert not pipe.session.reference.driver.closed
        pipe.fit(XN, YN, verbose=0)


@pytest.mark.gate
def test_a_reference_that_dies_is_told_so_and_training_may_go_on(nothing_left):
    with running(build=regressor, transport="auto") as pipe:
        before = []

        def kill(batch, logs):
            before[:] = pipe.get_weights()
            if batch == 0:
                os.kill(pipe.session.reference.driver.pids[0], signal.SIGKILL)

        arguments = {
            "batch_size": 10,
            "verbose": 0,
            "callbacks": [keras.callbacks.LambdaCallback(on_train_batch_end=kill)],
        }
        with pytest.raises(VerificationError, match=r"^step 2 .*the reference process, .*failed"):
            pipe.fit(XN, YN, verify_every=1, **arguments)
        assert_same_arrays(pipe.get_weights(), before)
        every = VerifyEvery(1, on_failure="warn")
        with pytest.warns(RuntimeWarning, match=r"^step 2 .*the reference process, .*failed"):
            pipe.fit(XN, YN, verify_every=every, **arguments)
        assert list(every.reports) == [1] and list(every.seconds) == [1, 2]
        assert pipe.verify(XN, YN).ok

"""Ctrl-C in a user's program: training stops after the step it is in; the pipeline is usable or closed, never half."""

from __future__ import annotations

import signal
import threading

import pytest

from pipeline.runtime.interrupts import deferred_interrupts, interruptible
from tests.failures import DEADLINE

PROGRAM = """
import numpy as np
from pipeline import Pipeline, Segment
from tests.failing_parts import part, say, wait_at, waiting_builder
from tests.failures import X, Y, tripping

def interrupted(action, *args, **kwargs):
    try: action(*args, **kwargs)
    except KeyboardInterrupt: return True
    return False

def usable(pipe):
    try: return bool(np.isfinite(pipe.train_on_batch(X, Y)))
    except Exception as error: return f"{type(error).__name__}: {error}"

waits = {"do": "wait", "call_number": 4, "line": line, "gate": gate}

with tripping({}, waits, {}) as pipe:
    start = pipe.get_weights()
    stopped = interrupted(pipe.fit, np.tile(X, (9, 1)), np.tile(Y, (9, 1)), batch_size=8, shuffle=False, verbose=0)
    steps = int(pipe.optimizer.iterations.numpy())
    weights = pipe.get_weights()
    with tripping({}, {}, {}) as twin:
        twin.set_weights(start)
        for _ in range(steps): twin.train_on_batch(X, Y)
        same = all(np.array_equal(a, b) for a, b in zip(weights, twin.get_weights(), strict=True))
    say(line, stopped=stopped, steps=steps, same=same, usable=usable(pipe))

with tripping({}, waits, {}) as pipe:
    stopped = interrupted(pipe.fit, np.tile(X, (9, 1)), np.tile(Y, (9, 1)), batch_size=8, verbose=0)
    say(line, stopped=stopped, usable=usable(pipe))

builder = Segment(waiting_builder, kwargs={"line": line, "gate": gate})
with Pipeline([Segment(part), builder]) as pipe:
    pipe.compile("sgd", "mse")
    stopped = interrupted(pipe.train_on_batch, X, Y)
    say(line, stopped=stopped)
    wait_at(gate)
    say(line, usable=usable(pipe))
"""


@pytest.mark.gate
@pytest.mark.timeout(180)
def test_control_c_in_a_users_program(script, line, gate):
    program = script(PROGRAM, line=line.path, gate=gate.path)

    worker = line.hear()["pid"]  # in step 2; once, and the step is let go on
    program.interrupt()
    assert worker in program.relatives()
    gate.open()
    seen = line.hear()
    assert seen["stopped"] is True
    assert seen["steps"] == 2, "the step that was under way is done, no other began"
    assert seen["same"] is True, "every stage has the weights of two whole updates"
    assert seen["usable"] is True

    worker = line.hear()["pid"]  # in step 2; it is never let go on, so that the second one waits for it to be undone
    program.interrupt()
    program.interrupt()
    program.interrupt()
    seen = line.hear()
    assert seen["stopped"] is True
    assert seen["usable"].startswith("PipelineClosedError: this pipeline's workers are gone (KeyboardInterrupt)")
    assert worker not in program.relatives()

    builder = line.hear()["pid"]  # while it builds: nothing is half done yet
    program.interrupt()
    assert line.hear()["stopped"] is True
    assert builder not in program.relatives()
    assert program.directories() == []
    gate.open()
    line.hear()  # it starts once more and builds
    gate.open()
    assert line.hear()["usable"] is True
    code, output = program.finish()
    assert code == 0
    assert "Traceback" not in output
    assert program.relatives() == []


def test_first_interrupt_waits_for_the_end_the_second_for_a_wait_the_third_for_nothing():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        with deferred_interrupts():
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("not in the middle of a message")
        with interruptible():
            done.append("never")
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            done.append("never")
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["inner", "outer", "not in the middle of a message"]


def test_interrupt_in_an_inner_block_waits_for_the_outer_one():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


@pytest.fixture
def handler():
    """Set a handler of one's own, as an event loop does; the old one comes back."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda mine: signal.signal(signal.SIGINT, mine)
    signal.signal(signal.SIGINT, before)


def test_whatever_handles_interrupts_gets_the_waiting_one(handler):
    seen = []
    handler(lambda number, frame: seen.append(number))
    with deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        assert seen == []
    assert seen == [signal.SIGINT]


def test_ignored_interrupts_stay_ignored(handler):
    handler(signal.SIG_IGN)
    with deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_get_no_signals_and_change_no_handler():
    before = signal.getsignal(signal.SIGINT)
    inside = []

    def run():
        with deferred_interrupts():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE)
    assert inside == [before]

"""What counts as frozen, and what never does: a process that computes, waits for others, or is only slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.runtime.recovery.freezing import FreezeWatch, process_state
from stages.worker.status import Phase
from tests.pipeline.runtime.launch.processes import DEADLINE


class Handle:
    """What a watch sees of a worker."""

    def __init__(self, code, phase):
        self.name = code
        self._process = subprocess.Popen([sys.executable, "-c", code])
        self.pid = self._process.pid
        self.board = np.array([phase, 1, 0, 0, 0, 0, 0, 0])

    def alive(self):
        return self._process.poll() is None

    def kill(self):
        self._process.kill()

    def wait(self, seconds):
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


@pytest.fixture
def watched():
    """A function that watches a program, and what ends it all."""
    watches, handles = [], []

    def watch(code, phase=Phase.RUNNING, hung_seconds=None):
        handles.append(Handle(code, phase))
        watches.append(FreezeWatch(hung_seconds))
        watches[-1].add(handles[-1])
        return handles[-1], watches[-1]

    yield watch
    for one in watches:
        one.close()
    for one in handles:
        one.kill()
        one.wait(DEADLINE)


SLEEPS, COMPUTES = "import time; time.sleep(1000)", "while True: pass"


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.IDLE])
def test_a_stopped_process_is_ended(watched, phase):
    handle, watch = watched(SLEEPS, phase)
    begin = time.monotonic()
    os.kill(handle.pid, signal.SIGSTOP)
    assert handle.wait(DEADLINE) == -signal.SIGKILL
    assert time.monotonic() - begin < 1.5
    assert watch.reasons == {SLEEPS: "stopped by a signal, and ended for it"}


@pytest.mark.gate
def test_only_what_is_to_compute_and_does_not_is_hung(watched):
    hung, watch = watched(SLEEPS, Phase.RUNNING, hung_seconds=0.5)
    others = [watched(COMPUTES, Phase.RUNNING, 0.5), watched(SLEEPS, Phase.WAITING, 0.5), watched(SLEEPS)]
    assert hung.wait(DEADLINE) == -signal.SIGKILL
    assert "no progress and no processor time in 0.5 s" in watch.reasons[SLEEPS]
    assert [one.wait(0.6) for one, _ in others] == [None] * 3


def test_a_process_that_is_gone_has_no_state():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(DEADLINE)
    assert process_state(process.pid) == ("", 0)
    assert process_state(os.getpid())[0] in "RSD"

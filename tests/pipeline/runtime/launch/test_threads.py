"""Workers as threads keep the same contract as processes, as far as threads can."""

from __future__ import annotations

import select
import threading

import numpy as np
import pytest

from pipeline.runtime.launch import LaunchError, ThreadLauncher
from tests.pipeline.runtime.launch.processes import open_files


@pytest.fixture
def launcher():
    with ThreadLauncher() as launcher:
        yield launcher


def test_entry_gets_the_spec_itself_and_the_board(launcher):
    worker = launcher.launch("w", "launch_entries:returns", {"board": range(8, 16)}, 1)
    assert worker.join(30)
    assert worker.exit_reason() == "returned"
    assert worker.board.tolist() == list(range(8, 16))
    assert worker.board.dtype == np.int64
    assert (worker.name, worker.pid, worker.alive()) == ("w", None, False)


def test_exception_becomes_the_reason(launcher, capsys):
    worker = launcher.launch("w", "launch_entries:raises", {})
    assert worker.join(30)
    first, second, *_ = worker.exit_reason().splitlines()
    assert first == "raised ValueError: boom"
    assert second == "Traceback (most recent call last):"
    assert "worker 'w' failed:\nTraceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "reason"), [(3, "exit status 3"), (None, "exit status 0"), ("text", "exit status 1")]
)
def test_sys_exit_ends_the_thread_only(launcher, status, reason):
    worker = launcher.launch("w", "launch_entries:exits", {"status": status})
    assert worker.join(30)
    assert worker.exit_reason() == reason


def test_sentinel_is_readable_when_the_entry_is_over(launcher):
    gate = threading.Event()
    worker = launcher.launch("w", "launch_entries:waits_for_event", {"event": gate})
    assert select.select([worker.sentinel], [], [], 0)[0] == []
    worker.kill()  # has no effect on a thread
    assert worker.alive()
    assert not worker.join(0)
    assert worker.exit_reason() == "running"
    assert "running" in repr(worker)
    gate.set()
    assert select.select([worker.sentinel], [], [], 30)[0] == [worker.sentinel]
    assert not worker.alive()


def test_nothing_is_left_whether_it_is_closed_before_or_after_its_end(launcher):
    before = open_files()
    gate = threading.Event()
    early = launcher.launch("early", "launch_entries:waits_for_event", {"event": gate})
    late = launcher.launch("late", "launch_entries:returns", {})
    assert late.join(30)
    launcher.close()
    launcher.close()
    gate.set()
    assert early.join(30)
    assert open_files() == before


def test_impossible_requests_are_refused(launcher):
    with pytest.raises(LaunchError, match="expected an entry 'module:function'"):
        launcher.launch("w", "nothing", {})

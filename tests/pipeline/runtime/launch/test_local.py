"""Workers as processes: what a worker is given, and what its driver learns of its end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.runtime.launch import LaunchError
from pipeline.runtime.launch.base import describe_exit
from stages.process.status_board import MAX_WORDS
from tests.pipeline.runtime.launch.processes import children, open_files


def run(launcher, function, **spec):
    worker = launcher.launch("middle", f"launch_entries:{function}", spec)
    assert worker.join(30)
    return worker


def test_entry_gets_its_spec_and_a_board_that_the_driver_reads(launcher):
    worker = run(launcher, "returns", board=[1, -2, 3, 4, 5, 6, 7, 2**62])
    assert worker.exit_reason() == "exit status 0"
    assert worker.board.dtype == np.int64
    assert worker.board.tolist() == [1, -2, 3, 4, 5, 6, 7, 2**62]
    assert not worker.alive()
    assert worker.name == "middle"


@pytest.mark.parametrize(
    ("function", "spec", "reason"),
    [
        ("exits", {"status": 3}, "exit status 3"),
        ("exits", {"status": None}, "exit status 0"),
        ("exits", {"status": "gone wrong"}, "exit status 1"),
        ("leaves", {"status": 7}, "exit status 7"),
        ("signals_itself", {"signal": signal.SIGKILL}, "killed by SIGKILL (out of memory?)"),
        ("signals_itself", {"signal": signal.SIGSEGV}, "killed by SIGSEGV"),
        ("signals_itself", {"signal": signal.SIGTERM}, "killed by SIGTERM"),
    ],
)
def test_reason_of_an_end_without_exception(launcher, function, spec, reason):
    assert run(launcher, function, **spec).exit_reason() == reason


def test_unknown_signal_is_described_by_its_number():
    assert describe_exit(-40) == "killed by signal 40"


def test_exception_reaches_reason_and_stderr_with_its_traceback(launcher, capfd):
    worker = run(launcher, "raises")
    first, *rest = worker.exit_reason().splitlines()
    assert first == "exit status 1, raised ValueError: boom"
    assert rest[0] == "Traceback (most recent call last):"
    assert any("launch_entries.py" in each for each in rest)
    captured = capfd.readouterr()
    assert "worker 'middle' failed:\nTraceback" in captured.err
    assert "ValueError: boom" in captured.err
    assert captured.out == "on stdout\n"


def test_reason_is_bounded(launcher, capfd):
    worker = run(launcher, "raises", size=10 * MAX_WORDS)
    first, second, *_ = worker.exit_reason().splitlines()
    assert first.startswith("exit status 1, raised ValueError: boomxxx")
    assert first.endswith("xxx")
    assert len(first) < 400
    assert second == "Traceback (most recent call last):"
    assert len(worker.exit_reason()) <= MAX_WORDS
    assert len(capfd.readouterr().err) > 10 * MAX_WORDS


def test_entry_that_cannot_be_imported_is_an_exception_of_the_worker(launcher, capfd):
    worker = launcher.launch("first", "no_such_module:entry", {})
    assert worker.join(30)
    assert worker.exit_reason().startswith(
        "exit status 1, raised ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert "no_such_module" in capfd.readouterr().err


def test_output_is_flushed_at_the_end(launcher, capfd):
    run(launcher, "prints")
    assert capfd.readouterr().out == "a line\nthe end without a newline"


def test_kill_ends_a_worker_and_the_board_survives(launcher, line):
    worker = launcher.launch("w", "launch_entries:waits", {"line": line.path})
    assert line.hear()["pid"] == worker.pid
    assert worker.alive()
    assert worker.exit_reason() == "running"
    assert not worker.join(0)
    worker.kill()
    assert worker.join(30)
    worker.kill()
    assert worker.exit_reason() == "killed by SIGKILL"
    assert worker.board.tolist() == [42, 0, 0, 0, 0, 0, 0, 0]
    assert "killed by SIGKILL" in repr(worker)


def test_board_is_shared_while_the_worker_runs(launcher, line):
    worker = launcher.launch("w", "launch_entries:waits", {"line": line.path})
    line.hear()
    assert worker.board[0] == 42


def test_sentinel_becomes_readable_when_the_worker_is_gone(launcher, line, watched):
    worker = launcher.launch("w", "launch_entries:waits_for_signal", {"line": line.path})
    watched.hold(line.hear()["pid"])
    assert worker.alive()
    os.kill(worker.pid, signal.SIGUSR1)
    watched.wait_gone()
    assert not worker.alive()
    assert worker.exit_reason() == "exit status 5"
    worker.close()
    worker.close()
    with pytest.raises(ValueError, match="closed"):
        worker.sentinel.fileno()
    assert worker.exit_reason() == "exit status 5"
    assert not worker.alive()


def test_worker_is_like_the_driver(launcher, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPELINE_TEST", "set after the server started")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs=3"])
    monkeypatch.syspath_prepend(str(tmp_path / "parts"))
    launcher.launch("w", "launch_entries:describes_itself", {"line": line.path})
    seen = line.hear()
    assert seen["directory"] == str(tmp_path)
    assert seen["path"] == sys.path
    assert seen["arguments"] == ["train.py", "--epochs=3"]
    assert seen["environment"]["TAPELINE_TEST"] == "set after the server started"
    assert "HOME" not in seen["environment"]
    assert seen["environment"]["OPENBLAS_NUM_THREADS"] == "1"
    assert seen["ignored"], "Ctrl-C must not kill a worker behind the driver's back"
    assert "pipeline" not in seen["modules"], "stages must not know pipeline"


def test_worker_has_only_its_own_files_open(launcher, line):
    launcher.launch("busy", "launch_entries:waits", {"line": line.path})
    line.hear()
    launcher.launch("w", "launch_entries:describes_itself", {"line": line.path})
    files = line.hear()["descriptors"]
    boards = [name for name, target in files.items() if "tapeline-board" in target]
    telling = [name for name, target in files.items() if target == line.path]
    assert len(boards) == 1
    assert set(files) - set(boards) - set(telling) == {"0", "1", "2"}


def test_siblings_draw_different_random_numbers(launcher, line):
    drawn = []
    for _ in range(2):
        launcher.launch("w", "launch_entries:describes_itself", {"line": line.path})
        drawn.extend(line.hear()["random"])
    assert len(set(drawn)) == len(drawn)


def test_no_file_of_a_worker_is_inherited_by_a_program_that_the_driver_starts(launcher, line):
    before = open_files()
    launcher.launch("w", "launch_entries:waits", {"line": line.path})
    line.hear()
    new = [int(name) for name in set(open_files()) - set(before)]
    assert new
    assert not any(os.get_inheritable(number) for number in new)


def test_nothing_is_left_of_closed_workers(launcher, light_server, line):
    run(launcher, "returns")
    launcher.close()
    before = open_files()
    threads = threading.active_count()
    server_files = open_files(light_server.pid)
    for _ in range(3):
        launcher.launch("runs", "launch_entries:waits", {"line": line.path})
        line.hear()
        run(launcher, "returns")
        launcher.close()
    launcher.close()
    assert open_files() == before
    assert threading.active_count() == threads
    assert children(light_server.pid) == []
    assert open_files(light_server.pid) == server_files


@pytest.mark.parametrize(
    ("name", "entry", "threads", "message"),
    [
        ("", "m:f", 1, "needs a name"),
        ("w", "m.f", 1, "expected an entry 'module:function', received 'm.f'"),
        ("w", ":f", 1, "expected an entry"),
        ("w", "__main__:f", 1, "cannot import; move the function to a module of its own"),
        ("w", "m:f", 0, "threads must be at least 1, received 0"),
    ],
)
def test_impossible_requests_are_refused(launcher, name, entry, threads, message):
    with pytest.raises(LaunchError, match=message):
        launcher.launch(name, entry, {}, threads)


def test_spec_must_be_plain_data(launcher):
    with pytest.raises(LaunchError, match="worker 'w': its spec must be plain data"):
        launcher.launch("w", "launch_entries:returns", {"array": np.zeros(3)})


def test_large_spec_arrives(launcher):
    worker = run(launcher, "returns", board=[5] * 8, ballast="x" * (8 << 20))
    assert worker.board.tolist() == [5] * 8


def test_worker_refuses_a_module_that_hides_ours(launcher, tmp_path, monkeypatch, capfd):
    (tmp_path / "pipeline.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = run(launcher, "returns").exit_reason()
    assert "ImportError: another module has the name 'pipeline'" in reason
    assert str(tmp_path / "pipeline.py") in reason
    assert str(Path("pipeline") / "__init__.py") in reason
    assert "Rename" in capfd.readouterr().err


def test_launching_from_several_threads(launcher):
    workers = []
    threads = [threading.Thread(target=lambda: workers.append(run(launcher, "returns"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.exit_reason() for worker in workers] == ["exit status 0"] * 4
    assert len({worker.pid for worker in workers}) == 4

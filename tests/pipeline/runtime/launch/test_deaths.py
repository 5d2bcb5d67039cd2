"""Whichever process dies, however, nothing stays alive: the driver is a script of its own here, so that it can die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.pipeline.runtime.launch.processes import Session


@pytest.mark.parametrize("how", ["file", "stdin", "argument"])
def test_script_without_a_main_guard_runs_and_leaves_nothing(driver, finish, line, watched, how):
    """As a file, and as a notebook or an interactive session has it: `__main__` without a file."""
    script = driver(
        """
        worker = LocalLauncher().launch("w", "launch_entries:returns", {"board": [7] * 8})
        assert worker.join(30)
        tell(server=server_pid(), reason=worker.exit_reason(), board=worker.board.tolist())
        LocalLauncher().launch("left running at exit", "launch_entries:waits", {"line": line})
        sys.stdin.read()
        """,
        how,
    )
    seen = line.hear()
    assert seen["reason"] == "exit status 0"
    assert seen["board"] == [7] * 8
    code, output = finish(script)
    assert (code, output) == (0, "")
    assert Session(seen["server"]).members() == []


def test_killed_driver_takes_server_and_workers_along(driver, line, watched):
    script = driver(
        """
        launcher = LocalLauncher()
        for _ in range(3): launcher.launch("w", "launch_entries:waits", {"line": line})
        signal.pause()
        """
    )
    seen = [line.hear() for _ in range(3)]
    watched.hold(script.pid, seen[0]["session"], *(each["pid"] for each in seen))
    script.kill()
    watched.wait_gone()
    assert Session(seen[0]["session"]).members() == []


def test_stopped_processes_die_with_the_driver_too(driver, line, watched):
    script = driver(
        """
        LocalLauncher().launch("w", "launch_entries:waits", {"line": line})
        signal.pause()
        """
    )
    seen = line.hear()
    watched.hold(seen["pid"], seen["session"])
    os.kill(seen["pid"], signal.SIGSTOP)
    os.kill(seen["session"], signal.SIGSTOP)
    script.kill()
    watched.wait_gone()


def test_driver_killed_between_fork_and_start_leaves_nothing(driver, line, watched):
    script = driver(
        """
        from pipeline.runtime.launch.local import describe_job
        server = shared.shared_server()
        held = server.launch(describe_job("w", "launch_entries:waits", {"line": line}, 1))
        tell(server=server.pid, worker=held.pid)
        signal.pause()
        """
    )
    seen = line.hear()
    watched.hold(seen["server"], seen["worker"])
    script.kill()
    watched.wait_gone()


@pytest.mark.parametrize("workers", range(4))
def test_driver_killed_in_the_middle_of_launching_leaves_nothing(driver, line, workers):
    """It is killed when the n-th worker says that it runs, while it launches the next ones without end."""
    script = driver(
        """
        launcher = LocalLauncher()
        tell(session=server_pid())
        while True: launcher.launch("w", "launch_entries:waits", {"line": line})
        """
    )
    session = Session(line.hear()["session"])
    for _ in range(workers):
        line.hear()
    script.kill()
    script.wait()
    session.wait_empty()


def test_driver_killed_while_the_server_imports_leaves_nothing(driver, line, watched, tmp_path):
    (tmp_path / "pauses.py").write_text("import launch_entries, sys\nlaunch_entries.waits({'line': sys.path[0]}, [0])")
    script = driver(
        f"""
        sys.path[:0] = [line, {str(tmp_path)!r}]
        ForkServer(preload=("pauses",)).start()
        signal.pause()
        """
    )
    seen = line.hear()
    assert seen["parent"] == script.pid
    watched.hold(seen["pid"])
    script.kill()
    watched.wait_gone()


def test_forked_copy_of_the_driver_has_no_part_in_its_workers(driver, finish, line):
    """It closes a launcher that it inherited, starts its own server and ends; its parent's workers do not notice."""
    script = driver(
        """
        launcher = LocalLauncher()
        worker = launcher.launch("w", "launch_entries:waits", {"line": line})
        server = shared.shared_server()
        child = os.fork()
        if child == 0:
            launcher.close()
            assert shared._server is None
            own = LocalLauncher().launch("own", "launch_entries:returns", {})
            assert own.join(30) and own.exit_reason() == "exit status 0"
            assert server_pid() != server.pid
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert worker.alive()
        assert shared.shared_server() is server
        assert LocalLauncher().launch("next", "launch_entries:returns", {}).join(30)
        tell(server=server.pid)
        """
    )
    line.hear()
    session = Session(line.hear()["server"])
    assert finish(script) == (0, "")
    assert session.members() == []


def test_orphans_that_a_driver_inherits_are_no_zombies(driver, finish, line):
    """In a container the driver may be process 1, which inherits the workers of a killed server."""
    script = driver(
        """
        import ctypes
        assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
        worker = LocalLauncher().launch("w", "launch_entries:pauses", {})
        os.kill(server_pid(), signal.SIGKILL)
        assert worker.join(30)
        try: os.kill(worker.pid, 0)
        except ProcessLookupError: tell(reason=worker.exit_reason())
        """
    )
    assert line.hear()["reason"].startswith("killed by SIGKILL")
    assert finish(script) == (0, "")


def test_driver_that_ends_normally_waits_for_its_server(driver, finish, line):
    """Where nobody reaps orphans (a container without an init), it would leave zombies otherwise."""
    script = driver(
        """
        import ctypes, subprocess
        if len(sys.argv) == 2:
            assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
            subprocess.run([sys.executable, __file__, line, "inner"], check=True)
            try: os.waitpid(-1, 0)
            except ChildProcessError: tell(orphans=0)
            else: tell(orphans=1)
        else:
            LocalLauncher().launch("w", "launch_entries:pauses", {})
        """
    )
    assert line.hear() == {"orphans": 0}
    assert finish(script) == (0, "")


def test_drivers_signal_settings_do_not_matter(driver, finish, line):
    script = driver(
        """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        launcher = LocalLauncher()
        first = launcher.launch("first", "launch_entries:leaves", {"status": 3})
        second = launcher.launch("second", "launch_entries:waits_for_signal", {"line": line})
        assert first.join(30)
        tell(reason=first.exit_reason())
        assert second.join(30)
        tell(reason=second.exit_reason())
        """
    )
    heard = [line.hear(), line.hear()]
    os.kill(next(each["pid"] for each in heard if "pid" in each), signal.SIGUSR1)
    assert next(each["reason"] for each in heard if "reason" in each) == "exit status 3"
    assert line.hear()["reason"] == "exit status 5"
    assert finish(script) == (0, "")


def test_driver_without_output_or_directory_can_launch(driver, finish, line, tmp_path):
    script = driver(
        f"""
        os.mkdir({str(tmp_path / "gone")!r}); os.chdir({str(tmp_path / "gone")!r}); os.rmdir({str(tmp_path / "gone")!r})
        os.close(1); os.close(2)
        worker = LocalLauncher().launch("w", "launch_entries:raises", {{}})
        assert worker.join(30)
        tell(reason=worker.exit_reason())
        """
    )
    assert "ValueError: boom" in line.hear()["reason"]
    assert finish(script)[1] == ""


def test_no_file_is_left_anywhere(driver, finish, line, tmp_path):
    (tmp_path / "temporary").mkdir()
    before = set(Path("/dev/shm").iterdir())
    script = driver(
        """
        LocalLauncher().launch("w", "launch_entries:waits", {"line": line})
        signal.pause()
        """,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    session = Session(line.hear()["session"])
    script.kill()
    script.wait()
    session.wait_empty()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert {each for each in set(Path("/dev/shm").iterdir()) - before if "tapeline" in each.name} == set()

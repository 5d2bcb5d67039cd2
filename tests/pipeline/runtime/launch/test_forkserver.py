"""The fork server: preloading, interruption, and its own end."""

from __future__ import annotations

import os
import resource
import signal
import threading

import pytest

from pipeline.runtime.launch import LaunchError, LocalLauncher, forkserver
from pipeline.runtime.launch.errors import ServerGoneError
from pipeline.runtime.launch.local import describe_job
from tests.pipeline.runtime.launch.processes import DEADLINE, children, open_files, tasks


def module(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def job(function, **spec):
    return describe_job("w", f"launch_entries:{function}", spec, 1)


def test_starting_and_closing_leaves_no_file_thread_or_process(new_server, watched):
    before, threads = open_files(), threading.active_count()
    server = new_server()
    assert server.pid is None
    server.start()
    server.wait_ready()
    watched.hold(server.pid)
    assert server.alive()
    assert server.exit_reason() == "running"
    server.close()
    server.close()
    watched.wait_gone()
    assert not server.alive()
    assert server.exit_reason() == "exit status 0"
    assert open_files() == before
    assert threading.active_count() == threads
    with pytest.raises(ServerGoneError, match="closed"):
        server.launch(job("returns"))


def test_server_stays_single_threaded_and_quiet(new_server, capfd):
    server = new_server("numpy", "stages")
    server.start()
    server.wait_ready()
    assert tasks(server.pid) == 1
    server.close()
    assert capfd.readouterr() == ("", "")


def test_failing_import_is_one_error_with_the_end_of_stderr(new_server, tmp_path, monkeypatch, watched):
    # a broken TensorFlow, as seen with a wheel for another processor
    module(
        tmp_path,
        monkeypatch,
        "tensorflow",
        "import sys; print('a hint from C++', file=sys.stderr); raise ImportError('libtensorflow_cc.so.2: bad')",
    )
    server = new_server("tensorflow", "keras")
    server.start()
    watched.hold(server.pid)
    with pytest.raises(LaunchError) as caught:
        server.launch(job("returns"))
    text = str(caught.value)
    assert "could not import tensorflow, keras: ImportError: libtensorflow_cc.so.2: bad" in text
    assert "    a hint from C++" in text
    assert "Traceback (most recent call last)" in text
    watched.wait_gone()


def test_what_a_server_said_before_it_ended_is_read_after_its_end(new_server, tmp_path, monkeypatch):
    """The request that it never read makes the kernel report a reset before its last message."""
    wait = forkserver.readable

    def late(descriptors, timeout):
        assert wait(descriptors[-1:], DEADLINE), "the server did not end"
        return wait(descriptors, timeout)

    server = new_server(module(tmp_path, monkeypatch, "broken", "raise ImportError('no good')"))
    server.start()
    monkeypatch.setattr(forkserver, "readable", late)
    with pytest.raises(LaunchError, match="could not import broken: ImportError: no good"):
        server.launch(job("returns"))
    with pytest.raises(ServerGoneError, match="died while it imported broken: exit status 1"):
        server.launch(job("returns"))


def test_quoted_stderr_is_bounded(new_server, tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "noisy", "import sys; sys.stderr.write('x' * 99 + '\\n') ; 1 / 0\n" * 1)
    loud = module(tmp_path, monkeypatch, "loud", f"import sys; sys.stderr.write('y\\n' * 100000); import {name}")
    server = new_server(loud)
    server.start()
    with pytest.raises(LaunchError) as caught:
        server.wait_ready()
    assert "ZeroDivisionError" in str(caught.value)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"killed by SIGKILL \(out of memory\?\)"),
        ("os._exit(9)", "exit status 9"),
    ],
)
def test_server_that_dies_in_an_import_is_one_error(new_server, tmp_path, monkeypatch, code, reason):
    name = module(
        tmp_path, monkeypatch, "dies", f"import os, signal, sys; print('last', file=sys.stderr, flush=True); {code}"
    )
    server = new_server(name)
    server.start()
    with pytest.raises(ServerGoneError, match=f"died while it imported dies: {reason}\n.*\n    last"):
        server.launch(job("returns"))
    assert not server.ready


def test_import_that_takes_too_long_is_an_error_and_close_ends_it(new_server, tmp_path, monkeypatch, watched):
    server = new_server(module(tmp_path, monkeypatch, "pauses", "import signal; signal.pause()"))
    server.start()
    watched.hold(server.pid)
    with pytest.raises(LaunchError, match=f"{server.pid}.* did not import pauses in time .it wrote nothing"):
        server.wait_ready(timeout=0)
    server.close()
    watched.wait_gone()


def test_other_keras_backend_is_refused(new_server, tmp_path, monkeypatch):
    fake = "class backend:\n    backend = staticmethod(lambda: 'jax')\n"
    server = new_server(module(tmp_path, monkeypatch, "keras", fake))
    server.start()
    with pytest.raises(LaunchError, match="runs on the backend 'jax', Tapeline needs 'tensorflow'; set KERAS_BACKEND"):
        server.wait_ready()


def test_interpreter_that_cannot_be_started_is_an_error(new_server, monkeypatch, tmp_path):
    before = open_files()
    for executable, message in ((str(tmp_path / "nothing"), "No such file"), ("", "does not know its own executable")):
        monkeypatch.setattr(forkserver.sys, "executable", executable)
        with pytest.raises(LaunchError, match=message):
            new_server().start()
    assert open_files() == before


def test_other_systems_are_refused_with_a_way_out(new_server, monkeypatch):
    monkeypatch.setattr(forkserver.sys, "platform", "darwin")
    with pytest.raises(LaunchError, match="need Linux, this is 'darwin'; use transport='inproc'"):
        new_server().start()


def test_worker_whose_gate_is_never_opened_ends_without_running(light_server, line, watched):
    launched = light_server.launch(job("waits", line=line.path))
    watched.hold(launched.pid)
    launched.gate.close()
    watched.wait_gone()
    assert os.read(launched.report.fileno(), 16) == b"0"
    assert launched.board.slots.tolist() == [0] * 8


def test_interrupted_launch_leaves_no_worker_and_a_usable_server(light_server, line, monkeypatch, watched):
    light_server.wait_ready()
    before = open_files()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forkserver, "readable", interrupted)
        with pytest.raises(KeyboardInterrupt):
            light_server.launch(job("waits", line=line.path))
    with LocalLauncher(lambda: light_server) as launcher:
        worker = launcher.launch("next", "launch_entries:waits", {"line": line.path})
        assert line.hear()["pid"] == worker.pid
        stale = [pid for pid in children(light_server.pid) if pid != worker.pid]
        for pid in stale:
            try:
                watched.hold(pid)
            except ProcessLookupError:  # gone already
                continue
        watched.wait_gone()
    assert open_files() == before


def test_server_without_free_descriptors_refuses_and_recovers(light_server):
    light_server.wait_ready()
    pid, limits = light_server.pid, resource.prlimit(light_server.pid, resource.RLIMIT_NOFILE)
    idle = open_files(pid)
    refused = 0
    for free in range(12):  # so that it fails while receiving, at the pidfd and at the copy of the report pipe
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(idle) + free, limits[1]))
        try:
            launched = light_server.launch(job("returns"))
        except LaunchError as error:
            assert "could not start a worker: OSError" in str(error)
            refused += 1
        else:
            launched.gate.close()
            while os.read(launched.report.fileno(), 16):
                pass
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert children(pid) == []
    assert 0 < refused < 12
    with LocalLauncher(lambda: light_server) as launcher:
        worker = launcher.launch("w", "launch_entries:returns", {})
        assert worker.join(30)
        assert worker.exit_reason() == "exit status 0"
    assert open_files(pid) == idle


@pytest.mark.gate
def test_killed_server_takes_its_workers_along_and_a_new_one_is_started(shared, line, watched):
    with LocalLauncher(shared.shared_server) as launcher:
        workers = [launcher.launch(f"w{i}", "launch_entries:waits", {"line": line.path}) for i in range(3)]
        watched.hold(*(line.hear()["pid"] for _ in workers))
        first = shared.shared_server()
        os.kill(first.pid, signal.SIGKILL)
        watched.wait_gone()
        for worker in workers:
            assert worker.join(30)
            assert worker.exit_reason() == "ended with its fork server (killed by SIGKILL (out of memory?))"
        again = launcher.launch("again", "launch_entries:returns", {})
        assert again.join(30)
        assert again.exit_reason() == "exit status 0"
        assert shared.shared_server() is not first


def test_server_that_dies_just_before_a_launch_is_replaced(shared, monkeypatch):
    dead = shared.shared_server()
    dead.wait_ready()
    with monkeypatch.context() as patch:  # it looks alive when it is asked for
        patch.setattr(dead, "alive", lambda: True)
        os.kill(dead.pid, signal.SIGKILL)
        servers = [dead]

        def server():
            return servers.pop() if servers else shared.shared_server()

        with LocalLauncher(server) as launcher:
            patch.undo()
            worker = launcher.launch("w", "launch_entries:returns", {})
            assert worker.join(30)
            assert worker.exit_reason() == "exit status 0"


def test_shared_server_is_kept_prestarted_and_shut_down(shared, line, watched):
    shared.prestart()
    server = shared.shared_server()
    shared.prestart()
    assert shared.shared_server() is server
    with LocalLauncher(shared.shared_server) as launcher:
        worker = launcher.launch("w", "launch_entries:waits", {"line": line.path})
        watched.hold(server.pid, line.hear()["pid"])
        shared.shutdown()
        shared.shutdown()
        watched.wait_gone()
        assert server.exit_reason() == "exit status 0", "it ends its workers itself and waits for them"
        assert worker.exit_reason() == "killed by SIGKILL (out of memory?)"
    assert shared.shared_server() is not server


def test_server_outlives_the_thread_that_started_it(shared, line, watched):
    thread = threading.Thread(target=lambda: shared.shared_server().wait_ready())
    thread.start()
    thread.join()
    server = shared.shared_server()
    pid = server.pid
    with LocalLauncher(shared.shared_server) as launcher:
        starting = threading.Thread(
            target=lambda: launcher.launch("w", "launch_entries:waits_for_signal", {"line": line.path})
        )
        starting.start()
        starting.join()
        seen = line.hear()
        assert seen["parent"] == seen["session"] == pid
        watched.hold(seen["pid"])
        os.kill(seen["pid"], signal.SIGINT)
        os.kill(pid, signal.SIGINT)
        os.kill(seen["pid"], signal.SIGUSR1)
        watched.wait_gone()
        assert launcher._workers[0].exit_reason() == "exit status 5"
    assert shared.shared_server() is server

"""Servers without TensorFlow (they start in a fraction of a second) and lines on which workers tell what they see."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.runtime.launch.forkserver import ForkServer
from pipeline.runtime.launch.local import LocalLauncher
from tests.pipeline.runtime.launch.processes import DEADLINE, Line, Watched

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


@pytest.fixture
def watched():
    watched = Watched()
    yield watched
    watched.release()


@pytest.fixture
def line(tmp_path):
    line = Line(tmp_path / "line")
    yield line
    line.close()


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    """Let workers import `launch_entries`: they get the driver's `sys.path`."""
    monkeypatch.syspath_prepend(str(HERE / "entries"))


@pytest.fixture(scope="module")
def light_server():
    server = ForkServer(preload=("stages", "numpy.random"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        server.start()
    yield server
    server.close()


@pytest.fixture
def launcher(light_server):
    with LocalLauncher(lambda: light_server) as launcher:
        yield launcher


@pytest.fixture
def new_server():
    """A function that makes servers, which are closed at the end."""
    servers = []

    def make(*preload):
        servers.append(ForkServer(preload=preload or ("stages",)))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def shared(monkeypatch):
    """The module of the shared server, with a server that preloads little."""
    from pipeline.runtime.launch import shared

    shared.shutdown()
    monkeypatch.setattr(shared, "ForkServer", lambda: ForkServer(preload=("stages",)))
    yield shared
    shared.shutdown()


PRELUDE = f"""
import json, os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(HERE / "entries")!r}]
from pipeline.runtime.launch import LocalLauncher, prestart, shared, shutdown
from pipeline.runtime.launch.forkserver import ForkServer
LIGHT = ForkServer
def light(): return ForkServer(preload=("stages",))
shared.ForkServer = light
line = sys.argv[1]
def tell(**facts):
    with open(line, "w") as file: file.write(json.dumps(facts) + "\\n")
def server_pid(): return shared.shared_server().pid
"""


@pytest.fixture
def driver(tmp_path, line):
    """A function that runs code as a user's script, without a __main__ guard, and returns its Popen."""
    processes = []

    def run(code, how="file", **options):
        text = PRELUDE + textwrap.dedent(code)
        if how == "file":
            script = tmp_path / f"script{len(processes)}.py"
            script.write_text(text)
            command, given = [sys.executable, str(script), line.path], None
        elif how == "stdin":
            command, given = [sys.executable, "-", line.path], text
        else:
            command, given = [sys.executable, "-c", text, line.path], None
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        processes.append(process)
        if given is not None:
            process.stdin.write(given)
        process.stdin.close()
        return process

    yield run
    for process in processes:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.fixture
def finish():
    """A function that waits for a driver script and returns its exit code and its output."""

    def wait(process):
        output = process.stdout.read()
        return process.wait(DEADLINE), output

    return wait

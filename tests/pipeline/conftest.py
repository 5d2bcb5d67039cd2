"""Lines and gates to workers, a folder of one's own for sockets, and scripts."""

from __future__ import annotations

import gc
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from pipeline.runtime.launch.shared import shared_server
from tests.failures import Gate, Script
from tests.pipeline.runtime.launch.processes import Line, children, open_files


@pytest.fixture
def line(tmp_path):
    line = Line(tmp_path / "line")
    yield line
    line.close()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


@pytest.fixture
def short_folder():
    """A folder with a short path: the path of a socket has at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="tl-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def script(short_folder):
    """A function that runs code as a user's program."""
    scripts = []

    def run(code, how="file", **variables):
        scripts.append(Script(code, short_folder, how, **variables))
        return scripts[-1]

    run.folder = Path(short_folder)
    yield run
    for each in scripts:
        each.close()


@pytest.fixture
def nothing_left(monkeypatch, short_folder, line, gate):
    """After the test: no worker, no socket file or directory, no pipe, socket or shared memory more than before.

    The check comes before the line and the gate are closed: that would set free a worker that still waits at one.
    """
    monkeypatch.setattr(tempfile, "tempdir", short_folder)
    server = shared_server()
    server.wait_ready()
    gc.collect()
    before = _held_open()
    yield
    gc.collect()
    assert children(shared_server().pid) == []
    assert list(Path(short_folder).iterdir()) == []
    assert not _held_open() - before


def _held_open():
    targets = open_files().values()
    return Counter(re.sub(r"\d+", "n", target) for target in targets if not target.startswith("/dev/"))

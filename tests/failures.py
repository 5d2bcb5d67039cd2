"""What the tests of failures share: pipelines that trip, what is left of them, and scripts that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

from pipeline import Pipeline, Segment
from tests import failing_parts
from tests.pipeline.runtime.launch.processes import DEADLINE
from tests.sources import ROOT

NOTICED_SECONDS = 2.0
"""How long after its cause an error may reach the user."""
GONE_SECONDS = 1.0
"""How long after the death of the user's process its workers may live."""

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
Y = np.ones((8, 4), np.float32)


def tripping(*trips, microbatches=2, compiled=True, eager=True, **options):
    """A pipeline with one stage per trip, named bottom, middle and top (or so)."""
    names = ["bottom", *(f"middle{i}" for i in range(1, len(trips) - 1)), "top"] if len(trips) > 1 else ["only"]
    segments = [Segment(failing_parts.part, kwargs=trip, name=name) for name, trip in zip(names, trips, strict=True)]
    pipe = Pipeline(segments, microbatches=microbatches, **options)
    if compiled:
        pipe.compile("sgd", "mse", run_eagerly=eager)
    return pipe


class Gate:
    """A named pipe that a worker waits at until `open`."""

    def __init__(self, path):
        self.path = str(path)
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR)

    def open(self, times=1):
        os.write(self._descriptor, b"x" * times)

    def close(self):
        os.close(self._descriptor)


class Script:
    """A user's program in a process of its own, found again in all processes that descend from it.

    Args:
        code: The program.
        folder: Where it runs, and keeps its temporary files; a short path.
        how: "file", or "argument", where `__main__` has no file.
        **variables: What the program finds defined.
    """

    def __init__(self, code, folder, how="file", **variables):
        self._mark = f"TAPELINE_TEST={folder}"
        self.folder = Path(folder)
        (self.folder / "sockets").mkdir(exist_ok=True)
        preamble = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        preamble += "".join(f"{name} = {value!r}\n" for name, value in variables.items())
        text = preamble + textwrap.dedent(code)
        script = self.folder / "my_script.py"
        script.write_text(text)
        command = [sys.executable, str(script)] if how == "file" else [sys.executable, "-c", text]
        environment = {**os.environ, "TAPELINE_TEST": str(folder), "TMPDIR": str(self.folder / "sockets")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )

    def finish(self):
        """Exit code and output."""
        output = self.process.stdout.read()
        return self.process.wait(DEADLINE), output

    def interrupt(self):
        """Ctrl-C in its terminal: SIGINT to its whole process group. Returns when its main thread has noticed."""
        number = signal.SIGINT
        os.killpg(self.process.pid, number)
        bit = 1 << (number - 1)
        end = time.monotonic() + DEADLINE
        while _pending(self.process.pid) & bit:
            assert time.monotonic() < end, "the signal was not delivered"

    def relatives(self):
        """Process ids of everything that descends from it and runs, itself not."""
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit() and int(each.name) != self.process.pid:
                try:
                    marked = self._mark.encode() in (each / "environ").read_bytes().split(b"\0")
                    state = (each / "stat").read_text().rpartition(")")[2].split()[0]
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                if marked and state != "Z":
                    found.append(int(each.name))
        return found

    def directories(self):
        """What it has in the folder for temporary files."""
        return sorted(path.name for path in (self.folder / "sockets").glob("tapeline-*"))

    def kill_and_time(self):
        """Kill it and return the seconds until nothing that descends from it runs, and its directories are gone."""
        self.process.kill()
        begin = time.monotonic()
        while self.relatives() or self.directories():
            assert time.monotonic() - begin < DEADLINE, (self.relatives(), self.directories())
        return time.monotonic() - begin

    def close(self):
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()


def _pending(pid):
    """The signals sent to a process that it has not seen yet, as a mask."""
    for name in ("ShdPnd", "SigPnd"):
        for text in Path(f"/proc/{pid}/status").read_text().splitlines():
            if text.startswith(name) and int(text.split()[1], 16):
                return int(text.split()[1], 16)
    return 0

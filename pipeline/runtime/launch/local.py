"""Workers as processes of this machine, forked from the warm server.

What the driver holds of a worker is a pidfd (readable when the process is gone, immune to reused process ids), the read
end of the pipe with its exit code, and the memory of its status board.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.runtime.launch.base import describe_exit
from pipeline.runtime.launch.descriptors import Descriptor, readable, remaining
from pipeline.runtime.launch.errors import LaunchError, ServerGoneError
from pipeline.runtime.launch.forkserver import DEFAULTS, ForkServer, Launched, import_path
from pipeline.runtime.launch.shared import shared_server
from stages.origin import ROOT
from stages.process.status_board import SharedBoard

__all__ = ["LocalLauncher", "LocalWorker"]

_REPORT_TIMEOUT = 2.0
"""Seconds that the server has for reporting a worker that is gone."""

_KILL_TIMEOUT = 5.0
"""Seconds that the kernel has for ending a killed process."""


class LocalLauncher:
    """Starts workers as forks of a warm server; see `Launcher` for the contract.

    Args:
        server: returns the running server to use; by default this process's shared one.
    """

    def __init__(self, server: Callable[[], ForkServer] = shared_server) -> None:
        self._server = server
        self._workers: list[LocalWorker] = []

    def launch(
        self, name: str, entry: str, spec: dict[str, Any], threads: int = 1, boundary: int | None = None
    ) -> LocalWorker:
        """Start a worker process; see `Launcher.launch`, and `ForkServer.launch` for `boundary`."""
        job = describe_job(name, entry, spec, threads)
        server = self._server()
        try:
            launched = server.launch(job, boundary=boundary)
        except ServerGoneError:
            if not server.ready:
                raise
            server = self._server()  # it had been fine and died since: once more with a new one
            launched = server.launch(job, boundary=boundary)
        worker = LocalWorker(name, launched, server)
        self._workers.append(worker)
        worker.open_gate(launched.gate)
        return worker

    def close(self) -> None:
        """Kill the workers that still run and free everything. Idempotent."""
        for worker in self._workers:
            worker.kill()
        while self._workers:
            self._workers[-1].close()
            self._workers.pop()

    def __enter__(self) -> LocalLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalWorker:
    """A worker process; see `WorkerHandle` for the contract.

    Args:
        name: for messages.
        launched: what the server gave.
        server: the server that forked it.
    """

    def __init__(self, name: str, launched: Launched, server: ForkServer) -> None:
        self._name = name
        self._pid = launched.pid
        self._pidfd = launched.pidfd
        self._report = launched.report
        self._shared: SharedBoard | None = launched.board
        self._board = launched.board.slots
        self._server = server
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._killed = False
        self._reason = ""

    def __repr__(self) -> str:
        return f"<LocalWorker {self._name!r}, process {self._pid}: {self.exit_reason().partition(chr(10))[0]}>"

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return self._name

    @property
    def pid(self) -> int:
        """Its process id; another process may have it once this one is gone."""
        return self._pid

    @property
    def sentinel(self) -> Descriptor:
        """Readable once the process is gone, until `close`."""
        return self._pidfd

    @property
    def board(self) -> npt.NDArray[np.int64]:
        """Its status board, int64 of shape (8,); a private copy once the worker is known to be gone."""
        return self._board

    def open_gate(self, gate: Descriptor) -> None:
        """Let the worker begin."""
        with gate, contextlib.suppress(BrokenPipeError):  # it may be gone: that is for `exit_reason` to say
            os.write(gate.fileno(), b"g")

    def alive(self) -> bool:
        """Return whether the process still runs."""
        return not self._reason and not readable([self._pidfd.fileno()], 0)

    def kill(self) -> None:
        """Send it SIGKILL. Harmless if it is gone, and in a forked copy of the process that owns it."""
        if self._reason or self._owner != os.getpid() or not self.alive():
            return
        self._killed = True
        signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for its end and return whether it is gone."""
        if not self._reason and not readable([self._pidfd.fileno()], timeout):
            return False
        self._finish()
        return True

    def exit_reason(self) -> str:
        """Return why it ended; see `WorkerHandle.exit_reason`."""
        return self._reason if self.join(0) else "running"

    def close(self) -> None:
        """Kill it if it runs and free what the driver holds for it. Idempotent."""
        if self._owner == os.getpid():
            self.kill()
            self.join(_KILL_TIMEOUT)
        with self._lock:
            self._reason = self._reason or "unknown (this is a forked copy of the process that started it)"
            self._pidfd.close()
            self._report.close()

    def _finish(self) -> None:
        """Find out, once, why the process ended, and keep what its memory says."""
        with self._lock:
            if self._reason or self._shared is None:
                return
            words = self._shared.last_words()
            self._board = self._board.copy()
            self._shared = None
            code = self._exit_code()
            if code is None:
                self._reason = f"ended with its fork server ({self._server.exit_reason()})"
            elif code > 0 and words:
                self._reason = f"{describe_exit(code)}, {words}"
            else:
                self._reason = describe_exit(code, self._killed)

    def _exit_code(self) -> int | None:
        """Return the code that the server reports, or None if the server was not there to see it."""
        deadline = time.monotonic() + _REPORT_TIMEOUT
        report = b""
        while readable([self._report.fileno()], remaining(deadline)):
            part = os.read(self._report.fileno(), 16)
            if not part:
                break
            report += part
        if report:
            return int(report)
        with contextlib.suppress(ChildProcessError):  # as process 1 of a container we inherit the server's orphans
            ended = os.waitid(os.P_PIDFD, self._pidfd.fileno(), os.WEXITED | os.WNOHANG)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return None


def describe_job(name: str, entry: str, spec: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return what a worker process must know to be like this process and to call its entry.

    Raises:
        LaunchError: the name, the entry or the number of threads is not possible.
    """
    check_request(name, entry, threads)
    try:
        directory = str(Path.cwd())
    except FileNotFoundError:
        directory = None  # it was deleted: the worker stays where the server is
    return {
        "name": name,
        "entry": entry,
        "spec": spec,
        "threads": threads,
        "root": str(ROOT),
        "path": import_path(),
        "directory": directory,
        "arguments": list(sys.argv) if hasattr(sys, "argv") else [""],
        "environment": {**DEFAULTS, **os.environ},
    }


def check_request(name: str, entry: str, threads: int) -> None:
    """Check what every launcher is given.

    Raises:
        LaunchError: the name, the entry or the number of threads is not possible.
    """
    if not name:
        raise LaunchError("a worker needs a name, received an empty one")
    if threads < 1:
        raise LaunchError(f"worker {name!r}: threads must be at least 1, received {threads}")
    module, _, function = entry.partition(":")
    if not module or not function:
        raise LaunchError(f"worker {name!r}: expected an entry 'module:function', received {entry!r}")
    if module == "__main__":
        raise LaunchError(
            f"worker {name!r}: its entry {entry!r} is in the script itself, which a worker cannot import; "
            "move the function to a module of its own"
        )

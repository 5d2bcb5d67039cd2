"""The driver's side of the warm fork server (`stages.process.fork_server` is the other, and draws how they talk).

Invariants:

1. `start` returns at once; whoever needs the server waits for it, and learns at once if it died.
2. Every request has a number and every reply names it. A wait that was interrupted (Ctrl-C) leaves a reply behind; the
   next one sees from the number that it is not its own. The worker of an abandoned request waits at a gate that its
   owner will never open, sees it closed, and ends.
3. What the server writes (it writes only when something is wrong, and TensorFlow's greetings) goes to memory of the
   driver's, to be quoted in an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime.launch.base import describe_exit
from pipeline.runtime.launch.descriptors import Descriptor, readable, remaining
from pipeline.runtime.launch.errors import LaunchError, ServerGoneError
from pipeline.runtime.launch.keeper import Keeper, python
from stages.origin import ROOT
from stages.process.control_socket import receive, send
from stages.process.job import job_to_bytes
from stages.process.status_board import SharedBoard

__all__ = ["DEFAULTS", "PRELOAD", "ForkServer", "Launched"]

PRELOAD = ("tensorflow", "keras", "stages.worker.worker")
"""What the server imports before it forks."""

DEFAULTS: Mapping[str, str] = {
    "KERAS_BACKEND": "tensorflow",
    "OPENBLAS_NUM_THREADS": "1",  # its threads would start at import, and a fork does not copy threads
    "TF_CPP_MIN_LOG_LEVEL": "3",  # at 2 every worker on a machine without a GPU says that cuInit failed
}
"""Environment of server and workers where the user's says nothing."""

READY_TIMEOUT = 120.0
"""Seconds that imports may take: far more than a cold disk needs, and an end."""

_BOOT = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from stages.process.fork_server import main; "
    "os._exit(main(int(sys.argv[2]), int(sys.argv[3])))"
)
_END_TIMEOUT = 2.0
"""Seconds that an ending server has to be gone."""

_TAIL_LINES = 20
_TAIL_BYTES = 4000


class Launched(NamedTuple):
    """A worker process that waits at its gate."""

    pid: int
    pidfd: Descriptor
    report: Descriptor  # read end of the pipe on which the server writes the exit code
    gate: Descriptor  # write end of the gate
    board: SharedBoard


class ForkServer:
    """A process with `preload` imported that forks workers; started by `start`, once.

    Args:
        preload: dotted names of the modules to import before forking.

    Any thread may use it; it belongs to the process that started it.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._preload = tuple(preload)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._ready = False
        self._keeper: Keeper | None = None
        self._socket: socket.socket | None = None
        self._output: Descriptor | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server, or None before `start`."""
        return self._keeper.pid if self._keeper is not None else None

    @property
    def ready(self) -> bool:
        """Whether the imports are known to have succeeded."""
        return self._ready

    def start(self) -> None:
        """Start the process and return without waiting for its imports.

        Raises:
            LaunchError: the interpreter could not be started.
        """
        if not sys.platform.startswith("linux"):
            raise LaunchError(
                f"worker processes need Linux, this is {sys.platform!r}; "
                "use transport='inproc' to run the stages as threads"
            )
        ours, theirs = map(_above_stdio, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._output = Descriptor(os.memfd_create("tapeline-server-output"))
        with theirs:
            number = theirs.fileno()
            try:
                command = [python(), "-P", "-c", _BOOT, str(ROOT), str(number), str(os.getpid())]
                self._keeper = Keeper(command, {**DEFAULTS, **os.environ}, [number], self._output.fileno())
                send(ours, {"path": import_path(), "preload": self._preload})
            except BaseException as error:
                ours.close()
                self._output.close()
                if isinstance(error, OSError | subprocess.SubprocessError):
                    raise LaunchError(f"the fork server could not be started: {error}") from error
                raise
        self._socket = ours

    def alive(self) -> bool:
        """Return whether the process runs."""
        return (
            self._keeper is not None
            and not self._keeper.sentinel.closed
            and not readable([self._keeper.sentinel.fileno()], 0)
        )

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the imports are done.

        Args:
            timeout: seconds.

        Raises:
            LaunchError: an import failed, the server died, or the time is over.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            while not self._ready:
                self._next_reply(deadline)

    def launch(self, job: dict[str, Any], timeout: float = READY_TIMEOUT, boundary: int | None = None) -> Launched:
        """Fork a worker; it waits for a byte through its gate before it does anything.

        Args:
            job: as `stages.process.child_process` reads it.
            boundary: memory in which it writes down its values; None: it does not.
            timeout: seconds to wait for the server, its imports included.

        Returns:
            What the driver holds of the worker. Closing the gate unopened ends the worker.

        Raises:
            LaunchError: the job is not plain data, an import failed, the server could not fork, or the time is over.
            ServerGoneError: the server died.
        """
        try:
            content = job_to_bytes({**job, "memory": boundary is not None})
        except (TypeError, ValueError) as error:
            raise LaunchError(
                f"worker {job['name']!r}: its spec must be plain data that JSON can hold (dict with str keys, list, "
                f"str, int, float, bool, None), or bytes: {error}"
            ) from error
        with (
            _output_of(1) as stdout,
            _output_of(2) as stderr,
            Descriptor(os.memfd_create("tapeline-job")) as task,
            Descriptor(SharedBoard.create_memory()) as memory,
        ):
            _write_all(task.fileno(), content)
            gate_out, gate_in = map(Descriptor, os.pipe())
            report_out, report_in = map(Descriptor, os.pipe())
            with gate_out, report_in:
                travelling = [each.fileno() for each in (task, memory, gate_out, report_in, stdout, stderr)]
                travelling.append(task.fileno() if boundary is None else boundary)  # always as many
                pid, pidfd = self._request_fork(travelling, time.monotonic() + timeout)
            return Launched(pid, pidfd, report_out, gate_in, SharedBoard(memory.fileno()))

    def exit_reason(self) -> str:
        """Return why the process ended, in one line; "running" while it runs."""
        if self.alive():
            return "running"
        code = self._keeper.exit_code(_END_TIMEOUT) if self._keeper is not None else None
        return "unknown" if code is None else describe_exit(code)

    def close(self) -> None:
        """End the server and its workers and wait for that. Idempotent."""
        with self._lock:
            if self._socket is None or self._keeper is None or self._output is None:
                return
            if self._ready:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # works even if another process has a copy of the socket
                self._keeper.exit_code(_END_TIMEOUT)
            self._keeper.kill()
            self._keeper.exit_code(_END_TIMEOUT)
            self._socket.close()
            self._socket = None
            self._keeper.sentinel.close()
            self._output.close()

    def abandon(self) -> None:
        """Let go of the server in a forked copy of the process that owns it, without ending it."""
        if self._socket is not None and self._keeper is not None and self._output is not None:
            self._socket.close()
            self._socket = None
            self._keeper.abandon()
            self._output.close()

    def _request_fork(self, descriptors: list[int], deadline: float) -> tuple[int, Descriptor]:
        with self._lock:
            number = next(self._numbers)
            if self._socket is None:
                raise ServerGoneError("the fork server is closed")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is ending: the wait below finds why
                send(self._socket, {"launch": number}, descriptors)
            while True:
                reply, received = self._next_reply(deadline)
                if reply.get("launched") == number:
                    return reply["pid"], received[0]
                if reply.get("refused") == number:
                    raise LaunchError(f"the fork server could not start a worker: {reply['reason']}")

    def _next_reply(self, deadline: float) -> tuple[dict[str, Any], list[Descriptor]]:
        """Wait for one message from the server; the caller holds the lock."""
        if self._socket is None or self._keeper is None:
            raise ServerGoneError("the fork server is closed")
        ready = readable([self._socket.fileno(), self._keeper.sentinel.fileno()], remaining(deadline))
        if not ready:
            doing = "start a worker" if self._ready else f"import {', '.join(self._preload)}"
            raise LaunchError(f"the fork server (process {self.pid}) did not {doing} in time{self._quote()}")
        reply: dict[str, Any] | None = None
        numbers: list[int] = []
        for _ in range(2):  # the reset comes before what the server said last
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                reply, numbers = receive(self._socket, socket.MSG_DONTWAIT)
                break
        descriptors = [Descriptor(number) for number in numbers]
        if reply is None:
            raise self._gone()
        if "failed" in reply:
            self._keeper.exit_code(_END_TIMEOUT)
            raise LaunchError(
                f"the fork server could not import {', '.join(self._preload)}: {reply['failed']}{self._quote()}\n"
                f"Workers need these imports to succeed in {sys.executable}"
            )
        self._ready = True
        return reply, descriptors

    def _gone(self) -> ServerGoneError:
        doing = "" if self._ready else f" while it imported {', '.join(self._preload)}"
        if self._keeper is not None:
            self._keeper.exit_code(_END_TIMEOUT)  # its socket closes a moment before it is gone
        return ServerGoneError(f"the fork server died{doing}: {self.exit_reason()}{self._quote()}")

    def _quote(self) -> str:
        """Return the end of what the server wrote, indented, or a remark that there is nothing."""
        if self._output is None or self._output.closed:
            return ""
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
        lines = text.splitlines()[-_TAIL_LINES:]
        if not lines:
            return " (it wrote nothing to stderr)"
        return "\nThe last lines of its stderr:\n" + "\n".join(f"    {line}" for line in lines)


def import_path() -> list[str]:
    """Return this process's `sys.path` for another process, with our packages' folder on it."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    return path if str(ROOT) in path or _found_on(path) else [*path, str(ROOT)]


def _found_on(path: list[str]) -> bool:
    return any((Path(entry) / "stages" / "server.py").is_file() for entry in path)


def _output_of(number: int) -> Descriptor:
    """Return a copy of this process's stdout or stderr as it is now, or of the null device if it is closed."""
    try:
        return Descriptor(os.dup(number))
    except OSError:
        return Descriptor(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))


def _above_stdio(connection: socket.socket) -> socket.socket:
    """Return the socket under a descriptor that is not 0, 1 or 2, whatever the user has closed."""
    return socket.socket(fileno=Descriptor(connection.detach()).detach())


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

"""The two small interfaces that a place where workers can run must offer.

The driver knows nothing else of processes, so a cluster's scheduler can take the place of this machine.
"""

from __future__ import annotations

import signal
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from transport.channel import HasFileno

__all__ = ["HasFileno", "Launcher", "WorkerHandle", "describe_exit"]


class WorkerHandle(Protocol):
    """One worker, as its driver sees it. No method raises because the worker is gone."""

    @property
    def name(self) -> str:
        """The worker's name in messages."""

    @property
    def pid(self) -> int | None:
        """Its process id, or None if it is not a process of its own."""

    @property
    def sentinel(self) -> HasFileno:
        """Readable once the worker is gone, until `close`."""

    @property
    def board(self) -> npt.NDArray[np.int64]:
        """Its status board, int64 of shape (8,), also after it is gone. Ask anew each time; a kept one keeps memory."""

    def alive(self) -> bool:
        """Return whether the worker still runs."""

    def exit_reason(self) -> str:
        """Return why it ended: one line, and a traceback below it if its entry raised; "running" while it runs."""

    def kill(self) -> None:
        """End it now, without asking it. Harmless if it is gone."""

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for its end and return whether it is gone."""

    def close(self) -> None:
        """Kill it if it runs and free what the driver holds for it. The reason and the board stay readable."""


class Launcher(Protocol):
    """A place where workers can run. `close` ends every worker that it started; it is idempotent."""

    def launch(self, name: str, entry: str, spec: dict[str, Any], threads: int) -> WorkerHandle:
        """Start a worker and return without waiting for what it does.

        Args:
            name: for messages, not empty.
            entry: "module:function"; called in the worker as ``function(spec, board)`` with board an int64 ndarray of
                shape (8,).
            spec: plain data (what JSON can hold), and bytes.
            threads: size of TensorFlow's thread pools in the worker, at least 1.

        Raises:
            LaunchError: the worker could not be started; none is left behind.
        """

    def close(self) -> None:
        """Kill the workers that still run and free everything. Idempotent."""


def describe_exit(code: int, expected_kill: bool = False) -> str:
    """Say what an exit code means.

    Args:
        code: as `subprocess` gives it: the exit status, or minus the number of the signal that killed the process.
        expected_kill: we sent the SIGKILL, so nothing needs guessing.

    Returns:
        For example "exit status 3", "killed by SIGSEGV" or "killed by SIGKILL (out of memory?)".
    """
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    guess = " (out of memory?)" if -code == signal.SIGKILL and not expected_kill else ""
    return f"killed by {name}{guess}"

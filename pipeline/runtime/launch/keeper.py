"""The thread that is the fork server's parent, as the kernel sees it.

A process that asked to die with its parent dies with the parent *thread*. Had the user's thread started the server, the
server would die when that thread ends. So a thread of ours starts it, and then only waits for it: it lives exactly as
long as the server or the process, and the server never becomes a zombie.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from pipeline.runtime.launch.descriptors import Descriptor

__all__ = ["Keeper"]


class Keeper:
    """Runs a child process for as long as this process lives.

    Args:
        command: program and arguments.
        environment: the child's environment.
        inherit: descriptors that the child gets under the same numbers; all others are closed in it.
        output: descriptor that becomes its stdout and stderr; its stdin is empty.

    Raises:
        OSError: the program cannot be started.

    Attributes:
        pid: the child's process id.
        sentinel: readable once the child is gone.
    """

    pid: int
    sentinel: Descriptor

    def __init__(self, command: list[str], environment: dict[str, str], inherit: list[int], output: int) -> None:
        self._started = threading.Event()
        self._error: Exception | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(
            target=self._run,
            args=(command, environment, inherit, output),
            name="tapeline-keeper",
            daemon=True,
        )
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _run(self, command: list[str], environment: dict[str, str], inherit: list[int], output: int) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherit,
                start_new_session=True,  # Ctrl-C in the terminal is the driver's business
            )
            self.pid = self._process.pid
            self.sentinel = Descriptor(os.pidfd_open(self.pid))
        except Exception as error:
            self._error = error
            if self._process is not None:
                self._process.kill()
        finally:
            self._started.set()
        if self._process is not None:
            self._process.wait()

    def exit_code(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for the child's end and return its exit code, or None if it still runs."""
        self._thread.join(timeout)
        return None if self._process is None else self._process.returncode

    def kill(self) -> None:
        """Send the child SIGKILL. Harmless if it is gone."""
        if self._process is not None:
            self._process.kill()

    def abandon(self) -> None:
        """Forget the child, in a forked copy of its parent: there it is nobody's child."""
        self.sentinel.close()
        if self._process is not None and self._process.returncode is None:
            self._process.returncode = 0  # or Popen would warn that the process still runs


def python() -> str:
    """Return the path of this Python interpreter.

    Raises:
        FileNotFoundError: Python is embedded in a program that does not tell.
    """
    if not sys.executable:
        raise FileNotFoundError("this Python does not know its own executable (sys.executable is empty)")
    return sys.executable

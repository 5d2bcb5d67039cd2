"""The warm fork server: a process that has imported TensorFlow and Keras once and forks a worker on request.

Importing TensorFlow takes seconds, a fork takes milliseconds. The driver starts this process as an interpreter of its
own, so nothing of the user's process (open files, locks, TensorFlow's threads) is in it, and `__main__` is never
imported again.

    driver                         server                            worker
      | -- {"path", "preload"} ----> |  import, run no op               |
      | <--------- {"ready"} ------- |                                  |
      | -- {"launch": 1} + 7 fds --> |  fork ------------------------->  |  read the job
      | <- {"launched": 1} + pidfd - |                                  |  wait at the gate
      | -- "go" through the gate ------------------------------------>  |  entry(spec, board)
      |                              | <---------- exit ---------------  |
      | <--- exit code (report) ---- |

Invariants:

1. One thread, and no TensorFlow op, ever: a child forked after an op hangs in its first `tf.function`. Checked before
   the first fork, and again before each.
2. The server dies with the driver and a worker dies with the server (`stages.process.lifetime`), whatever either is
   doing.
3. Messages are JSON, one datagram each; open files travel beside them. A job (which entry to call, with what) is in a
   memfd that only the worker reads. Nothing is pickled.
4. Every child is waited for at once, so there are no zombies; its exit code goes to its own report pipe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from stages.process.child_process import Descriptors, run_worker
from stages.process.control_socket import receive, send
from stages.process.lifetime import die_with_parent, name_process

__all__ = ["main", "preload"]

_NOT_NEEDED = ("sklearn", "matplotlib")
"""What Keras imports if it is installed, for its scikit-learn wrappers and its galleries: half of the import time.

Neither has a use inside a stage. Code in a worker can still import them, only `keras.wrappers` and
`keras.visualization` see them as not installed.
"""


class PreloadError(Exception):
    """The imports succeeded but left a process that must not be forked."""


class _DriverGoneError(Exception):
    """The driver closed its end of the control socket."""


def main(control: int, parent: int) -> int:
    """Serve fork requests until the driver closes the control socket.

    Args:
        control: descriptor of our end of the control socket.
        parent: process id of the driver.

    Returns:
        The exit status: 0 after a normal end, 1 if a preload failed.
    """
    die_with_parent(parent)
    name_process("tapeline-server")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with socket.socket(fileno=control) as connection:
        try:
            request, _ = _receive(connection)
            sys.path[:] = request["path"]
            try:
                preload(request["preload"])
            except BaseException as error:
                traceback.print_exc()
                send(connection, {"failed": _one_line(error)})
                return 1
            send(connection, {"ready": True})
            _Server(connection).serve()
        except (_DriverGoneError, BrokenPipeError, ConnectionResetError):
            pass
    return 0


def preload(modules: Sequence[str]) -> None:
    """Import `modules` in order and leave the process ready to be forked.

    The garbage collector is off meanwhile, and what was imported is then moved out of its sight: a collection would
    otherwise walk TensorFlow's million objects, and in a child copy every page that they are on.

    Args:
        modules: dotted names.

    Raises:
        PreloadError: Keras runs on another backend, or an import ran a TensorFlow op.
        Exception: whatever an import raised.
    """
    gc.disable()
    try:
        with _absent(_NOT_NEEDED):
            for name in modules:
                importlib.import_module(name)
        keras = sys.modules.get("keras")
        if keras is not None and keras.backend.backend() != "tensorflow":
            raise PreloadError(
                f"Keras runs on the backend {keras.backend.backend()!r}, Tapeline needs 'tensorflow'; "
                "set KERAS_BACKEND=tensorflow"
            )
        _check_no_op_ran()
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def _absent(names: Sequence[str]) -> Iterator[None]:
    """Let optional imports of `names` fail as if they were not installed, unless they are loaded already."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # documented: the import then raises
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _check_no_op_ran() -> None:
    if "tensorflow" not in sys.modules:
        return
    from stages.tensorflow_internals import has_op_run

    if has_op_run():
        raise PreloadError(
            "a TensorFlow op ran in the fork server while it imported modules, and a process forked after that hangs "
            "in its first tf.function; find the import that creates a tensor or a variable at module level"
        )


class _Server:
    """Forks workers on request and waits for those that end.

    Args:
        connection: the control socket; closed by the caller.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        # pidfd -> (process id, write end of its report pipe)
        self._children: dict[int, tuple[int, int]] = {}

    def serve(self) -> None:
        """Serve until the driver is gone, then end every worker."""
        try:
            while True:
                for descriptor, _ in self._poll.poll():
                    if descriptor in self._children:
                        self._reap(descriptor)
                    else:
                        self._answer(*_receive(self._connection))
        finally:
            for descriptor in self._children:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            for descriptor in list(self._children):
                self._reap(descriptor)

    def _answer(self, request: dict[str, Any], descriptors: list[int]) -> None:
        number = request["launch"]
        try:
            _check_no_op_ran()
            if len(descriptors) != len(Descriptors._fields):
                raise OSError("the server has no free file descriptors (see `ulimit -n`)")
            given = Descriptors(*descriptors)
            child, pidfd = self._fork(given)
            self._children[pidfd] = (child, given.report)
            descriptors.remove(given.report)  # kept until the child ends
            self._poll.register(pidfd, select.POLLIN)
            send(self._connection, {"launched": number, "pid": child}, (pidfd,))
        except (OSError, PreloadError) as error:
            send(self._connection, {"refused": number, "reason": _one_line(error)})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, given: Descriptors) -> tuple[int, int]:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            run_worker(given, parent, self._forget_all)
        try:
            return child, os.pidfd_open(child)
        except OSError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise

    def _forget_all(self) -> None:
        """Close, in a child, what belongs to the server."""
        self._connection.close()
        for pidfd, (_, report) in self._children.items():
            os.close(pidfd)
            os.close(report)

    def _reap(self, descriptor: int) -> None:
        child, report = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        _, status = os.waitpid(child, 0)
        os.close(descriptor)
        with contextlib.suppress(BrokenPipeError):
            os.write(report, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(report)  # last: to the driver this is the end of it


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    message, descriptors = receive(connection)
    if message is None:
        raise _DriverGoneError
    return message, descriptors


def _one_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[:4000]

"""Workers as daemon threads of this process, for debugging and for quick tests.

There is no isolation: they share TensorFlow's thread pools (`threads` is checked and otherwise without effect), a crash
ends the process, and a thread cannot be killed: it ends when its entry returns, which it does once its inbox is closed.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.runtime.launch.base import describe_exit
from pipeline.runtime.launch.descriptors import Descriptor
from pipeline.runtime.launch.local import check_request
from stages.process.status_board import BOARD_SLOTS, words_of

__all__ = ["ThreadLauncher", "ThreadWorker"]


class ThreadLauncher:
    """Starts workers as threads; see `Launcher` for the contract."""

    def __init__(self) -> None:
        self._workers: list[ThreadWorker] = []

    def launch(self, name: str, entry: str, spec: dict[str, Any], threads: int = 1) -> ThreadWorker:
        """Start a worker thread; see `Launcher.launch`."""
        check_request(name, entry, threads)
        worker = ThreadWorker(name, entry, spec)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Free what belongs to the workers that have ended; the others free it themselves when they end."""
        while self._workers:
            self._workers.pop().close()

    def __enter__(self) -> ThreadLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ThreadWorker:
    """A worker thread, started at once; see `WorkerHandle` for the contract.

    Args:
        name: for messages.
        entry: "module:function".
        spec: given to the entry as it is, not copied.
    """

    def __init__(self, name: str, entry: str, spec: dict[str, Any]) -> None:
        self._name = name
        self._board = np.zeros(BOARD_SLOTS, np.int64)
        self._reason = ""
        self._lock = threading.Lock()
        # readable when it is not 0
        self._ended: Descriptor = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(entry, spec), name=f"tapeline-{name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<ThreadWorker {self._name!r}: {self.exit_reason().partition(chr(10))[0]}>"

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return self._name

    @property
    def pid(self) -> None:
        """None: it is not a process of its own."""
        return

    @property
    def sentinel(self) -> Descriptor:
        """Readable once the entry has returned or raised, until `close`."""
        return self._ended

    @property
    def board(self) -> npt.NDArray[np.int64]:
        """Its status board, int64 of shape (8,)."""
        return self._board

    def alive(self) -> bool:
        """Return whether the thread still runs."""
        return not self._reason

    def exit_reason(self) -> str:
        """Return why it ended; see `WorkerHandle.exit_reason`."""
        return self._reason or "running"

    def kill(self) -> None:
        """Do nothing: a thread cannot be killed. Close the inbox that it waits for."""

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for its end and return whether it is gone."""
        if threading.current_thread() is not self._thread:  # the collector may close a dropped pipeline in any thread
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Free what the driver holds, now or, if the thread still runs, when it ends. Idempotent."""
        with self._lock:
            self._closed = True
            if self._reason:
                self._ended.close()

    def _run(self, entry: str, spec: dict[str, Any]) -> None:
        module, _, function = entry.partition(":")
        try:
            getattr(importlib.import_module(module), function)(spec, self._board)
            reason = "returned"
        except SystemExit as leaving:
            code = leaving.code
            reason = describe_exit(code if isinstance(code, int) else int(code is not None))
        except BaseException as error:
            print(f"worker {self._name!r} failed:", file=sys.stderr)
            traceback.print_exception(error)
            reason = words_of(error)
        with self._lock:
            self._reason = reason
            if self._closed:
                self._ended.close()
            else:
                os.eventfd_write(self._ended.fileno(), 1)

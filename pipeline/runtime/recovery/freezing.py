"""A look at processes that are there and do not run: stopped by a signal, or hung. They are ended, and so are dead.

A process that traces a graph, waits for a slow disk or is watched by a debugger is none of these.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from pipeline.runtime.launch import WorkerHandle
from stages.worker.status import Phase, Status

LOOK_SECONDS_AT_PROCESSES = 0.25
"""How often it is looked; a process that is stopped at two looks in a row is frozen."""
_AT_WORK = (Phase.RUNNING, Phase.BUILDING, Phase.BUSY)


class FreezeWatch:
    """Looks at the workers of one incarnation, in a thread of its own, and ends those that are frozen.

    Args:
        hung_seconds: How long one may stand still that is to compute; None: for ever.

    Attributes:
        reasons: {worker's name: why it was ended}.
    """

    def __init__(self, hung_seconds: float | None = None) -> None:
        self.reasons: dict[str, str] = {}
        self._hung_seconds = hung_seconds
        self._workers: list[_Looked] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, handle: WorkerHandle) -> None:
        """Look at this one too, from now on."""
        self._workers.append(_Looked(handle))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tapeline-freeze-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS_AT_PROCESSES):
            for worker in list(self._workers):
                reason = worker.look(self._hung_seconds)
                if reason:
                    self.reasons.setdefault(worker.handle.name, reason)
                    worker.handle.kill()


class _Looked:
    """One worker, and what it looked like."""

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self._stopped = 0
        self._looks: tuple[bytes, int] | None = None
        self._since = time.monotonic()

    def look(self, hung_seconds: float | None) -> str:
        """Why it is frozen; "" if it is not, as far as can be seen."""
        if self.handle.pid is None or not self.handle.alive():
            return ""
        state, ticks = process_state(self.handle.pid)
        self._stopped = self._stopped + 1 if state == "T" else 0
        if self._stopped >= 2:
            return "stopped by a signal, and ended for it"
        board = self.handle.board
        looks = board.tobytes(), ticks
        if looks != self._looks or state == "D" or Status.of(board).phase not in _AT_WORK:
            self._looks, self._since = looks, time.monotonic()
        elif hung_seconds is not None and time.monotonic() - self._since > hung_seconds:
            return f"hung: no progress and no processor time in {hung_seconds:g} s, and ended for it"
        return ""


def process_state(pid: int) -> tuple[str, int]:
    """The state of a process as Linux calls it ("R" runs, "S" sleeps, "D" waits for a disk, "T" is stopped, "t" is
    traced; "" if it is gone), and its processor time in ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])


__all__ = ["FreezeWatch"]

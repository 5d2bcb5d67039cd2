"""What the tests of launching see of processes from outside: their files, their children, their end."""

from __future__ import annotations

import json
import os
import select
import time
from pathlib import Path

DEADLINE = 90.0  # seconds after which a test fails; nothing waits that long in a run that passes


def open_files(pid="self"):
    """Return what a process has open, but for the listing itself."""
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        target = os.path.realpath(each)
        if not target.endswith("/fd"):
            found[each.name] = target
    return found


def tasks(pid="self"):
    """Return the number of threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def children(pid):
    """Return the process ids of the children of a single-threaded process, zombies included."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Line:
    """The reading end of a named pipe whose path a worker or a driver script knows."""

    def __init__(self, path):
        self.path = str(path)
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""

    def hear(self):
        """Return the next message; fail when it does not come before the deadline."""
        end = time.monotonic() + DEADLINE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, end - time.monotonic()))
            assert ready, "nobody said anything on the line"
            self._rest += os.read(self._descriptor, 1 << 16)
        message, _, self._rest = self._rest.partition(b"\n")
        return json.loads(message)

    def close(self):
        os.close(self._descriptor)


class Watched:
    """Processes of others, held by pidfds, so that a reused process id cannot deceive."""

    def __init__(self):
        self._held = {}

    def hold(self, *pids):
        for pid in pids:
            self._held[pid] = os.pidfd_open(pid)

    def wait_gone(self):
        """Wait until all are gone; fail when one is not before the deadline."""
        for pid, descriptor in self._held.items():
            ready, _, _ = select.select([descriptor], [], [], DEADLINE)
            assert ready, f"process {pid} is still alive"
        self.release()

    def release(self):
        while self._held:
            os.close(self._held.popitem()[1])


class Session:
    """A fork server and all its workers: it leads a session of its own and they are born into it."""

    def __init__(self, leader):
        self._leader = leader

    def members(self):
        """Return the process ids in the session that are not zombies."""
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit():
                try:
                    state, _, _, session = (each / "stat").read_text().rpartition(")")[2].split()[:4]
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(session) == self._leader and state != "Z":
                    found.append(int(each.name))
        return found

    def wait_empty(self):
        """Wait until no process is in the session; fail when one is still there at the deadline."""
        while members := self.members():
            watched = Watched()
            for pid in members:
                try:
                    watched.hold(pid)
                except ProcessLookupError:
                    continue
            watched.wait_gone()

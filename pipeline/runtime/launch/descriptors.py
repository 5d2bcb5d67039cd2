"""File descriptors with an owner, so that none leaks when an exception or Ctrl-C comes in between."""

from __future__ import annotations

import fcntl
import os
import select
import time

__all__ = ["Descriptor", "readable", "remaining"]


class Descriptor:
    """An open file descriptor that is closed with its owner, at the latest by garbage collection.

    Args:
        number: the descriptor; from now on this object's. One of 0, 1 and 2 is exchanged for a higher one.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        if 0 <= number <= 2:
            # a user who closed stdout must not have it be a socket of ours from now on
            self._number = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(number)

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ValueError: it is closed.
        """
        if self._number < 0:
            raise ValueError("this file descriptor is closed")
        return self._number

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._number < 0

    def detach(self) -> int:
        """Return the descriptor, which is the caller's from now on."""
        number, self._number = self._number, -1
        return number

    def close(self) -> None:
        """Close it. Idempotent."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def readable(descriptors: list[int], timeout: float | None) -> list[int]:
    """Wait until one of the descriptors can be read or is at its end, and return which can.

    Args:
        descriptors: file descriptors; any number may be above 1024.
        timeout: seconds; None waits for ever.

    Returns:
        Those that are ready, in the given order; empty after the timeout.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(None if timeout is None else max(0.0, timeout) * 1000)}
    return [descriptor for descriptor in descriptors if descriptor in ready]


def remaining(deadline: float | None) -> float | None:
    """Return the seconds until a `time.monotonic` deadline, at least 0; None for None."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())

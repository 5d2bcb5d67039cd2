"""Keep this process to some of its cores for a while, so that it computes as a worker with fewer threads does.

TensorFlow's thread pools are sized once in a process, but the system decides where its threads run. In every turn other
cores are taken, since one of them may be busy with something else.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["default_threads", "few_cores"]


def default_threads(workers: int) -> int:
    """Threads per worker: the cores this process may use, shared evenly, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


@contextmanager
def few_cores(count: int | None) -> Iterator[Callable[[], None]]:
    """Keep all threads of this process to `count` cores; afterwards each may run where it could before.

    Args:
        count: How many, at least 1. None, or no fewer than there are: nothing is changed.

    Yields:
        A function that takes the next cores in turn. Until it is called first, nothing is changed.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count is None or count >= len(cores):
        yield lambda: None
        return
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    turns = itertools.count()

    def take() -> None:
        first = next(turns)
        _keep_to({thread: {cores[(first + i) % len(cores)] for i in range(count)} for thread in _threads()})

    try:
        yield take
    finally:
        _keep_to({thread: before.get(thread, set(cores)) for thread in _threads()})


def _threads() -> list[int]:
    return [int(thread.name) for thread in Path("/proc/self/task").iterdir()]


def _keep_to(places: dict[int, set[int]]) -> None:
    for thread, cores in places.items():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(thread, cores)

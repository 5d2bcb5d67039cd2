"""The folder of a run: the last few states of one training, each a checkpoint that knows how far training was.

    run/step-000000100/   a checkpoint (see `pipeline.saving.checkpoint`) with its progress
    run/step-000000200/

One training writes into it at a time, which a lock on the folder shows.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.saving.folder import MANIFEST, is_ours, remove_leftovers

_STATE = re.compile(r"step-(\d{9,})")
_LOCKS: set[int] = set()
"""Descriptors of locked folders. A lock lasts as long as any process has its descriptor: forked children
close it."""


def state_of_step(folder: Path, steps: int) -> Path:
    """Where the state after so many training steps is."""
    return folder / f"step-{steps:09d}"


def states(folder: Path) -> list[Path]:
    """The states of a run, oldest first; [] where there is no such folder."""
    try:
        entries = [(int(named[1]), one) for one in folder.iterdir() if (named := _STATE.fullmatch(one.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [one for _, one in sorted(entries) if (one / MANIFEST).is_file()]


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the last states, and what writers and removers that were killed have left."""
    kept = set(states(folder)[-count:])
    for one in folder.iterdir():
        if _STATE.fullmatch(one.name) and one not in kept and one.is_dir() and not one.is_symlink():
            (one / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no state
            for entry in list(one.iterdir()):
                if is_ours(entry.name):
                    entry.unlink(missing_ok=True)
            with suppress(OSError):  # something of the user's is in it
                one.rmdir()
    remove_leftovers(folder, "step-*")


def _leave_locks() -> None:
    """In a forked child: the locks are its parent's."""
    while _LOCKS:
        with suppress(OSError):
            os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one training that writes into a folder, which is made if need be.

    Raises:
        CheckpointError: Another one does, or there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"no training can be saved into the folder {folder}: {error.strerror}") from None
    _LOCKS.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another training writes its states into {folder}; give this one a folder of its own"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if lock in _LOCKS:  # not in a forked child
            _LOCKS.remove(lock)
            os.close(lock)


__all__ = ["keep_last", "only_writer", "state_of_step", "states"]

"""The life of a worker process, from the fork to its exit.

It is born as a copy of the fork server. So it first gives up what is the server's, then becomes like the driver's
process in what a user can see (working directory, environment, `sys.path`, output), and only then calls the entry. It
leaves by `os._exit`: the server's exit handlers are not its own.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from stages.origin import check_origins
from stages.process.job import job_of_bytes
from stages.process.lifetime import die_with_parent, name_process
from stages.process.status_board import SharedBoard, words_of

__all__ = ["Descriptors", "run_worker"]


class Descriptors(NamedTuple):
    """The open files that a worker gets from the driver, in the order in which they travel."""

    job: int  # memfd with the job, see `stages.process.job`
    board: int  # memfd of the SharedBoard
    gate: int  # read end of a pipe: one byte starts the worker, end of file ends it
    report: int  # write end of a pipe: the server writes the exit code to it
    stdout: int
    stderr: int
    memory: int  # memfd of the BoundaryMemory, where the job says that there is one


def run_worker(given: Descriptors, parent: int, forget: Callable[[], None]) -> NoReturn:
    """Be the worker: do the job, then leave the process.

    Args:
        given: the worker's open files; all of them are used up.
        parent: process id of the fork server.
        forget: closes what belongs to the server.

    The exit status is 0 if the entry returned, 1 if it raised (the traceback then goes to stderr and to the board's
    last words), and that of `sys.exit` if it called that.
    """
    status = 1
    try:
        die_with_parent(parent)
        forget()
        os.dup2(given.stdout, 1)
        os.dup2(given.stderr, 2)
        board = SharedBoard(given.board)
        job = _read_job(given.job)
        started = os.read(given.gate, 1)
        if job["memory"]:
            job["spec"]["memory"] = os.dup(given.memory)
        for descriptor in given:
            os.close(descriptor)
        if not started:
            os._exit(0)  # the driver was interrupted before it knew of us
        status = _work(job, board)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _read_job(descriptor: int) -> dict[str, Any]:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return job_of_bytes(file.read())


def _work(job: dict[str, Any], board: SharedBoard) -> int:
    """Call the entry and return the exit status that its end means."""
    try:
        _settle(job)
        module, _, function = job["entry"].partition(":")
        getattr(importlib.import_module(module), function)(job["spec"], board.slots)
        return 0
    except SystemExit as leaving:
        return _status_of(leaving)
    except BaseException as error:
        board.write_last_words(words_of(error))
        print(f"worker {job['name']!r} failed:", file=sys.stderr)
        traceback.print_exception(error)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _settle(job: dict[str, Any]) -> None:
    """Make this copy of the server a process like the driver's, and unlike its siblings."""
    name_process(f"tapeline-{job['name']}")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["directory"] is not None:
        os.chdir(job["directory"])
    sys.argv[:] = job["arguments"]
    sys.path[:] = job["path"]
    importlib.invalidate_caches()
    check_origins(job["root"])
    random.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))  # siblings are born with equal states
    if "tensorflow" in sys.modules:
        _set_threads(job["threads"])


def _set_threads(threads: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def _status_of(leaving: SystemExit) -> int:
    """Return the exit status that Python gives a `SystemExit`."""
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1

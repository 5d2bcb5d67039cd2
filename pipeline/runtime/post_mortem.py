"""Say in words what workers were doing: from their status boards, their reports, their exit.

A board outlives its worker, so even a killed one is described by what it wrote down before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import StalledError, WorkerDiedError, WorkerError
from pipeline.runtime.launch import WorkerHandle
from stages.plain_text import printable
from stages.worker.stage_spec import StageSpec
from stages.worker.status import Phase, Status
from transport.errors import ClosedError, TransportError, Unsendable
from transport.message import DRIVER

_BOLD = re.compile("\x1b\\[[01]m")
_CHECKPOINT = "Load the last checkpoint with Pipeline.load(...), or make a new Pipeline."


def can_be_taken_back(error: BaseException) -> bool:
    """Whether after this all workers are there, none is half way through an update, and each hears what it is told."""
    if isinstance(error, WorkerError):
        return error.undone
    return isinstance(error, Unsendable) or not isinstance(error, TransportError | StalledError | ClosedError)


def stalled(boards: Sequence[Sequence[int]]) -> bool:
    """Whether no worker runs, builds or is busy otherwise, and at least one waits for another."""
    phases = {Status.of(board).phase for board in boards}
    return phases <= {Phase.WAITING, Phase.IDLE} and Phase.WAITING in phases


def describe_worker(handle: WorkerHandle, names: Mapping[int, str]) -> str:
    """One line: the worker's stage, its step, what it does or waits for.

    Args:
        handle: The worker.
        names: The names of all stages.
    """
    status = Status.of(handle.board)
    if status.phase == Phase.IDLE:
        return f"stage {handle.name!r} waits for the driver"
    if status.phase == Phase.BUSY:
        after = f" after step {status.step}" if status.step else ""
        return f"stage {handle.name!r} carries out an order of the driver{after}"
    name = names[status.stage]
    if status.phase == Phase.BUILDING:
        return f"stage {name!r} builds its model"
    doing = f"step {status.step}, {status.action.describe()} (action {status.done + 1} of its program)"
    if status.phase == Phase.RUNNING:
        return f"stage {name!r} runs {doing}"
    whom = "the driver" if status.source == DRIVER else f"stage {names[status.source]!r}"
    return f"stage {name!r} waits for {whom} to begin {doing}"


def died(handle: WorkerHandle, specs: Sequence[StageSpec], others: str) -> WorkerDiedError:
    """The error of a worker that ended without a report.

    Args:
        handle: The worker.
        specs: The stages it hosted.
        others: What all workers were doing.
    """
    status = Status.of(handle.board)
    name = next((spec.name for spec in specs if spec.index == status.stage), specs[0].name)
    action = status.action.describe() if status.step and status.phase != Phase.BUILDING else ""
    where = f" in step {status.step}, {action}" if action else ""
    if status.phase in (Phase.IDLE, Phase.BUSY) and action:
        where = f" after step {status.step}, {action}"
    if status.phase == Phase.BUILDING:
        where = " while it built its model"
    reason = handle.exit_reason()
    summary, _, words = _without_power(reason).partition("\n")
    quoted = f"\n--- last words of the worker ---\n{words.rstrip()}\n--- end of its words ---" if words else ""
    error = WorkerDiedError(
        f"the worker of stage {name!r} is gone{where}: {summary.rstrip(':')}. The other workers were stopped. "
        f"{_CHECKPOINT}\n{others}{quoted}",
        stage=name,
        action=action,
        step=status.step if action else -1,
        worker_traceback=words,
    )
    error.running, error.noticed = bool(action) and status.phase == Phase.RUNNING, time.time()
    return error


def failed(report: Mapping[str, Any]) -> WorkerError:
    """The error of a worker that reported an exception."""
    where = f" in step {report['step']}, {report['action']}" if report["action"] else ""
    message, told = _without_power(report["message"]), _without_power(report["traceback"])
    if report["building"]:
        where = " while it built its model"
    if report["updating"]:
        where = " while its optimizer updated it"
    text = (
        f"stage {report['stage']!r} failed{where}: {report['type']}: {message}\n"
        f"--- traceback of the worker ---\n{told.rstrip()}\n--- end of the worker's traceback ---"
    )
    if report["updating"]:
        text += (
            "\nThe other stages may have made this update already, which cannot be taken back: the pipeline is over. "
            f"{_CHECKPOINT}"
        )
    if report["undone"]:
        text += "\nNothing of it was kept in any stage: the pipeline goes on with the values from before."
    return WorkerError(
        text,
        stage=report["stage"],
        action=report["action"],
        step=report["step"],
        kind=report["type"],
        worker_traceback=told,
        undone=report["undone"],
    )


def _without_power(words: str) -> str:
    """What a worker said, without power over the terminal: Keras's bold type is left out, tabs are spaces."""
    return printable(_BOLD.sub("", words).replace("\t", "    "), breaks=True)

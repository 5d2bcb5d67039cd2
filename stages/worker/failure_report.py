"""The report of an exception in a worker, as plain data for the driver, who makes an error of it."""

from __future__ import annotations

import time
import traceback
from typing import Any

from stages.actions import Action
from stages.worker.stage_spec import StageSpec

_CHARACTERS = 12000


def failure_report(
    error: Exception, spec: StageSpec, step: int, action: Action | None, *, building: bool, updating: bool, undone: bool
) -> dict[str, Any]:
    """What is told of an exception.

    Args:
        error: It.
        spec: The stage that it is about.
        step: The step's number; -1 outside of one.
        action: What was carried out; None outside of a step.
        building: Whether the stage was being built.
        updating: Whether its optimizer was updating it.
        undone: Whether the worker is as it was before, and goes on.
    """
    return {
        "stage": spec.name,
        "index": spec.index,
        "step": step,
        "action": action.describe() if action is not None else "",
        "type": type(error).__name__,
        "message": str(error)[:_CHARACTERS],
        "traceback": "".join(traceback.format_exception(error))[-_CHARACTERS:],
        "building": building,
        "updating": updating,
        "undone": undone,
        "time": time.time(),
    }


__all__ = ["failure_report"]

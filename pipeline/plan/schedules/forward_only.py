"""Forward only: the plan for evaluation and prediction, in which no tape is opened.

It is not in the registry of schedules, as it cannot train; whatever the schedule, evaluation uses this plan.

    worker 0 │ F0 F1 F2 F3 ·  ·
    worker 1 │ ·  F0 F1 F2 F3 ·
    worker 2 │ ·  ·  F0 F1 F2 F3
"""

from __future__ import annotations

from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import blocks, check_numbers, forwards

__all__ = ["forward_only"]


def forward_only(stages: int, microbatches: int, *, windows: int = 1) -> Plan:
    """The plan in which every stage takes every microbatch forward once, for any wiring: stage i on worker i.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: number of windows W, at least 1.

    Returns:
        A plan with `training=False`; every worker idles (p-1)·F.

    Raises:
        ScheduleError: a number is no whole number of at least 1.
    """
    check_numbers(stages, microbatches, windows)
    return Plan(
        name="forward only",
        stages=stages,
        microbatches=microbatches,
        windows=windows,
        programs=tuple(forwards(stage, blocks(microbatches, windows)) for stage in range(stages)),
        training=False,
        in_flight=(0,) * stages,
    )

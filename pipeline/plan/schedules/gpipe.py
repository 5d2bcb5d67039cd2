"""GPipe: every forward, then every backward.

Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019, figure
2(c). The paper runs the backwards in the reverse order of the forwards; here they ascend, so that gradients
are summed in the order in which the reference run sums them.  The idle time is the same, (p-1)(F+B) on each
of p workers, and so is its price: the tapes of all m microbatches are open at once.

    worker 0 │ F0 F1 F2 F3 ·  ·  ·  ·  B0 B1 B2 B3
    worker 1 │ ·  F0 F1 F2 F3 ·  ·  B0 B1 B2 B3 ·
    worker 2 │ ·  ·  F0 F1 F2 F3 B0 B1 B2 B3 ·  ·
"""

from __future__ import annotations

from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import backwards, blocks, check_numbers, forwards

__all__ = ["gpipe"]


def gpipe(stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None) -> Plan:
    """The GPipe plan, for any wiring: stage i on worker i.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: number of windows W, at least 1.
        truncate: number of windows that a state's gradient goes back through; None: all.

    Returns:
        A plan with m·W tapes in flight on every worker.

    Raises:
        ScheduleError: a number is no whole number of at least 1.
    """
    check_numbers(stages, microbatches, windows)
    every = blocks(microbatches, windows, truncate)
    return Plan(
        name="gpipe",
        stages=stages,
        microbatches=microbatches,
        windows=windows,
        programs=tuple(forwards(stage, every) + backwards(stage, every) for stage in range(stages)),
        in_flight=(microbatches * windows,) * stages,
        truncate=truncate,
    )

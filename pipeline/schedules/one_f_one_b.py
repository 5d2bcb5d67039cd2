"""1F1B: as soon as a worker has a backward to do, it takes one backward after every forward.

Harlap et al., "PipeDream: Fast and Efficient Pipeline Parallel DNN Training", 2018, in the synchronous form
(PipeDream-Flush) of Narayanan et al., 2021, figure 3.  Idle time is GPipe's, (p-1)(F+B), but worker i holds
only min(p-i, m) tapes open, whatever the number of microbatches.

    worker 0 │ F0 F1 F2 ·  ·  B0 F3 B1 ·  B2 ·  B3
    worker 1 │ ·  F0 F1 ·  B0 F2 B1 F3 B2 ·  B3 ·
    worker 2 │ ·  ·  F0 B0 F1 B1 F2 B2 F3 B3 ·  ·
"""

from __future__ import annotations

from pipeline.plan import Plan
from pipeline.schedules.common import backwards, check, forwards
from stages.actions import Action

__all__ = ["one_f_one_b"]


def one_f_one_b(stages: int, microbatches: int, *, windows: int = 1) -> Plan:
    """The 1F1B plan, stage i on worker i, for every wiring in which stages only feed higher numbers.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: number of windows W, at least 1; the W windows of a microbatch form one block.

    Returns:
        A plan with min(p-i, m)·W tapes in flight on worker i.

    Raises:
        ScheduleError: a number is no whole number of at least 1.
    """
    check(stages, microbatches, windows)
    held = tuple(min(stages - stage, microbatches) for stage in range(stages))
    return Plan(
        name="1f1b",
        stages=stages,
        microbatches=microbatches,
        windows=windows,
        programs=tuple(_program(stage, held[stage], microbatches, windows) for stage in range(stages)),
        in_flight=tuple(count * windows for count in held),
    )


def _program(stage: int, held: int, microbatches: int, windows: int) -> tuple[Action, ...]:
    """Fill up to `held` tapes, then each backward makes room for one more forward, then drain."""
    program = forwards(stage, range(held), windows)
    for microbatch in range(microbatches):
        program += backwards(stage, range(microbatch, microbatch + 1), windows)
        program += forwards(stage, range(microbatch + held, min(microbatch + held + 1, microbatches)), windows)
    return program

"""1F1B: as soon as a worker has a backward to do, it takes one backward after every forward.

Harlap et al., "PipeDream: Fast and Efficient Pipeline Parallel DNN Training", 2018, in the synchronous form
(PipeDream-Flush) of Narayanan et al., 2021, figure 3.  Idle time is GPipe's, (p-1)(F+B), but worker i holds
only min(p-i, m) tapes open, whatever the number of microbatches.

    worker 0 │ F0 F1 F2 ·  ·  B0 F3 B1 ·  B2 ·  B3
    worker 1 │ ·  F0 F1 ·  B0 F2 B1 F3 B2 ·  B3 ·
    worker 2 │ ·  ·  F0 B0 F1 B1 F2 B2 F3 B3 ·  ·
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import Block, backwards, blocks, check_numbers, forwards, workers_of
from stages.actions import Action

__all__ = ["one_f_one_b"]


def one_f_one_b(
    stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None, chunks: int = 1
) -> Plan:
    """The 1F1B plan, stage i on worker i, for every wiring in which stages only feed higher numbers.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: number of windows W, at least 1; the W windows of a microbatch form one block.
        truncate: number of windows k that a state's gradient goes back through; then every k windows form a block.
        chunks: number of neighbouring stages that a worker has, which divides p; it takes them as if they were one.

    Returns:
        A plan with min(p-i, blocks) blocks of tapes in flight on worker i: min(p-i, m)·W tapes without truncation.
        With chunks, p is the number of workers, and each block has a tape of every chunk.

    Raises:
        ScheduleError: a number is no whole number of at least 1, or the stages cannot be divided so.
    """
    check_numbers(stages, microbatches, windows)
    workers = workers_of("1f1b", stages, chunks)
    every = blocks(microbatches, windows, truncate)
    held = tuple(min(workers - worker, len(every)) for worker in range(workers))
    own = [range(worker * chunks, (worker + 1) * chunks) for worker in range(workers)]
    return Plan(
        name="1f1b",
        stages=stages,
        microbatches=microbatches,
        windows=windows,
        programs=tuple(_program(some, count, every) for some, count in zip(own, held, strict=True)),
        placement=tuple(stage // chunks for stage in range(stages)),
        in_flight=tuple(count * chunks * min(windows, truncate or windows) for count in held),
        truncate=truncate,
    )


def _program(stages: range, held: int, every: list[Block]) -> tuple[Action, ...]:
    """Fill up to `held` blocks, then each backward makes room for one more forward, then drain."""
    ups = [action for block in every for stage in stages for action in forwards(stage, [block])]
    downs = [action for block in every for stage in reversed(stages) for action in backwards(stage, [block])]
    ends = [0, *accumulate(len(windows) * len(stages) for _, windows in every)]
    program = ups[: ends[held]]
    for done, (begin, end) in enumerate(pairwise(ends), held):
        program += downs[begin:end]
        program += ups[ends[done] : ends[done + 1]] if done < len(every) else []
    return tuple(program)

"""Interleaved 1F1B: each worker has several chunks of the model, so that a microbatch comes by several times.

Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021, section 2.2.
With v chunks on each of p workers, stage s is on worker s mod p. A worker waits (p-1)(F+B)/v, v times shorter than
under 1F1B, where F and B are those of all its chunks. In exchange every activation travels v times, and the first
worker holds up to p(v+1)-1 tapes of one chunk each. Microbatches go through a chunk in groups of p.

    worker 0 │ F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 ·    B2.2 ·    B2.3 B0.2 B0.3
    worker 1 │ ·    F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3 ·
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import check_numbers, refuse_windows, workers_of
from stages.actions import Action, Kind

__all__ = ["interleaved"]


def interleaved(
    stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None, chunks: int = 2
) -> Plan:
    """The interleaved 1F1B plan: stage s on worker s mod p, for wirings in which stages only feed higher numbers.

    Args:
        stages: number of stages, a multiple of `chunks`; there are p = stages / chunks workers.
        microbatches: number of microbatches m, at least 1.
        windows: must be 1.
        truncate: goes with windows.
        chunks: number of stages v that each worker has, at least 1.

    Returns:
        A plan with at most min(2(p-i-1)+(v-1)p+1, mv) tapes of a stage in flight on worker i.

    Raises:
        ScheduleError: a number is no whole number of at least 1, the stages cannot be divided so, or there are windows.
    """
    check_numbers(stages, microbatches, windows)
    refuse_windows("interleaved", windows)
    workers = workers_of("interleaved", stages, chunks)
    full = -(-microbatches // workers) * workers  # what is missing in the last group is left out of the whole plan
    programs = tuple(
        tuple(action for action in _program(worker, workers, chunks, full) if action.microbatch < microbatches)
        for worker in range(workers)
    )
    return Plan(
        name="interleaved",
        stages=stages,
        microbatches=microbatches,
        programs=programs,
        placement=tuple(stage % workers for stage in range(stages)),
        in_flight=tuple(
            min(2 * (workers - worker - 1) + (chunks - 1) * workers + 1, microbatches * chunks)
            for worker in range(workers)
        ),
    )


def _program(worker: int, workers: int, chunks: int, microbatches: int) -> tuple[Action, ...]:
    """Fill, then one backward after each forward, then drain."""
    forwards = _in_groups(Kind.FORWARD, worker, workers, range(chunks), microbatches)
    backwards = _in_groups(Kind.BACKWARD, worker, workers, range(chunks)[::-1], microbatches)
    ahead = min(2 * (workers - worker - 1) + (chunks - 1) * workers, len(forwards))
    program = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        program += [forward, backward]
    return (*program, *backwards[len(forwards) - ahead :])


def _in_groups(kind: Kind, worker: int, workers: int, chunks: Sequence[int], microbatches: int) -> list[Action]:
    """All actions of a kind: p microbatches through one chunk, the same through the next, then the next p."""
    return [
        Action(kind, chunk * workers + worker, microbatch)
        for first in range(0, microbatches, workers)
        for chunk in chunks
        for microbatch in range(first, min(first + workers, microbatches))
    ]

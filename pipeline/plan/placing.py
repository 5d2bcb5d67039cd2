"""A plan on other workers: the same actions, in an order that the other placement can carry out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.plan.clock import run_clock
from pipeline.plan.plan import Plan
from stages.actions import Wiring, chain

__all__ = ["placed"]


def placed(plan: Plan, placement: Sequence[int], wiring: Mapping[int, Iterable[int]] | None = None) -> Plan:
    """The plan with its stages on other workers.

    All actions are put in the order in which the plan would have begun them, were they equally long. That order keeps
    every dependency, so no placement can be stuck in it, and the order of microbatches in a stage is the plan's.

    Args:
        plan: A plan that can run.
        placement: For each stage, the worker that hosts it; workers are counted from 0, and each hosts one.
        wiring: stage -> upstream stages; None means a chain.

    Returns:
        The plan, which promises no number of tapes; the plan itself where its stages are there already.
    """
    if plan.placement == tuple(placement):
        return plan
    needs = Wiring.of(chain(plan.stages) if wiring is None else wiring)
    ticks = run_clock(plan.programs, plan.needs(needs).__getitem__).ticks
    programs = tuple(
        tuple(tick.action for tick in ticks if placement[tick.action.stage] == worker)
        for worker in range(1 + max(placement))
    )
    return replace(plan, programs=programs, placement=tuple(placement), in_flight=())

"""A simulator of plans: the timeline of a step, in seconds, from the cost of each stage, without any process.

A transfer is a delay between two workers, not work of either, as sending is asynchronous; transfers do not slow each
other down.  With equal costs and no transfer the result is the closed form: GPipe and 1F1B take (m+p-1)(F+B).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pipeline.errors import PlanError, TimelineError
from pipeline.plan import rules
from pipeline.plan.clock import run_clock
from pipeline.plan.plan import Plan
from pipeline.plan.timeline import Span, SpanRows, Timeline
from stages.actions import Action, Kind, Wiring, chain

if TYPE_CHECKING:
    from pipeline.plan.arrays import PlanArrays

__all__ = ["Cost", "costs_of_stages", "simulate"]


@dataclass(frozen=True, slots=True)
class Cost:
    """The seconds that one stage needs for one microbatch (of one window).

    Attributes:
        forward: the forward.
        input_gradient: the half of the backward that gives dL/dInputs.
        weight_gradient: the half that gives dL/dvariables.
        transfer: from the end of the forward until the outputs are at a stage on another worker; the gradients of
            these outputs need as long on their way back.

    Raises:
        TimelineError: a cost is negative or not finite.
    """

    forward: float
    input_gradient: float
    weight_gradient: float = 0.0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if not (math.isfinite(value) and value >= 0):
                raise TimelineError(f"`{attribute.name}` must be seconds, finite and at least 0, received {value!r}")

    @property
    def backward(self) -> float:
        """The whole backward: both halves."""
        return self.input_gradient + self.weight_gradient

    def of(self, kind: Kind) -> float:
        """The seconds that an action of this kind takes."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.input_gradient,
            Kind.BACKWARD_WEIGHT: self.weight_gradient,
        }[kind]


def costs_of_stages(stages: int, costs: Cost | Sequence[Cost]) -> tuple[Cost, ...]:
    """One cost for each stage, from such or from one for all.

    Raises:
        TimelineError: there is not one for each.
    """
    each = (costs,) * stages if isinstance(costs, Cost) else tuple(costs)
    if len(each) != stages:
        raise TimelineError(f"`costs` must have one entry for each of {stages} stages, received {len(each)}")
    return each


def _simulated(plan: Plan, costs: Sequence[Cost], arrays: PlanArrays) -> Timeline:
    """The same of a large plan."""
    import numpy as np  # imported by the arrays

    seconds = np.array([[cost.of(kind) for kind in Kind] for cost in costs])
    transfer, place = np.array([cost.transfer for cost in costs]), np.asarray(plan.placement)
    giving = np.append(arrays.stage, 0)[arrays.needs]
    taking = arrays.stage[:, None]
    producer = np.where(arrays.kind[:, None] == Kind.FORWARD, giving, taking)
    delays = np.where((place[giving] == place[taking]) | (arrays.needs == len(arrays.kind)), 0.0, transfer[producer])
    starts, ends = arrays.times(seconds[arrays.stage, arrays.kind], delays)
    spans = SpanRows(plan.programs, arrays.begins, starts, ends)
    return Timeline(spans, workers=plan.workers, name=plan.headline())


def simulate(plan: Plan, costs: Cost | Sequence[Cost], wiring: Mapping[int, Iterable[int]] | None = None) -> Timeline:
    """Predict the timeline of one step.

    Args:
        plan: a plan that can run.
        costs: one for each stage, or one for all.
        wiring: stage -> upstream stages; None means a chain.

    Returns:
        The timeline: step time, idle time of each worker, bubble, most open tapes.

    Raises:
        PlanError: the plan cannot run.
        TimelineError: there is not one cost for each stage.
    """
    each = costs_of_stages(plan.stages, costs)
    wiring = Wiring.of(chain(plan.stages) if wiring is None else wiring)

    if not any(rules.miswired(plan, wiring)) and (arrays := plan.arrays(wiring)) is not None:
        return _simulated(plan, each, arrays)

    def delay(needed: Action, action: Action) -> float:
        if plan.placement[needed.stage] == plan.placement[action.stage]:
            return 0.0
        producer = needed.stage if action.kind is Kind.FORWARD else action.stage
        return each[producer].transfer

    seconds = [{kind: cost.of(kind) for kind in Kind} for cost in each]
    needs = plan.needs(wiring)
    clock = run_clock(plan.programs, needs.__getitem__, lambda action: seconds[action.stage][action.kind], delay)
    if clock.blocked:
        raise PlanError(plan.name, rules.faults(plan, wiring))
    spans = tuple(Span(tick.worker, tick.action, tick.start, tick.end) for tick in clock.ticks)
    return Timeline(spans, workers=plan.workers, name=plan.headline())

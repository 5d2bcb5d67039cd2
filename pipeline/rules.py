"""The rules that every plan keeps, and the search for whatever breaks them.

A step that hangs after an hour, or sums gradients in another order than the reference, is far dearer than a
look at the plan.  All faults are reported together, each under the name of its rule:

1. shape      there is a program for every worker, a worker for every stage, and every number is in range.
2. wiring     the wiring has the plan's stages only, each once upstream of another, and no cycle.
3. worker     a worker only does actions of the stages that it hosts.
4. duplicate  no action happens twice.
5. kind       a backward is whole or comes in two halves, never both; without training there is none.
6. missing    every stage does the forward of every microbatch and window, and when training its backward.
7. before     on one worker, nothing precedes what it needs.
8. deadlock   no workers wait for each other in a circle.
9. order      a stage takes microbatches in ascending order, forward (moving statistics, random numbers) and
              backward (summation of gradients): the order of the reference run, so that numbers are equal.
10. in_flight no worker holds more tapes open than the schedule promised.

A rule that another one's fault makes meaningless is not applied to that action: one mistake, one fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from pipeline.clock import Blocked, run
from pipeline.errors import Fault
from stages.actions import Action, Kind, Wiring

if TYPE_CHECKING:
    from pipeline.plan import Plan

__all__ = ["RULES", "faults"]

RULES = (
    "shape",
    "wiring",
    "worker",
    "duplicate",
    "kind",
    "missing",
    "before",
    "deadlock",
    "order",
    "in_flight",
)

_LISTED = 6
_DEADLOCKS = 8
_HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def faults(plan: Plan, wiring: Mapping[int, Iterable[int]]) -> tuple[Fault, ...]:
    """Everything that is wrong with a plan.

    Args:
        plan: the plan.
        wiring: stage -> upstream stages.

    Returns:
        The faults in the order of the rules; empty if the plan can run and means what it should.
    """
    wiring = Wiring.of(wiring)
    found = [*_shape(plan), *_wiring(plan, wiring)]
    if found:
        return tuple(found)  # the other rules read the sizes and the wiring
    strays = {action for _, action in plan.actions() if not _in_range(plan, action)}
    return (
        *_out_of_range(plan),
        *_worker(plan, strays),
        *_duplicate(plan),
        *_kind(plan),
        *_missing(plan),
        *_before_and_deadlock(plan, wiring),
        *_order(plan, strays),
        *_in_flight(plan),
    )


def _shape(plan: Plan) -> Iterator[Fault]:
    for name in ("stages", "microbatches", "windows"):
        if (value := getattr(plan, name)) < 1:
            yield Fault("shape", f"`{name}` must be at least 1, received {value}")
    if len(plan.placement) != plan.stages:
        yield Fault(
            "shape",
            f"`placement` must name a worker for each of {plan.stages} stages, received {plan.placement}",
        )
    for stage, worker in enumerate(plan.placement):
        if not 0 <= worker < plan.workers:
            yield Fault(
                "shape",
                f"stage {stage} is placed on worker {worker}, but there are programs for workers 0 to "
                f"{plan.workers - 1} only",
            )
    if plan.in_flight and len(plan.in_flight) != plan.workers:
        yield Fault(
            "shape",
            f"`in_flight` must have a bound for each of {plan.workers} workers, received {plan.in_flight}",
        )


def _wiring(plan: Plan, wiring: Wiring) -> Iterator[Fault]:
    known = range(plan.stages)
    for stage in wiring:
        if stage not in known:
            yield Fault("wiring", f"the wiring names stage {stage}, the plan has stages 0 to {plan.stages - 1}")
        for source, times in Counter(wiring[stage]).items():
            if times > 1:
                yield Fault("wiring", f"stage {source} is {times} times upstream of stage {stage}, expected once")
    try:
        TopologicalSorter(wiring).prepare()
    except CycleError as error:
        circle = " -> ".join(f"stage {stage}" for stage in error.args[1])
        yield Fault("wiring", f"stages feed each other in a circle: {circle}")


def _in_range(plan: Plan, action: Action) -> bool:
    return (
        0 <= action.stage < plan.stages
        and 0 <= action.microbatch < plan.microbatches
        and 0 <= action.window < plan.windows
    )


def _out_of_range(plan: Plan) -> Iterator[Fault]:
    for worker, action in plan.actions():
        if not _in_range(plan, action):
            yield Fault(
                "shape",
                f"worker {worker} has {action} ({action.describe()} of stage {action.stage}), but the plan has "
                f"{plan.stages} stages, {plan.microbatches} microbatches and {plan.windows} windows, "
                "counted from 0",
            )


def _worker(plan: Plan, strays: set[Action]) -> Iterator[Fault]:
    for worker, action in plan.actions():
        if action not in strays and plan.placement[action.stage] != worker:
            yield Fault(
                "worker",
                f"worker {worker} has {action}, but stage {action.stage} is placed on worker "
                f"{plan.placement[action.stage]}",
            )


def _duplicate(plan: Plan) -> Iterator[Fault]:
    for action, times in Counter(action for _, action in plan.actions()).items():
        if times > 1:
            workers = sorted({worker for worker, other in plan.actions() if other == action})
            yield Fault(
                "duplicate",
                f"{action} ({action.describe()} of stage {action.stage}) happens {times} times on "
                f"{_workers(workers)}, expected once",
            )


def _kind(plan: Plan) -> Iterator[Fault]:
    backwards = [(worker, action) for worker, action in plan.actions() if action.kind is not Kind.FORWARD]
    if not plan.training:
        for worker, action in backwards:
            yield Fault("kind", f"worker {worker} has {action}, but a plan without training has only forwards")
        return
    whole = {(a.stage, a.microbatch, a.window) for _, a in backwards if a.kind is Kind.BACKWARD}
    halves = {(a.stage, a.microbatch, a.window) for _, a in backwards if a.kind in _HALVES}
    for where in sorted(whole & halves):
        actions = ", ".join(str(Action(kind, *where)) for kind in _HALVES)
        yield Fault(
            "kind",
            f"{Action(Kind.BACKWARD, *where)} is a whole backward, yet the plan also has halves ({actions})",
        )


def _missing(plan: Plan) -> Iterator[Fault]:
    present = {action for _, action in plan.actions()}
    halves = {(a.stage, a.microbatch, a.window) for a in present if a.kind in _HALVES}
    whole = {(a.stage, a.microbatch, a.window) for a in present if a.kind is Kind.BACKWARD}
    for stage in range(plan.stages):
        wanted: list[Action] = []
        for microbatch in range(plan.microbatches):
            for window in range(plan.windows):
                where = (stage, microbatch, window)
                wanted.append(Action(Kind.FORWARD, *where))
                if plan.training and where in halves - whole:
                    wanted += [Action(kind, *where) for kind in _HALVES]
                elif plan.training:
                    wanted.append(Action(Kind.BACKWARD, *where))
        absent = sorted(action for action in wanted if action not in present)
        if absent:
            yield Fault(
                "missing",
                f"worker {plan.placement[stage]} lacks {len(absent)} of the {len(wanted)} actions of stage "
                f"{stage}: {_listed(absent)}",
            )


def _before_and_deadlock(plan: Plan, wiring: Wiring) -> Iterator[Fault]:
    """Rules 7 and 8. What is missing counts as done, so that only a true circle is reported."""
    positions: dict[Action, tuple[int, int]] = {}
    for worker, program in enumerate(plan.programs):
        for index, action in enumerate(program):
            positions.setdefault(action, (worker, index))
    ignored: set[tuple[Action, Action]] = set()
    for action, (worker, index) in positions.items():
        for needed in plan.dependencies(action, wiring):
            host, at = positions.get(needed, (None, 0))
            if host == worker and at > index:
                ignored.add((action, needed))
                yield Fault("before", f"worker {worker} has {action} before {needed}, which it needs")

    def needs(action: Action) -> Iterator[Action]:
        for needed in plan.dependencies(action, wiring):
            if needed in positions and (action, needed) not in ignored:
                yield needed

    for _ in range(_DEADLOCKS):
        clock = run(plan.programs, needs)
        if not clock.blocked:
            return
        circle = _circle(clock.blocked, positions)
        ignored.update((blocked.action, blocked.needs) for blocked in circle)
        waits = "; ".join(
            f"worker {blocked.worker} cannot start {blocked.action} before {blocked.needs} "
            f"(on worker {positions[blocked.needs][0]})"
            for blocked in circle
        )
        yield Fault("deadlock", f"workers wait for each other for ever: {waits}")


def _circle(blocked: tuple[Blocked, ...], positions: Mapping[Action, tuple[int, int]]) -> list[Blocked]:
    """The circle that one meets by asking each stuck worker which worker it waits for."""
    stuck = {entry.worker: entry for entry in blocked}
    path: list[int] = []
    worker = blocked[0].worker
    while worker not in path:
        path.append(worker)
        worker = positions[stuck[worker].needs][0]
    return [stuck[member] for member in path[path.index(worker) :]]


def _order(plan: Plan, strays: set[Action]) -> Iterator[Fault]:
    """Rule 9. The input half of a backward sums nothing, so its order is free."""
    for worker, program in enumerate(plan.programs):
        latest: dict[tuple[str, int, int], Action] = {}
        for action in program:
            if action in strays or action.kind is Kind.BACKWARD_INPUT:
                continue
            way = "forward" if action.kind is Kind.FORWARD else "backward"
            place = (way, action.stage, action.window)
            before = latest.setdefault(place, action)
            if action.microbatch < before.microbatch:
                yield Fault(
                    "order",
                    f"worker {worker} has {before} before {action}: stage {action.stage} must take the {way}s of "
                    "its microbatches in ascending order",
                )
            else:
                latest[place] = action


def _in_flight(plan: Plan) -> Iterator[Fault]:
    for worker, (bound, counts) in enumerate(zip(plan.in_flight, plan.open_tapes(), strict=False)):
        peak = max(counts, default=0)
        if peak > bound:
            action = plan.programs[worker][counts.index(peak)]
            yield Fault(
                "in_flight",
                f"worker {worker} holds {peak} tapes open after {action}, the schedule promised at most {bound}",
            )


def _listed(actions: list[Action]) -> str:
    more = f" and {len(actions) - _LISTED} more" if len(actions) > _LISTED else ""
    return ", ".join(str(action) for action in actions[:_LISTED]) + more


def _workers(workers: list[int]) -> str:
    return ("worker " if len(workers) == 1 else "workers ") + " and ".join(str(worker) for worker in workers)

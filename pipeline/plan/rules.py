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

One mistake, one fault: a broken shape stops the search, and rules 7 to 10 look at what is left of each program once
strangers and repetitions are taken out, with whatever is missing counted as done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import product
from typing import TYPE_CHECKING

from pipeline.errors import Fault
from pipeline.plan.clock import Blocked, run_clock
from stages.actions import Action, Kind, Wiring, open_tapes

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

__all__ = ["RULES", "faults", "miswired"]

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

Programs = Sequence[tuple[Action, ...]]

_LISTED = 6
_DEADLOCKS = 8
HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def faults(plan: Plan, wiring: Mapping[int, Iterable[int]]) -> tuple[Fault, ...]:
    """Everything that is wrong with a plan.

    Args:
        plan: the plan.
        wiring: stage -> upstream stages.

    Returns:
        The faults in the order of the rules; empty if the plan can run and means what it should.
    """
    wiring = Wiring.of(wiring)
    if shape := tuple(_shape(plan)):
        return shape
    circles = tuple(miswired(plan, wiring))
    if not circles and plan.arrays(wiring) is not None:
        return ()
    contents = (*_range(plan), *_worker(plan), *_duplicate(plan), *_kind(plan), *_missing(plan))
    programs = [_sane(plan, worker) for worker in range(plan.workers)]
    timing = circles or (*_before_and_deadlock(plan, programs, wiring),)
    return (*contents, *timing, *_order(programs), *_in_flight(plan, programs))


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


def miswired(plan: Plan, wiring: Wiring) -> Iterator[Fault]:
    """Rule 2.

    Args:
        plan: the plan.
        wiring: stage -> upstream stages.
    """
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


def _belongs(plan: Plan, worker: int, action: Action) -> bool:
    return _in_range(plan, action) and plan.placement[action.stage] == worker


def _sane(plan: Plan, worker: int) -> tuple[Action, ...]:
    """A worker's program without what rules 1 to 5 complain about: strangers and repetitions."""
    return tuple(
        action
        for action in dict.fromkeys(plan.programs[worker])
        if _belongs(plan, worker, action) and (plan.training or action.kind is Kind.FORWARD)
    )


def _range(plan: Plan) -> Iterator[Fault]:
    for worker, action in plan.actions():
        if not _in_range(plan, action):
            yield Fault(
                "shape",
                f"worker {worker} has {action} ({action.describe()} of stage {action.stage}), but the plan has "
                f"{plan.stages} stages, {plan.microbatches} microbatches and {plan.windows} windows, "
                "counted from 0",
            )


def _worker(plan: Plan) -> Iterator[Fault]:
    for worker, action in plan.actions():
        if _in_range(plan, action) and not _belongs(plan, worker, action):
            yield Fault(
                "worker",
                f"worker {worker} has {action}, but stage {action.stage} is placed on worker "
                f"{plan.placement[action.stage]}",
            )


def _duplicate(plan: Plan) -> Iterator[Fault]:
    counts = Counter((worker, action) for worker, action in plan.actions() if _belongs(plan, worker, action))
    for (worker, action), times in counts.items():
        if times > 1:
            yield Fault(
                "duplicate",
                f"worker {worker} has {action} ({action.describe()} of stage {action.stage}) {times} times, "
                "expected once",
            )


def _kind(plan: Plan) -> Iterator[Fault]:
    backwards = [(worker, action) for worker, action in plan.actions() if action.kind is not Kind.FORWARD]
    if not plan.training:
        for worker, action in backwards:
            yield Fault("kind", f"worker {worker} has {action}, but a plan without training has only forwards")
        return
    whole = {(a.stage, a.microbatch, a.window) for _, a in backwards if a.kind is Kind.BACKWARD}
    halves = {(a.stage, a.microbatch, a.window) for _, a in backwards if a.kind in HALVES}
    for where in sorted(whole & halves):
        actions = ", ".join(str(Action(kind, *where)) for kind in HALVES)
        yield Fault(
            "kind",
            f"{Action(Kind.BACKWARD, *where)} is a whole backward, yet the plan also has halves ({actions})",
        )


def _missing(plan: Plan) -> Iterator[Fault]:
    present = {action for _, action in plan.actions()}
    for stage, worker in enumerate(plan.placement):
        wanted = _wanted(plan, stage, present)
        absent = sorted(wanted - present)
        if absent:
            yield Fault(
                "missing",
                f"worker {worker} lacks {len(absent)} of the {len(wanted)} actions of stage {stage}: {_listed(absent)}",
            )


def _wanted(plan: Plan, stage: int, present: Container[Action]) -> set[Action]:
    """All that a stage has to do; a backward of which one half is present, and no whole one, wants both halves."""
    wanted = set()
    for microbatch, window in product(range(plan.microbatches), range(plan.windows)):
        where = (stage, microbatch, window)
        wanted.add(Action(Kind.FORWARD, *where))
        if not plan.training:
            continue
        whole = Action(Kind.BACKWARD, *where)
        if whole not in present:
            halves = {Action(kind, *where) for kind in HALVES}
            if any(half in present for half in halves):
                wanted |= halves
                continue
        wanted.add(whole)
    return wanted


def _before_and_deadlock(plan: Plan, programs: Programs, wiring: Wiring) -> Iterator[Fault]:
    """Rules 7 and 8. What is missing counts as done, so that only a true circle is reported."""
    positions = {
        action: (worker, index) for worker, program in enumerate(programs) for index, action in enumerate(program)
    }
    ignored: set[tuple[Action, Action]] = set()
    known = plan.needs(wiring)
    there = {action: tuple(needed for needed in known[action] if needed in positions) for action in positions}
    for action, (worker, index) in positions.items():
        for needed in there[action]:
            host, at = positions[needed]
            if host == worker and at > index:
                ignored.add((action, needed))
                yield Fault("before", f"worker {worker} has {action} before {needed}, which it needs")

    def needs(action: Action) -> Iterable[Action]:
        if not ignored:
            return there[action]
        return [needed for needed in there[action] if (action, needed) not in ignored]

    for _ in range(_DEADLOCKS):
        clock = run_clock(programs, needs)
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


def _order(programs: Programs) -> Iterator[Fault]:
    """Rule 9. The input half of a backward sums nothing, so its order is free."""
    for worker, program in enumerate(programs):
        latest: dict[tuple[str, int, int], Action] = {}
        for action in program:
            if action.kind is Kind.BACKWARD_INPUT:
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


def _in_flight(plan: Plan, programs: Programs) -> Iterator[Fault]:
    """Rule 10, for the workers whose programs are complete: a missing backward is no broken promise."""
    present = {action for program in programs for action in program}
    for worker, (bound, program) in enumerate(zip(plan.in_flight, programs, strict=False)):
        counts = open_tapes(program) if plan.training else []
        peak = max(counts, default=0)
        if peak <= bound:
            continue
        wanted = {action for stage in plan.stages_of(worker) for action in _wanted(plan, stage, present)}
        if wanted == set(program):
            yield Fault(
                "in_flight",
                f"worker {worker} holds {peak} tapes open after {program[counts.index(peak)]}, the schedule "
                f"promised at most {bound}",
            )


def _listed(actions: list[Action]) -> str:
    more = f" and {len(actions) - _LISTED} more" if len(actions) > _LISTED else ""
    return ", ".join(str(action) for action in actions[:_LISTED]) + more

"""Zero bubble: the halves that nobody waits for fill the time in which a worker would wait.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023. A backward is an input half I, which the stage before waits for,
and a weight half W, which nobody waits for. Workers then wait (p-1)(F+I-W) where 1F1B waits (p-1)(F+I+W), and not less
than (p-1)F: a step ends for all at once, and the last worker cannot begin earlier. ZB-H1 holds p tapes at most, as the
first worker of 1F1B does; ZB-H2, with 2p-1, gains where messages take long, since more work lies ready meanwhile.

    worker 0 │ F0 F1 F2 ·  ·  B0 ── F3 B1 ── B2 ── B3 ──
    worker 1 │ ·  F0 F1 ·  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    worker 2 │ ·  ·  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

The plan is what greedy workers do: of what one may start it takes a forward first, then an input half, then a weight
half, and it never waits while it has any of them. What the stages cost decides which of a few such plans is taken. The
first stage has no input half: there a backward is whole.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from pipeline.errors import ScheduleError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import check_numbers, refuse_windows
from pipeline.plan.simulator import Cost, costs_of_stages, simulate
from pipeline.saying import is_whole, not_whole
from stages.actions import Action, Kind

__all__ = ["zb_h1", "zb_h2", "zero_bubble"]

EVEN = Cost(forward=1.0, input_gradient=1.0, weight_gradient=1.0)
"""What stages cost if nothing is known."""
_FORWARD, _INPUT, _WEIGHT = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
_PREFERENCES = ((_FORWARD, _INPUT, _WEIGHT), (_INPUT, _FORWARD, _WEIGHT))


def zb_h1(stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None) -> Plan:
    """The zero-bubble plan with at most p tapes on a worker, for stages of equal cost; see `zero_bubble`."""
    return zero_bubble(stages, microbatches, windows=windows, truncate=truncate)


def zb_h2(stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None) -> Plan:
    """The zero-bubble plan with at most 2p-1 tapes on a worker, for stages of equal cost; see `zero_bubble`."""
    check_numbers(stages, microbatches, windows)
    return zero_bubble(stages, microbatches, windows=windows, truncate=truncate, tapes=2 * stages - 1)


def zero_bubble(
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    tapes: int | None = None,
    costs: Cost | Sequence[Cost] = EVEN,
) -> Plan:
    """The zero-bubble plan, stage i on worker i, for every wiring in which stages only feed higher numbers.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: must be 1.
        truncate: goes with windows.
        tapes: the most tapes that a worker holds, from p (the default, ZB-H1) to 2p-1 (ZB-H2). A tape is held until
            its weight half is done.
        costs: what the stages cost, one for each or one for all, in any unit.

    Returns:
        A plan with min(tapes, m) tapes in flight on every worker.

    Raises:
        ScheduleError: a number is no whole number of at least 1, `tapes` is out of range, or there are windows.
        TimelineError: there is not one cost for each stage.
    """
    check_numbers(stages, microbatches, windows)
    refuse_windows("zero bubble", windows)
    held = stages if tapes is None else tapes
    if not is_whole(held):
        raise ScheduleError(not_whole("`tapes`", held))
    if not stages <= held <= 2 * stages - 1:
        raise ScheduleError(
            f"`tapes` must be from {stages} to {2 * stages - 1} for {stages} stage(s), received {held}; with fewer a "
            "worker waits for its own weight halves, with more nothing is gained"
        )
    each = costs_of_stages(stages, costs)
    guesses = {each: None, tuple(replace(cost, transfer=0.0) for cost in each): None}
    plans = [
        Plan(
            name="zb-h1" if held == stages else "zb-h2" if held == 2 * stages - 1 else f"zb with {held} tapes",
            stages=stages,
            microbatches=microbatches,
            programs=tuple(tuple(program) for program in _Greedy(microbatches, held, guess, preference).programs),
            in_flight=(min(held, microbatches),) * stages,
        )
        for guess in guesses
        for preference in (_PREFERENCES[:1] if costs is EVEN else _PREFERENCES)
    ]
    return plans[0] if len(plans) == 1 else min(plans, key=lambda plan: simulate(plan, each).step_time)


class _Greedy:
    """One run of greedy workers.

    Args:
        microbatches: how many.
        held: the most tapes on a worker.
        costs: one for each stage.
        preference: what a worker takes first.

    Attributes:
        programs: for each worker its actions in order.
    """

    def __init__(self, microbatches: int, held: int, costs: Sequence[Cost], preference: Sequence[Kind]) -> None:
        stages = len(costs)
        self.programs: list[list[Action]] = [[] for _ in costs]
        self._costs, self._held, self._preference = costs, held, preference
        self._done = {kind: [0] * stages for kind in (_FORWARD, _INPUT, _WEIGHT)}
        # So many forwards come before the first backward: p-i of 1F1B, and a share of the tapes beyond p.
        self._ahead = [stages - i + (held - stages) * (stages - 1 - i) // max(1, stages - 1) for i in range(stages)]
        self._arrived = {kind: [deque[float]() for _ in costs] for kind in (_FORWARD, _INPUT)}
        self._arrived[_FORWARD][0].extend([0.0] * microbatches)
        self._free = [0.0] * stages
        self._ticket = count()
        self._events = [(0.0, next(self._ticket), worker) for worker in range(stages)]
        while self._events:
            now, _, worker = heapq.heappop(self._events)
            if self._free[worker] <= now and (kind := self._choice(worker, now)) is not None:
                self._take(worker, kind, now)

    def _choice(self, worker: int, now: float) -> Kind | None:
        """What a worker that is free takes; None: there is nothing to do as yet."""
        forwards, inputs, weights = (self._done[kind][worker] for kind in (_FORWARD, _INPUT, _WEIGHT))
        for kind in self._preference:
            if kind is _WEIGHT:
                if weights < inputs:
                    return kind
            elif (arrived := self._arrived[kind][worker]) and arrived[0] <= now:
                room = forwards - weights < self._held and forwards - inputs < self._ahead[worker]
                if kind is _INPUT or room:
                    return kind
        return None

    def _take(self, worker: int, kind: Kind, now: float) -> None:
        """Do the next action of a kind and tell who waits for it."""
        microbatch = self._done[kind][worker]
        self._done[kind][worker] += 1
        if kind is not _WEIGHT:
            self._arrived[kind][worker].popleft()
        whole = kind is _INPUT and worker == 0
        if whole:
            self._done[_WEIGHT][worker] += 1
        action = Action(Kind.BACKWARD if whole else kind, worker, microbatch)
        self.programs[worker].append(action)
        end = now + self._costs[worker].of(action.kind)
        self._free[worker] = end
        self._wake(end, worker)
        if kind is _FORWARD:
            if worker + 1 < len(self._costs):
                self._send(end + self._costs[worker].transfer, worker + 1, _FORWARD)
            else:
                self._arrived[_INPUT][worker].append(end)
        elif kind is _INPUT and worker:
            self._send(end + self._costs[worker - 1].transfer, worker - 1, _INPUT)

    def _send(self, at: float, worker: int, kind: Kind) -> None:
        self._arrived[kind][worker].append(at)
        self._wake(at, worker)

    def _wake(self, at: float, worker: int) -> None:
        heapq.heappush(self._events, (at, next(self._ticket), worker))

"""Greedy workers: each does at once whatever it may start, in an order of preference, and what they do is a plan.

A worker has one stage or several (chunks). It never waits while there is something that it may start; an input half is
there when the next stage's has arrived, a forward when the one before has and a tape is free. The first stage of the
model has no input half: there a backward is whole.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from pipeline.plan.plan import Plan
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind

__all__ = ["ActionsOfWorkers", "Preference", "best_plan", "greedy_programs"]

_FORWARD, _INPUT, _WEIGHT = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
ActionsOfWorkers = tuple[tuple[Action, ...], ...]
_ROUNDING = 1e-12
"""Sums of seconds in another order."""


@dataclass(frozen=True)
class Preference:
    """The order in which workers take what they may start, and how far they run ahead.

    Attributes:
        order: (kind, chunk), the one that is taken first first. Chunk 0 is a worker's first stage.
        ahead: For each worker how many microbatches may be between its first forward and `until`, at least 1.
        until: The action on a worker's last chunk that lets another microbatch in.
    """

    order: tuple[tuple[Kind, int], ...]
    ahead: tuple[int, ...]
    until: Kind


def best_plan(plan: Plan, found: Iterable[ActionsOfWorkers], costs: Sequence[Cost]) -> Plan:
    """The plan with those programs that take the shortest step; of equal ones the first.

    Args:
        plan: All but the programs.
        found: What to choose from; not asked for more once no step can be shorter.
        costs: What the stages cost.
    """
    least, best = _least(plan, costs), None
    for programs in found:
        made = Plan(
            plan.name, plan.stages, plan.microbatches, programs, placement=plan.placement, in_flight=plan.in_flight
        )
        seconds = simulate(made, costs).step_time
        if best is None or seconds < best[0]:
            best = seconds, made
        if seconds <= least * (1 + _ROUNDING):
            break
    assert best is not None
    return best[1]


def _least(plan: Plan, costs: Sequence[Cost]) -> float:
    """What no step can be shorter than: the first microbatch comes to a worker, which then never waits."""
    arrives, at = dict[int, float](), 0.0
    for stage, worker in enumerate(plan.placement):
        if stage:
            before = costs[stage - 1]
            at += before.forward + (before.transfer if worker != plan.placement[stage - 1] else 0.0)
        arrives.setdefault(worker, at)
    work = dict.fromkeys(arrives, 0.0)
    for stage, cost in enumerate(costs):
        work[plan.placement[stage]] += plan.microbatches * (cost.forward + cost.backward)
    return max(arrives[worker] + work[worker] for worker in arrives)


def greedy_programs(
    microbatches: int, held: int, costs: Sequence[Cost], placement: Sequence[int], preference: Preference
) -> ActionsOfWorkers:
    """For each worker its actions in order.

    They are complete, whatever the preference and the costs: of the first microbatch that is not through, the chunk
    that it has come to has a tape free, as one is kept for each later chunk.

    Args:
        microbatches: How many.
        held: The most tapes on a worker, at least one for each of its chunks.
        costs: One for each stage.
        placement: For each stage its worker.
        preference: What workers take first.
    """
    return _Greedy(microbatches, held, costs, placement, preference).programs()


class _Greedy:
    """One run of greedy workers; arguments as `greedy_programs` has them."""

    def __init__(
        self, microbatches: int, held: int, costs: Sequence[Cost], placement: Sequence[int], preference: Preference
    ) -> None:
        stages, workers = range(len(costs)), range(1 + max(placement))
        self._costs, self._placement, self._limit, self._preference = costs, placement, held, preference
        self._own = [[stage for stage in stages if placement[stage] == worker] for worker in workers]
        self._programs: list[list[Action]] = [[] for _ in workers]
        self._done = {kind: [0] * len(costs) for kind in (_FORWARD, _INPUT, _WEIGHT)}
        self._arrived = {kind: [deque[float]() for _ in stages] for kind in (_FORWARD, _INPUT)}
        self._arrived[_FORWARD][0].extend([0.0] * microbatches)
        self._free, self._tapes = [0.0] * len(workers), [0] * len(workers)
        self._ticket = count()
        self._events = [(0.0, next(self._ticket), worker) for worker in workers]
        while self._events:
            now, _, worker = heapq.heappop(self._events)
            if self._free[worker] <= now and (chosen := self._choice(worker, now)) is not None:
                self._take(worker, *chosen, now)

    def programs(self) -> ActionsOfWorkers:
        return tuple(tuple(program) for program in self._programs)

    def _choice(self, worker: int, now: float) -> tuple[Kind, int] | None:
        """The kind and stage that a worker that is free takes; None: there is nothing to do as yet."""
        own = self._own[worker]
        for kind, chunk in self._preference.order:
            stage = own[chunk]
            if kind is _WEIGHT:
                if self._done[_WEIGHT][stage] < self._done[_INPUT][stage]:
                    return kind, stage
            elif self._has_arrived(kind, stage, now) and (kind is _INPUT or self._has_room(worker, chunk)):
                return kind, stage
        return None

    def _has_arrived(self, kind: Kind, stage: int, now: float) -> bool:
        arrived = self._arrived[kind][stage]
        return bool(arrived) and arrived[0] <= now

    def _has_room(self, worker: int, chunk: int) -> bool:
        own = self._own[worker]
        if self._tapes[worker] >= self._limit - (len(own) - 1 - chunk):
            return False
        under_way = self._done[_FORWARD][own[0]] - self._done[self._preference.until][own[-1]]
        return chunk > 0 or under_way < self._preference.ahead[worker]

    def _take(self, worker: int, kind: Kind, stage: int, now: float) -> None:
        """Do the next action of a kind and tell who waits for it."""
        microbatch = self._done[kind][stage]
        self._done[kind][stage] += 1
        if kind is not _WEIGHT:
            self._arrived[kind][stage].popleft()
        whole = kind is _INPUT and stage == 0
        if whole:
            self._done[_WEIGHT][stage] += 1
        self._tapes[worker] += 1 if kind is _FORWARD else -1 if whole or kind is _WEIGHT else 0
        action = Action(Kind.BACKWARD if whole else kind, stage, microbatch)
        self._programs[worker].append(action)
        end = now + self._costs[stage].of(action.kind)
        self._free[worker] = end
        self._wake(end, worker)
        if kind is _FORWARD:
            if stage + 1 < len(self._costs):
                self._send(end, stage, stage + 1, _FORWARD)
            else:
                self._arrived[_INPUT][stage].append(end)
        elif kind is _INPUT and stage:
            self._send(end, stage, stage - 1, _INPUT)

    def _send(self, at: float, stage: int, to: int, kind: Kind) -> None:
        worker = self._placement[to]
        if worker != self._placement[stage]:
            at += self._costs[min(stage, to)].transfer
        self._arrived[kind][to].append(at)
        self._wake(at, worker)

    def _wake(self, at: float, worker: int) -> None:
        heapq.heappush(self._events, (at, next(self._ticket), worker))

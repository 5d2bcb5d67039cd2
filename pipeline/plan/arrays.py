"""Large plans as arrays: the check that nothing is wrong, and the times of a step, many workers at once.

`pipeline.plan.rules` and `pipeline.plan.clock` say what a plan must keep and when an action starts, one action at a
time, and name what is wrong. Here the same is computed for all actions in a few hundred operations on arrays, and the
answer is only whether there is a fault at all. Tests compare both on plans of every kind.

    rounds   in every round each worker takes its next action, if what it needs was taken in an earlier round
    times    round by round, as `run_clock` computes them: the later of "the worker is free" and "it has arrived"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.actions import Kind, Wiring

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

__all__ = ["PlanArrays"]

Array = np.ndarray[Any, np.dtype[Any]]

_F, _B, _I, _W = (int(kind) for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT))


@dataclass(frozen=True, eq=False)
class PlanArrays:
    """All actions of a plan, worker after worker in program order, as one array for each of their numbers.

    Attributes:
        kind, stage, microbatch, window: Of each action.
        begins: For each worker where its actions begin, and their number at the end.
        needs: (actions, most) numbers of the actions that each needs; where there is none, the number of actions.
        rounds: Numbers of the actions that run in each round, ascending; None where workers are stuck.
    """

    kind: Array
    stage: Array
    microbatch: Array
    window: Array
    begins: Array
    needs: Array
    rounds: Sequence[Array] | None

    @classmethod
    def of(cls, plan: Plan, wiring: Wiring) -> PlanArrays | None:
        """The arrays of a plan in which nothing is wrong; None for any other.

        Args:
            plan: A plan whose shape is right and whose wiring is.
            wiring: stage -> upstream stages.
        """
        columns = [
            np.fromiter((getattr(action, name) for program in plan.programs for action in program), np.int64)
            for name in ("kind", "stage", "microbatch", "window")
        ]
        begins = np.concatenate([[0], np.cumsum([len(program) for program in plan.programs])]).astype(np.int64)
        kind, stage, microbatch, window = columns
        if not _all_there(plan, kind, stage, microbatch, window, begins):
            return None
        needs = _needs(plan, wiring, kind, stage, microbatch, window)
        if not (_in_order(plan, kind, stage, microbatch, window) and _within_tapes(plan, kind, begins)):
            return None
        rounds = _rounds(needs, begins)
        return None if rounds is None else cls(kind, stage, microbatch, window, begins, needs, rounds)

    def times(self, durations: Array, delays: Array) -> tuple[Array, Array]:
        """When each action starts and ends.

        Args:
            durations: (actions,) seconds of each.
            delays: (actions, most) seconds that the result of each needed action travels.
        """
        count = len(self.kind)
        ends = np.zeros(count + 1)
        free = np.zeros(len(self.begins) - 1)
        starts = np.empty(count)
        worker = np.repeat(np.arange(len(free)), np.diff(self.begins))
        assert self.rounds is not None
        for now in self.rounds:
            who = worker[now]
            start = np.maximum(free[who], (ends[self.needs[now]] + delays[now]).max(axis=1))
            starts[now] = start
            ends[now] = free[who] = start + durations[now]
        return starts, ends[:count]


def _all_there(plan: Plan, kind: Array, stage: Array, microbatch: Array, window: Array, begins: Array) -> bool:
    """Rules 1 and 3 to 6: every action in range, on its stage's worker, once, in halves or whole, none missing."""
    limits = ((stage, plan.stages), (microbatch, plan.microbatches), (window, plan.windows))
    if not all(((values >= 0) & (values < limit)).all() for values, limit in limits):
        return False
    worker = np.repeat(np.arange(plan.workers), np.diff(begins))
    if (np.asarray(plan.placement)[stage] != worker).any():
        return False
    size = plan.stages * plan.microbatches * plan.windows
    place = (stage * plan.microbatches + microbatch) * plan.windows + window
    forwards, whole, inputs, weights = (np.bincount(place[kind == one], minlength=size) for one in (_F, _B, _I, _W))
    if not plan.training:
        return bool((forwards == 1).all() and not (whole.any() or inputs.any() or weights.any()))
    one_way = (whole == 1) & (inputs == 0) & (weights == 0) | (whole == 0) & (inputs == 1) & (weights == 1)
    return bool((forwards == 1).all() and one_way.all())


def _needs(plan: Plan, wiring: Wiring, kind: Array, stage: Array, microbatch: Array, window: Array) -> Array:
    """The rules of `stages.actions.dependencies`, for all actions at once."""
    count, shape = len(kind), (plan.stages, plan.microbatches, plan.windows)
    place = (stage * plan.microbatches + microbatch) * plan.windows + window
    numbers = np.arange(count)
    forward = np.full(shape, count, np.int64)
    gradient = np.full(shape, count, np.int64)
    forward.reshape(-1)[place[kind == _F]] = numbers[kind == _F]
    gives = (kind == _B) | (kind == _I)
    gradient.reshape(-1)[place[gives]] = numbers[gives]
    above, below = (_table([of(one) for one in range(plan.stages)]) for of in (wiring.upstream, wiring.downstream))
    width = 1 + max(above.shape[1], 1 + below.shape[1])
    needs = np.full((count, width), count, np.int32 if count < 2**31 - 1 else np.int64)

    is_f = kind == _F
    states = is_f & (window > 0)
    needs[states, 0] = forward[stage[states], microbatch[states], window[states] - 1]
    _fill(needs, is_f, 1, above, forward, stage, microbatch, window)
    needs[gives, 0] = forward[stage[gives], microbatch[gives], window[gives]]
    later = gives & (window + 1 < plan.windows)
    if plan.truncate is not None:
        later &= (window + 1) % plan.truncate != 0
    needs[later, 1] = gradient[stage[later], microbatch[later], window[later] + 1]
    _fill(needs, gives, 2, below, gradient, stage, microbatch, window)
    weights = kind == _W
    needs[weights, 0] = gradient[stage[weights], microbatch[weights], window[weights]]
    return needs


def _table(neighbours: list[tuple[int, ...]]) -> Array:
    """(stages, most) neighbours of each stage; -1 where there is none."""
    found = np.full((len(neighbours), max(map(len, neighbours), default=0)), -1, np.int64)
    for stage, others in enumerate(neighbours):
        found[stage, : len(others)] = others
    return found


def _fill(
    needs: Array, rows: Array, first: int, table: Array, giving: Array, stage: Array, microbatch: Array, window: Array
) -> None:
    """Let some actions need what the neighbours of their stages give, in the columns from `first` on."""
    for column in range(table.shape[1]):
        some = rows & (table[stage, column] >= 0)
        needs[some, first + column] = giving[table[stage[some], column], microbatch[some], window[some]]


def _in_order(plan: Plan, kind: Array, stage: Array, microbatch: Array, window: Array) -> bool:
    """Rule 9: each stage takes its microbatches in ascending order, forward and, but for input halves, backward."""
    counted = kind != _I
    group = (((kind != _F) * plan.stages + stage) * plan.windows + window)[counted]
    order = np.argsort(group, kind="stable")
    same = np.diff(group[order]) == 0
    return bool((np.diff(microbatch[counted][order])[same] >= 0).all())


def _within_tapes(plan: Plan, kind: Array, begins: Array) -> bool:
    """Rule 10: no worker holds more tapes than the schedule promised."""
    if not (plan.in_flight and plan.training):
        return True
    opened = np.concatenate([[0], np.cumsum(np.asarray((1, -1, 0, -1))[kind])])
    peaks = [int((opened[begin + 1 : end + 1] - opened[begin]).max(initial=0)) for begin, end in pairwise(begins)]
    return all(peak <= bound for peak, bound in zip(peaks, plan.in_flight, strict=True))


def _rounds(needs: Array, begins: Array) -> list[Array] | None:
    """The actions of each round; None where some worker is stuck (rules 7 and 8)."""
    count = len(needs)
    done = np.zeros(count + 1, bool)
    done[count] = True
    ahead, ends, found = begins[:-1].copy(), begins[1:], []
    waiting = np.flatnonzero(ahead < ends)
    while waiting.size:
        actions = ahead[waiting]
        free = done[needs[actions]].all(axis=1)
        now = actions[free]
        if not now.size:
            return None
        found.append(now)
        done[now] = True
        ahead[waiting[free]] += 1
        waiting = waiting[ahead[waiting] < ends[waiting]]
    return found

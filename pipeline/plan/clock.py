"""The order of events in a plan in which every worker takes its next action as soon as it may.

The programs fix the order on each worker, so a start time is simply the later of "the worker is free" and
"the last thing needed has arrived"; no event queue is needed.  The validator asks who is stuck, the drawing
counts slots, the simulator counts seconds: all three run this one loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stages.actions import Action

__all__ = ["Blocked", "Clock", "Tick", "run_clock"]


@dataclass(frozen=True, slots=True)
class Tick:
    """One action that ran on a worker from `start` to `end`, in the units of the durations given."""

    worker: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Blocked:
    """A worker that stands before `action` for ever, because `needs` never happens."""

    worker: int
    action: Action
    needs: Action


@dataclass(frozen=True, slots=True)
class Clock:
    """The actions that ran, ordered by start and worker, and the workers that are stuck (none, if all can run)."""

    ticks: tuple[Tick, ...]
    blocked: tuple[Blocked, ...]


def run_clock(
    programs: Sequence[Sequence[Action]],
    needs: Callable[[Action], Iterable[Action]],
    duration: Callable[[Action], float] = lambda action: 1,
    delay: Callable[[Action, Action], float] = lambda needed, action: 0,
) -> Clock:
    """Let every worker run its program, each action as soon as what it needs is there.

    Args:
        programs: for each worker its actions in order.
        needs: what must have finished before an action starts.
        duration: how long an action takes.
        delay: how long the result of the first action travels to the second.

    Returns:
        The clock; `blocked` has one entry for each worker that could not finish its program.
    """
    ended: dict[Action, float] = {}
    waiting: dict[Action, list[int]] = {}
    position = [0] * len(programs)
    free = [0.0] * len(programs)
    stuck: dict[int, Blocked] = {}
    ticks: list[Tick] = []
    ready = deque(range(len(programs)))
    while ready:
        worker = ready.popleft()
        stuck.pop(worker, None)
        while position[worker] < len(programs[worker]):
            action = programs[worker][position[worker]]
            start = free[worker]
            for needed in needs(action):
                if needed not in ended:
                    stuck[worker] = Blocked(worker, action, needed)
                    waiting.setdefault(needed, []).append(worker)
                    break
                start = max(start, ended[needed] + delay(needed, action))
            else:
                free[worker] = start + duration(action)
                ended[action] = free[worker]
                ticks.append(Tick(worker, action, start, free[worker]))
                position[worker] += 1
                if waiting:
                    ready.extend(waiting.pop(action, ()))
                continue
            break
    ticks.sort(key=lambda tick: (tick.start, tick.worker))
    return Clock(tuple(ticks), tuple(stuck[worker] for worker in sorted(stuck)))

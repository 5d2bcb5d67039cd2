"""Hypothesis strategies for wirings, plans, costs and actions."""

import random

from hypothesis import strategies as st

from pipeline.plan.plan import Plan
from pipeline.plan.schedules import SCHEDULES, forward_only
from pipeline.plan.simulator import Cost
from stages.actions import Action, Kind, Wiring, dependencies

WINDOWED = {name: SCHEDULES[name] for name in ("gpipe", "1f1b")}
"""The schedules that know windows of time; their backwards are whole."""
PAIRED = ("interleaved", "zb-v")
"""Schedules that need an even number of stages."""
MILLISECONDS = st.integers(0, 50).map(lambda number: number / 1000)


def actions():
    """Lists of arbitrary actions, in no sensible order."""
    index = st.integers(0, 2**31 - 1)
    return st.lists(st.builds(Action, st.sampled_from(Kind), index, index, index), max_size=20)


@st.composite
def wirings(draw, most=6):
    """Any acyclic wiring in which stages feed higher numbers: chains, skips, joins, forks, several bottoms or tops."""
    count = draw(st.integers(1, most))
    return Wiring({stage: sorted(draw(st.sets(st.integers(0, stage - 1)))) if stage else () for stage in range(count)})


@st.composite
def wired_plans(draw):
    """(plan, wiring): the plan of a built-in schedule over some wiring, windows included where it knows them."""
    wiring = draw(wirings())
    names = [name for name in SCHEDULES if name not in PAIRED or len(wiring) % 2 == 0]
    schedule = draw(st.sampled_from([*(SCHEDULES[name] for name in names), forward_only]))
    windows = draw(st.integers(1, 3)) if schedule in (*WINDOWED.values(), forward_only) else 1
    return schedule(len(wiring), draw(st.integers(1, 6)), windows=windows), wiring


def costs(stages):
    """A cost for each stage, zero included."""
    cost = st.builds(Cost, MILLISECONDS, MILLISECONDS, MILLISECONDS, MILLISECONDS)
    return st.lists(cost, min_size=stages, max_size=stages)


@st.composite
def arbitrary_plans(draw):
    """(plan, wiring): any placement, some backwards in halves, and an order that a real run could have had.

    The order of the whole is a random one that respects every dependency, so no worker can be stuck; microbatches
    need not ascend.
    """
    wiring = draw(wirings(most=4))
    stages, microbatches, windows = len(wiring), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    workers = draw(st.integers(1, stages))
    placement = draw(st.lists(st.integers(0, workers - 1), min_size=stages, max_size=stages))
    places = [(s, m, w) for s in range(stages) for m in range(microbatches) for w in range(windows)]
    halved = draw(st.sets(st.sampled_from(places)))
    halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    left = [Action(Kind.FORWARD, *place) for place in places]
    left += [Action(kind, *place) for place in places for kind in (halves if place in halved else (Kind.BACKWARD,))]
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    shuffle.shuffle(left)
    done: list[Action] = []
    while left:
        action = next(a for a in left if set(dependencies(a, wiring, windows=windows, halved=halved)) <= set(done))
        left.remove(action)
        done.append(action)
    programs = tuple(tuple(a for a in done if placement[a.stage] == worker) for worker in range(workers))
    return Plan("arbitrary", stages, microbatches, programs, tuple(placement), windows), wiring

"""Arrays and loops agree about plans: whether anything is wrong, and when all starts and ends, to the last bit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.plan import plan as plan_module
from pipeline.plan import rules
from pipeline.plan.arrays import PlanArrays
from pipeline.plan.plan import validate
from pipeline.plan.schedules import build_plan, interleaved, one_f_one_b, zb_h1
from pipeline.plan.simulator import Cost, simulate
from pipeline.plan.timeline import SpanRows
from stages.actions import Action, Kind, chain
from tests.strategies_plans import arbitrary_plans, costs, wired_plans


@st.composite
def damaged(draw, plans):
    """(plan, wiring): a plan in which something may be wrong, of its shape: actions moved, lost, twice, or changed."""
    plan, wiring = draw(plans)
    programs = [list(program) for program in plan.programs]
    for _ in range(draw(st.integers(0, 2))):
        program = draw(st.sampled_from(programs))
        if not program:
            continue
        place, other = (draw(st.integers(0, len(program) - 1)) for _ in range(2))
        how = draw(st.sampled_from(["swap", "lose", "twice", "away", "kind", "number"]))
        if how == "swap":
            program[place], program[other] = program[other], program[place]
        elif how == "kind":
            program[place] = replace(program[place], kind=draw(st.sampled_from(Kind)))
        elif how == "number":
            name = draw(st.sampled_from(["stage", "microbatch", "window"]))
            program[place] = replace(program[place], **{name: draw(st.integers(-1, 4))})
        elif how == "lose":
            del program[place]
        else:
            target = program if how == "twice" else draw(st.sampled_from(programs))
            target.insert(draw(st.integers(0, len(target))), program[place])
    bounds = draw(st.sampled_from([plan.in_flight, (), (1,) * plan.workers]))
    return replace(plan, programs=programs, in_flight=bounds), wiring


PLANS = st.one_of(wired_plans(), arbitrary_plans())


@given(damaged(PLANS))
def test_arrays_find_something_wrong_where_the_rules_do(pair):
    plan, wiring = pair
    assert (PlanArrays.of(plan, wiring) is None) == bool(rules.faults(plan, wiring))


@given(PLANS, st.data())
def test_times_are_those_of_the_loop_bit_for_bit(pair, data):
    plan, wiring = pair
    plan = replace(plan, in_flight=())
    each = data.draw(costs(plan.stages))
    if rules.faults(plan, wiring):  # microbatches that do not ascend can be simulated, by the loop
        return
    by_loop = simulate(plan, each, wiring)
    before = plan_module.MANY_WORKERS, plan_module.MANY_ACTIONS
    plan_module.MANY_WORKERS = plan_module.MANY_ACTIONS = 0
    try:
        by_arrays = simulate(plan, each, wiring)
    finally:
        plan_module.MANY_WORKERS, plan_module.MANY_ACTIONS = before
    assert isinstance(by_arrays.spans, SpanRows) and isinstance(by_loop.spans, tuple)
    assert by_arrays == by_loop and tuple(by_arrays.spans) == by_loop.spans
    for name in ("step_time", "busy", "idle", "bubble", "parallelism", "peak_in_flight"):
        assert getattr(by_arrays, name) == getattr(by_loop, name), name
    assert [by_arrays.of_worker(w) for w in range(plan.workers)] == [by_loop.of_worker(w) for w in range(plan.workers)]
    assert by_arrays.spans[1:3] == by_loop.spans[1:3] and by_arrays.text() == by_loop.text()


def test_large_plans_are_arrays_and_small_ones_are_not():
    assert one_f_one_b(15, 200).arrays() is None and one_f_one_b(16, 8).arrays() is None
    for plan in (one_f_one_b(16, 128), zb_h1(16, 128), interleaved(32, 128)):
        assert plan.arrays() is not None
        assert plan.arrays() is plan.arrays(chain(plan.stages))
        assert len(simulate(plan, Cost(1, 1, 1)).spans) == sum(map(len, plan.programs))


def test_what_is_wrong_with_a_large_plan_is_named():
    plan = one_f_one_b(16, 128)
    *others, (forward, backward, *rest) = plan.programs
    assert backward == Action(Kind.BACKWARD, 15, 0)
    with pytest.raises(PlanError, match=r"has 1 fault:\n.*worker 15 has B15.0 before F15.0, which it needs"):
        validate(replace(plan, programs=(*others, (backward, forward, *rest))))


def test_a_plan_of_64_stages_takes_the_step_of_the_closed_form():
    """(m+p-1)(F+B)."""
    assert simulate(build_plan("1f1b", 64, 256), Cost(1, 1, 1)).step_time == (256 + 63) * 3

"""Zero-bubble plans: rules, closed forms, the limit of tapes, and what costs change."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ScheduleError, TimelineError
from pipeline.plan.plan import validate
from pipeline.plan.schedules import one_f_one_b, zb_h1, zb_h2, zero_bubble
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind
from tests.strategies_plans import costs

SIZES = list(product(range(1, 7), range(1, 9)))
EVEN = Cost(1, 1, 1)


@pytest.mark.parametrize("schedule", [zb_h1, zb_h2])
def test_every_plan_keeps_every_rule_and_its_limit_of_tapes(schedule):
    for stages, microbatches in SIZES:
        plan = validate(schedule(stages, microbatches))
        limit = stages if schedule is zb_h1 else 2 * stages - 1
        assert plan.in_flight == (min(limit, microbatches),) * stages
        assert max(plan.peak_in_flight()) <= min(limit, microbatches)


@pytest.mark.parametrize("schedule", [zb_h1, zb_h2])
def test_a_worker_does_both_halves_of_everything_once(schedule):
    for stages, microbatches in SIZES:
        for stage, program in enumerate(schedule(stages, microbatches).programs):
            kinds = [Kind.FORWARD, *((Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if stage else (Kind.BACKWARD,))]
            assert sorted(program) == [Action(kind, stage, m) for kind in kinds for m in range(microbatches)]


@pytest.mark.parametrize("schedule", [zb_h1, zb_h2])
def test_from_p_microbatches_on_a_worker_waits_p_minus_1_forwards(schedule):
    """The least that a step with a common end can have, at F = I = W, where 1F1B waits three times as long."""
    for stages, microbatches in SIZES:
        if microbatches >= stages:
            timeline = simulate(schedule(stages, microbatches), EVEN)
            assert timeline.idle == (stages - 1,) * stages
            assert simulate(one_f_one_b(stages, microbatches), EVEN).idle == (3 * (stages - 1),) * stages


@pytest.mark.parametrize(
    ("stages", "microbatches", "whole", "halves"),
    [(2, 8, 27, 25), (2, 16, 51, 49), (4, 8, 33, 27), (4, 16, 57, 51), (8, 8, 45, 31), (8, 16, 69, 55)],
)
def test_steps_take_what_was_worked_out_by_hand(stages, microbatches, whole, halves):
    """(m+p-1)(F+B) and m(F+B) + (p-1)F, with F = I = W = 1."""
    assert simulate(one_f_one_b(stages, microbatches), EVEN).step_time == whole
    assert simulate(zb_h1(stages, microbatches), EVEN).step_time == halves
    assert simulate(zb_h2(stages, microbatches), EVEN).step_time == halves


def test_more_tapes_pay_where_messages_take_long():
    """8 stages, 16 microbatches, a message as long as a third of a forward."""
    cost = Cost(1, 1, 1, transfer=0.3)
    found = [simulate(zero_bubble(8, 16, tapes=n, costs=cost), cost).step_time for n in (8, 11, 15)]
    whole = simulate(one_f_one_b(8, 16), cost).step_time
    assert whole / found[0] >= 1.25
    assert found[0] >= found[1] >= found[2]
    assert whole / found[2] >= 1.4


@given(st.data(), st.integers(1, 5), st.integers(1, 6))
def test_known_costs_make_valid_plans_within_the_limit(data, stages, microbatches):
    each = data.draw(costs(stages))
    limit = data.draw(st.integers(stages, 2 * stages - 1))
    plan = validate(zero_bubble(stages, microbatches, tapes=limit, costs=each))
    assert max(plan.peak_in_flight()) <= min(limit, microbatches)


@pytest.mark.parametrize("tapes", [2, 6])
def test_too_few_and_too_many_tapes_are_refused(tapes):
    with pytest.raises(ScheduleError, match=rf"`tapes` must be from 3 to 5 for 3 stage\(s\), received {tapes}"):
        zero_bubble(3, 4, tapes=tapes)


def test_what_is_no_number_of_tapes_or_no_cost_for_each_stage_is_refused():
    with pytest.raises(ScheduleError, match="`tapes` must be a whole number"):
        zero_bubble(3, 4, tapes=3.5)
    with pytest.raises(TimelineError, match="each of 3 stages, received 2"):
        zero_bubble(3, 4, costs=[EVEN] * 2)


@pytest.mark.parametrize("schedule", [zb_h1, zb_h2])
def test_windows_are_refused(schedule):
    with pytest.raises(ScheduleError, match="no place for windows of time"):
        schedule(2, 2, windows=2)

"""What the simulator predicts, against hand-made figures and against laws that every step obeys."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PlanError, TimelineError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import forward_only, gpipe, one_f_one_b
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind
from tests.strategies_plans import arbitrary_plans, costs, wired_plans

F, B, I, W = Kind  # noqa: E741


def times(timeline):
    return {str(span.action): (span.start, span.end) for span in timeline.spans}


def test_one_microbatch_goes_down_and_up():
    timeline = simulate(gpipe(2, 1), [Cost(1, 2, 3, transfer=10), Cost(4, 5, 6, transfer=99)])
    assert times(timeline) == {"F0.0": (0, 1), "F1.0": (11, 15), "B1.0": (15, 26), "B0.0": (36, 41)}
    assert timeline.idle == (35, 26)
    assert timeline.name == "gpipe: 2 stages, 1 microbatch"


def test_a_skip_edge_costs_the_producers_transfer_both_ways():
    wiring = {0: (), 1: (0,), 2: (0, 1)}
    each = [Cost(1, 1, transfer=5), Cost(1, 1, transfer=2), Cost(1, 1)]
    assert times(simulate(gpipe(3, 1), each, wiring)) == {
        "F0.0": (0, 1),
        "F1.0": (6, 7),
        "F2.0": (9, 10),
        "B2.0": (10, 11),
        "B1.0": (13, 14),
        "B0.0": (19, 20),
    }


def test_two_bottoms_run_side_by_side_under_one_top():
    wiring = {0: (), 1: (), 2: (0, 1)}
    timeline = simulate(one_f_one_b(3, 2), [Cost(1, 1), Cost(3, 3), Cost(1, 1)], wiring)
    assert times(timeline) == {
        "F0.0": (0, 1),
        "F1.0": (0, 3),
        "F0.1": (1, 2),
        "F2.0": (3, 4),
        "F1.1": (3, 6),
        "B2.0": (4, 5),
        "B0.0": (5, 6),
        "F2.1": (6, 7),
        "B1.0": (6, 9),
        "B2.1": (7, 8),
        "B0.1": (8, 9),
        "B1.1": (9, 12),
    }


def test_stages_on_one_worker_need_no_transfer():
    actions = tuple(Action(kind, stage, 0) for kind, stage in [(F, 0), (F, 1), (B, 1), (B, 0)])
    plan = Plan("together", 2, 1, (actions,), placement=(0, 0))
    assert simulate(plan, Cost(1, 1, transfer=50)).step_time == 4


def test_an_input_half_lets_the_next_stage_start_before_the_weight_half():
    halves = ((Action(F, 0, 0), Action(B, 0, 0)), (Action(F, 1, 0), Action(I, 1, 0), Action(W, 1, 0)))
    timeline = simulate(Plan("zero bubble", 2, 1, halves), Cost(1, 2, 3))
    assert times(timeline) == {"F0.0": (0, 1), "F1.0": (1, 2), "I1.0": (2, 4), "W1.0": (4, 7), "B0.0": (4, 9)}


def test_the_slowest_stage_sets_the_pace():
    timeline = simulate(one_f_one_b(3, 100), [Cost(1, 1), Cost(2, 3), Cost(1, 1)])
    assert timeline.busy == (200, 500, 200)
    assert 500 <= timeline.step_time <= 500 + 8


def test_one_cost_for_all_or_one_each():
    assert simulate(gpipe(2, 2), Cost(1, 2)) == simulate(gpipe(2, 2), [Cost(1, 2), Cost(1, 2)])
    with pytest.raises(TimelineError, match="each of 2 stages, received 3"):
        simulate(gpipe(2, 2), [Cost(1, 2)] * 3)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["forward", "input_gradient", "weight_gradient", "transfer"])
def test_a_cost_is_finite_and_not_negative(name, bad):
    with pytest.raises(TimelineError, match=f"`{name}` must be seconds, finite and at least 0, received {bad}"):
        Cost(**{"forward": 1.0, "input_gradient": 1.0, name: bad})


def test_a_plan_that_cannot_run_is_not_simulated():
    stuck = replace(gpipe(1, 1), programs=((Action(B, 0, 0), Action(F, 0, 0)),))
    with pytest.raises(PlanError, match="before"):
        simulate(stuck, Cost(1, 1))


@given(st.one_of(wired_plans(), arbitrary_plans()), st.data())
def test_every_dependency_is_met_and_no_worker_does_two_things_at_once(pair, data):
    plan, wiring = pair
    each = data.draw(costs(plan.stages))
    timeline = simulate(plan, each, wiring)
    by_action = {span.action: span for span in timeline.spans}
    assert len(by_action) == sum(map(len, plan.programs))
    for span in timeline.spans:
        assert span.duration == pytest.approx(each[span.action.stage].of(span.action.kind), abs=1e-9)
        for needed in plan.dependencies(span.action, wiring):
            assert by_action[needed].end <= span.start + 1e-9
    for worker, program in enumerate(plan.programs):
        spans = [by_action[action] for action in program]
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(spans))
        assert all(span.worker == worker for span in spans)
    assert timeline.peak_in_flight == plan.peak_in_flight()


@given(wired_plans(), st.data())
def test_a_step_lasts_at_least_the_busiest_worker_and_at_most_everything_in_turn(pair, data):
    plan, wiring = pair
    each = data.draw(costs(plan.stages))
    timeline = simulate(plan, each, wiring)
    transfers = sum(
        each[needed.stage].transfer + each[action.stage].transfer
        for _, action in plan.actions()
        for needed in plan.dependencies(action, wiring)
    )
    assert max(timeline.busy) <= timeline.step_time + 1e-9
    assert timeline.step_time <= sum(timeline.busy) + transfers + 1e-9
    assert -1e-9 <= timeline.bubble <= 1
    assert timeline.parallelism == pytest.approx(plan.workers * (1 - timeline.bubble) if timeline.step_time else 0)


@given(wired_plans(), st.data())
def test_a_dearer_stage_never_makes_the_step_shorter(pair, data):
    plan, wiring = pair
    each = data.draw(costs(plan.stages))
    stage = data.draw(st.integers(0, plan.stages - 1))
    name = data.draw(st.sampled_from(["forward", "input_gradient", "weight_gradient", "transfer"]))
    dearer = list(each)
    dearer[stage] = replace(each[stage], **{name: getattr(each[stage], name) + 0.01})
    before, after = simulate(plan, each, wiring), simulate(plan, dearer, wiring)
    assert after.step_time >= before.step_time - 1e-9


def test_forward_only_costs_no_backward():
    assert simulate(forward_only(2, 3), Cost(1, 100, 100)).step_time == 4

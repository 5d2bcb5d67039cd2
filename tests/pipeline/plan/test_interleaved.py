"""Interleaved plans: rules, closed forms, any number of microbatches; and plans that are put on other workers."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ScheduleError
from pipeline.plan.placing import placed
from pipeline.plan.plan import validate
from pipeline.plan.schedules import interleaved, one_f_one_b
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Kind
from tests.strategies_plans import arbitrary_plans, wired_plans

SIZES = list(product(range(1, 5), range(1, 4), range(1, 11)))


def test_every_plan_keeps_every_rule_also_where_p_does_not_divide_m():
    for workers, chunks, microbatches in SIZES:
        plan = validate(interleaved(workers * chunks, microbatches, chunks=chunks))
        assert plan.placement == tuple(range(workers)) * chunks
        assert plan.counts() == dict.fromkeys((Kind.FORWARD, Kind.BACKWARD), workers * chunks * microbatches)


def test_a_worker_waits_v_times_shorter_than_under_1f1b():
    """(p-1)(F+B)/v, where p divides m; with one chunk it is 1F1B's step."""
    for workers, chunks, microbatches in SIZES:
        if microbatches % workers == 0:
            timeline = simulate(interleaved(workers * chunks, microbatches, chunks=chunks), Cost(2, 3, 1))
            whole = simulate(one_f_one_b(workers, microbatches), Cost(2 * chunks, 3 * chunks, chunks))
            assert (
                [idle * chunks for idle in timeline.idle] == list(whole.idle) == [(workers - 1) * 6 * chunks] * workers
            )


@pytest.mark.parametrize(
    ("workers", "microbatches", "two", "four"),
    [(2, 8, 25.5, 24.75), (4, 8, 28.5, 26.25), (8, 8, 34.5, 29.25), (8, 16, 58.5, 53.25)],
)
def test_steps_take_what_was_worked_out_by_hand(workers, microbatches, two, four):
    """F = I = W = 1 of a whole worker."""
    for chunks, expected in ((2, two), (4, four)):
        each = 1 / chunks
        timeline = simulate(interleaved(workers * chunks, microbatches, chunks=chunks), Cost(each, each, each))
        assert timeline.step_time == expected


def test_a_worker_holds_what_the_schedule_promises():
    for workers, chunks, microbatches in SIZES:
        plan = interleaved(workers * chunks, microbatches, chunks=chunks)
        held = [2 * (workers - i - 1) + (chunks - 1) * workers + 1 for i in range(workers)]
        assert plan.in_flight == tuple(min(count, microbatches * chunks) for count in held)
        if microbatches % workers == 0:
            assert plan.peak_in_flight() == plan.in_flight


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(
        ScheduleError, match=r"each worker 2 stages, and 3 stage\(s\) cannot .* multiple of 2, such as 4"
    ):
        interleaved(3, 4)
    with pytest.raises(ScheduleError, match="`chunks` must be a whole number"):
        interleaved(4, 4, chunks=0)
    with pytest.raises(ScheduleError, match="no place for windows"):
        interleaved(4, 4, windows=2)


@given(st.one_of(wired_plans(), arbitrary_plans()), st.data())
def test_a_plan_on_other_workers_can_run_and_keeps_the_order_in_each_stage(pair, data):
    plan, wiring = pair
    workers = data.draw(st.permutations(range(data.draw(st.integers(1, plan.stages)))))
    rest = data.draw(st.lists(st.sampled_from(workers), min_size=plan.stages, max_size=plan.stages))
    placement = [*workers, *rest][: plan.stages]
    other = placed(plan, placement, wiring)
    assert other.placement == tuple(placement)
    assert simulate(other, Cost(1, 1, 1), wiring).step_time > 0  # it raises where workers are stuck
    for stage in range(plan.stages):
        before, after = ([a for _, a in each.actions() if a.stage == stage] for each in (plan, other))
        assert after == before

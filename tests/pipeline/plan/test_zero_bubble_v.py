"""Zero-bubble plans in a V: rules, the table of steps, the limit of tapes, any costs."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ScheduleError
from pipeline.plan.plan import validate
from pipeline.plan.schedules import TunedSchedule, one_f_one_b, zb_h1, zb_v
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind
from tests.strategies_plans import costs

SIZES = list(product(range(1, 6), range(1, 9)))
HALF = Cost(0.5, 0.5, 0.5)
"""A chunk of a worker with F = I = W = 1."""


def test_every_plan_keeps_every_rule_and_holds_p_tapes_of_both_chunks():
    for workers, microbatches in SIZES:
        plan = validate(zb_v(2 * workers, microbatches))
        assert plan.placement == (*range(workers), *reversed(range(workers)))
        assert max(plan.peak_in_flight()) <= min(2 * workers, 2 * microbatches) == plan.in_flight[0]
        for worker, program in enumerate(plan.programs):
            found = [(kind, stage) for stage in plan.stages_of(worker) for kind in kinds(stage)]
            assert sorted(program) == sorted(Action(*pair, m) for pair in found for m in range(microbatches))


def kinds(stage):
    return (Kind.FORWARD, *((Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if stage else (Kind.BACKWARD,)))


def test_from_p_microbatches_on_a_worker_waits_half_as_long_as_under_zb_h1():
    """(p-1)F/2, the least that a V can have: the last worker cannot begin before half of p-1 forwards."""
    for workers, microbatches in SIZES:
        if microbatches >= workers:
            assert simulate(zb_v(2 * workers, microbatches), HALF).idle == ((workers - 1) / 2,) * workers
            assert simulate(zb_h1(workers, microbatches), Cost(1, 1, 1)).idle == (workers - 1,) * workers


@pytest.mark.parametrize(
    ("workers", "microbatches", "whole", "v"),
    [(2, 8, 27, 24.5), (2, 16, 51, 48.5), (4, 8, 33, 25.5), (4, 16, 57, 49.5), (8, 8, 45, 27.5), (8, 16, 69, 51.5)],
)
def test_steps_take_what_was_worked_out_by_hand(workers, microbatches, whole, v):
    """m(F+I+W) + (p-1)F/2, with F = I = W = 1 of a worker."""
    assert simulate(one_f_one_b(workers, microbatches), Cost(1, 1, 1)).step_time == whole
    assert simulate(zb_v(2 * workers, microbatches), HALF).step_time == v


@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_known_costs_make_valid_plans_within_the_limit(data, workers, microbatches):
    each = data.draw(costs(2 * workers))
    plan = validate(zb_v(2 * workers, microbatches, costs=each))
    assert max(plan.peak_in_flight()) <= 2 * workers


def test_one_worker_plays_both_ways_without_a_bubble():
    plan = zb_v(2, 3)
    assert plan.workers == 1
    assert simulate(plan, HALF).idle == (0.0,)


def test_odd_stages_and_windows_are_refused():
    with pytest.raises(ScheduleError, match=r"3 stage\(s\) cannot be paired so; cut .* even number, such as 4"):
        zb_v(3, 4)
    with pytest.raises(ScheduleError, match="no place for windows of time"):
        zb_v(4, 4, windows=2)


# -- 1F1B with several stages a worker, and schedules for known costs ----------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_1f1b_of_neighbouring_stages_is_1f1b_of_workers_that_have_them_all(chunks):
    for workers, microbatches in product(range(1, 4), range(1, 6)):
        plan = validate(one_f_one_b(workers * chunks, microbatches, chunks=chunks))
        whole = one_f_one_b(workers, microbatches)
        cost = Cost(2 * chunks, 3 * chunks, chunks)
        assert simulate(plan, Cost(2, 3, 1)).step_time == simulate(whole, cost).step_time
        assert plan.peak_in_flight() == plan.in_flight == tuple(chunks * held for held in whole.in_flight)
    with pytest.raises(ScheduleError, match=r"1f1b gives each worker 2 stages, and 3 stage\(s\) cannot"):
        one_f_one_b(3, 4, chunks=2)


def test_windows_and_chunks_go_together_under_1f1b():
    plan = validate(one_f_one_b(4, 3, windows=2, truncate=1, chunks=2))
    assert plan.placement == (0, 0, 1, 1)


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v"])
def test_a_tuned_schedule_is_the_schedule_of_its_name(name):
    chunks = 2 if name in ("interleaved", "zb-v") else 1
    plan = validate(TunedSchedule(name, (Cost(1, 2, 1),) * 4, chunks)(4, 5))
    assert plan.name == name and plan.workers == 4 // chunks
    assert repr(TunedSchedule(name)) == f"{name} (auto)"

"""GPipe, 1F1B and forward-only plans against their closed forms: exhaustive up to 6 stages and 8 microbatches.

The costs are whole seconds, so that sums are exact and a closed form can be compared with ==.
"""

from collections import Counter
from itertools import product

import pytest

from pipeline.errors import PlanError, ScheduleError
from pipeline.plan.plan import Plan, validate
from pipeline.plan.schedules import SCHEDULES, build_plan, forward_only, gpipe, one_f_one_b, schedule_named
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind, chain
from tests.strategies_plans import WINDOWED

STAGES, MICROBATCHES, WINDOWS = range(1, 7), range(1, 9), range(1, 4)
SIZES = list(product(STAGES, MICROBATCHES))
NAMES = ", ".join(map(repr, SCHEDULES))
COSTS = [Cost(1, 1), Cost(1, 1, 1), Cost(5, 2, 1), Cost(1, 3, 4)]


@pytest.fixture(params=WINDOWED)
def schedule(request):
    return WINDOWED[request.param]


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_every_worker_idles_p_minus_1_forwards_and_backwards(schedule, cost):
    for stages, microbatches in SIZES:
        timeline = simulate(schedule(stages, microbatches), cost)
        idle = (stages - 1) * (cost.forward + cost.backward)
        assert timeline.idle == (idle,) * stages
        assert timeline.step_time == (microbatches + stages - 1) * (cost.forward + cost.backward)
        assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-15)


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_windows_shrink_the_bubble_to_that_of_one_window(schedule, cost):
    for stages, microbatches, windows in product(STAGES, MICROBATCHES, WINDOWS):
        timeline = simulate(schedule(stages, microbatches, windows=windows), cost)
        slots = microbatches * windows + stages - 1
        assert timeline.idle == ((stages - 1) * (cost.forward + cost.backward),) * stages
        assert timeline.step_time == slots * (cost.forward + cost.backward)
        assert timeline.bubble == pytest.approx((stages - 1) / slots, abs=1e-15)


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_forward_only_idles_p_minus_1_forwards(cost):
    for stages, microbatches, windows in product(STAGES, MICROBATCHES, WINDOWS):
        timeline = simulate(validate(forward_only(stages, microbatches, windows=windows)), cost)
        slots = microbatches * windows + stages - 1
        assert timeline.idle == ((stages - 1) * cost.forward,) * stages
        assert timeline.step_time == slots * cost.forward
        assert timeline.bubble == pytest.approx((stages - 1) / slots, abs=1e-15)
        assert timeline.peak_in_flight == (0,) * stages


@pytest.mark.parametrize("windows", WINDOWS)
def test_1f1b_holds_min_p_minus_i_and_m_tapes(windows):
    for stages, microbatches in SIZES:
        plan = one_f_one_b(stages, microbatches, windows=windows)
        expected = tuple(min(stages - stage, microbatches) * windows for stage in range(stages))
        assert plan.in_flight == plan.peak_in_flight() == simulate(plan, Cost(2, 3)).peak_in_flight == expected


@pytest.mark.parametrize("windows", WINDOWS)
def test_gpipe_holds_all_tapes(windows):
    for stages, microbatches in SIZES:
        plan = gpipe(stages, microbatches, windows=windows)
        expected = (microbatches * windows,) * stages
        assert plan.in_flight == plan.peak_in_flight() == simulate(plan, Cost(2, 3)).peak_in_flight == expected


@pytest.mark.parametrize("make", [*WINDOWED.values(), forward_only])
@pytest.mark.parametrize("windows", WINDOWS)
def test_every_plan_keeps_every_rule(make, windows):
    for stages, microbatches in SIZES:
        plan = make(stages, microbatches, windows=windows)
        assert validate(plan) is plan


@pytest.mark.parametrize("make", [*WINDOWED.values(), forward_only])
def test_a_worker_does_everything_of_its_stage_once_and_nothing_else(make):
    for stages, microbatches in SIZES:
        plan = make(stages, microbatches)
        kinds = [Kind.FORWARD, Kind.BACKWARD] if plan.training else [Kind.FORWARD]
        for stage, program in enumerate(plan.programs):
            wanted = [Action(kind, stage, m) for kind in kinds for m in range(microbatches)]
            assert Counter(program) == Counter(wanted)


@pytest.mark.parametrize("make", [*WINDOWED.values(), forward_only])
def test_messages_alone_carry_every_plan_to_its_end(make):
    """A hand-off played without `dependencies`: a forward takes an activation, a backward a tape and a gradient."""
    for stages, microbatches in SIZES:
        plan = make(stages, microbatches)
        todo = [list(program) for program in plan.programs]
        activations = {(0, m) for m in range(microbatches)}
        gradients = {(stages - 1, m) for m in range(microbatches)}
        tapes = set()
        moved = True
        while moved:
            moved = False
            for stage, program in enumerate(todo):
                while program:
                    here = (stage, program[0].microbatch)
                    if program[0].kind is Kind.FORWARD and here in activations:
                        activations.remove(here)
                        activations.add((stage + 1, here[1]))
                        tapes.add(here)
                    elif program[0].kind is Kind.BACKWARD and here in gradients & tapes:
                        gradients.remove(here)
                        gradients.add((stage - 1, here[1]))
                        tapes.remove(here)
                    else:
                        break
                    program.pop(0)
                    moved = True
        assert todo == [[]] * stages
        assert tapes == (set() if plan.training else {(s, m) for s in range(stages) for m in range(microbatches)})


@pytest.mark.parametrize("windows", WINDOWS)
def test_microbatches_ascend_both_ways_and_windows_descend_going_back(schedule, windows):
    for stages, microbatches in SIZES:
        for program in schedule(stages, microbatches, windows=windows).programs:
            forwards = [(a.microbatch, a.window) for a in program if a.kind is Kind.FORWARD]
            backwards = [(a.microbatch, -a.window) for a in program if a.kind is Kind.BACKWARD]
            assert forwards == sorted(forwards)
            assert backwards == sorted(backwards)


def test_the_last_stage_of_1f1b_alternates():
    kinds = [action.kind for action in one_f_one_b(4, 6).programs[-1]]
    assert kinds == [Kind.FORWARD, Kind.BACKWARD] * 6


@pytest.mark.parametrize("make", [*SCHEDULES.values(), forward_only])
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None, "3"])
@pytest.mark.parametrize("name", ["stages", "microbatches", "windows"])
def test_a_schedule_refuses_impossible_numbers(make, bad, name):
    numbers = {"stages": 2, "microbatches": 2, "windows": 2, name: bad}
    with pytest.raises(ScheduleError, match=f"`{name}` must be a whole number of at least 1, received {bad!r}"):
        make(**numbers)


def test_schedules_have_names():
    assert schedule_named("gpipe") is gpipe
    assert schedule_named("1f1b") is one_f_one_b
    assert schedule_named(gpipe) is gpipe


@pytest.mark.parametrize(
    ("name", "hint"),
    [("1F1B", "'1f1b'"), ("1f1", "'1f1b'"), ("GPipe", "'gpipe'"), ("g-pipe", "'gpipe'"), ("ZB-H1", "'zb-h1'")],
)
def test_an_unknown_name_is_answered_with_all_names_and_the_nearest(name, hint):
    with pytest.raises(ScheduleError, match=rf"'{name}', expected one of {NAMES}; did you mean {hint}\?"):
        schedule_named(name)


def test_a_name_that_resembles_none_gets_no_hint():
    with pytest.raises(ScheduleError, match=f"no schedule 'zzz', expected one of {NAMES}$"):
        schedule_named("zzz")


def test_what_is_neither_a_name_nor_a_function_is_refused():
    with pytest.raises(ScheduleError, match="received 7"):
        schedule_named(7)


def test_build_plan_takes_a_function_without_windows():
    plan = build_plan(lambda stages, microbatches: gpipe(stages, microbatches), 2, 3)
    assert plan == gpipe(2, 3)
    assert build_plan("1f1b", 2, 3, windows=2) == one_f_one_b(2, 3, windows=2)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (None, "must return a Plan, it returned None"),
        (gpipe(2, 3), r"asked for \(stages, microbatches, windows\) = \(2, 4, 1\), but its plan has \(2, 3, 1\)"),
        (gpipe(3, 4), r"its plan has \(3, 4, 1\)"),
        (gpipe(2, 4, windows=2), r"its plan has \(2, 4, 2\)"),
    ],
)
def test_build_plan_refuses_what_it_did_not_ask_for(made, complaint):
    with pytest.raises(ScheduleError, match=complaint):
        build_plan(lambda stages, microbatches: made, 2, 4)


def test_build_plan_checks_the_plan_against_the_wiring():
    backwards_chain = {0: (1,), 1: ()}
    assert build_plan("gpipe", 2, 2, wiring=backwards_chain)
    with pytest.raises(PlanError, match="deadlock"):
        build_plan("1f1b", 2, 2, wiring=backwards_chain)


def test_placement_is_one_stage_a_worker_unless_said():
    plan = gpipe(3, 2)
    assert plan.placement == (0, 1, 2)
    assert [plan.stages_of(worker) for worker in range(3)] == [(0,), (1,), (2,)]
    shared = Plan("shared", 3, 1, ((), ()), placement=(0, 1, 0))
    assert shared.stages_of(0) == (0, 2)
    assert shared.workers == 2


def test_a_plan_is_a_value():
    assert gpipe(2, 3) == gpipe(2, 3)
    assert hash(gpipe(2, 3)) == hash(gpipe(2, 3))
    assert gpipe(2, 3) != gpipe(2, 4)
    assert gpipe(2, 3).counts() == {Kind.FORWARD: 6, Kind.BACKWARD: 6}
    assert gpipe(2, 3).dependencies(Action(Kind.FORWARD, 1, 2)) == (Action(Kind.FORWARD, 0, 2),)
    assert gpipe(2, 3).validate(chain(2)) == gpipe(2, 3)


@pytest.mark.parametrize("truncate", [1, 2, 3, 5])
def test_truncated_plans_keep_every_rule_and_hold_blocks(schedule, truncate):
    """Every k windows are a block: forward ascending, then backward descending, so 1F1B holds p-i blocks."""
    for (stages, microbatches), windows in product(SIZES, [1, 3, 4]):
        plan = validate(schedule(stages, microbatches, windows=windows, truncate=truncate))
        count = microbatches * -(-windows // truncate)
        if schedule is one_f_one_b:
            assert plan.in_flight == tuple(min(s, count) * min(windows, truncate) for s in range(stages, 0, -1))
        assert all(held <= bound for held, bound in zip(plan.peak_in_flight(), plan.in_flight, strict=True))
        for program in plan.programs:
            backwards = [(a.microbatch, a.window // truncate, -a.window) for a in program if a.kind is Kind.BACKWARD]
            assert backwards == sorted(backwards)


def test_a_cut_gradient_is_waited_for_by_nobody():
    """Windows 0 1 | 2: the backward of window 1 needs nothing of window 2, that of window 0 needs window 1's."""
    plan = one_f_one_b(1, 1, windows=3, truncate=2)
    assert [str(action) for action in plan.programs[0]] == ["F0.0", "F0.0/1", "B0.0/1", "B0.0", "F0.0/2", "B0.0/2"]
    assert Action(Kind.BACKWARD, 0, 0, 2) not in plan.dependencies(Action(Kind.BACKWARD, 0, 0, 1))
    assert Action(Kind.BACKWARD, 0, 0, 1) in plan.dependencies(Action(Kind.BACKWARD, 0, 0, 0))
    assert plan.headline() == "1f1b: 1 stage, 1 microbatch, 3 windows, gradients through 2"

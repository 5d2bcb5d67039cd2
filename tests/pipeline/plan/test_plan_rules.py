"""Each kind of mistake in a plan is found, named and explained; several are reported together; no false alarm."""

import pickle
from collections import Counter
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Fault, PipelineError, PlanError
from pipeline.plan.plan import Plan, validate
from pipeline.plan.rules import RULES, faults
from pipeline.plan.schedules import forward_only, gpipe, one_f_one_b
from stages.actions import Action, Kind, chain, dependencies
from tests.strategies_plans import arbitrary_plans, wired_plans

F, B, I, W = Kind  # noqa: E741


def act(text):
    """`F0.3` or `B1.2/1` as an action."""
    kind = {"F": F, "B": B, "I": I, "W": W}[text[0]]
    stage, _, rest = text[1:].partition(".")
    microbatch, _, window = rest.partition("/")
    return Action(kind, int(stage), int(microbatch), int(window or 0))


def programs(*rows):
    return tuple(tuple(act(word) for word in row.split()) for row in rows)


def edited(plan, worker, edit):
    """The plan with one worker's program changed by `edit(list)`."""
    program = list(plan.programs[worker])
    edit(program)
    return replace(plan, programs=(*plan.programs[:worker], tuple(program), *plan.programs[worker + 1 :]))


def found(plan, wiring=None):
    """The (rule, message) that validate reports."""
    with pytest.raises(PlanError) as caught:
        validate(plan, wiring)
    return [(fault.rule, fault.message) for fault in caught.value.faults]


def test_a_missing_action_is_reported_once_with_its_worker_and_stage():
    plan = edited(one_f_one_b(3, 4), 1, lambda program: program.remove(act("B1.2")))
    assert found(plan) == [("missing", "worker 1 lacks 1 of the 8 actions of stage 1: B1.2")]


def test_many_missing_actions_of_a_stage_are_one_fault():
    plan = edited(gpipe(2, 8), 0, lambda program: program.clear())
    assert found(plan) == [
        ("missing", "worker 0 lacks 16 of the 16 actions of stage 0: F0.0, F0.1, F0.2, F0.3, F0.4, F0.5 and 10 more")
    ]


def test_a_missing_weight_half_is_reported():
    plan = Plan("halves", 1, 1, programs("F0.0 I0.0"))
    assert found(plan) == [("missing", "worker 0 lacks 1 of the 3 actions of stage 0: W0.0")]


def test_a_missing_input_half_is_reported():
    plan = Plan("halves", 1, 1, programs("F0.0 W0.0"))
    assert found(plan) == [("missing", "worker 0 lacks 1 of the 3 actions of stage 0: I0.0")]


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize("action", ["F0.1", "B0.1"])
def test_a_duplicate_is_reported_once(make, action):
    plan = edited(make(2, 3), 0, lambda program: program.append(act(action)))
    words = act(action).describe()
    assert found(plan) == [("duplicate", f"worker 0 has {action} ({words} of stage 0) 2 times, expected once")]


def test_an_action_on_the_wrong_worker_is_reported():
    plan = edited(gpipe(2, 2), 1, lambda program: program.remove(act("F1.1")))
    plan = edited(plan, 0, lambda program: program.append(act("F1.1")))
    assert found(plan) == [("worker", "worker 0 has F1.1, but stage 1 is placed on worker 1")]


def test_a_backward_before_its_forward_is_reported():
    plan = Plan("hasty", 1, 2, programs("B0.0 F0.0 F0.1 B0.1"))
    assert found(plan) == [("before", "worker 0 has B0.0 before F0.0, which it needs")]


def test_windows_the_wrong_way_round_are_reported():
    plan = Plan("windows", 1, 1, programs("F0.0 F0.0/1 B0.0 B0.0/1"), windows=2)
    assert found(plan) == [("before", "worker 0 has B0.0 before B0.0/1, which it needs")]


def test_stages_of_one_worker_in_the_wrong_order_are_reported():
    plan = Plan("shared", 2, 1, programs("F1.0 F0.0 B1.0 B0.0"), placement=(0, 0))
    assert found(plan) == [("before", "worker 0 has F1.0 before F0.0, which it needs")]


def test_two_workers_that_wait_for_each_other_are_reported_with_what_they_wait_for():
    plan = Plan("stuck", 2, 2, programs("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"))
    assert found(plan) == [
        (
            "deadlock",
            "workers wait for each other for ever: worker 0 cannot start B0.0 before B1.0 (on worker 1); "
            "worker 1 cannot start F1.1 before F0.1 (on worker 0)",
        )
    ]


def test_a_circle_of_three_workers_is_reported_without_those_that_only_wait_for_it():
    wiring = {0: (), 1: (), 2: (), 3: (0, 1, 2)}
    rows = ["F0.0 B0.0", "F1.0 B1.0", "F2.0 B2.0", "F3.0 B3.0"]
    assert validate(Plan("join", 4, 1, programs(*rows)), wiring)
    ring = Plan("ring", 6, 1, programs("F1.0 F0.0", "F3.0 F2.0", "F5.0 F4.0"), (0, 0, 1, 1, 2, 2), training=False)
    edges = {0: (), 1: (2,), 2: (), 3: (4,), 4: (), 5: (0,)}
    assert found(ring, edges) == [
        (
            "deadlock",
            "workers wait for each other for ever: worker 0 cannot start F1.0 before F2.0 (on worker 1); "
            "worker 1 cannot start F3.0 before F4.0 (on worker 2); "
            "worker 2 cannot start F5.0 before F0.0 (on worker 0)",
        )
    ]
    bystander = replace(ring, stages=7, programs=(*programs("F6.0"), *ring.programs), placement=(1, 1, 2, 2, 3, 3, 0))
    [(rule, message)] = found(bystander, {**edges, 6: (1,)})
    assert rule == "deadlock"
    assert "worker 0" not in message


def test_two_separate_deadlocks_are_both_reported():
    rows = programs("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1")
    other = tuple(tuple(replace(a, stage=a.stage + 2) for a in row) for row in rows)
    plan = Plan("stuck twice", 4, 2, rows + other)
    assert [rule for rule, _ in found(plan, {0: (), 1: (0,), 2: (), 3: (2,)})] == ["deadlock", "deadlock"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("F0.1 F0.0 B0.0 B0.1", "worker 0 has F0.1 before F0.0: stage 0 must take the forwards of its microbatches"),
        ("F0.0 F0.1 B0.1 B0.0", "worker 0 has B0.1 before B0.0: stage 0 must take the backwards of its microbatches"),
        ("F0.0 F0.1 I0.0 I0.1 W0.1 W0.0", "worker 0 has W0.1 before W0.0: stage 0 must take the backwards of its"),
    ],
)
def test_microbatches_out_of_order_are_reported(row, message):
    [(rule, text)] = found(Plan("unordered", 1, 2, programs(row)))
    assert rule == "order"
    assert text.startswith(message)


def test_microbatches_ascend_within_each_window_so_that_windows_may_lead():
    row = "F0.0 F0.1 F0.0/1 F0.1/1 B0.0/1 B0.1/1 B0.0 B0.1"
    assert validate(Plan("windows lead", 1, 2, programs(row), windows=2))


def test_input_halves_may_come_in_any_order():
    assert validate(Plan("free", 1, 2, programs("F0.0 F0.1 I0.1 I0.0 W0.0 W0.1")))


def test_a_broken_promise_of_tapes_is_reported_with_the_action_that_breaks_it():
    plan = replace(gpipe(2, 4), in_flight=(2, 4))
    assert found(plan) == [("in_flight", "worker 0 holds 4 tapes open after F0.3, the schedule promised at most 2")]
    assert validate(replace(gpipe(2, 4), in_flight=()))


def test_a_whole_backward_beside_its_halves_is_reported():
    plan = Plan("both", 1, 1, programs("F0.0 B0.0 I0.0 W0.0"))
    assert found(plan) == [("kind", "B0.0 is a whole backward, yet the plan also has halves (I0.0, W0.0)")]


def test_a_backward_without_training_is_reported():
    plan = edited(forward_only(2, 1), 1, lambda program: program.append(act("B1.0")))
    assert found(plan) == [("kind", "worker 1 has B1.0, but a plan without training has only forwards")]


def test_a_backward_without_training_is_one_fault_wherever_it_stands():
    plan = Plan("forward only", 1, 1, programs("B0.0 F0.0"), training=False)
    assert [rule for rule, _ in found(plan)] == ["kind"]


def test_a_whole_backward_beside_one_half_misses_nothing():
    assert [rule for rule, _ in found(Plan("both", 1, 1, programs("F0.0 B0.0 I0.0")))] == ["kind"]


def test_forwards_without_backwards_are_reported_when_training():
    plan = replace(forward_only(2, 2), training=True)
    assert found(plan) == [
        ("missing", "worker 0 lacks 2 of the 4 actions of stage 0: B0.0, B0.1"),
        ("missing", "worker 1 lacks 2 of the 4 actions of stage 1: B1.0, B1.1"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 0, "placement": ()}, "`stages` must be at least 1, received 0"),
        ({"microbatches": 0}, "`microbatches` must be at least 1, received 0"),
        ({"windows": -1}, "`windows` must be at least 1, received -1"),
        ({"placement": (0,)}, r"`placement` must name a worker for each of 2 stages, received (0,)"),
        ({"placement": (0, 2)}, "stage 1 is placed on worker 2, but there are programs for workers 0 to 1 only"),
        ({"placement": (-1, 1)}, "stage 0 is placed on worker -1, but there are programs for workers 0 to 1 only"),
        ({"in_flight": (2,)}, "`in_flight` must have a bound for each of 2 workers, received (2,)"),
    ],
)
def test_wrong_counts_are_reported(change, message):
    assert ("shape", message) in found(replace(gpipe(2, 2), **change))


@pytest.mark.parametrize("action", ["F2.0", "F0.2", "F0.0/1"])
def test_an_action_out_of_range_is_reported(action):
    plan = edited(gpipe(2, 2), 0, lambda program: program.insert(0, act(action)))
    [(rule, message)] = found(plan)
    assert rule == "shape"
    assert message.startswith(f"worker 0 has {action} (")
    assert "2 stages, 2 microbatches and 1 windows, counted from 0" in message


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        ({0: (), 1: (0,), 2: (1,)}, "the wiring names stage 2, the plan has stages 0 to 1"),
        ({0: (), 1: (0, -1)}, "the wiring names stage -1, the plan has stages 0 to 1"),
        ({0: (), 1: (0, 0)}, "stage 0 is 2 times upstream of stage 1, expected once"),
        ({0: (0,), 1: (0,)}, "stages feed each other in a circle: stage 0 -> stage 0"),
        ({0: (1,), 1: (0,)}, "stages feed each other in a circle: stage"),
    ],
)
def test_a_wrong_wiring_is_reported(wiring, message):
    [(rule, text)] = found(gpipe(2, 2), wiring)
    assert rule == "wiring"
    assert text.startswith(message)


def test_all_faults_are_reported_together_in_the_order_of_the_rules():
    """One mistake a worker, one of each kind, and nothing else is said."""
    rows = [
        "F0.0 F0.1 F0.5 B0.0 B0.1",  # out of range: F0.5
        "F1.0 F1.1 B1.0 B1.1 F0.0",  # wrong worker: F0.0
        "F2.0 F2.0 F2.1 B2.0 B2.1",  # duplicate: F2.0
        "F3.0 F3.1 B3.0 I3.0 W3.0 B3.1",  # whole and halves: B3.0
        "F4.0 F4.1 B4.0",  # missing: B4.1
        "B5.0 F5.0 F5.1 B5.1",  # before: B5.0
        "F6.0 B6.0 F6.1 B6.1",  # deadlock with the next
        "F7.0 F7.1 B7.0 B7.1",
        "F8.1 F8.0 B8.0 B8.1",  # order: F8.1
        "F9.0 F9.1 B9.0 B9.1",  # in flight: promised 1
    ]
    plan = Plan("all wrong", 10, 2, programs(*rows), in_flight=(2,) * 9 + (1,))
    wiring = dict.fromkeys(range(10), ()) | {7: (6,)}
    assert [rule for rule, _ in found(plan, wiring)] == [rule for rule in RULES if rule != "wiring"]


def test_a_wrong_wiring_does_not_hide_the_other_faults():
    plan = edited(replace(gpipe(2, 2), in_flight=(1, 2)), 1, lambda program: program.pop())
    assert [rule for rule, _ in found(plan, {0: (0,)})] == ["missing", "wiring", "in_flight"]


def test_the_message_counts_and_numbers_the_faults_and_stays_short():
    error = PlanError("mine", [Fault("order", f"fault {number}") for number in range(25)])
    lines = str(error).splitlines()
    assert lines[0] == "the plan 'mine' cannot be run, it has 25 faults:"
    assert lines[1] == "  1. [order] fault 0"
    assert lines[-1] == "  ... and 5 more in `.faults`"
    assert len(lines) == 22
    assert str(PlanError("mine", [Fault("order", "x")])).startswith("the plan 'mine' cannot be run, it has 1 fault:")


def test_the_error_survives_pickling_and_belongs_to_the_family():
    error = PlanError("mine", [Fault("order", "x")])
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.faults, str(again)) == (error.name, error.faults, str(error))
    assert isinstance(error, PipelineError)
    assert isinstance(error, ValueError)


@given(wired_plans())
def test_no_false_alarm_over_any_wiring(pair):
    plan, wiring = pair
    assert validate(plan, wiring) is plan


@given(arbitrary_plans())
def test_no_false_alarm_over_any_placement_halves_and_order(pair):
    plan, wiring = pair
    assert {fault.rule for fault in faults(plan, wiring)} <= {"order"}


@given(arbitrary_plans(), st.randoms(use_true_random=False))
def test_a_plan_in_any_order_is_refused_exactly_if_its_graph_has_a_cycle(pair, random):
    """The oracle is the standard library's topological sort over program order and dependencies together."""
    plan, wiring = pair
    plan = replace(plan, programs=tuple(tuple(random.sample(program, len(program))) for program in plan.programs))
    graph = {}
    for program in plan.programs:
        for index, action in enumerate(program):
            graph[action] = [*program[max(index - 1, 0) : index], *plan.dependencies(action, wiring)]
    try:
        TopologicalSorter(graph).prepare()
        cyclic = False
    except CycleError:
        cyclic = True
    assert bool({"before", "deadlock"} & {fault.rule for fault in faults(plan, wiring)}) == cyclic


@given(arbitrary_plans(), st.data())
def test_any_removed_doubled_or_moved_action_is_reported_as_such(pair, data):
    plan, wiring = pair
    worker, action = data.draw(st.sampled_from(list(plan.actions())))
    alarms = Counter(fault.rule for fault in faults(plan, wiring))

    removed = edited(plan, worker, lambda program: program.remove(action))
    assert "missing" in {fault.rule for fault in faults(removed, wiring)}

    doubled = edited(plan, worker, lambda program: program.append(action))
    assert Counter(fault.rule for fault in faults(doubled, wiring)) == alarms + Counter(["duplicate"])

    if plan.workers > 1:
        moved = edited(removed, (worker + 1) % plan.workers, lambda program: program.append(action))
        assert "worker" in {fault.rule for fault in faults(moved, wiring)}


def test_a_plan_of_another_worker_count_than_its_stages_can_be_sound():
    """Two workers of two stages each, interleaved: stage 0 and 2 on worker 0, stage 1 and 3 on worker 1."""
    rows = programs(
        "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1",
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1",
    )
    plan = Plan("interleaved", 4, 2, rows, placement=(0, 1, 0, 1), in_flight=(4, 3))
    assert validate(plan) is plan
    assert plan.peak_in_flight() == (4, 3)
    needs = dependencies(act("B2.1"), chain(4))
    assert needs == (act("F2.1"), act("B3.1"))

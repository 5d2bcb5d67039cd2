"""The drawing of a plan shows exactly its programs, slot by slot."""

import re

import pytest
from hypothesis import given

from pipeline.errors import PlanError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import forward_only, gpipe, one_f_one_b
from pipeline.plan.simulator import Cost, simulate
from stages.actions import Action, Kind
from tests.strategies_plans import arbitrary_plans, wired_plans

F, B, I, W = Kind  # noqa: E741


def drawn(cells):
    """The cells in which an action starts."""
    return [cell for cell in cells if cell != "·" and set(cell) != {"─"}]


def rows(text):
    """For each worker its cells, one a slot."""
    return [line.split("│")[1].split() for line in text.splitlines()[1:]]


def test_1f1b_is_drawn_as_in_the_literature():
    assert one_f_one_b(3, 4).text() == (
        "1f1b: 3 stages, 4 microbatches\n"
        "worker 0 │ F0 F1 F2 ·  ·  B0 F3 B1 ·  B2 ·  B3 │ holds 3, waits 4 of 12\n"
        "worker 1 │ ·  F0 F1 ·  B0 F2 B1 F3 B2 ·  B3 ·  │ holds 2, waits 4 of 12\n"
        "worker 2 │ ·  ·  F0 B0 F1 B1 F2 B2 F3 B3 ·  ·  │ holds 1, waits 4 of 12"
    )


def test_a_backward_of_two_slots_is_drawn_as_long_as_it_takes():
    assert gpipe(2, 2).text(backward=2) == (
        "gpipe: 2 stages, 2 microbatches\n"
        "worker 0 │ F0 F1 ·  ·  ·  B0 ── B1 ── │ holds 2, waits 3 of 9\n"
        "worker 1 │ ·  F0 F1 B0 ── B1 ── ·  ·  │ holds 2, waits 3 of 9"
    )


def test_a_plan_without_training_holds_nothing():
    assert forward_only(2, 1).text() == (
        "forward only: 2 stages, 1 microbatch\n"
        "worker 0 │ F0 ·  │ waits 1 of 2\n"
        "worker 1 │ ·  F0 │ waits 1 of 2"
    )  # fmt: skip


def test_windows_and_stages_are_named_where_there_are_several():
    program = tuple(Action(F, s, 0, w) for s in (0, 1) for w in (0, 1))
    back = tuple(Action(B, s, 0, w) for s in (1, 0) for w in (1, 0))
    plan = Plan("one worker", 2, 1, (program + back,), placement=(0, 0), windows=2)
    assert plan.text() == (
        "one worker: 2 stages, 1 microbatch, 2 windows, 1 worker\n"
        "worker 0 │ F0.0/0 F0.0/1 F1.0/0 F1.0/1 B1.0/1 B1.0/0 B0.0/1 B0.0/0 │ holds 4, waits 0 of 8"
    )


def test_halves_are_drawn_with_their_letters():
    plan = Plan("halves", 1, 1, ((Action(F, 0, 0), Action(I, 0, 0), Action(W, 0, 0)),))
    assert rows(plan.text()) == [["F0", "I0", "W0"]]
    assert rows(plan.text(backward=4)) == [["F0", "I0", "──", "W0", "──"]]


def test_ten_and_more_workers_and_microbatches_stay_aligned():
    lines = one_f_one_b(11, 12).text().splitlines()[1:]
    bars = {tuple(match.start() for match in re.finditer("│", line)) for line in lines}
    assert len(bars) == 1


def test_a_plan_that_cannot_run_has_no_drawing_but_an_explanation():
    stuck = Plan("stuck", 1, 1, ((Action(B, 0, 0), Action(F, 0, 0)),))
    with pytest.raises(PlanError, match=r"B0\.0 before F0\.0"):
        stuck.text()


@pytest.mark.parametrize("slots", [{"forward": 0}, {"backward": 0}])
def test_an_action_takes_at_least_one_slot(slots):
    with pytest.raises(ValueError, match="at least 1"):
        gpipe(2, 2).text(**slots)


@given(wired_plans())
def test_the_drawing_reads_back_as_the_programs_and_waits_as_simulated(pair):
    plan, wiring = pair
    text = plan.text(wiring, forward=1, backward=2)
    timeline = simulate(plan, Cost(1, 1, 1), wiring)
    for worker, cells in enumerate(rows(text)):
        window = "/{0.window}" if plan.windows > 1 else ""
        stage = "{0.stage}." if len(plan.stages_of(worker)) > 1 else ""
        label = "{0.kind.letter}" + stage + "{0.microbatch}" + window
        wanted = [label.format(action) for action in plan.programs[worker]]
        assert drawn(cells) == wanted
        assert cells.count("·") == timeline.idle[worker]
        assert len(cells) == timeline.step_time
        assert f"waits {cells.count('·')} of {len(cells)}" in text.splitlines()[worker + 1]


@given(arbitrary_plans())
def test_every_plan_that_can_run_can_be_drawn(pair):
    plan, wiring = pair
    assert sum(len(drawn(cells)) for cells in rows(plan.text(wiring))) == sum(map(len, plan.programs))

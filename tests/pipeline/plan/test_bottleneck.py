"""What holds a step back is named by its cause, and what would help is what the simulator makes of the change."""

import pytest

from pipeline.errors import TimelineError
from pipeline.plan.schedules import build_plan
from pipeline.plan.simulator import Cost, simulate
from tests.measured_steps import step

EVEN = [Cost(0.01, 0.01, 0.01)] * 3
HEAVY = [EVEN[0], Cost(0.05, 0.05, 0.05), EVEN[0]]
FAR = [Cost(0.01, 0.01, 0.01, 0.08), *EVEN[1:]]


def time_of(costs, microbatches, schedule="1f1b"):
    return simulate(build_plan(schedule, len(costs), microbatches), costs).step_time


def test_a_heavy_stage_is_named_and_even_cuts_would_save_what_the_simulator_says():
    found = step(HEAVY, 8, names=("bottom", "middle", "top")).bottleneck
    assert (found.cause, found.stage) == ("stage", 1)
    even = [Cost(*[0.07 / 3] * 3)] * 3
    assert found.helps[0].saves == pytest.approx(1 - time_of(even, 8) / time_of(HEAVY, 8))
    assert "the heaviest stage, 'middle'" in str(found)
    assert "it computes 1.2e+03 ms a step, the others 240 ms on average" in str(found)


def test_few_microbatches_are_the_bubble_and_more_of_them_or_another_schedule_would_help():
    found = step(EVEN, 2).bottleneck
    assert found.cause == "bubble"
    assert found.shares["bubble"] == pytest.approx(2 / 4)
    more = [Cost(*[0.01 / 4] * 3)] * 3
    saved = {each.what: each.saves for each in found.helps}
    assert saved["8 microbatches in place of 2"] == pytest.approx(1 - time_of(more, 8) / time_of(EVEN, 2))
    best = min(("gpipe", "zb-h1", "zb-h2"), key=lambda name: time_of(EVEN, 2, name))
    assert saved[f"schedule={best!r}"] == pytest.approx(1 - time_of(EVEN, 2, best) / time_of(EVEN, 2))


def test_no_more_microbatches_are_advised_than_there_are_samples():
    assert not any("microbatches" in each.what for each in step(EVEN, 2, samples=3).bottleneck.helps)


def test_no_schedule_is_advised_where_the_loss_leaves_no_choice():
    helps = step(EVEN, 2, "gpipe", one_schedule=True).bottleneck.helps
    assert [each.what for each in helps] == ["8 microbatches in place of 2"]


def test_a_long_way_is_transfer_from_the_stage_before_the_cut():
    found = step(FAR, 8).bottleneck
    assert (found.cause, found.stage) == ("transfer", 0)
    assert found.helps[0].what == "cuts where next to nothing crosses"
    assert found.helps[0].saves == pytest.approx(1 - time_of(EVEN, 8) / time_of(FAR, 8))
    assert f"{16 * 1000 / 2**20:.3g} MiB a step cross behind it" in str(found)


def test_a_way_that_nobody_waits_for_holds_nothing_back():
    """Many microbatches under GPipe hide a way that is as long as a forward, but for its first and last microbatch."""
    costs = [Cost(0.01, 0.01, 0.01, 0.01), *EVEN[1:]]
    assert step(costs, 40, "gpipe").bottleneck.cause == "compute"


def test_a_slow_driver_is_named_with_what_it_does():
    found = step(EVEN, 16, driver={"data": 0.9, "callbacks": 0.1}).bottleneck
    assert found.cause == "driver"
    turn = 1.0 + time_of(EVEN, 16)
    assert found.seconds == pytest.approx(turn)
    assert found.helps[0].saves == pytest.approx(1.0 / turn)
    assert "data 900 ms, callbacks 100 ms" in str(found)


def test_an_update_is_compute_though_the_driver_goes_on_meanwhile():
    found = step(EVEN, 16, driver={"data": 0.9}, update=0.9).bottleneck
    assert found.cause == "compute"
    assert found.shares["driver"] == pytest.approx(0.0)


def test_a_step_in_which_nearly_everything_is_work_is_compute():
    found = step(EVEN, 40).bottleneck
    assert found.cause == "compute"
    assert "the workers compute 95% of the time" in str(found)
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_where_nothing_would_help_the_sentence_says_so():
    found = step([Cost(0.01, 0.01, 0.01)], 8).bottleneck
    assert found.helps == ()
    assert str(found).endswith("nothing that the simulator knows would help by 1 %")


def test_the_sentence_is_the_last_line_of_a_measured_timeline_and_no_other_s():
    timeline = step(HEAVY)
    assert timeline.text().splitlines()[-1] == str(timeline.bottleneck)
    simulated = simulate(build_plan("1f1b", 3, 4), HEAVY)
    assert "held back" not in simulated.text()
    with pytest.raises(TimelineError, match="found in measured ones"):
        simulated.bottleneck  # noqa: B018

"""What `validate` accepts either runs, with the gradients of any other plan, or is refused in words before launch."""

from dataclasses import replace
from itertools import permutations

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import PlanError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import forward_only, gpipe, interleaved, one_f_one_b, zb_h1
from pipeline.runtime.runnable import runnable
from stages.actions import Action, Kind
from tests.models import part

F, B, I, W = Kind  # noqa: E741


def halved(stages, microbatches, **options):
    """GPipe with every backward in two halves."""
    plan = gpipe(stages, microbatches, **options)
    programs = [
        [a for action in program for a in (_halves(action) if action.kind is B else [action])]
        for program in plan.programs
    ]
    return replace(plan, name="halved", programs=programs, in_flight=())


def _halves(action):
    return [replace(action, kind=kind) for kind in (I, W)]


def on(*placement):
    """GPipe with its stages on other workers."""

    def schedule(stages, microbatches, **_):
        actions = [action for program in gpipe(stages, microbatches).programs for action in program]
        programs: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
        for action in sorted(actions, key=lambda a: (a.kind, a.stage if a.kind is F else -a.stage, a.microbatch)):
            programs[placement[action.stage]].append(action)
        return Plan("placed", stages, microbatches, programs, placement)

    return schedule


def idle(stages, microbatches, **_):
    """One worker more than stages."""
    return replace(
        gpipe(stages, microbatches), name="idle", programs=(*gpipe(stages, microbatches).programs, ()), in_flight=()
    )


REFUSED = {
    "forwards": (forward_only, r"training needs the backward of every forward, this plan has forwards only"),
    "idle": (idle, r"every worker runs at least one stage, .* 3 workers and none of its 2 stage\(s\) is on worker 2"),
}


def two_parts():
    keras.utils.set_random_seed(1)
    return [
        part((3,), keras.layers.Dense(4, activation="tanh", name="a")),
        part((4,), keras.layers.Dense(1, name="b")),
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_workers_cannot_carry_out_is_refused_before_launch(name):
    schedule, words = REFUSED[name]
    plan = schedule(2, 2)
    assert plan.validate() is plan  # it breaks no rule
    (fault,) = runnable(plan)
    assert fault.rule == "runtime"
    with pytest.raises(PlanError, match=words):
        Pipeline(two_parts(), microbatches=2, schedule=schedule, transport="inproc")


def test_all_reasons_are_given_together():
    """Halves with windows, and a worker without a stage."""
    plan = halved(2, 1, windows=2)
    plan = replace(plan, placement=(2, 0), programs=(plan.programs[1], (), plan.programs[0]))
    assert plan.validate() is plan
    halves, idle = runnable(plan)
    assert halves.message == (
        "with windows workers run whole backwards only, this plan has 2 windows and 8 half backward(s), the first "
        "I1.0/1 (input gradient of microbatch 0, window 1 of stage 1); put one BACKWARD in place of each pair of halves"
    )
    assert "on worker 1; leave out" in idle.message


def test_plans_without_backwards_run_where_none_is_needed():
    assert runnable(forward_only(3, 2), training=False) == () != runnable(forward_only(3, 2))


def hand_made():
    """Every valid plan of two stages and two microbatches of which each stage has its own worker."""
    actions = [[Action(kind, stage, k) for kind in (F, B) for k in range(2)] for stage in range(2)]
    for first in permutations(actions[0]):
        for second in permutations(actions[1]):
            plan = Plan("hand-made", 2, 2, (first, second))
            try:
                yield plan.validate()
            except PlanError:
                continue


def test_every_hand_made_plan_that_is_accepted_runs_and_gives_the_same_gradients():
    plans = list(hand_made())
    assert len(plans) == 3  # F F B B and F B F B, but not a last stage that holds what the first one waits for
    plans += [halved(2, 2), zb_h1(2, 2), on(1, 0)(2, 2), on(0, 0)(2, 2), interleaved(2, 2)]
    assert all(runnable(plan) == () for plan in [*plans, one_f_one_b(3, 4)])
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.ones((4, 1), "float32")
    found = []
    for plan in plans:
        with Pipeline(two_parts(), 2, lambda *_, plan=plan: plan, "inproc") as pipe:
            pipe.compile("sgd", "mse", run_eagerly=True)
            found.append(list(pipe.gradients(x, y).values()))
    for other in found[1:]:
        for gradient, same in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(gradient, same)

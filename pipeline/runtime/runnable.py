"""The check that workers can carry out a plan; not every plan that keeps all rules can run as yet.

`pipeline.plan.rules` says what a plan may mean at all; simulation, drawings and comparisons of schedules need no more.
The workers know less: each has a stage, and with windows of time a backward is whole. Whatever else a plan asks for is
refused here, in words and before anything is started. Who teaches the workers more takes a rule away.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import Fault, PlanError
from pipeline.plan.plan import Plan
from pipeline.plan.rules import HALVES

__all__ = ["check_runnable", "runnable"]

RULE = "runtime"


def runnable(plan: Plan, *, training: bool = True) -> tuple[Fault, ...]:
    """Why a valid plan cannot run as yet.

    Args:
        plan: A plan that `pipeline.plan.plan.validate` accepts.
        training: Whether the step needs gradients.

    Returns:
        One fault per kind of thing that the workers cannot do, under the rule ``"runtime"``; empty if it can run.
    """
    return tuple(Fault(RULE, reason) for reason in _reasons(plan, training))


def check_runnable(plan: Plan, *, training: bool = True) -> Plan:
    """The plan itself, once `runnable` has nothing against it.

    Raises:
        PlanError: With every reason.
    """
    if faults := runnable(plan, training=training):
        raise PlanError(plan.name, faults)
    return plan


def _reasons(plan: Plan, training: bool) -> Iterator[str]:
    if training and not plan.training:
        yield "training needs the backward of every forward, this plan has forwards only; make it with training=True"
    halves = [action for _, action in plan.actions() if action.kind in HALVES]
    if halves and plan.windows > 1:
        yield (
            f"with windows workers run whole backwards only, this plan has {plan.windows} windows and {len(halves)} "
            f"half backward(s), the first {halves[0]} ({halves[0].describe()} of stage {halves[0].stage}); put one "
            "BACKWARD in place of each pair of halves"
        )
    if idle := sorted(set(range(plan.workers)) - set(plan.placement)):
        yield (
            f"every worker runs at least one stage, this plan has programs for {plan.workers} workers and none of "
            f"its {plan.stages} stage(s) is on worker {idle[0]}; leave out workers that run none"
        )

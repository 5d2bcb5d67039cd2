"""Zero bubble in a V: each worker has a stage of the way there and one of the way back, and backwards in halves.

Qi et al., "Pipeline Parallelism with Controllable Memory", 2024 (V-ZB). Of 2p stages, i and 2p-1-i are on worker i, so
the last worker hands to itself, and a microbatch comes back to where it began: the last stage is beside the first, and
its backward begins at once. Workers wait half as long as under ZB-H1, (p-1)F/2 where F is the forward of both stages,
and hold p tapes of both, as the first worker of 1F1B does. In exchange every tensor travels twice.

    worker 0 │ F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 B0.0 ·    B0.1 F0.3 ·    F3.2 I3.2 W3.1 ...
    worker 1 │ ·    F1.0 F2.0 F1.1 F2.1 I2.0 I1.0 W1.0 I2.1 I1.1 W1.1 F1.2 F2.2 W2.0 W2.1 F1.3 ...

No single order of preference is the best for every number of workers and microbatches. So greedy workers
(`pipeline.plan.schedules.greedy`) play some, and the shortest step wins. Of up to 6 workers with equal stages, from p
microbatches on, one of them leaves no bubble but the (p-1)F/2 in which the first microbatch comes to the last worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.errors import ScheduleError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import check_numbers, refuse_windows
from pipeline.plan.schedules.greedy import ActionsOfWorkers, Preference, best_plan, greedy_programs
from pipeline.plan.schedules.zero_bubble import EVEN
from pipeline.plan.simulator import Cost, costs_of_stages
from stages.actions import Kind

__all__ = ["zb_v"]

_F, _I, _W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
_INPUTS_FIRST = ((_I, 0), (_I, 1), (_F, 1), (_F, 0))
_WAY_BACK_FIRST = ((_F, 1), (_F, 0), (_I, 1), (_I, 0))
_FORWARDS_FIRST = ((_F, 0), (_I, 0), (_F, 1), (_I, 1))
_WAY_THERE_FIRST = ((_I, 0), (_F, 0), (_F, 1), (_I, 1))
_TRIED = (
    *((_INPUTS_FIRST, None), (_WAY_BACK_FIRST, None), (_WAY_THERE_FIRST, 1), (_FORWARDS_FIRST, 1)),
    *((_FORWARDS_FIRST, 2), (_WAY_THERE_FIRST, 2), (_WAY_BACK_FIRST, 1), (_INPUTS_FIRST, 1)),
)
"""What workers take first, before weight halves, and by how much less than 2(p-i) microbatches worker i runs ahead;
None: 2p-1 on all. The stage of the way there is chunk 0, that of the way back chunk 1."""
_MANY, _FEW = 20_000, 2
"""Of plans of so many forwards only so many are tried: each takes seconds to play."""


def zb_v(
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    costs: Cost | Sequence[Cost] = EVEN,
) -> Plan:
    """The zero-bubble plan in a V: stages i and 2p-1-i on worker i, for wirings in which stages feed higher numbers.

    Args:
        stages: number of stages 2p, even.
        microbatches: number of microbatches m, at least 1.
        windows: must be 1.
        truncate: goes with windows.
        costs: what the stages cost, one for each or one for all, in any unit.

    Returns:
        A plan with at most min(2p, 2m) tapes of a stage in flight on every worker.

    Raises:
        ScheduleError: a number is no whole number of at least 1, the number of stages is odd, or there are windows.
        TimelineError: there is not one cost for each stage.
    """
    check_numbers(stages, microbatches, windows)
    refuse_windows("zb-v", windows)
    if stages % 2:
        raise ScheduleError(
            "zb-v gives each worker one stage of the way there and one of the way back, and "
            f"{stages} stage(s) cannot be paired so; cut the model into an even number, such as {stages + 1}"
        )
    each, last = costs_of_stages(stages, costs), stages - 1
    plan = Plan(
        name="zb-v",
        stages=stages,
        microbatches=microbatches,
        programs=((),) * (stages // 2),
        placement=tuple(min(stage, last - stage) for stage in range(stages)),
        in_flight=(min(stages, 2 * microbatches),) * (stages // 2),
    )
    return best_plan(plan, _programs(plan, each), each)


def _programs(plan: Plan, costs: Sequence[Cost]) -> Iterator[ActionsOfWorkers]:
    """What greedy workers do, by several preferences and, if messages take time, also as if they took none."""
    guesses = {tuple(costs): None, tuple(replace(cost, transfer=0.0) for cost in costs): None}
    tried = _TRIED if plan.stages * plan.microbatches <= _MANY else _TRIED[:_FEW]
    for order, less in tried:
        ahead = (plan.stages - 1,) * plan.workers
        if less is not None:
            ahead = tuple(max(1, plan.stages - 2 * worker - less) for worker in range(plan.workers))
        preference = Preference((*order, (_W, 0), (_W, 1)), ahead, _F)
        for guess in guesses:
            yield greedy_programs(plan.microbatches, plan.stages, guess, plan.placement, preference)

"""`schedule="auto"`: the schedule with the shortest simulated step, of those that the model and its memory allow.

    costs of the stages ─► each schedule's plan ─► simulator ─► shortest step ─► one line that says which and why

The choice is made once, when the model is split, and is the same for the same costs. An action more of a worker takes
some time in Python, which counts here: halves of tiny stages gain nothing. What gains less than costs can be measured
to is not chosen, so where nothing is gained it is 1F1B.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.cutting.prediction import Prediction
from pipeline.cutting.stage_prediction import peak_bytes
from pipeline.errors import ScheduleError
from pipeline.plan.plan import Plan
from pipeline.plan.rules import HALVES
from pipeline.plan.schedules import TunedSchedule, build_plan
from pipeline.plan.simulator import Cost, simulate
from pipeline.saying import is_whole, not_whole

__all__ = ["AutoSchedule", "choose_schedule", "in_windows"]

AUTO_NAME = "auto"
ACTION_SECONDS = 60e-6
"""What an action takes besides its arithmetic."""
LEAST_GAIN = 1.02
"""Over 1F1B; what is measured is no more exact than that."""
ALIKE = 1.01
"""Steps that differ by less count as equally long; then memory decides."""
_BASE = "1f1b"


@dataclass(frozen=True)
class AutoSchedule:
    """The limits of a choice: ``Pipeline.split(model, ..., schedule=AutoSchedule(memory=2**30))``; "auto" has none.

    Args:
        memory: The most bytes that a worker may need for variables, gradients, optimizer slots and activations, as far
            as they are known: see `Prediction.peak_memory`. None: no limit.
        stages_per_worker: How many stages each worker has, which divides the number of stages.

    Raises:
        ScheduleError: A number is no whole number of at least 1.
    """

    memory: int | None = None
    stages_per_worker: int = 1

    def __post_init__(self) -> None:
        numbers = {"stages_per_worker": self.stages_per_worker}
        if self.memory is not None:
            numbers["memory"] = self.memory
        for name, number in numbers.items():
            if not is_whole(number):
                raise ScheduleError(not_whole(f"`{name}`", number))

    @classmethod
    def of(cls, schedule: object) -> AutoSchedule | None:
        """What a user means by a schedule; None: one that is not to be chosen."""
        if isinstance(schedule, cls):
            return schedule
        return cls() if isinstance(schedule, str) and schedule == AUTO_NAME else None

    def names(self) -> tuple[str, ...]:
        """The schedules to choose from."""
        if self.stages_per_worker == 1:
            return (_BASE, "gpipe", "zb-h1", "zb-h2")
        return (_BASE, "interleaved", *(("zb-v",) if self.stages_per_worker == 2 else ()))


@dataclass(frozen=True)
class _Candidate:
    """A schedule, its simulated seconds, the most bytes on each worker, and its most tapes of one."""

    schedule: TunedSchedule
    seconds: float
    bytes: tuple[int, ...]
    tapes: int


def choose_schedule(wanted: AutoSchedule, prediction: Prediction) -> Prediction:
    """The same prediction under the best schedule, which `why` tells about.

    Args:
        wanted: What to choose from.
        prediction: The stages' measured costs.

    Raises:
        ScheduleError: The stages cannot be shared out so, or no schedule fits into the memory.
    """
    found = list(_candidates(wanted, prediction))
    fitting = [one for one in found if wanted.memory is None or max(one.bytes) <= wanted.memory]
    if not fitting:
        least = min(found, key=lambda one: max(one.bytes))
        worker = least.bytes.index(max(least.bytes))
        raise ScheduleError(
            f"no schedule fits into memory={wanted.memory} bytes a worker: the least is {least.schedule.name} with "
            f"{least.bytes[worker]} on worker {worker}; ask for more stages, recompute=True or a smaller sample"
        )
    base = found[0]
    gaining = [one for one in fitting if base.seconds >= one.seconds * LEAST_GAIN or base not in fitting]
    quickest = min((one.seconds for one in gaining), default=0.0)
    alike = [one for one in gaining if one.seconds <= quickest * ALIKE]
    best = min(alike, key=lambda one: max(one.bytes), default=base)
    why = _why(best, found, fitting, wanted)
    return replace(prediction, schedule=best.schedule, why=why)


def in_windows(wanted: AutoSchedule, windows: int) -> tuple[TunedSchedule, str]:
    """The schedule for windows of time, and why: halves and several rounds have no place for them.

    Raises:
        ScheduleError: Several stages a worker are asked for, or a limit of memory.
    """
    if wanted.memory is not None:
        raise ScheduleError(
            f"memory={wanted.memory} is held against what was measured without windows of time, so with "
            f"windows={windows} it would hold for nothing; leave memory= out"
        )
    if wanted.stages_per_worker > 1:
        raise ScheduleError(
            f"stages_per_worker={wanted.stages_per_worker} has no place for windows of time; windows={windows} goes "
            "with one stage a worker"
        )
    return TunedSchedule(_BASE), f"{_BASE}: windows={windows} go with whole backwards, one stage a worker"


def _candidates(wanted: AutoSchedule, prediction: Prediction) -> Iterator[_Candidate]:
    costs = tuple(stage.cost for stage in prediction.stages)
    chunks, stages = wanted.stages_per_worker, len(prediction.stages)
    for name in wanted.names():
        schedule = TunedSchedule(name, costs, chunks)
        plan = build_plan(schedule, stages, prediction.microbatches, wiring=prediction.wiring)
        seconds = simulate(plan, [_in_actions(cost, plan) for cost in costs], prediction.wiring).step_time
        yield _Candidate(schedule, seconds, _bytes(plan, prediction), max(plan.peak_in_flight()))


def _in_actions(cost: Cost, plan: Plan) -> Cost:
    """The cost with what each action takes besides; a whole backward is one action."""
    halved = any(action.kind in HALVES for _, action in plan.actions())
    return Cost(
        cost.forward + ACTION_SECONDS,
        cost.input_gradient + ACTION_SECONDS,
        cost.weight_gradient + ACTION_SECONDS * halved,
        cost.transfer,
    )


def _bytes(plan: Plan, prediction: Prediction) -> tuple[int, ...]:
    """For each worker the most bytes that its stages need at once, messages among them."""
    stages = prediction.stages
    return tuple(
        sum(stages[i].memory + stages[i].under_way for i in plan.stages_of(worker)) + peak_bytes(stages, program)
        for worker, program in enumerate(plan.programs)
    )


def _why(best: _Candidate, found: Sequence[_Candidate], fitting: Sequence[_Candidate], wanted: AutoSchedule) -> str:
    base, others = found[0], list(found[1:])
    left_out = [one.schedule.name for one in found if one not in fitting]
    if best is base:
        tried = ", ".join(f"{one.schedule.name} {base.seconds / one.seconds:.2f}x" for one in others)
        text = f"{_BASE}: by the simulator nothing gains 2% over it ({tried})"
        if any(one not in fitting for one in others):
            text = f"{_BASE}: by the simulator nothing that fits gains 2% over it ({tried})"
    else:
        text = (
            f"{best.schedule.name}: {base.seconds / best.seconds:.2f}x of {_BASE} by the simulator, tapes {best.tapes} "
            f"instead of {base.tapes}"
        )
    if left_out:
        text += f"; memory={wanted.memory} leaves out {', '.join(left_out)}"
    workers, cores = len(best.bytes), len(os.sched_getaffinity(0))
    if workers > cores:
        text += f"; {workers} workers share {cores} core(s), of which the simulator knows nothing"
    return text

"""The options of a pipeline: what they are, and what they may be, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.cutting.auto_schedule import AutoSchedule
from pipeline.cutting.cores import default_threads
from pipeline.errors import CompileError, OptionsError, PipelineError, ScheduleError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import SCHEDULES, TunedSchedule, schedule_named
from pipeline.runtime.crew import check_transport
from pipeline.runtime.recovery.options import Recovery
from pipeline.saying import is_whole, not_whole
from transport.errors import BadAddress
from transport.registry import AUTO


@dataclass(frozen=True)
class Options:
    """The options of a pipeline, whatever its model; `pipeline.pipeline.Pipeline` says what each means to a user.

    Attributes:
        microbatches: Into how many parts a batch is cut, at least 1.
        schedule: Its name, or the function that makes its plans.
        transport: As `Driver` takes it: ``"local"``, ``"ipc"``, ``"tcp"``, an address, or ``"inproc"``.
        recompute: One value per stage.
        threads: TensorFlow's threads per worker, at least 1.
        windows: Into how many windows the time axis is cut, at least 1.
        truncate: How many windows a state's gradient goes back through, at least 1; None: all.
        keep_state: Whether a batch begins with the states that the one before it left.
        recovery: How it gets over workers that die; None: not at all.
    """

    microbatches: int
    schedule: str | Callable[..., Plan]
    transport: str
    recompute: tuple[bool, ...]
    threads: int
    windows: int = 1
    truncate: int | None = None
    keep_state: bool = False
    recovery: Recovery | None = None

    @classmethod
    def of(
        cls, stages: int, *, recompute: bool | Sequence[bool], threads: int | None, states: bool = True, **others: Any
    ) -> Self:
        """From what `Pipeline` takes, for so many stages.

        Raises:
            PipelineError, BadAddress: An option cannot be; OptionsError for several, with all of them.
        """
        each = (recompute,) * stages if isinstance(recompute, bool) else tuple(recompute)
        size = default_threads(_workers(others["schedule"], stages)) if threads is None else threads
        found = cls(recompute=each, threads=size, **others)
        found = replace(found, transport=AUTO if found.transport == "auto" else found.transport)
        recovery = Recovery.of(found.recovery, found.scheme)
        faults = list(found._faults(stages))
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise OptionsError(faults)
        if not states:
            found.refuse_without_states()
        return replace(found, recovery=recovery)

    def _faults(self, stages: int) -> Iterator[PipelineError | BadAddress]:
        """Everything that is wrong, each as the error that it is alone."""
        numbers = {"microbatches": self.microbatches, "windows": self.windows, "threads": self.threads}
        if self.truncate is not None:
            numbers["truncate"] = self.truncate
        for name, number in numbers.items():
            if not is_whole(number):
                yield ScheduleError(not_whole(f"`{name}`", number))
        whole = is_whole(self.windows) and self.truncate is not None and is_whole(self.truncate)
        if whole and self.truncate is not None and self.windows < max(2, self.truncate):
            yield ScheduleError(
                f"truncate={self.truncate} lets a state's gradient go back through so many windows, and windows="
                f"{self.windows} makes no more; ask for more windows, or leave truncate out"
            )
        try:
            if AutoSchedule.of(self.schedule) is not None:
                raise ScheduleError(
                    "schedule='auto' chooses by what a model costs, which is measured where it is split: "
                    "Pipeline.split(model, stages=..., schedule='auto', sample=x[:32])"
                )
            schedule_named(self.schedule)
        except ScheduleError as error:
            yield error
        try:
            check_transport(self.transport)
        except BadAddress as error:
            yield error
        if len(self.recompute) != stages:
            yield CompileError(f"recompute takes one value per stage ({stages}), received {len(self.recompute)}")

    def refuse_without_states(self) -> None:
        """For segments none of which hands a state to its next window.

        Raises:
            ScheduleError: An option is about states.
        """
        asked = ["truncate="] if self.truncate is not None else []
        asked += ["keep_state="] if self.keep_state else []
        if asked:
            raise ScheduleError(
                f"{' and '.join(asked)} is about states, and no segment hands a state to its next window: the model "
                "has no recurrent layer; leave it out"
            )

    @property
    def scheme(self) -> str:
        """The transport without an address."""
        return self.transport.partition("://")[0]

    @property
    def schedule_name(self) -> str | None:
        """What the schedule is called; None for a function of the user's own."""
        if isinstance(self.schedule, TunedSchedule):
            return self.schedule.name
        return self.schedule if isinstance(self.schedule, str) else None

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `as_given`: all but what belongs to the machine."""
        chunks = self.schedule.chunks if isinstance(self.schedule, TunedSchedule) else 1
        return {
            "microbatches": self.microbatches,
            "schedule": self.schedule_name,
            "stages_per_worker": None if chunks == 1 else chunks,
            "recompute": list(self.recompute),
            "windows": self.windows,
            "truncate": self.truncate,
            "keep_state": self.keep_state,
        }


def as_given(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint kept, as `Pipeline` takes them."""
    found = {name: value for name, value in saved.items() if value is not None}
    chunks, name = found.pop("stages_per_worker", 1), found.get("schedule")
    if chunks != 1 and isinstance(name, str) and name in SCHEDULES:
        found["schedule"] = TunedSchedule(name, chunks=chunks)
    return found


def _workers(schedule: Any, stages: int) -> int:
    """Into how many processes a schedule puts the stages; one each where that is not known before its plan is made."""
    make = SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    try:
        return make(stages, 1).workers if isinstance(schedule, str | TunedSchedule) and make is not None else stages
    except ScheduleError:  # said with all other faults
        return stages

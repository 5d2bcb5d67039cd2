"""Every error that the `pipeline` package raises on purpose, under one base; each is of one family, as all our errors.

The families (`transport.errors`): your mistake, the other side's fault, time, closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transport.errors import ClosedError, MistakeError, PeerError, TapelineError, TimedOutError

__all__ = [
    "CheckpointError",
    "CompileError",
    "DataError",
    "Fault",
    "FirstBatchError",
    "MicrobatchError",
    "NotInPipelineError",
    "OptionsError",
    "PartyLostError",
    "PartyMismatchError",
    "PartyPlanError",
    "PartySilentError",
    "PartyStoppedError",
    "PipelineClosedError",
    "PipelineError",
    "PlanError",
    "ScheduleError",
    "SplitError",
    "StalledError",
    "TimelineError",
    "UsageError",
    "VerificationError",
    "WiringError",
    "WorkerDiedError",
    "WorkerError",
]


class PipelineError(TapelineError):
    """Base of every error that the package `pipeline` raises on purpose."""


class ScheduleError(PipelineError, MistakeError, ValueError):
    """A schedule that does not exist, or one that was asked for an impossible plan."""


class MicrobatchError(PipelineError, MistakeError, ValueError):
    """A batch that cannot be cut into the microbatches asked for."""


class OptionsError(PipelineError, MistakeError, ValueError):
    """Several options of a pipeline that cannot be; the message has a line for each.

    Attributes:
        faults: The error that each would be alone.
    """

    def __init__(self, faults: Iterable[Exception]) -> None:
        self.faults = tuple(faults)
        lines = [f"  {number}. {fault}" for number, fault in enumerate(self.faults, 1)]
        super().__init__("\n".join([f"{len(self.faults)} options of this pipeline cannot be:", *lines]))

    def __reduce__(self) -> tuple[type[OptionsError], tuple[tuple[Exception, ...]]]:
        return type(self), (self.faults,)


class TimelineError(PipelineError, MistakeError, ValueError):
    """Times that cannot be: an action that ends before it starts, or a cost below zero."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a plan.

    Attributes:
        rule: the name of the broken rule, one of `pipeline.plan.rules.RULES`, or ``"runtime"``: see
            `pipeline.runtime.runnable`.
        message: what was expected, what was found, and where.
    """

    rule: str
    message: str

    def __str__(self) -> str:
        return self.message


class PlanError(PipelineError, MistakeError, ValueError):
    """A plan that cannot run or would train something else; carries every fault that was found.

    Args:
        name: the name of the plan.
        faults: what is wrong with it, at least one.

    Attributes:
        faults: tuple of `Fault`, in the order of the rules.
    """

    SHOWN = 20

    def __init__(self, name: str, faults: Iterable[Fault]) -> None:
        self.name = name
        self.faults = tuple(faults)
        shown = [f"  {number}. [{fault.rule}] {fault}" for number, fault in enumerate(self.faults[: self.SHOWN], 1)]
        if len(self.faults) > self.SHOWN:
            shown.append(f"  ... and {len(self.faults) - self.SHOWN} more in `.faults`")
        count = f"{len(self.faults)} fault" + ("s" if len(self.faults) != 1 else "")
        super().__init__("\n".join([f"the plan {name!r} cannot be run, it has {count}:", *shown]))

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, tuple[Fault, ...]]]:
        return type(self), (self.name, self.faults)


class WiringError(PipelineError, MistakeError, ValueError):
    """Segments whose names or tensors do not fit together."""


class SplitError(PipelineError, MistakeError, ValueError):
    """A model that cannot be cut, or not there."""


class CompileError(PipelineError, MistakeError, ValueError):
    """A call of `compile` that cannot be carried out, or one that is missing."""


class DataError(PipelineError, MistakeError, ValueError):
    """A batch that does not fit the model: wrong shapes, wrong dtypes, different lengths."""


class NotInPipelineError(PipelineError, MistakeError, AttributeError):
    """Something of `keras.Model` that a pipeline does not have, or that setting would not change."""


class CheckpointError(PipelineError, MistakeError, ValueError):
    """A checkpoint that is not there, is not whole, or belongs to another model."""


class UsageError(PipelineError, MistakeError, RuntimeError):
    """A pipeline is used as it cannot be: in a forked process, as a copy, or counted in by two threads at once."""


class VerificationError(PipelineError, PeerError, AssertionError):
    """A verification found a difference above its tolerance."""


class FirstBatchError(PipelineError, PeerError, ValueError):
    """The workers compute something else than the user's own model and loss; nothing was trained."""


class PipelineClosedError(PipelineError, ClosedError, RuntimeError):
    """The pipeline's workers are gone; the message says since when and why."""


class WorkerError(PipelineError, PeerError, RuntimeError):
    """Code that ran in a worker raised: a builder, a layer, a loss.

    Attributes:
        stage: the stage's name.
        action: what it was doing, in words; "" outside a step.
        step: the step's number, or -1.
        kind: the name of the exception's class in the worker.
        worker_traceback: the worker's traceback as text.
        undone: whether it left no trace, so that the pipeline goes on with the values from before.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: str,
        action: str = "",
        step: int = -1,
        kind: str = "",
        worker_traceback: str = "",
        undone: bool = False,
    ) -> None:
        super().__init__(message)
        self.stage, self.action, self.step, self.kind = stage, action, step, kind
        self.worker_traceback, self.undone = worker_traceback, undone


class WorkerDiedError(WorkerError):
    """A worker's process ended, or was ended, without a word.

    Attributes:
        running: whether it was computing its action; else it waited, or was at something else.
        noticed: when its end was noticed, seconds since the epoch.
    """

    running = False
    noticed = 0.0


class RecoveryError(PipelineError, PeerError, RuntimeError):
    """Values could not be made what they were before a worker died: a step that was made again gave other numbers."""


class StalledError(PipelineError, TimedOutError, TimeoutError):
    """Every worker waits and nobody runs; the message says who waits for what."""


class PartyPlanError(PipelineError, MistakeError, ValueError):
    """A plan of parties that cannot be, or a party whose models or data do not fit it; a line for each fault."""


class PartyMismatchError(PipelineError, PeerError, ValueError):
    """Two parties do not mean the same training; nothing was trained.

    Attributes:
        differences: {the other party: names of the fields that differ, never their values}.
    """

    def __init__(self, message: str, differences: dict[str, tuple[str, ...]]) -> None:
        super().__init__(message)
        self.differences = differences

    def __reduce__(self) -> tuple[type[PartyMismatchError], tuple[str, dict[str, tuple[str, ...]]]]:
        return type(self), (str(self), self.differences)


class PartyStoppedError(PipelineError, PeerError, RuntimeError):
    """A party ended the session, or sent what must not be; the values are those of the last commit."""


class PartyLostError(PipelineError, PeerError, ConnectionError):
    """A party is gone in the middle; the values are those of the last commit."""


class PartySilentError(PipelineError, TimedOutError, TimeoutError):
    """A party sent nothing for as long as the plan says; the values are those of the last commit."""

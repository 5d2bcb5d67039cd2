"""The events of a measured step beside its actions: messages, waits, updates, and what the driver did.

    driver    │ callbacks │ data │ prepare │ send │ wait for workers        │ decide │
    worker 0  │ update │                     F0 F1 ──message──┐   B0 B1
    worker 1  │ update │                     wait for worker 0 ► F0 B0 ...

All times are seconds on one clock, that of the timeline which the events belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.plan.clock_offsets import clock_offsets
from stages.worker.step_notes import Passage, StepNotes

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

__all__ = ["DRIVER_TRACK", "DriverSpan", "StepEvents", "StepRecord", "Transit", "Update", "events_of"]

DRIVER_TRACK = -1
"""The driver, where a worker's number is asked for."""


@dataclass(frozen=True, slots=True)
class DriverSpan:
    """Something that the driver's process did from `start` to `end`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Update:
    """The update of all variables of a worker from `start` to `end`."""

    worker: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Transit:
    """One message on its way.

    Attributes:
        kind: ``activation``, ``gradient``, ``mask``, ``target``, ``sample_weight`` or ``shared_gradient``.
        tensor: Its name.
        microbatch, window: Of what it belongs to.
        source: The stage that sent it; -1: the driver.
        stage: The stage that it is for.
        sender, receiver: The workers; -1: the driver.
        bytes: Of the tensor.
        sent: When its sending began.
        left: When its sender was done with it.
        wanted: When its receiver began to wait for it.
        taken: When its receiver had it.
    """

    kind: str
    tensor: str
    microbatch: int
    window: int
    source: int
    stage: int
    sender: int
    receiver: int
    bytes: int
    sent: float
    left: float
    wanted: float
    taken: float

    @property
    def wait(self) -> float:
        """Seconds that its receiver waited for it."""
        return self.taken - self.wanted

    @property
    def crosses(self) -> bool:
        """Whether it went from one process to another."""
        return self.sender != self.receiver


@dataclass(frozen=True)
class StepEvents:
    """The events of a measured step beside its actions.

    Attributes:
        plan: The plan of the step.
        wiring: Stage -> the stages it takes tensors from.
        names: The stages' names.
        samples: In the batch.
        one_schedule: Whether the loss leaves no choice of a schedule.
        transits: The messages that were sent and taken, in the order of their sending.
        updates: Of the step before, which workers may still have been busy with.
        driver: What the driver did, in order.
        offsets: For each worker the seconds by which its clock was ahead of the driver's; they are taken off already.
    """

    plan: Plan
    wiring: Mapping[int, tuple[int, ...]]
    names: tuple[str, ...] = ()
    samples: int = 0
    one_schedule: bool = False
    transits: tuple[Transit, ...] = ()
    updates: tuple[Update, ...] = ()
    driver: tuple[DriverSpan, ...] = ()
    offsets: tuple[float, ...] = ()

    @cached_property
    def period(self) -> float:
        """Seconds from where the driver's first span begins to the end of its last: a whole turn of the training."""
        return self.driver[-1].end - self.driver[0].start if self.driver else 0.0

    def moved(self, by: float) -> StepEvents:
        """The same events, so many seconds later."""

        def later(time: float) -> float:
            return time + by

        return replace(
            self,
            transits=tuple(
                replace(t, sent=later(t.sent), left=later(t.left), wanted=later(t.wanted), taken=later(t.taken))
                for t in self.transits
            ),
            updates=tuple(replace(each, start=later(each.start), end=later(each.end)) for each in self.updates),
            driver=tuple(replace(each, start=later(each.start), end=later(each.end)) for each in self.driver),
        )


@dataclass(frozen=True)
class StepRecord:
    """The notes of driver and workers of a traced step, each on its own clock.

    Attributes:
        notes: For each worker.
        sent: What the driver sent.
        ordered: When the driver began to order the step.
        fed: When it had sent the batch.
        answered: When all workers had answered.
    """

    notes: tuple[StepNotes, ...]
    sent: tuple[Passage, ...]
    ordered: float
    fed: float
    answered: float

    def offsets(self, placement: tuple[int, ...]) -> tuple[float, ...]:
        """For each worker, by how many seconds its clock was ahead of the driver's.

        Args:
            placement: For each stage, the worker that hosts it.
        """
        ahead: dict[tuple[int, int], float] = {}
        left = {(each.key, 0): each.begin for each in self.sent}
        for worker, notes in enumerate(self.notes, 1):
            ahead[0, worker] = notes.begin - self.ordered
            ahead[worker, 0] = self.answered - notes.end
            left |= {(each.key, worker): each.begin for each in notes.sent}
        for worker, notes in enumerate(self.notes, 1):
            for each in notes.taken:
                sender = 0 if each.source < 0 else 1 + placement[each.source]
                if (each.key, sender) in left and sender != worker:
                    most = each.end - left[each.key, sender]
                    ahead[sender, worker] = min(most, ahead.get((sender, worker), most))
        return clock_offsets(1 + len(self.notes), ahead)[1:]


def events_of(record: StepRecord, step: StepEvents) -> StepEvents:
    """The events of a step, on the driver's clock; its driver spans are those of the step itself.

    Args:
        record: What was written down.
        step: What is known of the step besides.
    """
    plan = step.plan
    offsets = record.offsets(plan.placement)
    ends = {each.key: (DRIVER_TRACK, each.begin, each.end, each.bytes) for each in record.sent}
    for worker, (notes, ahead) in enumerate(zip(record.notes, offsets, strict=True)):
        ends |= {each.key: (worker, each.begin - ahead, each.end - ahead, each.bytes) for each in notes.sent}
    transits = []
    for worker, (notes, ahead) in enumerate(zip(record.notes, offsets, strict=True)):
        for one in notes.taken:
            if one.key in ends:
                sender, sent, left, size = ends[one.key]
                what = (one.kind, one.tensor, one.microbatch, one.window, one.source, one.stage)
                times = (sent, left, one.begin - ahead, one.end - ahead)
                transits.append(Transit(*what, sender, worker, size, *times))
    return replace(
        step,
        transits=tuple(sorted(transits, key=lambda t: (t.sent, t.receiver))),
        updates=tuple(
            Update(worker, notes.update[0] - ahead, notes.update[1] - ahead)
            for worker, (notes, ahead) in enumerate(zip(record.notes, offsets, strict=True))
            if notes.update is not None
        ),
        driver=(
            DriverSpan("send the batch", record.ordered, record.fed),
            DriverSpan("wait for the workers", record.fed, record.answered),
        ),
        offsets=offsets,
    )

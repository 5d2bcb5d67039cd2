"""The orders of the driver, one frozen class each: the driver makes it, the worker gets an equal one.

On the wire an order is ``{"do": its name, field: value, ...}``; `of_wire` is the only place that looks into it. Which
orders are legal when is the table of `stages.worker.states`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import groupby
from typing import Any, ClassVar, Self

from stages.errors import HandoffError
from stages.grid import Grid
from stages.loss.ways import Way, Ways


class Mode(StrEnum):
    """The purpose of a step."""

    TRAIN = "train"  # forward and backward, for an update
    GRADIENTS = "gradients"  # the same for a look at the gradients: what a forward pass changes is put back
    TEST = "test"  # forward, loss and metrics
    PREDICT = "predict"  # forward; outputs go to the driver
    MASKS = "masks"  # forward; which elements of the predictions count, for the weights of the next step; put back too

    @property
    def training(self) -> bool:
        """Whether layers run in training mode, under tapes, and gradients are there afterwards."""
        return self in (Mode.TRAIN, Mode.GRADIENTS)

    @property
    def only_looks(self) -> bool:
        """Whether all that a forward pass changes is put back at its end, kept states too."""
        return self in (Mode.GRADIENTS, Mode.MASKS)

    @property
    def with_loss(self) -> bool:
        """Whether losses are computed, so that targets and sample weights come along."""
        return self in (Mode.TRAIN, Mode.GRADIENTS, Mode.TEST)


class Service(StrEnum):
    """A small thing that every stage does by itself."""

    RESET_METRICS = "reset_metrics"
    RESET_STATE = "reset_state"  # forget the states that the last batch left
    FINALIZE = "finalize"  # averages of weights become the weights, where the optimizer keeps them


@dataclass(frozen=True)
class Order:
    """An order without anything to say.

    Attributes:
        do: Its name.
        answered: Whether the worker sends a `Reply`.
    """

    do: ClassVar[str]
    answered: ClassVar[bool] = True

    @property
    def command(self) -> str:
        """Its column in the table of `stages.worker.states`."""
        return self.do

    def plain(self) -> dict[str, Any]:
        """For the wire."""
        return {"do": self.do, **{name: _plain(value) for name, value in vars(self).items()}}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire, ``do`` left out."""
        return cls(**data)


@dataclass(frozen=True)
class Connect(Order):
    """Open a way to every process that hosts a stage this worker sends to.

    Attributes:
        peers: {stage: address}.
    """

    do: ClassVar[str] = "connect"
    peers: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        return cls(peers=_by_stage(data["peers"]))


@dataclass(frozen=True)
class Build(Order):
    """Build the stages; the reply is {stage: `StageDescription.plain`}."""

    do: ClassVar[str] = "build"


@dataclass(frozen=True)
class Strips(Order):
    """Say which inputs lose their mask; the reply is {stage: [tensor name]}."""

    do: ClassVar[str] = "strips"


@dataclass(frozen=True)
class Unmask(Order):
    """Send no mask along with some outputs.

    Attributes:
        pairs: {stage: [(tensor name, consuming stage)]}.
    """

    do: ClassVar[str] = "unmask"
    answered: ClassVar[bool] = False
    pairs: Mapping[int, list[tuple[str, int]]] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        pairs = _by_stage(data["pairs"])
        return cls(pairs={stage: [(name, consumer) for name, consumer in some] for stage, some in pairs.items()})


@dataclass(frozen=True)
class TakePlan(Order):
    """Learn a plan; its actions follow in a message of their own.

    Attributes:
        plan: The number that steps will call it by.
    """

    do: ClassVar[str] = "plan"
    answered: ClassVar[bool] = False
    plan: int = 0


@dataclass(frozen=True)
class StepOrder(Order):
    """One step up to, not including, its update.

    Attributes:
        step: The step's number, from 1, the same in every worker.
        mode: What it is for.
        grid: How the batch is cut into microbatches and windows.
        plan: Number of the plan that says in which order.
        sample_weights: The labels of the outputs whose sample weights come along.
        trace: Whether to note when each action began and ended.
        loss_scale: Factor on every loss while it is differentiated; None: no loss scaling.
        truncate: How many windows a state's gradient goes back through; None: all.
        observe: What to note of tensors at the cuts: ``"values"``, ``"norms"`` or nothing; see
            `stages.worker.observers`.
        squared_norms: Whether the reply says each gradient's sum of squares.
        ways: {label of an output: how its loss and its metrics are made of microbatches}, of those that were tried.
        undo_to: The first of the steps that are undone together with this one, their updates included; 0: it alone,
            and not once its update was ordered.
    """

    do: ClassVar[str] = "step"
    step: int
    mode: Mode
    grid: Grid
    plan: int = 0
    sample_weights: tuple[str, ...] = ()
    trace: bool = False
    loss_scale: float | None = None
    truncate: int | None = None
    observe: str = ""
    squared_norms: bool = False
    ways: Mapping[str, Ways] = field(default_factory=dict)
    undo_to: int = 0

    @property
    def command(self) -> str:
        """A step leaves gradients, or it is a mere forward pass."""
        return "step" if self.mode.training else "forward"

    @property
    def scale(self) -> float:
        """Factor on every loss; 1 without loss scaling."""
        return 1.0 if self.loss_scale is None else self.loss_scale

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        grid = Grid(_unrolled(data["grid"]["sizes"]), _unrolled(data["grid"]["lengths"]))
        labels = tuple(data["sample_weights"])
        ways = {label: Ways(*map(Way, one)) for label, one in data["ways"].items()}
        return cls(**{**data, "mode": Mode(data["mode"]), "grid": grid, "sample_weights": labels, "ways": ways})


@dataclass(frozen=True)
class Apply(Order):
    """Update the variables from the gradients of a step, at most once a step.

    Attributes:
        step: The step's number.
        learning_rates: {stage: rate}; stages that are not there keep theirs.
        scale: Factor on all gradients, for clipping by a global norm.
        divisor: What they are divided by first, for loss scaling.
        attributes: {stage: {name: value}} of its optimizer that are set before the update, from now on.
        write_down: Whether all values are written down then, where they are to outlive the worker.
    """

    do: ClassVar[str] = "apply"
    answered: ClassVar[bool] = False
    step: int
    learning_rates: Mapping[int, float] = field(default_factory=dict)
    scale: float | None = None
    divisor: float | None = None
    attributes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    write_down: bool = True

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        by_stage = {name: _by_stage(data[name]) for name in ("learning_rates", "attributes")}
        return cls(**{**data, **by_stage})


@dataclass(frozen=True)
class Discard(Order):
    """Forget the gradients of a step."""

    do: ClassVar[str] = "discard"
    answered: ClassVar[bool] = False


@dataclass(frozen=True)
class Get(Order):
    """Read arrays; the reply is {stage: how many}, and all of them, stage after stage.

    Attributes:
        what: ``gradients``; ``given gradients``, two arrays a variable as an optimizer gets them: values, and the
            places of an embedding's rows or None; ``kept states``; ``update times``, (begin, end) of the last update,
            seconds of the worker's monotonic clock; or as `HostedStage.variables` calls it.
    """

    do: ClassVar[str] = "get"
    what: str


@dataclass(frozen=True)
class Set(Order):
    """Write arrays, which come in messages of their own.

    Attributes:
        what: As for `Get`.
        counts: {stage: how many}.
    """

    do: ClassVar[str] = "set"
    what: str
    counts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        return cls(data["what"], _by_stage(data["counts"]))


@dataclass(frozen=True)
class CallService(Order):
    """A small service in every stage.

    Attributes:
        service: Which.
    """

    do: ClassVar[str] = "call"
    service: Service

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        return cls(Service(data["service"]))


@dataclass(frozen=True)
class Keep(Order):
    """Set all values aside."""

    do: ClassVar[str] = "keep"


@dataclass(frozen=True)
class PutBack(Order):
    """Put back what `Keep` set aside; the reply is {stage: paths of variables that are not as they were}."""

    do: ClassVar[str] = "put_back"


@dataclass(frozen=True)
class TellSeen(Order):
    """Send what the last step noted at the cuts, and forget it; the reply is [a `Sight` of each array]."""

    do: ClassVar[str] = "seen"


ORDERS: tuple[type[Order], ...] = (
    *(Connect, Build, Strips, Unmask, TakePlan, StepOrder, Apply, Discard),
    *(Get, Set, CallService, Keep, PutBack, TellSeen),
)
"""What every worker understands."""


def of_wire(data: Any, known: Mapping[str, type[Order]]) -> Order:
    """The order in a message.

    Args:
        data: The message's value.
        known: {name: class} of the orders that the worker understands.

    Raises:
        HandoffError: It is none of them, or lacks a part, or has one too many.
    """
    said = dict(data) if isinstance(data, Mapping) else {}
    do = said.pop("do", None)
    if do not in known:
        raise HandoffError(f"the driver ordered {do!r}, which this worker does not know; it knows {', '.join(known)}")
    expected, kind = {one.name for one in fields(known[do])}, known[do]
    if set(said) != expected:
        raise HandoffError(
            f"the order {do!r} has the parts {sorted(said)}, expected {sorted(expected)}; are driver and workers of "
            "one version?"
        )
    return kind.from_plain(said)


def _by_stage(data: Mapping[str, Any]) -> dict[int, Any]:
    """Numbers of stages, which are strings on the wire."""
    return {int(stage): value for stage, value in data.items()}


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """[[number, how often in a row]]: thousands of microbatches have one or two sizes, and an order stays small."""
    return [[number, len(list(run))] for number, run in groupby(numbers)]


def _unrolled(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(number for number, count in runs for _ in range(count))


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Grid):
        return {"sizes": _runs(value.sizes), "lengths": _runs(value.lengths)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, StrEnum) else value


__all__ = [
    "ORDERS",
    "Apply",
    "Build",
    "CallService",
    "Connect",
    "Discard",
    "Get",
    "Keep",
    "Mode",
    "Order",
    "PutBack",
    "Service",
    "Set",
    "StepOrder",
    "Strips",
    "TakePlan",
    "TellSeen",
    "Unmask",
    "of_wire",
]

"""The description of a built stage, as its worker tells it: variables, optimizer slots, tensors.

Written by `HostedStage.describe`, sent once as plain data, read by the driver for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.worker.snapshot import OptimizerSlot

NOT_TRAINED = -1
"""The place of a variable that is not trained."""


@dataclass(frozen=True)
class VariableInfo:
    """A variable of a stage's model.

    Attributes:
        name: Its path in the model, with ``#2`` and so on where the path repeats.
        dtype: Name of its dtype.
        shape: Its shape.
        place: Index among the stage's trainable variables, or `NOT_TRAINED`.
        is_weight: Whether it is among the model's `weights`; seed states are not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: int = NOT_TRAINED
    is_weight: bool = True

    @property
    def trained(self) -> bool:
        """Whether it is one of the stage's trainable variables."""
        return self.place != NOT_TRAINED

    def plain(self) -> list[Any]:
        """As JSON; checkpoints keep it so."""
        return [self.name, self.dtype, list(self.shape), self.place, self.is_weight]

    @classmethod
    def from_plain(cls, data: Sequence[Any]) -> VariableInfo:
        """From JSON."""
        name, dtype, shape, place, is_weight = data
        return cls(name, dtype, tuple(shape), place, is_weight)


class TensorInfo(NamedTuple):
    """An input or output of a stage's model.

    Attributes:
        dtype: Name of its dtype.
        shape: Its shape, None for free dimensions.
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class StageDescription:
    """A built stage.

    Attributes:
        variables: All of the model's, in order.
        slots: What the optimizer's variables belong to, in their order; () without an optimizer.
        masks: Whether the model may begin a mask.
        mean_loss: Whether a loss of the stage is a mean, whose denominator depends on masks.
        inputs: The model's, carried states behind them; None for a model that does not tell.
        outputs: Likewise.
    """

    variables: tuple[VariableInfo, ...]
    slots: tuple[OptimizerSlot, ...]
    masks: bool
    mean_loss: bool
    inputs: tuple[TensorInfo, ...] | None
    outputs: tuple[TensorInfo, ...] | None

    @property
    def weights(self) -> tuple[VariableInfo, ...]:
        """The model's weights, in the order of `get_weights`."""
        return tuple(variable for variable in self.variables if variable.is_weight)

    @property
    def trained(self) -> tuple[int, ...]:
        """Index among `variables` of each trainable variable, in the order of the trainable ones."""
        found = {variable.place: k for k, variable in enumerate(self.variables) if variable.trained}
        return tuple(found[place] for place in sorted(found))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "variables": [variable.plain() for variable in self.variables],
            "slots": [list(slot) for slot in self.slots],
            "masks": self.masks,
            "mean_loss": self.mean_loss,
            "inputs": _plain_tensors(self.inputs),
            "outputs": _plain_tensors(self.outputs),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> StageDescription:
        """From JSON."""
        return cls(
            tuple(VariableInfo.from_plain(variable) for variable in data["variables"]),
            tuple(OptimizerSlot(*slot) for slot in data["slots"]),
            data["masks"],
            data["mean_loss"],
            _tensors(data["inputs"]),
            _tensors(data["outputs"]),
        )


def _plain_tensors(tensors: Sequence[TensorInfo] | None) -> list[Any] | None:
    return None if tensors is None else [[dtype, list(shape)] for dtype, shape in tensors]


def _tensors(data: Sequence[Any] | None) -> tuple[TensorInfo, ...] | None:
    return None if data is None else tuple(TensorInfo(dtype, tuple(shape)) for dtype, shape in data)


__all__ = ["NOT_TRAINED", "StageDescription", "TensorInfo", "VariableInfo"]

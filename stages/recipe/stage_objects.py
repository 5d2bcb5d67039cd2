"""The user's own objects that one stage needs, as its worker gets them.

They travel together, so that what they share (a variable of the loss that is a layer's too, a schedule) stays shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.recipe.by_value import Packed, pack, unpack


@dataclass(frozen=True, eq=False)
class Built:
    """A part that its worker builds.

    Attributes:
        build: The function, or its ``"module:name"``.
        kwargs: Its keyword arguments.
    """

    build: Callable[..., Any] | str
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Judging:
    """Loss and metrics of one output, each as `keras.Model.compile` takes it for one.

    Attributes:
        loss: Or None.
        metrics: A list, or None.
        weighted_metrics: Likewise.
        weight: The loss weight if it is a variable, which the user may assign; else None.
    """

    loss: Any = None
    metrics: Any = None
    weighted_metrics: Any = None
    weight: Any = None


@dataclass(frozen=True, eq=False)
class StageObjects:
    """The objects of one stage.

    Attributes:
        part: The Keras model, or how to build it.
        judging: What judges each of its outputs that has a loss or metrics, in the order of the stage's heads.
        optimizer: Its optimizer, not built; or None.
        variables: Variables that came along with their values: those of losses, and what a layer holds untracked.
            Not those of the part, the metrics and the optimizer. In the same order on both sides.
    """

    part: Any
    judging: Sequence[Judging] = ()
    optimizer: Any = None
    variables: Sequence[Any] = ()

    def packed(
        self, what: str, *, foreign: Mapping[int, str], optimizer_attributes: Mapping[str, Any]
    ) -> tuple[bytes, list[Any]]:
        """As bytes for the worker, and those variables here whose copies are `variables` there.

        Args:
            what: The stage, for messages.
            foreign: {id of a variable: the stage that has it}, of variables that are in other stages only.
            optimizer_attributes: What the copy of the optimizer is to have set.

        Raises:
            RecipeError: Something cannot be copied.
        """
        own = getattr(self.part, "variables", ())
        unbuilt = [] if self.optimizer is None else [(self.optimizer, optimizer_attributes)]
        things = (self.part, tuple(self.judging), self.optimizer)
        found: Packed = pack(things, what, without_values=own, foreign=foreign, unbuilt=unbuilt)
        return found.data, _besides(found.variables, self.part, self.judging, self.optimizer)

    @classmethod
    def of(cls, data: bytes) -> StageObjects:
        """The objects from bytes; see `stages.recipe.by_value` for where these may come from.

        Raises:
            RecipeError: A module that they need cannot be imported.
        """
        found = unpack(data)
        part, judging, optimizer = found.thing
        return cls(part, judging, optimizer, _besides(found.variables, part, judging, optimizer))


def _besides(variables: Sequence[Any], part: Any, judging: Sequence[Judging], optimizer: Any) -> list[Any]:
    """Variables that are neither a metric's, a layer's metrics included, nor the optimizer's."""
    known = {id(variable) for variable in getattr(optimizer, "variables", ())}
    known |= {id(variable) for variable in getattr(part, "metrics_variables", ())}
    for one in judging:
        for metric in [*_metrics(one.metrics), *_metrics(one.weighted_metrics)]:
            known |= {id(variable) for variable in getattr(metric, "variables", ())}
    return [variable for variable in variables if id(variable) not in known]


def _metrics(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


__all__ = ["Built", "Judging", "StageObjects"]

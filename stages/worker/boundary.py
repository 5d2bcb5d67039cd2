"""The values of a worker's stages where an order has changed them, written down in memory that outlives the worker.

    order 7: step        nothing, until it is decided upon      order 9: evaluation   statistics, metrics, states
    order 8: update      everything                             order 10: set values  everything

A *boundary* is what the values are behind such an order; its stamp is the order's number, the same in every worker. As
the memory has two slots, the boundary before is there too: the driver gives no order that makes another boundary before
every worker has written down the last one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.process.boundary_memory import BoundaryMemory, Region
from stages.put_back import held_by
from stages.worker.hosted_stage import HostedStage
from stages.worker.orders import Apply, Build, CallService, Discard, Keep, Mode, Order, PutBack, Service, Set, StepOrder
from stages.worker.recovery_orders import GoOnAs, WriteDown
from stages.worker.written_values import GROUPS

Array = np.ndarray[Any, Any]
_EAGERLY = 24
"""So many times the large region is read variable by variable."""
_CHANGE_ALL = (Build, Set, PutBack, Keep, WriteDown, GoOnAs)


class BoundaryWriter:
    """Writes down a worker's values.

    Args:
        descriptor: Of the memory.
        hosted: Its stages by number; they may come later.
    """

    def __init__(self, descriptor: int, hosted: Mapping[int, HostedStage]) -> None:
        self._memory = BoundaryMemory(descriptor)
        self._hosted = hosted
        self._behind = True
        self._last: StepOrder | None = None
        self._number = 0
        self._large = _Large()

    def passed(self, order: Order, number: int) -> None:
        """Write down what an order has changed, if it is one behind which there is a boundary.

        Args:
            order: It was carried out a moment ago.
            number: The order's.
        """
        if isinstance(order, StepOrder):
            self._last, self._number = order, number
        if isinstance(order, (*_CHANGE_ALL, Apply)) or (
            isinstance(order, CallService) and order.service is Service.FINALIZE
        ):
            self._behind = True
        if isinstance(order, _CHANGE_ALL):
            self._large.known = False  # an optimizer may have been built anew
        if self._is_boundary(order):
            self._write(number)

    def take_back_step(self) -> None:
        """The last step was undone: what was written down behind it is not so."""
        if self._last is not None:
            self._memory.forget(self._number)

    def _is_boundary(self, order: Order) -> bool:
        if isinstance(order, Apply):
            return order.write_down
        if isinstance(order, StepOrder):
            return order.mode in (Mode.TEST, Mode.PREDICT)
        if isinstance(order, Discard):
            return self._last is not None and self._last.mode is Mode.TRAIN
        return isinstance(order, (*_CHANGE_ALL, CallService))

    def _write(self, number: int) -> None:
        if self._behind:
            values = self._large.read(self._hosted)
            self._memory.write(Region.LARGE, number, self._large.head, [_bytes(value) for value in values])
            self._behind = False
        groups = [(i, group, _small(one, group)) for i, one in self._hosted.items() for group in GROUPS[Region.SMALL]]
        values = [np.asarray(tensor) for _, _, some in groups for tensor in some]
        examples = {str(i): [head.example for head in one.heads] for i, one in self._hosted.items()}
        self._memory.write(Region.SMALL, number, _head(groups, values, examples), [_bytes(value) for value in values])


class _Large:
    """The variables of the large region, listed once, and soon read by one call in place of one each.

    Attributes:
        head: What they are.
        known: Whether the list is still right.
    """

    def __init__(self) -> None:
        self.head, self.known = b"", False
        self._variables: list[Any] = []
        self._reads = 0
        self._all: Any = None

    def read(self, hosted: Mapping[int, HostedStage]) -> list[Array]:
        """The values, which later updates leave as they are."""
        if not self.known:
            self._list(hosted)
        self._reads += 1
        if self._reads == _EAGERLY:  # a trace takes longer than some reads, and another worker waits for these
            variables = self._variables
            self._all = tf.function(lambda: [variable.read_value() for variable in variables])
        if self._all is None:
            return [np.asarray(variable.read_value()) for variable in self._variables]
        return [np.asarray(tensor) for tensor in self._all()]

    def _list(self, hosted: Mapping[int, HostedStage]) -> None:
        groups = [(i, group, one.variables(group)) for i, one in hosted.items() for group in GROUPS[Region.LARGE]]
        variables = [held_by(variable) for _, _, some in groups for variable in some]
        if [id(one) for one in variables] != [id(one) for one in self._variables]:
            self._variables, self._reads, self._all = variables, 0, None
            self.head = _head(groups, [np.asarray(variable.read_value()) for variable in variables], {})
        self.known = True


def _small(hosted: HostedStage, group: str) -> list[Any]:
    """The tensors of a group that any pass may change."""
    if group == "kept states":
        kept = {} if hosted.stage.carried is None else hosted.stage.carried.kept
        return [state for k in sorted(kept) for state in kept[k]]
    return [held_by(variable).read_value() for variable in hosted.variables(group)]


def _head(
    groups: Sequence[tuple[int, str, Sequence[Any]]], values: Sequence[Array], examples: Mapping[str, Any]
) -> bytes:
    """What the values are, as JSON."""
    kinds = iter([[value.dtype.name, list(value.shape)] for value in values])
    listed = [[stage, group, [next(kinds) for _ in some]] for stage, group, some in groups]
    return json.dumps({"groups": listed, "examples": examples}).encode()


def _bytes(value: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


__all__ = ["BoundaryWriter"]

"""The arrays of a stage that the driver reads and writes by the name of a group: the orders `Get` and `Set`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.tape.embedding_rows import from_parts, parts_of
from stages.tape.tensors import to_array, to_tensor
from stages.worker import snapshot

if TYPE_CHECKING:
    from stages.worker.base import BaseWorker

Array = np.ndarray[Any, Any]


def read_group(worker: BaseWorker, stage: int, what: str) -> Sequence[Array | None]:
    """The arrays of a stage's group, each of its variable's shape and dtype.

    Args:
        worker: Who hosts the stage.
        stage: Its number.
        what: The group's name; see `Get`.
    """
    hosted = worker.hosted[stage]
    if what == "gradients":
        return worker.gradients(stage)
    if what == "given gradients":
        parts = [part for gradient in worker.given_gradients(stage) for part in parts_of(gradient)]
        return [None if part is None else to_array(part) for part in parts]
    if what == "optimizer":
        return worker.optimizer_values(stage)
    if what == "kept states":
        kept = {} if hosted.stage.carried is None else hosted.stage.carried.kept
        return [to_array(state) for k in sorted(kept) for state in kept[k]]
    if what == "update times":
        return [None if hosted.update_times is None else np.array(hosted.update_times)]
    return snapshot.read(hosted.variables(what))


def write_group(worker: BaseWorker, stage: int, what: str, arrays: Sequence[Array | None]) -> None:
    """Write a stage's group: the inverse of `read_group`."""
    values = [array for array in arrays if array is not None]
    if what == "given gradients":
        variables = worker.hosted[stage].stage.trainable_variables
        tensors = [None if array is None else to_tensor(np.array(array)) for array in arrays]
        pairs = zip(tensors[::2], tensors[1::2], variables, strict=True)
        worker.set_given_gradients(stage, [from_parts(values, places, v.shape) for values, places, v in pairs])
    elif what == "optimizer":
        worker.set_optimizer_values(stage, values)
    elif what == "kept states":
        _begin_with(worker, stage, values)
    else:
        worker.hosted[stage].set(what, values)


def _begin_with(worker: BaseWorker, stage: int, values: Sequence[Array]) -> None:
    """Let a stage begin with states that another run's batch left, microbatch after microbatch; none: begin anew."""
    carried = worker.hosted[stage].stage.carried
    if carried is not None:
        count = len(carried)
        carried.kept = {
            k: tuple(to_tensor(np.array(value)) for value in values[k * count : (k + 1) * count])
            for k in range(len(values) // count)
        }


__all__ = ["read_group", "write_group"]

"""The messages of one batch: the order of its step, inputs and targets on their way to the stages, outputs back.

Activations never pass through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.batch.step import Batch
from pipeline.plan.plan import Plan
from stages.grid import Grid
from stages.worker.orders import Mode, StepOrder
from stages.worker.stage_spec import StageSpec
from transport.message import DRIVER, Key, Message

Array = np.ndarray[Any, Any]


def order_of(plan: Plan, mode: Mode, batch: Batch) -> StepOrder:
    """The order of a step with nothing asked for beside what its mode gives; its numbers are still to be set."""
    grid = Grid(tuple(batch.sizes), tuple(batch.lengths))
    weights = tuple(batch.sample_weights)
    return StepOrder(0, mode, grid, sample_weights=weights, truncate=plan.truncate, ways=batch.ways)


def batch_messages(
    placement: Sequence[Sequence[StageSpec]], mode: Mode, batch: Batch, incarnation: int, step: int
) -> Iterator[tuple[int, Message]]:
    """(worker, message) of everything that a batch gives to stages: inputs where they enter, targets to the loss.

    Args:
        placement: For each worker the stages it hosts.
        mode: What the step is for.
        batch: The data.
        incarnation: Of the run.
        step: The step's number.
    """
    for worker, specs in enumerate(placement):
        for spec in specs:
            entering = [name for name, source in spec.inputs if source == DRIVER]
            data = [("activation", name, batch.inputs[name]) for name in entering]
            for head in spec.heads if mode.with_loss else ():
                data.append(("target", head.label, batch.targets[head.label]))
                if head.label in batch.sample_weights:
                    data.append(("sample_weight", head.label, batch.sample_weights[head.label]))
            for kind, name, array in data:
                yield worker, Message(kind, incarnation, step, spec.index, DRIVER, name, array=array)


def joined_outputs(
    wait: Callable[[Key], Message],
    specs: Sequence[StageSpec],
    batch: Batch,
    step: int,
    over_time: Callable[[int, str], bool],
) -> dict[str, Array]:
    """{name: an output (n, ...) of the whole model}, of a step that predicts.

    Args:
        wait: Waits for the message under a key.
        specs: The stages.
        batch: The data.
        step: The step's number.
        over_time: Whether a stage's output of a name has a time axis; what has none comes from the last window.
    """
    windows = len(batch.lengths) if batch.lengths else 1
    found = {}
    for spec in specs:
        for name in dict.fromkeys(spec.finals):
            first = 0 if over_time(spec.index, name) else windows - 1
            rows = []
            for k in range(len(batch.sizes)):
                keys = [Key("output", step, DRIVER, spec.index, name, k, w) for w in range(first, windows)]
                parts = [part for key in keys if (part := wait(key).array) is not None]
                rows.append(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
            found[name] = np.concatenate(rows)
    return found


__all__ = ["batch_messages", "joined_outputs", "order_of"]

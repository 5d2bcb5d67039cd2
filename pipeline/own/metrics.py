"""The user's own metric objects on predictions in this process, to compare the workers' copies with.

Predictions round otherwise in another process, and a metric may jump: an accuracy counts a sample or does not. So a
metric may differ by what it does when the predictions are changed at random by as much as they may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.batch.step import Batch
from pipeline.compiled.compiled import Compiled
from pipeline.distance import distance
from pipeline.model.wiring import Wires
from pipeline.own.model import as_tensors
from stages.loss.head import LossModel
from stages.masks import mask_of, with_mask
from stages.recipe.held_attributes import HeldAttributes

Array = np.ndarray[Any, Any]
CHANGED_PREDICTIONS = 8
JUMPS = 4
"""So many times what random changes of the predictions do to a metric is allowed."""
PARTS = 1e-4
"""What counting microbatches in place of the batch may change, as a part of the value."""


class OwnMetrics:
    """The metrics that `compile` was given, counted once for one batch.

    Args:
        compiled: What `compile` was given.
        wires: Names the outputs.
    """

    def __init__(self, compiled: Compiled, wires: Wires) -> None:
        self._labelled = [(name, label) for name, label in wires.labelled if label in compiled.heads]
        self._several = len(wires.labelled) > 1
        self._given = {one.label: one for one in compiled.objectives if one.metrics or one.weighted_metrics}

    def apart(self, theirs: Mapping[str, Any], tensors: Mapping[str, Any], batch: Batch, rounding: float) -> str:
        """Of which metric the workers have another value, in words; "" of none.

        Args:
            theirs: {name in the logs: the workers' value}.
            tensors: {tensor name: predictions (n, ...) of the own model}, with their masks.
            batch: Targets and sample weights.
            rounding: What predictions may differ by, as a part of the largest.
        """
        with _kept(self._given.values()):
            own = self._values(tensors, batch)
            by = {name: distance(theirs[name], value) for name, value in own.items() if name in theirs}
            far = {name: much for name, much in by.items() if much > PARTS}
            if not far:
                return ""
            draw = np.random.default_rng(0)
            runs = [self._values(tensors, batch)]
            for _ in range(CHANGED_PREDICTIONS):
                runs.append(self._values({name: _changed(t, rounding, draw) for name, t in tensors.items()}, batch))
        for name, much in far.items():
            if runs[0][name] == own[name] and much > JUMPS * max(distance(run[name], own[name]) for run in runs):
                return f"the metric {name!r} ({_shown(theirs[name])} there, {_shown(own[name])} here)"
        return ""

    def _values(self, tensors: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        """The metrics of one batch, by their names in the logs."""
        found: dict[str, Any] = {}
        for name, label in self._labelled:
            if (given := self._given.get(label)) is None:
                continue
            judge = LossModel()
            judge.compile(optimizer=None, metrics=given.metrics, weighted_metrics=given.weighted_metrics)
            target, weight = as_tensors(batch, label)
            judge.compute_metrics(None, target, tensors[name], weight)
            judge.reset_metrics()  # what was made by the first call counts from zero as well
            judge.compute_metrics(None, target, tensors[name], weight)
            prefix = f"{label}_" if self._several else ""
            results = judge.get_metrics_result().items()
            found |= {f"{prefix}{key}": np.asarray(value).tolist() for key, value in results if key != "loss"}
        return found


@contextmanager
def _kept(objectives: Iterable[Any]) -> Iterator[None]:
    """The user's metric objects have their values afterwards; what they made meanwhile counts from zero."""
    given = keras.tree.flatten([[one.metrics, one.weighted_metrics] for one in objectives])
    metrics = [one for one in given if isinstance(one, keras.metrics.Metric)]
    before = [(variable, variable.numpy()) for metric in metrics for variable in metric.variables]
    attributes = HeldAttributes(metrics)
    try:
        yield
    finally:
        for metric in metrics:
            metric.reset_state()
        attributes.put_back()
        for variable, value in before:
            variable.assign(value)


def _changed(tensor: Any, by: float, draw: np.random.Generator) -> Any:
    if not tensor.dtype.is_floating:
        return tensor
    array = np.asarray(tf.cast(tensor, tf.float64))
    noise = by * float(np.abs(array).max(initial=0.0)) * draw.uniform(-1, 1, array.shape)
    return with_mask(tf.cast(array + noise, tensor.dtype), mask_of(tensor))


def _shown(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


__all__ = ["OwnMetrics"]

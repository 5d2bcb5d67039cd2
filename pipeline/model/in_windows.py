"""The comparison of a run over the whole length with one in windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.distance import distance
from pipeline.model.call_graph import Call

Array = np.ndarray[Any, Any]
ALLOWED = 1e-3
"""A difference up to this part of the largest |value| is rounding; a step that is missing changes much more."""
LOW_PRECISION = 0.1
"""The same where a tensor has less than 24 bits of mantissa."""


def put_back_only(statistics: Sequence[Any], variables: Sequence[Any], before: Sequence[Any]) -> None:
    """Give statistics their values back; seeds go on."""
    chosen = {id(variable) for variable in statistics}
    for variable, value in zip(variables, before, strict=True):
        if id(variable) in chosen:
            variable.value.assign(value)


def added_losses(model: Any) -> Any:
    """The losses that a model adds itself, weights' regularisers left out: they count once a batch."""
    losses = list(model.losses)
    count = len(losses) - sum(v.regularizer is not None for v in model.trainable_weights)
    return tf.add_n([tf.zeros(()), *(tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in losses[:count])])


def same(ours: Any, theirs: Any) -> bool:
    """Whether two tensors are equal to within rounding; what is not finite in both is equal."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return False
    if not ours.dtype.is_floating:
        return bool(np.array_equal(np.asarray(ours), np.asarray(theirs)))
    low = ours.dtype.size < 4
    return distance(ours, theirs) <= (LOW_PRECISION if low else ALLOWED)


def largest_value(array: Array) -> float:
    """The largest |value|."""
    return float(np.abs(array).max(initial=0.0))


def called(call: Call) -> str:
    """A call as messages name it: the layer's or operation's name and kind."""
    kind = type(call.operation).__name__
    what = "layer" if isinstance(call.operation, keras.Layer) else "operation"
    return f"the {what} {call.name!r} ({kind})"

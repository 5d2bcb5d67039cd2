"""In which way the loss and the metrics of an output are made of a batch's microbatches.

    PARTS   L = sum of w_k L_k, w_k from the denominators that Keras would divide by (`Head.weights`)
    SUM     L = sum of L_k: the function adds over samples by itself
    WHOLE   L is that of all predictions joined: a batch's number that no sum of its parts is

Keras's own losses and metrics are known. Another one is tried on a batch and its parts (`stages.loss.trial`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

import keras

from stages.keras_training_internals import function_arguments, wrapped_function

_OF_A_BATCH = ("dice", "tversky", "circle")
"""Functions of Keras that give one number a batch; the first two only unless told along which axes they sum."""


class Way(StrEnum):
    """The way from the microbatches' values to the batch's; see the module."""

    PARTS = "parts"
    SUM = "sum"
    WHOLE = "whole"


class Ways(NamedTuple):
    """Of one output.

    Attributes:
        loss: How its loss is made.
        metrics: How its metrics count: PARTS, every microbatch; or WHOLE, once the whole batch.
    """

    loss: Way = Way.PARTS
    metrics: Way = Way.PARTS


def known_loss(loss: Any) -> Way | None:
    """The way of one of Keras's losses; None of another one, and PARTS where there is none.

    Args:
        loss: As `keras.losses.get` gives it. Of one that sums along other axes than the last, None, too: whether the
            samples, or time steps that windows cut, are among them depends on the predictions.
    """
    if loss is None:
        return Way.PARTS
    function = wrapped_function(loss) or loss
    name = getattr(loss, "__name__", getattr(function, "__name__", None))
    if not (_is_of_keras(loss) and _is_of_keras(function)):
        return None
    if name == "circle" or isinstance(loss, keras.losses.Circle):
        return Way.WHOLE
    axis = function_arguments(loss).get("axis", None if name in _OF_A_BATCH else -1)
    axes = axis if isinstance(axis, list | tuple) else (axis,)
    if None in axes or 0 in axes:
        return Way.WHOLE
    return None if min(axes) < -1 or max(axes) > 0 else Way.PARTS


def known_metrics(metrics: Any) -> Way | None:
    """PARTS if all metrics of an output are Keras's own, which count samples; None if they must be tried.

    Args:
        metrics: A list of names, functions and objects, or None.
    """
    return Way.PARTS if all(map(_counts_samples, metrics or ())) else None


def _counts_samples(metric: Any) -> bool:
    if isinstance(metric, str):
        return metric not in _OF_A_BATCH
    if isinstance(metric, keras.losses.Loss) or not _is_of_keras(metric):  # a loss gives its mean over a batch
        return False
    function = wrapped_function(metric) or metric
    return _is_of_keras(function) and getattr(function, "__name__", None) not in _OF_A_BATCH


def _is_of_keras(thing: Any) -> bool:
    kind = thing if hasattr(thing, "__name__") else type(thing)
    return str(getattr(kind, "__module__", "")).split(".")[0] == "keras"


__all__ = ["Way", "Ways", "known_loss", "known_metrics"]

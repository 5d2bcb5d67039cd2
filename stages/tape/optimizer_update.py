"""One step of a Keras optimizer from accumulated gradients: rescaled as Keras does, and counted without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from stages.keras_training_internals import update_nothing
from stages.loss.precision import rounded_once
from stages.tape.accumulate import dense


def update(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """One step of an optimizer, also where no objective reaches a variable of the stage.

    One optimizer over all stages counts every step, and takes every variable into its averages. Keras's `apply` does
    nothing without gradients; the stage's count would stay behind, and its averages would stay zero.

    As Keras's trainer, it calls `apply_gradients`, which an optimizer of the user's own may override.
    """
    if gradients:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        update_nothing(optimizer)


def rescaled(gradients: Sequence[Any], scale: Any | None, divisor: Any | None) -> list[Any]:
    """Gradients over a divisor (the loss scale), then times a factor (of clipping); None leaves a step out.

    As in Keras, an embedding's rows stay apart when they are divided, and are summed when the global norm clips them.
    """
    if divisor is not None:
        gradients = [_with_values(g, tf.divide(_values(g), rounded_once(divisor, g.dtype))) for g in gradients]
    if scale is not None:
        gradients = [tf.multiply(dense(g), rounded_once(scale, g.dtype)) for g in gradients]
    return list(gradients)


def _values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Any, values: Any) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return values
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


__all__ = ["rescaled", "update"]

"""Layouts of ragged series: elements first, as a `tf.RaggedTensor`, and the steps of a batch as every sample's.

`RaggedSteps` puts the batch first, since that is the axis that microbatches are cut along. All functions here only move
values, so gradients pass through them unchanged; none passes through padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.masks import mask_of, with_mask

__all__ = ["as_ragged", "batch_first", "elements_first", "row_lengths", "steps_per_sample"]


def elements_first(padded: Any) -> Any:
    """(batch, elements, longest, ...) → (elements, longest, batch, ...)."""
    padded = _of_rank(padded, 3, "a padded series (batch, elements, longest, ...)")
    return tf.transpose(padded, [1, 2, 0, *range(3, padded.shape.rank)])


def batch_first(padded: Any) -> Any:
    """(elements, longest, batch, ...) → (batch, elements, longest, ...), as targets must have it."""
    padded = _of_rank(padded, 3, "a padded series (elements, longest, batch, ...)")
    return tf.transpose(padded, [2, 0, 1, *range(3, padded.shape.rank)])


def row_lengths(padded: Any) -> Any:
    """How many steps every row has, (batch, elements) int32, by the mask of what `RaggedSteps` gave.

    Raises:
        HandoffError: The tensor has no mask; most operations of TensorFlow's lose it, Keras layers keep it.
    """
    mask = mask_of(padded)
    if mask is None:
        raise HandoffError(
            "expected the output of a RaggedSteps with its mask, received a tensor without one; take the lengths from "
            "RaggedSteps(..., return_lengths=True)"
        )
    return tf.reduce_sum(tf.cast(mask, tf.int32), axis=-1)


def as_ragged(padded: Any, lengths: Any) -> Any:
    """The padded series without its padding.

    Args:
        padded: (rows..., longest, ...), with as many row axes as `lengths` has axes.
        lengths: Integers (rows...), for example (batch, elements), or (elements,) for a series with elements first.

    Returns:
        A `tf.RaggedTensor` (rows..., None, ...). Differentiable.

    Raises:
        HandoffError: The shapes do not belong together.
    """
    lengths = tf.convert_to_tensor(lengths)
    padded = tf.convert_to_tensor(padded)
    rank = lengths.shape.rank
    if rank < 1 or padded.shape.rank <= rank or not padded.shape[:rank].is_compatible_with(lengths.shape):
        raise HandoffError(
            f"expected lengths of the shape of the leading axes of {tuple(padded.shape)}, received "
            f"{tuple(lengths.shape)}; (batch, elements) for what RaggedSteps gives, (elements,) with elements first"
        )
    rows = tf.reshape(padded, tf.concat([[-1], tf.shape(padded)[rank:]], axis=0))
    ragged = tf.RaggedTensor.from_tensor(rows, lengths=tf.reshape(lengths, [-1]))
    for size in reversed(lengths.shape[1:]):
        ragged = tf.RaggedTensor.from_uniform_row_length(ragged, size)
    return ragged


def steps_per_sample(steps: Sequence[int] | Any, batch: int) -> np.ndarray[Any, Any]:
    """The steps of a batch (elements,) for each of its samples, (batch, elements) int32: what a pipeline can cut."""
    found = np.asarray(steps)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise HandoffError(f"expected whole numbers of the shape (elements,), received {found.dtype} {found.shape}")
    return np.tile(found.astype(np.int32), (batch, 1))


def _of_rank(tensor: Any, rank: int, expected: str) -> Any:
    """A tensor of at least this rank, without a mask."""
    tensor = with_mask(tensor, None)
    if tensor.shape.rank < rank:
        raise HandoffError(f"expected {expected}, received the shape {tuple(tensor.shape)}")
    return tensor

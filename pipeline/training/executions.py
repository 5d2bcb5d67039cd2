"""The batches of one execution: so many as `steps_per_execution` says, or fewer where the data end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import keras
import tensorflow as tf


def next_batches(iterator: Any, most: int) -> Iterator[Any]:
    """The next batches of Keras's iterator over an epoch's data, read as they are asked for.

    Args:
        iterator: Gives batches; a data set's end may come as `tf.errors.OutOfRangeError`.
        most: How many at most.
    """
    try:
        for data in islice(iterator, most):
            yield keras.tree.map_structure(_present, data)
    except tf.errors.OutOfRangeError:
        return


def _present(one: Any) -> Any:
    """A part of a batch; None where a data adapter says so in TensorFlow's way."""
    return None if isinstance(one, tf.experimental.Optional) else one


__all__ = ["next_batches"]

"""Random numbers that a model's inputs may have, padded in front, behind and between where something masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

SIZE = 4
"""Of every axis that a model leaves free, but for samples and time."""


def random_input(
    random: np.random.Generator, dtype: str, shape: Sequence[int], readers: Sequence[Any], ends: Sequence[int] | None
) -> Any:
    """A tensor for one input.

    Args:
        random: Draws.
        dtype: The input's.
        shape: The input's, (n, ...), or (n, time, ...) where `ends` are given.
        readers: The layers and operations that read it: embeddings bound the numbers, masking layers say what pads.
        ends: The time steps in front of which windows end; None: it is not over time.
    """
    over = ends is not None
    kept = _kept(shape[0], shape[1], ends) if ends is not None else None
    words = [layer.input_dim for layer in readers if isinstance(layer, keras.layers.Embedding)]
    padded = kept if over and len(shape) == 2 else None
    kind = tf.as_dtype(dtype)
    if kind == tf.bool:
        return tf.constant(random.random(shape) < 0.5 if padded is None else padded)
    if not kind.is_floating:
        numbers = random.integers(min(1, min(words, default=2) - 1), min(words, default=2), shape)
        return tf.constant(numbers if padded is None else numbers * padded, dtype)
    array = random.normal(size=shape)
    for layer in readers:
        if isinstance(layer, keras.layers.Masking) and kept is not None:
            array[~kept] = layer.mask_value
    if words:
        array = random.uniform(0, min(words), shape).astype(np.int64).astype(np.float64)
        array = array if padded is None else array * padded
    return tf.constant(array, dtype)


def _kept(samples: int, steps: int, ends: Sequence[int]) -> np.ndarray[Any, Any]:
    """(n, time) of bool: padding in front, behind, over whole windows, at the begin of a window, and none."""
    kept = np.ones((samples, steps), bool)
    for row in range(samples):
        if row % 4 == 0:
            kept[row, ends[:-1]] = False
            kept[row, 0] = False
        elif row % 4 == 1:
            kept[row, ends[0] - 1 :] = False
        elif row % 4 == 2:
            kept[row, : ends[0] + 1] = False
    return kept

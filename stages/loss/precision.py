"""The float type of losses, of what they weigh and of their sums: float32, or float64 where that is Keras's own.

Whoever says `keras.config.set_floatx("float64")` (or has it in `keras.json`) wants 53 bits everywhere: a microbatch's
third of a batch, kept in float32, would be wrong by 3e-8 in every gradient.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

__all__ = ["float_of_losses", "loss_number", "rounded_once"]


def float_of_losses() -> str:
    """The float type, by name; Keras's setting of this moment decides."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def loss_number(value: float) -> np.floating[Any]:
    """A loss, or a number that it is multiplied with, as a NumPy scalar of the float type."""
    number: np.floating[Any] = np.dtype(float_of_losses()).type(value)
    return number


def rounded_once(number: Any, dtype: Any) -> Any:
    """A Python number, or a float tensor or variable, as a tensor of a dtype.

    `tf.cast` makes float32 of a Python number first, whatever it is asked for.
    """
    return tf.constant(number, dtype) if isinstance(number, int | float) else tf.cast(number, dtype)

"""The Keras mask of a tensor: reading it, and putting it on a tensor that has crossed a cut."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["mask_of", "with_mask"]


def mask_of(tensor: Any) -> Any | None:
    """The Keras mask that rides on a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def with_mask(tensor: Any, mask: Any | None) -> Any:
    """The tensor under a new name, carrying this mask and none of Keras's other hidden attributes."""
    copy = tf.identity(tensor)
    if mask is not None:
        copy._keras_mask = mask
    return copy

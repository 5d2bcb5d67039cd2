"""The Keras mask of a tensor: reading it, and putting it on a tensor that has crossed a cut."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from stages.keras_internals import mask_of, set_mask

__all__ = ["mask_of", "with_mask"]


def with_mask(tensor: Any, mask: Any | None) -> Any:
    """The tensor under a new name, carrying this mask and none of Keras's other hidden attributes."""
    copy = tf.identity(tensor)
    if mask is not None:
        set_mask(copy, mask)
    return copy

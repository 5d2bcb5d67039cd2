"""The Keras mask of a tensor: reading it, and putting it on a tensor that has crossed a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from stages.keras_internals import mask_of, set_mask

__all__ = ["joined_with_masks", "mask_of", "with_mask"]


def with_mask(tensor: Any, mask: Any | None) -> Any:
    """The tensor under a new name, carrying this mask and none of Keras's other hidden attributes."""
    copy = tf.identity(tensor)
    if mask is not None:
        set_mask(copy, mask)
    return copy


def joined_with_masks(tensors: Sequence[Any]) -> Any:
    """Tensors (n_k, ...) one behind the other along the first axis, and their masks likewise, if the first has one."""
    masks = [mask_of(tensor) for tensor in tensors]
    whole = tf.concat(list(tensors), axis=0)
    return whole if masks[0] is None else with_mask(whole, tf.concat(masks, axis=0))

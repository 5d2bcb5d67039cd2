"""Between TensorFlow's tensors and the NumPy arrays that travel, and between nested and flat.

Hand-offs work on flat tuples of tensors; the order is that of `keras.tree.flatten` on the model's own inputs and
outputs. A received array may become a tensor without a copy only if it is 64-byte aligned, writable and contiguous:
TensorFlow aborts the process on a misaligned buffer, so everything else is copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_ALIGNMENT = 64
_SHARE_BYTES = 64
"""Sharing takes 1 us and a copy by `tf.constant` at least 10; less than one cache line is not worth asking."""
_NO_DLPACK = {"bfloat16", "bool"}


def to_tensor(array: np.ndarray[Any, Any]) -> Any:
    """An eager tensor with the array's values; shares memory with aligned arrays.

    The caller must not write to the array afterwards: a tape or a variable may still alias it.
    """
    if (
        array.nbytes >= _SHARE_BYTES
        and array.flags.c_contiguous
        and array.flags.writeable
        and array.dtype.kind in "fiu"
        and array.dtype.isbuiltin == 1
        and ctypes.addressof(ctypes.c_char.from_buffer(array.data)) % _ALIGNMENT == 0
    ):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def to_array(tensor: Any) -> np.ndarray[Any, Any]:
    """The values of an eager tensor as a read-only array that shares its memory."""
    return np.asarray(tensor)


def flatten(structure: Any) -> tuple[Any, ...]:
    """The leaves of nested lists, tuples and dicts, in Keras's order."""
    return tuple(keras.tree.flatten(structure))


def is_differentiable(dtype: Any) -> bool:
    """Whether a tensor of this dtype can carry a gradient."""
    dtype = tf.as_dtype(dtype)
    return bool(dtype.is_floating or dtype.is_complex)


def compatible(shape: Sequence[int | None], expected: Sequence[int | None]) -> bool:
    """Whether a shape fits one in which None means any size."""
    return len(shape) == len(expected) and all(
        a == b or a is None or b is None for a, b in zip(shape, expected, strict=True)
    )


def describe_tensor(tensor: Any) -> str:
    """``float32 (32, 10)`` for messages."""
    dtype = getattr(tensor.dtype, "name", None) or str(tensor.dtype)
    return f"{dtype} {tuple(tensor.shape)}"

"""Memory that TensorFlow can take over without a copy: 64-byte aligned, and never used twice.

TensorFlow aborts the process on a misaligned DLPack buffer, and a ZeroMQ frame is never aligned. A buffer that was
handed out may be aliased by a tape or a variable for ever, so there is no pool here on purpose.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np

ALIGNMENT: Final = 64


def aligned_empty(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Fresh uninitialised memory.

    Args:
        nbytes: size in bytes, 0 or more.

    Returns:
        uint8 array of shape (nbytes,), writable, contiguous, its address a multiple of 64.
    """
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory.data)) % ALIGNMENT  # twice as fast as memory.ctypes
    return memory[start:][:nbytes]  # in two steps: NumPy resets the address of memory[start:start]

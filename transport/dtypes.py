"""The element types that may travel, by name: `dtype.str` cannot tell bfloat16 from two opaque bytes."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

_INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
_FLOATS = (np.float16, np.float32, np.float64, np.complex64, np.complex128)
_NUMPY = {np.dtype(kind).name: np.dtype(kind) for kind in (np.bool_, *_INTEGERS, *_FLOATS)}
_FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
_EXTENDED = (
    "bfloat16",
    *(f"float8_{form}" for form in _FLOAT8),
    "float4_e2m1fn",
    "int2",
    "int4",
    "uint2",
    "uint4",
)

DTYPES: Final[dict[str, np.dtype[Any]]] = _NUMPY | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED if hasattr(ml_dtypes, name)
}
"""Name on the wire -> native dtype. Sub-byte types take one byte an element, as NumPy stores them."""

BUFFER_NAMES: Final = frozenset(_NUMPY)
"""Those that Python's buffer protocol knows; the others travel through a view as bytes."""

NAMES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}
"""The other way round; a dtype of foreign byte order is not in it."""

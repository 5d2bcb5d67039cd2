"""State as plain data: numbers, text, lists, mappings and arrays, taken apart into JSON and arrays, and put together.

No code and no pickle: what is put together again is of Python's and NumPy's own types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class NotPlainError(TypeError):
    """A value that is no plain data; the message says of which type it is."""


def taken_apart(value: Any, arrays: list[Array]) -> Any:
    """A value as JSON; arrays in it go to the end of a list, and JSON has their numbers.

    Args:
        value: None, numbers, text, arrays, and lists, tuples, sets and dicts of these.
        arrays: Gets the arrays.

    Raises:
        NotPlainError: It is something else, or has something else in it.
    """
    if isinstance(value, np.generic | np.ndarray):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise NotPlainError("array of objects")
        arrays.append(array.copy())
        return {"scalar" if isinstance(value, np.generic) else "array": len(arrays) - 1}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [taken_apart(one, arrays) for one in value]
    if type(value) in (tuple, set, frozenset):
        return {type(value).__name__: [taken_apart(one, arrays) for one in value]}
    if type(value) is dict:
        return {"dict": [[taken_apart(one, arrays) for one in pair] for pair in value.items()]}
    raise NotPlainError(type(value).__name__)


def put_together(plain: Any, arrays: Sequence[Array]) -> Any:
    """The value that `taken_apart` was given.

    Raises:
        ValueError, KeyError, IndexError, TypeError: It never gave this.
    """
    if isinstance(plain, list):
        return [put_together(one, arrays) for one in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "array":
        return arrays[value].copy()
    if kind == "scalar":
        return arrays[value][()]
    if kind == "dict":
        return {put_together(key, arrays): put_together(one, arrays) for key, one in value}
    return _KINDS[kind](put_together(one, arrays) for one in value)


_KINDS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}

__all__ = ["NotPlainError", "put_together", "taken_apart"]

"""The ranges of a defence's arguments."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from pipeline.errors import SplitError
from pipeline.saying import is_whole, not_whole


def positive(who: str, what: str, value: Any) -> float:
    """A positive finite number.

    Raises:
        SplitError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < math.inf:
        raise SplitError(f"{who} expects {what} to be a positive number, received {value!r}")
    return float(value)


def whole(who: str, what: str, value: Any, most: int | None = None) -> int:
    """A whole number of at least 1.

    Raises:
        SplitError: It is none, or more than `most`.
    """
    if not is_whole(value) or (most is not None and value > most):
        reach = "" if most is None else f" and at most {most}"
        raise SplitError(f"{who}: {not_whole(f'`{what}`', value)}{reach}")
    return int(value)

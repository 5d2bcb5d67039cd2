"""Phrases of many messages: the nearest known name, that a whole number is expected; the user's line of a warning."""

from __future__ import annotations

import inspect
from operator import index
from typing import Any

from transport.saying import did_you_mean


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer (of Python or NumPy, no bool) of at least `least`."""
    if isinstance(value, bool):
        return False
    try:
        return index(value) >= least
    except TypeError:
        return False


def not_whole(what: str, value: Any, least: int = 1) -> str:
    """The sentence about a value that should be a whole number.

    Args:
        what: The subject of the sentence, such as ``"`microbatches`"``.
        value: What was given.
        least: The smallest number that is one.
    """
    return f"{what} must be a whole number of at least {least}, received {value!r}"


_NOT_THE_USERS = {"pipeline", "stages", "transport", "keras", "tensorflow", "contextlib"}
"""Packages through which a user's call comes to a warning of ours."""


def users_line() -> int:
    """The `stacklevel` with which a warning of the caller points at the user's line, however far out it is."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return max(level, 1)


__all__ = ["did_you_mean", "is_whole", "not_whole", "users_line"]

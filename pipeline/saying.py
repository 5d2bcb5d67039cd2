"""Phrases of many messages: the nearest known name, and that a whole number is expected."""

from __future__ import annotations

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


__all__ = ["did_you_mean", "is_whole", "not_whole"]

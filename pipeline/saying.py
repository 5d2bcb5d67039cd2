"""What many messages say alike: the nearest known name, and what counts as a whole number of at least so much."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from operator import index
from typing import Any


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """The end of a sentence about an unknown name: ``"; did you mean 'gpipe'?"``, or "" where none is like it.

    Args:
        name: What was given; its case does not count.
        known: The names that there are.
        most: How many to offer.
    """
    names = {one.lower(): one for one in known}
    near = [names[one] for one in difflib.get_close_matches(name.lower(), names, n=most, cutoff=0.4)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer (of Python or NumPy, no bool) of at least `least`."""
    if isinstance(value, bool):
        return False
    try:
        return index(value) >= least
    except TypeError:
        return False

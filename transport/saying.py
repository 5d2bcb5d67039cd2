"""The end of many messages about an unknown name: the nearest one that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


__all__ = ["did_you_mean"]

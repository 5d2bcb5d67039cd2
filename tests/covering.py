"""A covering design: few rows in which every pair of values of every two factors occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Mapping[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of (factor, value) in a row."""
    return set(combinations(row.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Rows that together hold every pair; each row in turn is the one with the most new pairs (the first of them).

    Args:
        factors: {name: its values, hashable}.
    """
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    missing = set().union(*(pairs_of(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen

"""The three levels that tests run at, and what a test module asks about them.

    make check   before every commit    tests without a mark
    make test    the gate, `.ci/run`    and those marked ``gate``
    make soak    by night               and those marked ``soak``, with more examples

A mark is pytest's own (`pyproject.toml`), and `-m` chooses by it; how many examples Hypothesis draws is its profile
(`tests/conftest.py`). Pytest by itself runs the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings

LEVEL = settings.get_current_profile_name()
"""The level of this run: "check", "gate" or "soak"."""
SOAK = LEVEL == "soak"
Named = type(pytest.param())


def examples(check: int, gate: int, soak: int) -> int:
    """How many examples a test of its own measure draws at the level of this run."""
    return {"check": check, "gate": gate, "soak": soak}[LEVEL]


def in_turn(values: Sequence[Any], check: int, gate: int, *, several: bool = False) -> list[Any]:
    """Parameters: the first ``check`` values run at every level, those up to ``gate`` in the gate, all in the soak.

    Args:
        values: One each, or with ``several`` a tuple for several parameters; or `pytest.param`, with an id of its own.
        check: How many.
        gate: How many, those of ``check`` among them.
        several: Whether they are for several parameters at once.
    """
    each = [
        value if isinstance(value, Named) else pytest.param(*value) if several else pytest.param(value)
        for value in values
    ]
    marks = [() if i < check else (pytest.mark.gate,) if i < gate else (pytest.mark.soak,) for i in range(len(each))]
    return [
        pytest.param(*one.values, id=one.id, marks=(*one.marks, *mark)) for one, mark in zip(each, marks, strict=True)
    ]

"""How often the user's own objects are run again to see what rounding may do: as often as it changes the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.verify.own_numbers import Numbers, OwnPair, Rule, UnrepeatableError, compared

EPS = float(np.finfo("float32").eps)
RULE = Rule(EPS)


def pair(kind: str) -> OwnPair:
    return OwnPair((kind, 0), kind, "stage", "name", (0,), (kind,))


PAIRS = [pair("prediction"), pair("gradient")]


class Rounding:
    """Numbers of a model that one rounding of every variable changes by this much, and what was asked of it."""

    def __init__(self, *changes: float) -> None:
        self.changes, self.asked = changes, []  # type: ignore[var-annotated]

    def __call__(self, seed: int | None, kinds: frozenset[str]) -> Numbers:
        self.asked.append((seed, *kinds))
        by = 0.0 if seed is None else self.changes[seed]
        return {(kind, 0): np.float32([1 + by]) for kind in kinds}


def judged(off: float, again: Rounding) -> list[bool]:
    theirs = {one.key: np.float32([1]) for one in PAIRS}
    ours = {**theirs, PAIRS[1].key: np.float32([1 + off])}
    return [one.row.ok for one in compared(PAIRS, ours, theirs, again, RULE)]


def test_nothing_is_run_again_where_plain_rounding_explains_all():
    again = Rounding()
    assert judged(32 * EPS, again) == [True, True] and again.asked == []


def test_it_is_run_until_rounding_explains_what_differs_and_only_for_that():
    again = Rounding(1e-6, 1e-4, 1.0)
    assert judged(1e-3, again) == [True, True]
    assert again.asked == [(None, "gradient"), (0, "gradient"), (1, "gradient")]


def test_what_three_tries_do_not_explain_deviates():
    again = Rounding(1e-6, 1e-5, 1e-6)
    assert judged(1e-3, again) == [True, False] and len(again.asked) == 4


def test_what_no_rounding_makes_is_tried_for_chance_only():
    again = Rounding(1e-6)
    assert judged(np.inf, again) == [True, False] and again.asked == [(None, "gradient")]


def test_a_gradient_of_zeros_and_none_are_the_same_and_run_nothing_again():
    again = Rounding()
    theirs = {PAIRS[0].key: np.float32([1]), PAIRS[1].key: None}
    ours = {**theirs, PAIRS[1].key: np.float32([0])}
    assert all(one.row.ok for one in compared(PAIRS, ours, theirs, again, RULE)) and again.asked == []


def test_numbers_that_are_others_each_time_are_not_judged():
    theirs = {one.key: np.float32([1]) for one in PAIRS}
    ours = {**theirs, PAIRS[1].key: np.float32([2])}
    with pytest.raises(UnrepeatableError, match="other numbers each time"):
        compared(PAIRS, ours, theirs, lambda seed, kinds: {PAIRS[1].key: np.float32([3])}, RULE)

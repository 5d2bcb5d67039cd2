"""A question of a verification is checked in one place, and all that is wrong with it is told together."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from pipeline import Pipeline, VerifyEvery
from pipeline.compare.rows import CHECKS
from pipeline.errors import VerificationError
from pipeline.verify.question import Asked, Question

NAMES = [field.name for field in fields(Question)]


def test_checks_stand_in_their_own_order_and_once():
    assert Question.of(["steps", "tape", "tape"]).checks == ("tape", "steps")
    assert Question.of("all").checks == tuple(CHECKS)
    assert Question.of("chain") == Question(("chain",))


def test_everything_that_is_wrong_is_told_together():
    with pytest.raises(VerificationError) as caught:
        Question.of(["tape", "tap"], steps=0, tolerance=float("nan"), memory_limit=1.5, seed=True)
    for words in ("'tap'", "steps must be", "tolerance must be", "memory_limit must be", "seed must be"):
        assert words in str(caught.value)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), "0.1"])
def test_a_tolerance_is_a_number_that_something_can_be_above(tolerance):
    with pytest.raises(VerificationError, match="tolerance must be None or a finite number"):
        Question.of("tape", tolerance=tolerance)


def test_whoever_asks_has_the_questions_own_names_and_defaults():
    assert list(get_type_hints(Asked)) == NAMES
    for asks in (Pipeline.verify, VerifyEvery.__init__):
        taken = inspect.signature(asks).parameters
        assert {name: taken[name].default for name in NAMES} == {name: getattr(Question, name) for name in NAMES}

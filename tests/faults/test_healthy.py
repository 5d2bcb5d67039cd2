"""No false alarm: random configurations with nothing wrong verify; 200 in the soak, and when the page is printed."""

import pytest

from tests.faults.healthy import verify_many
from tests.levels import examples, in_turn

COUNT = examples(3, 3, 20)


@pytest.mark.parametrize("part", in_turn(range(10), 0, 1))
def test_what_is_right_is_not_reported(part):
    verdict = verify_many(COUNT, start=part)
    assert verdict.count == verdict.checks["tape"] == verdict.checks["steps"] == COUNT
    assert [f"{alarm.configuration}: {alarm.said}" for alarm in verdict.alarms] == []

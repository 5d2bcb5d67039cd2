"""No false alarm: random configurations with nothing wrong verify; 200 in the soak, and when the page is printed."""

import pytest

from tests.conftest import NIGHTLY
from tests.faults.healthy import verify_many

PARTS, COUNT = (10, 20) if NIGHTLY else (2, 6)


@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_right_is_not_reported(part):
    verdict = verify_many(COUNT, start=part)
    assert verdict.count == verdict.checks["tape"] == verdict.checks["steps"] == COUNT
    assert [f"{alarm.configuration}: {alarm.said}" for alarm in verdict.alarms] == []

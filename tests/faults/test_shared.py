"""Faults in code that the pipeline and its reference share: one tape agrees, the independent checks do not."""

import pytest

from tests.faults.cases import CASES
from tests.faults.shared import CHECKS, FAULTS, run
from tests.levels import in_turn

# The recurrent one has every fault.
FULLEST_FIRST = sorted(CASES, key=lambda case: -sum(case in fault.cases for fault in FAULTS))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", in_turn(FULLEST_FIRST, 0, 1))
def test_only_independent_checks_find_what_is_wrong_on_both_sides(case, check):
    found = list(run(case, check))
    assert len(found) == sum(case in fault.cases for fault in FAULTS)
    assert [f"{one.fault}: {one.said}" for one in found if not one.ok] == []

"""What a copy of the user's objects lost is invisible to one tape, and found by the user's own objects."""

import pytest

from tests.faults.cases import CASES
from tests.faults.copies import FAULTS, injected
from tests.levels import SOAK, in_turn

ALL = [(fault, case) for fault in FAULTS for case in fault.where]
ONE_EACH = [(fault, list(fault.where)[number % len(fault.where)]) for number, fault in enumerate(FAULTS)]


@pytest.mark.gate
@pytest.mark.parametrize(("fault", "case"), ALL if SOAK else in_turn(ONE_EACH, 2, len(ONE_EACH), several=True), ids=str)
def test_only_the_users_own_objects_find_what_a_copy_lost(fault, case):
    found = injected(fault, CASES[case])
    assert found.ok, found.said

"""The matrix with compiled stages: in the gate every fault at one place of each model, in the soak at every place."""

import pytest

from tests.faults.cases import CASES, SCHEDULES
from tests.faults.proving import NAMES, prove, running
from tests.levels import SOAK, in_turn

RUNS = [(case, schedule) for schedule in reversed(SCHEDULES) for case in CASES]
PLACES = None if SOAK else 1


@pytest.fixture(scope="module", params=in_turn(RUNS, 0, 3), ids="-".join)
def live(request):
    with running(*request.param, eager=False) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found(live, name):
    prove(live, name, PLACES)

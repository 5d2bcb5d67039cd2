"""The matrix with compiled stages: in the gate every fault at one place of each model, in the soak at every place."""

import pytest

from tests.conftest import NIGHTLY
from tests.faults.cases import CASES, SCHEDULES
from tests.faults.proving import NAMES, prove, running

SOME_SCHEDULES, PLACES = (SCHEDULES, None) if NIGHTLY else (["1f1b"], 1)
RUNS = [(case, schedule) for case in CASES for schedule in SOME_SCHEDULES]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def live(request):
    with running(*request.param, eager=False) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found(live, name):
    prove(live, name, PLACES)

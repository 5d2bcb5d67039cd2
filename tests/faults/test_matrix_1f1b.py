"""Every fault in three models under 1f1b, eagerly: `verify` reports it and names where it is.

At every place where it makes sense in the soak; the gate takes all of one model and the first of the two others, `make
check` the first of one.
"""

import pytest

from tests.faults.cases import CASES
from tests.faults.proving import NAMES, prove, running
from tests.levels import LEVEL, in_turn

ALL_PLACES = {"check": [], "gate": list(CASES)[:1], "soak": list(CASES)}[LEVEL]


@pytest.fixture(scope="module", params=in_turn(list(CASES), 1, 3))
def live(request):
    with running(request.param, "1f1b", eager=True) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found_wherever_it_is(live, name):
    prove(live, name, None if live.case.name in ALL_PLACES else 1)

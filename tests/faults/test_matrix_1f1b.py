"""Every fault in three models under 1f1b, eagerly: `verify` reports it and names where it is.

At every place where it makes sense; `make check` takes the first of one model.
"""

import pytest

from tests.faults.cases import CASES
from tests.faults.proving import NAMES, prove, running
from tests.levels import LEVEL, in_turn

PLACES = 1 if LEVEL == "check" else None


@pytest.fixture(scope="module", params=in_turn(list(CASES), 1, 3))
def live(request):
    with running(request.param, "1f1b", eager=True) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found_wherever_it_is(live, name):
    prove(live, name, PLACES)

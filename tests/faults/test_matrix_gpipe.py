"""Every fault in three models under gpipe, eagerly: `verify` reports it and names where it is.

At every place where it makes sense in the soak; the gate takes the first in two models.
"""

import pytest

from tests.faults.cases import CASES
from tests.faults.proving import NAMES, prove, running
from tests.levels import SOAK, in_turn

PLACES = None if SOAK else 1


@pytest.fixture(scope="module", params=in_turn(list(CASES), 0, 2))
def live(request):
    with running(request.param, "gpipe", eager=True) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found_wherever_it_is(live, name):
    prove(live, name, PLACES)

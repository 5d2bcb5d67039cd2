"""Every fault at every place of three models under gpipe, eagerly: `verify` reports it and names where it is."""

import pytest

from tests.faults.cases import CASES
from tests.faults.proving import NAMES, prove, running


@pytest.fixture(scope="module", params=CASES)
def live(request):
    with running(request.param, "gpipe", eager=True) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found_wherever_it_is(live, name):
    prove(live, name)

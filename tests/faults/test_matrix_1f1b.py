"""Every fault at every place of three models under 1f1b, eagerly: `verify` reports it and names where it is."""

import pytest

from tests.faults.cases import CASES
from tests.faults.proving import NAMES, prove, running


@pytest.fixture(scope="module", params=CASES)
def live(request):
    with running(request.param, "1f1b", eager=True) as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_found_wherever_it_is(live, name):
    prove(live, name)

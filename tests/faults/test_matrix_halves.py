"""Every fault in stages whose backwards come in halves: `verify` reports it and names where it is.

Those between the halves at every place; the others at one, in the gate three of them in one model, compiled.
"""

import pytest

from tests.faults.cases import CASES
from tests.faults.in_halves import FAULTS_OF_HALVES
from tests.faults.matrix import outcomes
from tests.faults.proving import NAMES, prove, running
from tests.levels import in_turn

RUNS = [("convolutional", False), *((name, eager) for name in CASES for eager in (True, False))]


@pytest.fixture(scope="module", params=in_turn(list(dict.fromkeys(RUNS)), 0, 1), ids=str)
def live(request):
    name, eager = request.param
    with running(name, "zb-h1", eager=eager) as found:
        yield found


@pytest.mark.parametrize("fault", FAULTS_OF_HALVES, ids=lambda fault: fault.name)
def test_a_fault_between_halves_is_found(live, fault):
    found = list(outcomes(live, [fault]))
    assert len(found) >= 2  # the first stage of the model has whole backwards
    assert not [str(outcome) for outcome in found if not outcome.ok]


@pytest.mark.parametrize("name", in_turn(list(NAMES), 0, 3))
def test_the_fault_is_found(live, name):
    prove(live, name, 1)

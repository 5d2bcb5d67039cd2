"""Two transports of one host, and a way from one to the other."""

import pytest

from tests.transport.ways import PATIENCE
from transport import open_transport


@pytest.fixture
def pair():
    """Two transports, as of two processes."""
    with open_transport("local") as here, open_transport("local") as there:
        yield here, there


@pytest.fixture
def way(pair):
    """An inbox and an outbox that leads to it."""
    here, there = pair
    inbox = here.bind()
    yield inbox, there.connect(inbox.address, PATIENCE)

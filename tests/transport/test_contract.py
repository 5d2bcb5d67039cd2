"""Every transport keeps the one contract."""

from functools import partial

import pytest

from transport import open_transport
from transport.channel import Transport
from transport.testing import CONTRACT


class Apart(Transport):
    """Two transports of one scheme, one with the inboxes and one with the outboxes: as in two processes."""

    def __init__(self, scheme, directory, **options):
        self.here, self.there = (open_transport(scheme, directory, **options) for _ in range(2))
        self.scheme, self.bind, self.connect = scheme, self.here.bind, self.there.connect

    def close(self):
        self.there.close()
        self.here.close()


@pytest.mark.parametrize("scheme", ["inproc", "local", "ipc", "tcp"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, scheme, tmp_path):
    check(partial(open_transport, scheme, tmp_path))
    assert list(tmp_path.iterdir()) == []  # no socket file is left


@pytest.mark.gate
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract_between_two_local_transports(check, tmp_path):
    """Within one, messages do not leave the process."""
    check(partial(Apart, "local", tmp_path))

"""Every transport keeps the one contract."""

from functools import partial

import pytest

from transport import open_transport
from transport.testing import CONTRACT


@pytest.mark.parametrize("scheme", ["inproc", "ipc", "tcp"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, scheme, tmp_path):
    check(partial(open_transport, scheme, tmp_path))
    assert list(tmp_path.iterdir()) == []  # no socket file is left

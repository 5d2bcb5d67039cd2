"""Tools of the contract suite (`transport.testing`): a fresh channel, expectations, arrays of every kind.

No test framework is needed; what fails is an AssertionError, also under ``python -O``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from transport.channel import Inbox, Outbox, Transport
from transport.dtypes import DTYPES
from transport.message import Message

PATIENCE: Final = 20.0
"""Seconds after which a check gives up on something that should have happened."""

Opener = Callable[..., Transport]
"""Opens a transport; takes an optional `limits`."""


@contextmanager
def channel(open_one: Opener, **options: Any) -> Iterator[tuple[Inbox, Outbox]]:
    """A connected inbox and outbox of one fresh transport."""
    with open_one(**options) as transport:
        inbox = transport.bind()
        yield inbox, transport.connect(inbox.address, PATIENCE)


def expect(kind: type[BaseException], action: Callable[[], object], *words: str) -> None:
    """Fails unless `action` raises exactly this kind of error, with all `words` in its text."""
    try:
        result = action()
    except kind as error:
        if type(error) is not kind:
            raise AssertionError(f"expected {kind.__name__}, got {error!r}") from error
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"expected {missing} in the message, got: {error}") from error
        return
    raise AssertionError(f"expected {kind.__name__}, got the result {result!r}")


def require(condition: bool, *details: object) -> None:
    """Fails with the details unless the condition holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise AssertionError(" ".join(map(str, details)) or "the contract is broken")


def arrays() -> Iterator[np.ndarray[Any, Any]]:
    """Arrays of every dtype and of every awkward shape and layout."""
    for dtype in DTYPES.values():
        yield np.arange(24).reshape(2, 3, 4).astype(dtype)
        yield np.ones((), dtype)
        yield np.empty((0,), dtype)
        yield np.empty((3, 0, 5), dtype)
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    yield grid.T
    yield grid[::-1, ::2]
    yield np.asfortranarray(grid)
    yield np.broadcast_to(np.float64(2.5), (4, 5))
    yield grid.astype(">f4")
    yield np.array([np.nan, np.inf, -0.0], np.float32)
    yield np.arange(1 << 20, dtype=np.int64)[1:]


def free_address(transport: Transport) -> str:
    """An address that nobody has."""
    with transport.bind() as inbox:
        return inbox.address


def until_it_succeeds(action: Callable[[], Message], unless: type[Exception]) -> Message:
    """Repeats until the action succeeds; for what is on its way."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except unless:
            require(time.monotonic() < deadline, "nothing arrived")

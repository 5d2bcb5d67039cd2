"""Let Ctrl-C wait for the end of what must not be left half done.

first    is remembered, and raised at the end of the block
second   is raised where the block waits for workers (`interruptible`), who then undo what they are in
third    means it, and is raised at once
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class _Block:
    """A block that the main thread is in.

    Attributes:
        signals: How many came.
        raised: Whether the second one was let through.
    """

    signals: int = 0
    raised: bool = False

    def may_raise(self) -> bool:
        """Whether the second one is let through now."""
        due = self.signals >= 2 and not self.raised
        self.raised = self.raised or due
        return due


_blocks: list[_Block] = []
"""The innermost, the last one, gets the signals."""
_waits = False


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Delay KeyboardInterrupt to the end of the block. Does nothing outside the main thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None or before == signal.SIG_IGN:
        yield
        return
    block = _Block()

    def note(number: int, frame: Any) -> None:
        block.signals += 1
        if block.signals > 2 or (_waits and block.may_raise()):
            raise KeyboardInterrupt

    _blocks.append(block)
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _blocks.pop()
    if block.signals:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the second Ctrl-C of a deferred block through here, where nothing is lost by that.

    Raises:
        KeyboardInterrupt: There were two, before or while the block runs.
    """
    global _waits
    if not _blocks or threading.current_thread() is not threading.main_thread():
        yield
        return
    _waits = True
    try:
        if _blocks[-1].may_raise():
            raise KeyboardInterrupt
        yield
    finally:
        _waits = False


__all__ = ["deferred_interrupts", "interruptible"]

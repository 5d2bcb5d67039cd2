"""The status board of a worker: a page of memory that worker and driver share and that outlives the worker.

A worker that is killed cannot say what it was doing. So it writes that down as it goes, eight integers on a page of
anonymous memory (a memfd: no name, no file, nothing to clean up), and the driver reads them afterwards. The same memory
keeps the worker's last words, the traceback of an exception that escaped its entry function.

    byte 0        64       72            4096                     4096 + 32768
    | 8 x int64   | length | not used    | last words (UTF-8)                |
"""

from __future__ import annotations

import mmap
import os
import traceback

import numpy as np
import numpy.typing as npt

__all__ = ["BOARD_SLOTS", "MAX_WORDS", "SharedBoard", "words_of"]

BOARD_SLOTS = 8
"""How many int64 slots a board has; what they mean is between the worker and the driver."""

MAX_WORDS = 32768
"""How many bytes of a traceback are kept."""

_WORDS_AT = 4096
_SIZE = _WORDS_AT + MAX_WORDS
_MAX_SUMMARY = 300
_MAX_TRACEBACK = MAX_WORDS // 4 - 2 * _MAX_SUMMARY  # a character takes up to 4 bytes


class SharedBoard:
    """A status board and last words in memory that two processes share.

    Args:
        descriptor: a file descriptor from `SharedBoard.create_memory`; it stays the caller's and may be closed at once.

    Attributes:
        slots: int64 ndarray of shape (8,), zeros at first, shared with every process that maps the same memory.
    """

    slots: npt.NDArray[np.int64]

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)
        self.slots = np.frombuffer(self._memory, dtype=np.int64, count=BOARD_SLOTS)
        self._length = np.frombuffer(self._memory, dtype=np.int64, count=1, offset=self.slots.nbytes)

    @staticmethod
    def create_memory() -> int:
        """Return a new file descriptor of zeroed memory for one board; the caller closes it."""
        descriptor = os.memfd_create("tapeline-board")
        os.ftruncate(descriptor, _SIZE)
        return descriptor

    def write_last_words(self, text: str) -> None:
        """Keep `text`, of which `MAX_WORDS` bytes fit, for the driver. The length is last, so a kill leaves nothing."""
        words = text.encode("utf-8", "replace")[:MAX_WORDS]
        self._memory[_WORDS_AT : _WORDS_AT + len(words)] = words
        self._length[0] = len(words)

    def last_words(self) -> str:
        """Return what the worker wrote last, or "" if it wrote nothing."""
        length = min(max(int(self._length[0]), 0), MAX_WORDS)
        return self._memory[_WORDS_AT : _WORDS_AT + length].decode("utf-8", "replace")


def words_of(error: BaseException) -> str:
    """Say what was raised, in one line, and below it the traceback; whatever is too long loses its middle.

    Returns:
        Text that fits into the last words of a board, for example "raised ValueError: boom\\nTraceback ...".
    """
    summary = "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]
    text = "".join(traceback.format_exception(error)).rstrip()
    return f"raised {_shortened(summary, _MAX_SUMMARY)}\n{_shortened(text, _MAX_TRACEBACK)}"


def _shortened(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"

"""Limits of a message: checked by the sender before it sends and by the receiver before it allocates."""

from __future__ import annotations

from dataclasses import dataclass

MAX_FRAME = 2**31 - 1
"""Bytes in one frame: ZeroMQ reports the size of a received frame as a C int."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one message. Both ends of a channel should use the same.

    Args:
        max_bytes: bytes of the array, at most 2 GiB - 1.
        max_header_bytes: bytes of the header, which includes `value`.
        max_rank: dimensions of the array.
        max_count: entries of all lists and dicts in `value` together, at least 64.
        max_depth: nesting of lists and dicts in `value`.
        max_name: characters of the tensor's name.
    """

    max_bytes: int = MAX_FRAME
    max_header_bytes: int = 1 << 20
    max_rank: int = 32
    max_count: int = 4096
    max_depth: int = 16
    max_name: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.max_bytes <= MAX_FRAME:
            raise ValueError(f"max_bytes must be within 0 .. {MAX_FRAME} (2 GiB - 1), got {self.max_bytes}")
        if self.max_header_bytes < 64:
            raise ValueError(f"max_header_bytes must be at least 64, got {self.max_header_bytes}")
        if self.max_count < 64:
            raise ValueError(f"max_count must be at least 64, got {self.max_count}")
        if not 0 <= self.max_rank <= 64:
            raise ValueError(f"max_rank must be within 0 .. 64 (NumPy's bound), got {self.max_rank}")


DEFAULT_LIMITS = Limits()

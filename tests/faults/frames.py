"""Damage to the frames of a message, behind the codec: what arrives is not what was sent, and still well-formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from transport import codec


class Envelope(NamedTuple):
    """What a frame's header says of its array."""

    kind: str
    step: int
    stage: int
    source: int
    tensor: str
    microbatch: int
    dtype: str


Change = Callable[[Envelope, Any], None]
"""Takes the envelope and the raw frame, uint8 of shape (bytes,), which it may write to."""


def envelope(header: bytes) -> Envelope:
    """Read a header frame."""
    fields = codec.decode_header(header).fields
    _, kind, _, step, stage, source, tensor, microbatch, _, _, dtype, *_ = fields
    return Envelope(kind, step, stage, source, tensor, microbatch, dtype)


class Damaged:
    """An inproc inbox whose senders' frames are changed.

    Args:
        inbox: The right one.
        change: What is done to each raw frame.
    """

    def __init__(self, inbox: Any, change: Change) -> None:
        self._inbox, self._change = inbox, change

    def put(self, header: bytes, raw: Any) -> bool:
        """As `InprocInbox.put`."""
        if raw is not None:
            self._change(envelope(header), raw)
        return self._inbox.put(header, raw)


class DamagedSocket:
    """A ZeroMQ socket whose frames are changed.

    Args:
        socket: The right one.
        change: What is done to a copy of each raw frame.
    """

    def __init__(self, socket: Any, change: Change) -> None:
        self._socket, self._change = socket, change
        self._header: bytes | None = None

    def send(self, frame: Any, flags: int = 0, copy: bool = True) -> Any:
        """As `zmq.Socket.send`; a message's raw frame follows its header."""
        import zmq

        if self._header is not None:
            raw = np.frombuffer(bytes(frame), np.uint8).copy()
            self._change(envelope(self._header), raw)
            frame, copy = raw.tobytes(), True
        self._header = frame if flags & zmq.SNDMORE else None
        return self._socket.send(frame, flags, copy=copy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class DamagedDatagrams:
    """The making of the datagrams of a `LocalOutbox`, from frames that are changed.

    Args:
        make: The right one, its `_datagrams`.
        change: What is done to a copy of each raw frame.
    """

    def __init__(self, make: Any, change: Change) -> None:
        self._make, self._change = make, change

    def __call__(self, header: bytes, raw: Any, place: tuple[int, int, int]) -> Any:
        """As `LocalOutbox._datagrams`, which takes step, microbatch and window beside the header."""
        if raw is not None:
            damaged = np.frombuffer(raw, np.uint8).copy()
            step, microbatch, _ = place
            self._change(envelope(header)._replace(step=step, microbatch=microbatch), damaged)
            raw = damaged.data
        return self._make(header, raw, place)


def flip_a_bit(raw: Any) -> None:
    """The lowest bit of the first byte: of a float the last place of the first element."""
    raw[0] ^= 1


def cast_to_bfloat16(raw: Any) -> None:
    """As a sender that saves bandwidth, and a receiver that restores the dtype."""
    values = raw.view(np.float32)
    values[:] = values.astype(ml_dtypes.bfloat16).astype(np.float32)

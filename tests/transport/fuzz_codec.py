"""The decoder under atheris, a fuzzer that is led by the lines that a frame reaches.

    python -m pip install atheris
    python -m tests.transport.fuzz_codec -runs=1000000 -rss_limit_mb=2048

A header without a checksum would end at the first line, so it gets a right one where the first byte says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["transport.codec", "transport.limits", "transport.message"]):
    from transport import codec
    from transport.errors import MalformedMessage
    from transport.limits import Limits

from tests.strategies import sealed
from tests.transport.mutations import SOURCES

LIMITS = Limits(max_bytes=1 << 20, max_header_bytes=4096)


def one(data: bytes) -> None:
    """Decode what the fuzzer makes: how, the size of the header, header, rest."""
    if len(data) < 2:
        return
    how, header, rest = data[0], data[2 : 2 + data[1]], data[2 + data[1] :]
    frames = [sealed(header) if how & 1 else header, *([rest] if how & 2 else [])]
    try:
        message = codec.decode(frames, LIMITS)
    except MalformedMessage:
        return
    again = codec.decode(codec.encode(message, LIMITS), LIMITS)  # what is a message can be sent on
    assert again.key == message.key


def seeds(folder: Path) -> None:
    """Write messages as they are sent, from which the fuzzer begins."""
    for number, frames in enumerate(SOURCES):
        packed, rest = frames[0][4:], b"".join(frames[1:])
        (folder / f"seed-{number}").write_bytes(bytes([3 if rest else 1, len(packed)]) + packed + rest)


if __name__ == "__main__":
    with TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()

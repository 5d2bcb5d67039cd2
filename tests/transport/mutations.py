"""Frames of real messages, changed at random: by accident, or by whoever knows the checksum."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np

from tests.strategies import sealed
from transport import Message
from transport.codec import encode
from transport.one_host import datagrams

GOOD = Message("activation", 0, 3, array=np.arange(6, dtype="float32"))
SOURCES = [
    [bytes(frame) for frame in encode(message)]
    for message in (
        GOOD,
        Message("stop"),
        Message("command", value={"do": "step", "sizes": [4, 4, 3], "deep": [[{"a": None}], 1.5, "x" * 40]}),
        Message("gradient", 1, 7, tensor="dense_1/out", microbatch=5, window=2, array=np.ones((2, 0, 3), "int64")),
    )
]
EXTREME: list[Any] = [
    0,
    1,
    -1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    -(2**63),
    True,
    None,
    "",
    "float32",
    [],
    {},
    [[[]]],
    b"\0",
    1.5,
]


def changed(rng: random.Random, frame: bytes) -> bytes:
    """Some bytes of a frame changed, put in, taken out or doubled."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randint(0, len(data)), rng.randint(1, 8)
        kind = rng.randrange(4)
        if kind == 0:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 1:
            data[place:place] = rng.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        else:
            data[place:place] = data[place : place + 4 * length]
    return bytes(data[:4000])


def header(rng: random.Random, frame: bytes) -> bytes:
    """A header as an accident leaves it, or as an attacker makes it: with a right checksum."""
    kind = rng.randrange(3)
    if kind == 0:
        return changed(rng, frame)
    if kind == 1:
        return sealed(changed(rng, frame[4:]))
    fields = msgpack.unpackb(frame[4:])
    for _ in range(rng.randint(1, 3)):
        fields[rng.randrange(len(fields))] = rng.choice(EXTREME)
    return sealed(fields)


def frames(rng: random.Random) -> list[bytes]:
    """Those of a message, at least one of them changed, or their number."""
    first, *rest = rng.choice(SOURCES)
    found = [header(rng, first) if rng.random() < 0.9 else first, *rest]
    if rest and rng.random() < 0.3:
        found[1] = changed(rng, found[1])
    if rng.random() < 0.1:
        found += [rng.randbytes(rng.randint(0, 40))] * rng.randint(1, 3)
    return found if rng.random() < 0.95 else found[1:] or [b""]


def datagram(rng: random.Random) -> bytes:
    """One of the local way, with a prefix that says anything."""
    first, *rest = rng.choice(SOURCES)
    first, body = header(rng, first) if rng.random() < 0.7 else first, b"".join(rest)
    said = [rng.choice((*range(8), 77)), rng.randrange(2), len(first), 0, len(body), 3, 0, 0]
    if rng.random() < 0.5:
        said[rng.randrange(2, 5)] = rng.choice((0, 1, 2**16, 2**32 - 1, rng.randrange(100)))
    if rng.random() < 0.1:
        said[rng.randrange(5, 8)] = rng.choice((-1, 2**63 - 1, -(2**63), 2**53))
    whole = datagrams.PREFIX.pack(*said) + first + body
    return changed(rng, whole) if rng.random() < 0.2 else whole

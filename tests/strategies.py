"""Hypothesis strategies for what travels: plain values, arrays of every dtype, messages, and damaged frames."""

import zlib

import msgpack
import numpy as np
from hypothesis import strategies as st

from transport import DRIVER, KINDS, Message
from transport.dtypes import DTYPES

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-1, 2**53)
places = st.integers(DRIVER, 64)

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def arrays(draw):
    """Any dtype, 0 to 4 dimensions of 0 to 5, any bit pattern that the dtype has, in any layout."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = int(np.prod(shape, dtype=int))
    if dtype.name in ("bool", "int2", "int4", "uint2", "uint4", "float4_e2m1fn"):
        bits = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8) % 2
        array = bits.astype(dtype).reshape(shape)
    else:
        size = count * dtype.itemsize
        array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["C", "F", "reversed", "writable", "foreign"]))
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "reversed" and array.ndim:
        return array[::-1]
    if layout == "writable":
        return array.copy()
    if layout == "foreign" and dtype.kind in "iufc" and dtype.itemsize > 1:
        return array.astype(dtype.newbyteorder(">"))
    return array


@st.composite
def messages(draw):
    """Any message that may be sent."""
    return Message(
        kind=draw(st.sampled_from(sorted(KINDS))),
        incarnation=draw(numbers),
        step=draw(numbers),
        stage=draw(places),
        source=draw(places),
        tensor=draw(names),
        microbatch=draw(numbers),
        window=draw(numbers),
        value=draw(plain_values),
        array=draw(st.none() | arrays()),
    )


def sealed(fields):
    """A header frame with a right checksum over any fields: what an attacker, not an accident, would send."""
    packed = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return zlib.crc32(packed).to_bytes(4, "little") + packed


@st.composite
def damaged(draw, frame):
    """The frame with some bytes changed, inserted, removed or repeated."""
    data = bytearray(frame)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        patch = draw(st.binary(min_size=1, max_size=6))
        kind = draw(st.sampled_from(["change", "insert", "remove", "repeat"]))
        if kind == "change":
            data[place : place + len(patch)] = patch
        elif kind == "insert":
            data[place:place] = patch
        elif kind == "remove":
            del data[place : place + len(patch)]
        else:
            data[place:place] = data[place : place + 8]
    return bytes(data)


hostile_items = st.one_of(
    plain_values,
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([2**31, 2**40, 2**63 - 1, 2**64 - 1, -1, True, "float32", "object", "<f4", "|O", "bfloat16"]),
    st.binary(max_size=8),
    st.lists(st.integers(-2, 2**64 - 1), max_size=40),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    st.builds(lambda depth: _nested(depth), st.integers(10, 200)),
)


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def hostile_headers(draw):
    """Headers with a right checksum: random bytes, one or two fields of a good header replaced, or damage."""
    if draw(st.integers(0, 5)) == 0:
        return sealed(draw(st.binary(max_size=64)))
    fields = [1, "activation", 0, 1, 0, -1, "x", 0, 0, None, "float32", [2, 3], 24]
    for _ in range(draw(st.integers(0, 2))):
        fields[draw(st.integers(0, len(fields) - 1))] = draw(hostile_items)
    if draw(st.integers(0, 8)) == 0:
        fields = fields[: draw(st.integers(0, 13))] + draw(st.lists(hostile_items, max_size=2))
    packed = msgpack.packb(fields)
    if draw(st.integers(0, 3)) == 0:
        packed = draw(damaged(packed))
    return sealed(packed)

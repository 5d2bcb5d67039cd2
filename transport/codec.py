"""Message <-> frames: a checksummed MessagePack header and at most one raw frame. The decoder trusts nothing.

::

    frame 0   crc32 of the rest (4 bytes, little-endian) | MessagePack list of 13:
              version, kind, incarnation, step, stage, source, tensor, microbatch, window, value,
              dtype name or nil, shape, byte length of frame 1
    frame 1   the array in C order, little-endian elements; absent when dtype is nil

Rules:

1. Nothing is allocated for an array before its header was found consistent and within the limits.
2. Whatever is wrong with received bytes is a `MalformedMessage`; whatever is wrong with a message to send is an
   `Unsendable` (`MessageTooLarge` when only its size is wrong), raised before anything is sent.
3. No pickle, no class names, no code: a decoded value holds None, bool, int, float, str, list and dict, no other types.

The checksum finds accidents, not attackers: every check behind it is made as if it were not there.
"""

from __future__ import annotations

import math
import reprlib
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack
import numpy as np

from transport.buffers import aligned_empty
from transport.dtypes import BUFFER_NAMES, DTYPES, NAMES
from transport.errors import MalformedMessage, MessageTooLarge, TransportError, Unsendable
from transport.limits import DEFAULT_LIMITS, Limits
from transport.message import KINDS, Message

WIRE_VERSION: Final = 1

Raw: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Frame: TypeAlias = "bytes | bytearray | memoryview"

_FIELDS: Final = 13
_SMALL_HEADER: Final = 1 << 14
"""Bytes of a header that can hold what they like: a few thousand entries take no memory to speak of."""
_checksum: Final = struct.Struct("<I").unpack_from
_NUMBERS: Final = ("incarnation", "step", "stage", "source", "microbatch", "window")
_LOWEST, _HIGHEST = -1, 2**53  # exact in every language's number type


class Header(NamedTuple):
    """A validated header: what `assemble` needs to build the message once the raw frame is there."""

    fields: list[Any]
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    nbytes: int


class _Packers(threading.local):
    """One packer a thread: a packer owns a growing buffer, and making one costs more than a header."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True).pack


_packers = _Packers()


def encode(message: Message, limits: Limits = DEFAULT_LIMITS) -> tuple[bytes] | tuple[bytes, memoryview]:
    """Turns a message into its frames, without copying an array that is already contiguous and native.

    Returns:
        The header frame, and the raw frame if there is an array. The raw frame is read-only when the array was
        read-only or when it is a private copy: then nobody will write to it any more.

    Raises:
        Unsendable: something in the message has no place on the wire.
        MessageTooLarge: it is above the limits.
    """
    array = message.array
    raw: memoryview | None = None
    dtype_name: str | None = None
    shape: tuple[int, ...] = ()
    nbytes = 0
    if array is not None:
        raw, dtype_name, shape, nbytes = _encode_array(message, array, limits)
    value = message.value
    if value is not None:
        _check_value(value, limits, Unsendable)
    numbers = (
        message.incarnation,
        message.step,
        message.stage,
        message.source,
        message.microbatch,
        message.window,
    )
    incarnation, step, stage, source, microbatch, window = numbers
    _check_envelope(message.kind, message.tensor, numbers, limits, Unsendable)
    try:
        packed: bytes = _packers.pack(
            [
                WIRE_VERSION,
                message.kind,
                incarnation,
                step,
                stage,
                source,
                message.tensor,
                microbatch,
                window,
                value,
                dtype_name,
                shape,
                nbytes,
            ]
        )
    except (ValueError, TypeError, OverflowError) as error:  # a lone surrogate in a str
        raise Unsendable(f"{message}: {error}") from error
    if len(packed) + 4 > limits.max_header_bytes:
        raise MessageTooLarge(
            f"{message}: the header with its value takes {len(packed) + 4} bytes, the limit is "
            f"{limits.max_header_bytes}; send large data as an array"
        )
    header = zlib.crc32(packed).to_bytes(4, "little") + packed
    return (header,) if raw is None else (header, raw)


def decode_header(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Decodes and validates frame 0. Allocates nothing for the array.

    Raises:
        MalformedMessage: with the first thing found wrong.
    """
    size = len(frame)
    if not 4 < size <= limits.max_header_bytes:
        raise MalformedMessage(f"expected a header of 5 to {limits.max_header_bytes} bytes, received {size}")
    packed = frame[4:]
    if zlib.crc32(packed) != _checksum(frame)[0]:
        raise MalformedMessage("the header does not match its checksum: it is damaged or of another protocol")
    count_entries = _EntryLimit(2 * limits.max_count + _FIELDS + limits.max_rank) if size > _SMALL_HEADER else None
    try:
        fields = msgpack.unpackb(
            packed,
            list_hook=count_entries,
            object_hook=count_entries,
            max_str_len=limits.max_header_bytes,
            max_array_len=limits.max_count,
            max_map_len=limits.max_count,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"the header is not valid MessagePack: {error!r:.200}") from error
    if type(fields) is not list or len(fields) != _FIELDS:
        raise MalformedMessage(f"expected a header of {_FIELDS} fields, received {_show(fields)}")
    version, kind, incarnation, step, stage, source, tensor, microbatch, window, value = fields[:10]
    if version != WIRE_VERSION:
        raise MalformedMessage(
            f"this side speaks version {WIRE_VERSION} of the wire format, received {_show(version)}; "
            "install the same tapeline on both sides"
        )
    numbers = (incarnation, step, stage, source, microbatch, window)
    _check_envelope(kind, tensor, numbers, limits, MalformedMessage)
    if value is not None:
        _check_value(value, limits, MalformedMessage)
    dtype_name, shape, nbytes = fields[10:]
    if dtype_name is None:
        if shape != [] or type(nbytes) is not int or nbytes:
            raise MalformedMessage(f"no dtype, but shape {_show(shape)} and {_show(nbytes)} bytes")
        return Header(fields, None, (), 0)
    return Header(fields, *_decode_array_fields(dtype_name, shape, nbytes, limits))


class _EntryLimit:
    """Counts the entries of lists and dicts as they are read, so that a megabyte of empty lists is never all built."""

    def __init__(self, most: int) -> None:
        self._left = most

    def __call__(self, entries: Any) -> Any:
        self._left -= len(entries) + 1  # each once in its list, and once more if it is a list itself
        if self._left < 0:
            raise ValueError("it has more entries than a message may hold")
        return entries


def assemble(header: Header, raw: Raw | None, place: tuple[int, int, int] | None = None) -> Message:
    """Builds the message over `raw`, which the array takes over; `raw` must have exactly `header.nbytes` bytes.

    Args:
        header: of the message.
        raw: the array's memory, or None.
        place: step, microbatch and window, where they did not come in the header.
    """
    array = None
    if header.dtype is not None:
        assert raw is not None and raw.nbytes == header.nbytes
        array = np.ndarray(header.shape, header.dtype, raw)
    f = header.fields  # one by one: twice as fast as unpacking
    step, microbatch, window = (f[3], f[7], f[8]) if place is None else place
    return Message(f[1], f[2], step, f[4], f[5], f[6], microbatch, window, f[9], array)


def places_fit(step: int, microbatch: int, window: int) -> bool:
    """Whether step, microbatch and window are numbers that a header may have."""
    return (
        type(step) is type(microbatch) is type(window) is int
        and _LOWEST <= step <= _HIGHEST
        and _LOWEST <= microbatch <= _HIGHEST
        and _LOWEST <= window <= _HIGHEST
    )


def decode(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Message:
    """Decodes all frames of one message; the array is a fresh, aligned, writable copy of the raw frame.

    Raises:
        MalformedMessage: with the first thing found wrong.
    """
    if not frames:
        raise MalformedMessage("expected a header frame, received no frame")
    header = decode_header(frames[0], limits)
    expected = 1 if header.dtype is None else 2
    if len(frames) != expected:
        raise MalformedMessage(f"the header announces {expected} frames, received {len(frames)}")
    if expected == 1:
        return assemble(header, None)
    received = memoryview(frames[1])
    if received.nbytes != header.nbytes:
        raise wrong_size(header, received.nbytes)
    return assemble(header, aligned_copy(received))


def aligned_copy(frame: Frame) -> Raw:
    """A fresh aligned copy of a raw frame."""
    source = np.frombuffer(frame, np.uint8)
    copy = aligned_empty(source.nbytes)
    copy[:] = source
    return copy


def wrong_size(header: Header, received: int) -> MalformedMessage:
    """The error for a raw frame whose size is not what its header says."""
    return MalformedMessage(f"{header.dtype}{list(header.shape)} takes {header.nbytes} bytes, received {received}")


def _encode_array(
    message: Message, array: np.ndarray[Any, Any], limits: Limits
) -> tuple[memoryview, str, tuple[int, ...], int]:
    if not isinstance(array, np.ndarray):
        raise Unsendable(f"{message.kind}: array must be a numpy.ndarray, got {type(array).__name__}")
    dtype, shape, nbytes = array.dtype, array.shape, array.nbytes
    if nbytes > limits.max_bytes:
        raise MessageTooLarge(
            f"{message}: {nbytes} bytes are above the limit of {limits.max_bytes} bytes a message; "
            "send it in slices, or raise Limits.max_bytes on both sides",
            limits.max_bytes,
        )
    if len(shape) > limits.max_rank or (0 in shape and _span(shape) > limits.max_bytes):
        raise MessageTooLarge(
            f"{message}: the shape is above the limits of {limits.max_rank} dimensions and {limits.max_bytes} elements"
        )
    name = NAMES.get(dtype)
    if name is None:
        name = dtype.name
        if name not in DTYPES:  # else: a foreign byte order
            raise Unsendable(f"{message}: dtype {dtype} cannot be sent; sendable are {', '.join(DTYPES)}")
        array = array.astype(DTYPES[name])
        array.flags.writeable = False
    elif not array.flags.c_contiguous:
        array = array.copy(order="C")
        array.flags.writeable = False
    if name in BUFFER_NAMES:
        return array.data, name, shape, nbytes
    return array.reshape(-1).view(np.uint8).data, name, shape, nbytes


def _decode_array_fields(
    dtype_name: object, shape: object, nbytes: object, limits: Limits
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        raise MalformedMessage(f"dtype {_show(dtype_name)} is not allowed; allowed are {', '.join(DTYPES)}")
    if type(shape) is not list or len(shape) > limits.max_rank:
        raise MalformedMessage(f"expected a shape of at most {limits.max_rank} dimensions, received {_show(shape)}")
    for size in shape:
        if type(size) is not int or size < 0:
            raise MalformedMessage(f"every dimension must be an int of at least 0, received {_show(shape)}")
    if type(nbytes) is not int or math.prod(shape) * dtype.itemsize != nbytes:
        raise MalformedMessage(f"{dtype_name}{_show(shape)} does not take {_show(nbytes)} bytes")
    if nbytes > limits.max_bytes or (0 in shape and _span(shape) > limits.max_bytes):
        raise MalformedMessage(f"{dtype_name}{_show(shape)} is above the limit of {limits.max_bytes} bytes")
    return dtype, tuple(shape), nbytes


def _span(shape: Sequence[int]) -> int:
    """Elements of a shape with its zeros taken as ones: NumPy refuses huge empty shapes."""
    return math.prod(size or 1 for size in shape)


def _check_envelope(
    kind: object, tensor: object, numbers: Sequence[object], limits: Limits, fault: type[TransportError]
) -> None:
    if type(kind) is not str or kind not in KINDS:
        raise fault(f"unknown kind of message {_show(kind)}; known are {', '.join(sorted(KINDS))}")
    if type(tensor) is not str or len(tensor) > limits.max_name:
        raise fault(f"tensor must be a str of at most {limits.max_name} characters, got {_show(tensor)}")
    for number in numbers:
        if type(number) is not int or not _LOWEST <= number <= _HIGHEST:
            raise fault(
                f"{', '.join(_NUMBERS)} must be ints within {_LOWEST} .. 2**53, got "
                + ", ".join(f"{_show(number)} ({type(number).__name__})" for number in numbers)
            )


def _check_value(value: object, limits: Limits, fault: type[TransportError]) -> None:
    """Walks `value` without recursion; level by level, so that its depth is known."""
    level, count = [value], 0
    for _ in range(limits.max_depth + 1):
        below: list[object] = []
        for item in level:
            kind = type(item)
            if kind is list:
                below.extend(item)  # type: ignore[arg-type]
            elif kind is dict:
                for name in item:  # type: ignore[attr-defined]
                    if type(name) is not str:
                        raise fault(f"keys of a value must be str, got {_show(name)}")
                below.extend(item.values())  # type: ignore[attr-defined]
            elif kind is int:
                if not -(2**63) <= item < 2**64:  # type: ignore[operator]
                    raise fault(f"an int in a value must fit 64 bits, got {_show(item)}")
            elif item is not None and kind not in (str, float, bool):
                raise fault(
                    "a value holds None, bool, int, float, str, list and dict only, got "
                    f"{_show(item)} of type {kind.__name__}; convert it, or send it as the array"
                )
        count += len(below)
        if count > limits.max_count:
            raise (MessageTooLarge if fault is Unsendable else fault)(
                f"a value may hold {limits.max_count} entries; send large data as an array"
            )
        if not below:
            return
        level = below
    raise fault(f"a value may be nested {limits.max_depth} levels deep")


def _show(item: object) -> str:
    return reprlib.repr(item)

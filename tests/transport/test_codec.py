"""The codec: what is encoded comes back; what is damaged or hostile is MalformedMessage and costs no memory."""

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.levels import SOAK, examples
from tests.strategies import arrays, damaged, hostile_headers, messages, sealed
from transport import Limits, MalformedMessage, Message, MessageTooLarge, Unsendable
from transport.codec import decode, decode_header, encode
from transport.dtypes import DTYPES

EXAMPLES = settings(max_examples=examples(200, 700, 100_000))
pytestmark = pytest.mark.timeout(7200 if SOAK else 120)
GOOD = [1, "activation", 0, 1, 0, -1, "x", 0, 0, None, "float32", [2, 3], 24]


def native(message):
    """The message as it should arrive: its array in native byte order."""
    if message.array is None:
        return message
    array = message.array.astype(message.array.dtype.newbyteorder("="))
    return Message(*message.key[:1], message.incarnation, *message.key[1:], message.value, array)


def forged(**changes):
    """A well-sealed header that differs from a good one in the fields given by position (`f3=...`)."""
    fields = list(GOOD)
    for name, value in changes.items():
        fields[int(name[1:])] = value
    return sealed(fields)


@EXAMPLES
@given(messages())
def test_what_is_sent_comes_back(message):
    received = decode(encode(message))
    assert received.same(native(message))
    if received.array is not None:
        assert received.array.flags.writeable and received.array.flags.c_contiguous
        assert received.array.__array_interface__["data"][0] % 64 == 0
        assert not np.shares_memory(received.array, message.array)


@pytest.mark.parametrize(
    "lying",
    [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1], lambda a: np.asfortranarray(a)],
    ids=["transposed", "with gaps", "backwards", "by columns"],
)
def test_an_array_arrives_as_it_is_indexed_however_it_lies_in_memory(lying):
    array = lying(np.arange(12, dtype="float32").reshape(3, 4))
    received = decode(encode(Message("activation", 0, array=array))).array
    assert received.shape == array.shape and received.tolist() == array.tolist()


@EXAMPLES
@given(messages(), st.data())
def test_a_damaged_header_is_the_same_message_or_malformed(message, data):
    header, *raw = encode(message)
    try:
        received = decode([data.draw(damaged(header)), *raw])
    except MalformedMessage:
        return
    assert received.same(native(message))


@EXAMPLES
@given(messages(), st.data())
def test_damaged_frames_are_the_same_envelope_or_malformed(message, data):
    """The raw frame has no checksum: its content may differ, but nothing else, and never its size."""
    frames = [bytes(frame) for frame in encode(message)]
    change = data.draw(st.sampled_from(["damage", "drop", "repeat", "swap"]))
    if change == "damage":
        frames[-1] = data.draw(damaged(frames[-1]))
    elif change == "drop":
        frames.pop(data.draw(st.integers(0, len(frames) - 1)))
    elif change == "repeat":
        frames.append(frames[-1])
    else:
        frames.reverse()
    try:
        received = decode(frames)
    except MalformedMessage:
        return
    assert (received.key, repr(received.value)) == (message.key, repr(message.value))
    assert (received.array is None) == (message.array is None)
    if received.array is not None:
        assert received.array.shape == message.array.shape


@EXAMPLES
@given(hostile_headers())
def test_hostile_headers_never_raise_anything_else_or_allocate_above_the_limit(header):
    """The checksum is right here. What is accepted is a message that can be sent again, to the same effect."""
    limits = Limits(max_bytes=4096, max_header_bytes=4096, max_count=64)
    tracemalloc.start() if not tracemalloc.is_tracing() else tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        decoded = decode_header(header, limits)
        raw = [] if decoded.dtype is None else [bytes(decoded.nbytes)]
        message = decode([header, *raw], limits)
    except MalformedMessage as error:
        assert len(str(error)) < 1000  # nor does a hostile header write novels into our log
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert peak < 256 * 1024  # whatever shape it claims: the limits above, and the error's own text
    assert decode(encode(message, limits), limits).same(message)


@EXAMPLES
@given(st.lists(st.binary(max_size=80), max_size=3))
def test_random_frames_are_malformed(frames):
    with pytest.raises(MalformedMessage):
        decode(frames)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_by_name(name):
    array = np.ones((2, 3), DTYPES[name])
    header = decode_header(encode(Message("activation", array=array))[0])
    assert header.fields[10] == name
    assert header.dtype == array.dtype


def test_every_numeric_dtype_of_tensorflow_has_a_name():
    """TensorFlow's quantised types are structured in NumPy and have no place in training."""
    numeric = (
        "bfloat16 bool complex64 complex128 float16 float32 float64 float8_e4m3b11fnuz float8_e4m3fn "
        "float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 "
        "uint32 uint64"
    )
    assert set(numeric.split()) <= set(DTYPES)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "5 to"),
        (b"12345678", "checksum"),
        (sealed(b""), "5 to"),
        (sealed(b"\xc1"), "MessagePack"),
        (sealed([1, 2]), "13 fields"),
        (sealed({}), "13 fields"),
        (sealed(msgpack.packb(GOOD) + b"\x00"), "MessagePack"),
        (sealed(b"\x91" * 3000), "MessagePack"),
        (sealed(b"\xdd\xff\xff\xff\xff"), "MessagePack"),
        (sealed(b"\xdb\xff\xff\xff\xff"), "MessagePack"),
        (forged(f0=2), "version 1 .* received 2"),
        (forged(f0=[]), "version"),
        (forged(f1="pickle"), "unknown kind"),
        (forged(f1=[]), "unknown kind"),
        (forged(f2=True), "must be ints"),
        (forged(f3=-2), "must be ints"),
        (forged(f4=1.0), "must be ints"),
        (forged(f7=2**53 + 1), "must be ints"),
        (forged(f6=None), "tensor must be a str"),
        (forged(f6="x" * 1025), "tensor must be a str"),
        (forged(f9=b""), "value holds"),
        (forged(f9=msgpack.ExtType(5, b"")), "value holds|MessagePack"),
        (forged(f9={b"": 1}), "keys of a value|MessagePack"),
        (forged(f9=[[None] * 3000, [None] * 3000]), "4096 entries"),
        (forged(f10="object"), "dtype 'object' is not allowed"),
        (forged(f10="<f4"), "not allowed"),
        (forged(f10=4), "not allowed"),
        (forged(f10=None), "no dtype"),
        (forged(f10=None, f11=[], f12=False), "no dtype"),
        (forged(f11="23"), "expected a shape"),
        (forged(f11=[1] * 33), "expected a shape"),
        (forged(f11=[-2, -3]), "at least 0"),
        (forged(f11=[2.0, 3]), "at least 0"),
        (forged(f11=[True, 6]), "at least 0"),
        (forged(f12=23), "does not take"),
        (forged(f12=24.0), "does not take"),
        (forged(f11=[2**62, 4], f12=0), "does not take"),
        (forged(f11=[2**29], f12=2**31), "above the limit"),
        (forged(f11=[2**40, 2**40, 0], f12=0), "above the limit"),
    ],
)
def test_what_is_wrong_is_said(header, words):
    with pytest.raises(MalformedMessage, match=words):
        decode_header(header)


def test_a_list_that_claims_to_be_long_is_not_believed():
    """Also not many of them, one in the other: MessagePack makes room for a list before it reads what is in it."""
    for packed in (b"\xdd\x00\xff\xff\xff" + bytes(100), b"\xdd\x00\x01\x00\x00" * 500 + bytes(100)):
        tracemalloc.start()
        try:
            with pytest.raises(MalformedMessage, match="MessagePack"):
                decode_header(sealed(packed))
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_the_good_header_of_these_tests_is_good():
    assert decode_header(sealed(GOOD)).shape == (2, 3)


def test_nesting_is_limited_on_both_sides_alike():
    for depth, fine in ((15, True), (16, True), (17, False)):
        value = 1
        for _ in range(depth):
            value = [value]
        if fine:
            assert decode(encode(Message("command", value=value))).value == value
        else:
            with pytest.raises(Unsendable, match="nested 16 levels"):
                encode(Message("command", value=value))
            with pytest.raises(MalformedMessage, match="nested 16 levels"):
                decode_header(forged(f9=value))


def test_a_value_that_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(Unsendable, match="nested"):
        encode(Message("command", value=value))


def test_limits_are_sent_up_to_the_last_byte():
    limits = Limits(max_bytes=8, max_rank=2)
    assert decode(encode(Message("output", array=np.ones(8, np.uint8)), limits), limits).array.size == 8
    with pytest.raises(MessageTooLarge, match="9 bytes are above the limit of 8"):
        encode(Message("output", array=np.ones(9, np.uint8)), limits)
    with pytest.raises(MessageTooLarge, match="2 dimensions"):
        encode(Message("output", array=np.ones((1, 1, 1), np.uint8)), limits)
    with pytest.raises(MalformedMessage, match="above the limit"):
        decode_header(encode(Message("output", array=np.ones(9, np.uint8)))[0], limits)


@pytest.mark.parametrize(
    "wrong", [{"max_bytes": 2**31}, {"max_bytes": -1}, {"max_header_bytes": 1}, {"max_rank": 65}, {"max_count": 1}]
)
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


@given(arrays())
def test_a_contiguous_native_array_is_encoded_in_place(array):
    _, raw = encode(Message("activation", array=array))
    in_place = array.flags.c_contiguous and array.dtype.isnative
    if array.size:
        assert np.shares_memory(np.frombuffer(raw, np.uint8), array) == in_place
    assert raw.readonly == (not array.flags.writeable or not in_place)


@pytest.mark.parametrize("entry", [[], {}, [[]], [0]], ids=repr)
def test_a_header_full_of_small_entries_is_refused_before_it_is_built(entry):
    """A megabyte of empty lists took 70 MB and a quarter of a second to refuse; reading ends after some thousands."""
    frame = forged(f9=[[entry] * 4000] * 60)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="more entries"):
            decode_header(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


def test_a_value_of_as_many_entries_as_it_may_have_arrives():
    value = [[]] * 4000
    assert decode(encode(Message("reply", value=value))).value == value
    many = [list(range(200))] * 20
    assert decode(encode(Message("reply", value=many))).value == many

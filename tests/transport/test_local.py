"""The lane of one host: what the contract does not say of Unix sockets and shared regions."""

import errno
import os
import resource
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.transport.ways import LARGE, PATIENCE, SMALL, activation, mapped_regions, open_descriptors
from transport import (
    BadAddress,
    ChannelClosed,
    Limits,
    MalformedMessage,
    Message,
    PeerLost,
    TransportTimeout,
    Watched,
    codec,
    open_transport,
)
from transport.one_host import datagrams, local, regions
from transport.one_host import inbox as receiving
from transport.one_host import outbox as sending


def test_regions_are_used_again_and_leave_no_descriptor_open(way):
    inbox, outbox = way
    outbox.send(activation(0, LARGE))
    inbox.receive(PATIENCE)
    descriptors = open_descriptors()
    for number in range(20):
        outbox.send(activation(number, LARGE + number))
        assert np.array_equal(inbox.receive(PATIENCE).array, LARGE + number)
    assert mapped_regions() == 2  # one, seen from both ends
    assert open_descriptors() == descriptors


def test_messages_in_flight_have_regions_of_their_own(way):
    inbox, outbox = way
    sizes = [1 << 20, 1 << 18, 1 << 19, 1 << 20]
    for number, size in enumerate(sizes * 3):
        outbox.send(activation(number, np.full(size, number, np.uint8)))
    for number, size in enumerate(sizes * 3):
        received = inbox.receive(PATIENCE).array
        assert received.shape == (size,) and (received == number).all()


def test_regions_that_are_too_small_by_now_are_given_up(way, monkeypatch):
    monkeypatch.setattr(regions, "KEPT_BYTES", 1 << 19)
    inbox, outbox = way
    for size in (1 << 20, 1 << 21, 1 << 22):
        for number in range(2):
            outbox.send(activation(number, np.full(size, number, np.uint8)))
            assert (inbox.receive(PATIENCE).array == number).all()
    with pytest.raises(TransportTimeout):
        inbox.receive(0)
    assert mapped_regions() == 2


def test_nothing_is_left_when_both_ends_are_closed(monkeypatch):
    descriptors, mapped = open_descriptors(), mapped_regions()
    with open_transport("local") as here, open_transport("local") as there:
        inbox = here.bind()
        outbox = there.connect(inbox.address, PATIENCE)
        for number in range(3):
            outbox.send(activation(number, LARGE))
        inbox.receive(PATIENCE)
        monkeypatch.setattr(sending, "LINGER_SECONDS", 0.05)
        for number in range(3000):  # more than the socket takes, and nobody reads it
            outbox.send(activation(number, SMALL))
        outbox.send(activation(0, np.ones(1 << 22)))
    assert (open_descriptors(), mapped_regions()) == (descriptors, mapped)


@pytest.mark.parametrize("content", [SMALL, np.arange(2048, dtype=np.float32)], ids=["24 bytes", "8 KiB"])
def test_two_that_send_before_they_receive_do_not_lock_each_other_up(pair, content):
    """More than sockets hold, both ways, by one thread: nobody waits for anybody."""
    inboxes = [transport.bind() for transport in pair]
    outboxes = [
        transport.connect(inbox.address, PATIENCE) for transport, inbox in zip(pair, reversed(inboxes), strict=True)
    ]
    count = 6000 if content is SMALL else 400
    for number in range(count):
        for outbox in outboxes:
            outbox.send(activation(number, content))
    assert all(outbox._queue for outbox in outboxes)
    waiting = [0, 0]
    deadline = time.monotonic() + PATIENCE
    while waiting != [count, count] and time.monotonic() < deadline:
        for side, inbox in enumerate(inboxes):
            try:
                message = inbox.receive(0)
            except TransportTimeout:
                continue
            assert message.microbatch == waiting[side] and np.array_equal(message.array, content)
            waiting[side] += 1
    assert waiting == [count, count]


def test_what_a_socket_did_not_take_is_sent_on_while_the_sender_does_something_else(way):
    inbox, outbox = way
    count = 0
    while not outbox._queue:
        outbox.send(activation(count))
        count += 1
    later = outbox._later
    assert [inbox.receive(PATIENCE).microbatch for _ in range(count)] == list(range(count))
    later.join(PATIENCE)
    assert not later.is_alive() and not outbox._queue  # the thread is there no longer than it is needed


def refuse(*arguments):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_without_descriptors_arrays_come_in_pieces(way, monkeypatch):
    inbox, outbox = way
    monkeypatch.setattr(os, "memfd_create", refuse)
    for number in range(3):
        outbox.send(activation(number, LARGE + number))
        outbox.send(Message("hello"))
    for number in range(3):
        received = inbox.receive(PATIENCE).array
        assert np.array_equal(received, LARGE + number)
        assert received.ctypes.data % 64 == 0 and received.flags.writeable
        assert inbox.receive(PATIENCE).kind == "hello"
    assert mapped_regions() == 0


def test_a_receiver_without_descriptors_says_so(way):
    inbox, outbox = way
    with pytest.raises(TransportTimeout):
        inbox.receive(0)  # lets the sender in
    outbox.send(activation(0, LARGE))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, before[1]))
    try:
        with pytest.raises(OSError, match="ulimit -n"):
            inbox.receive(PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_receiver_without_descriptors_for_one_who_connects_says_so(way, monkeypatch):
    inbox, _ = way
    listener = inbox._listener
    monkeypatch.setattr(inbox, "_listener", SimpleNamespace(accept=refuse))
    with open_transport("local") as there:
        late = there.connect(inbox.address, PATIENCE)
        late.send(Message("hello"))
        with pytest.raises(OSError, match=r"a process connects and no file descriptor is free \(ulimit -n\)"):
            inbox.receive(PATIENCE)
        monkeypatch.setattr(inbox, "_listener", listener)
        assert inbox.receive(PATIENCE).kind == "hello"  # and is let in as soon as there is one


def test_values_of_any_size_within_the_limits_arrive(way):
    inbox, outbox = way
    value = ["x" * 900_000, {"rest": list(range(100))}]
    for content in (None, SMALL, LARGE):
        outbox.send(Message("command", value=value, array=content))
        received = inbox.receive(PATIENCE)
        assert received.same(Message("command", value=value, array=content))


def test_headers_that_are_known_are_told_apart(way):
    """Both ends keep headers: numbers, bools and floats that are equal are not the same, and nothing is shared."""
    inbox, outbox = way
    values = [None, False, 0, 0.0, True, 1, 1.0, None, {"a": [1]}, {"a": [1]}]
    for round_ in range(2):
        for number, value in enumerate(values):
            outbox.send(Message("command", step=round_, microbatch=number, window=round_, value=value))
            outbox.send(Message("activation", step=number, microbatch=round_, array=np.ones(3, f"f{4 + 4 * round_}")))
        for number, value in enumerate(values):
            received = inbox.receive(PATIENCE)
            assert received.same(Message("command", step=round_, microbatch=number, window=round_, value=value))
            expected = Message("activation", step=number, microbatch=round_, array=np.ones(3, f"f{4 + 4 * round_}"))
            assert inbox.receive(PATIENCE).same(expected)
    for _ in range(2):
        outbox.send(Message("command", value={"a": [1]}))
        received = inbox.receive(PATIENCE).value
        assert received == {"a": [1]}
        received["a"].append(2)


def test_more_headers_than_are_kept_arrive(way, monkeypatch):
    monkeypatch.setattr(sending, "KNOWN_HEADERS", 3)
    monkeypatch.setattr(receiving, "KNOWN_HEADERS", 2)
    inbox, outbox = way
    for number in range(20):
        outbox.send(Message("activation", tensor=str(number % 7), microbatch=number, array=SMALL))
        assert inbox.receive(PATIENCE).key == Message("activation", tensor=str(number % 7), microbatch=number).key


def test_what_is_sent_within_a_process_does_not_leave_it():
    with open_transport("local") as transport:
        inbox = transport.bind()
        descriptors = open_descriptors()
        outbox = transport.connect(inbox.address, PATIENCE)
        content = LARGE.copy()
        outbox.send(activation(0, content))
        content[:] = 0
        received = inbox.receive(PATIENCE).array
        assert np.array_equal(received, LARGE) and not np.shares_memory(received, content)
        assert (open_descriptors(), mapped_regions()) == (descriptors, 0)
        inbox.close()
        with pytest.raises(PeerLost):
            outbox.send(activation(1))


def test_only_the_same_user_gets_in(pair, monkeypatch):
    here, there = pair
    inbox = here.bind()
    me = os.geteuid()
    outbox = there.connect(inbox.address, PATIENCE)  # waits to be let in
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(TransportTimeout):
        inbox.receive(0)
    with pytest.raises(BadAddress, match="another user"):
        there.connect(inbox.address, PATIENCE)
    with pytest.raises(PeerLost):
        outbox.send(activation(0))
    monkeypatch.undo()
    there.connect(inbox.address, PATIENCE).send(Message("hello"))
    assert inbox.receive(PATIENCE).kind == "hello"


def test_messages_come_before_watched_objects_also_from_whoever_just_connected(pair):
    here, there = pair
    inbox = here.bind()
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", 0) as sink:
        sink.write(b"!")
        there.connect(inbox.address, PATIENCE).send(Message("hello"))
        assert inbox.receive(PATIENCE, (source,)).kind == "hello"
        with pytest.raises(Watched):
            inbox.receive(PATIENCE, (source,))


@pytest.mark.parametrize("address", ["local://a/b", "local://" + "x" * 81, "local://ä", "local://a b"])
def test_bad_addresses(address):
    with open_transport("local") as transport:
        for action in (transport.bind, transport.connect):
            with pytest.raises(BadAddress, match="letters, digits"):
                action(address)


@pytest.fixture
def stranger(pair):
    """An inbox with limits, and a socket that sends it what it likes."""
    with open_transport("local", limits=Limits(max_bytes=1 << 20, max_header_bytes=5000)) as transport:
        inbox = transport.bind()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
            sender.connect(local._place(inbox.address))
            yield inbox, sender, transport


HEADER, RAW = codec.encode(activation(0))
FORMS = {form.name.lower().replace("_", " "): form for form in datagrams.Form}


def datagram(form, *, new=0, length=None, number=0, nbytes=24, place=(3, 0, 0), header=HEADER, rest=b""):
    length = len(header) if length is None else length
    return datagrams.PREFIX.pack(FORMS.get(form, form), new, length, number, nbytes, *place) + header + rest


NONSENSE = {
    "no prefix": b"x",
    "an unknown form": datagram(77),
    "a header that is longer than the datagram": datagram("with array", length=5000, rest=bytes(24)),
    "a header of nonsense": datagram("with array", header=b"x" * 60, rest=bytes(24)),
    "too few bytes": datagram("with array", rest=bytes(23)),
    "too many bytes": datagram("with array", rest=bytes(25)),
    "another size than the header's": datagram("in region", nbytes=23),
    "a region that nobody sent": datagram("in region"),
    "a new region that did not come": datagram("in region", new=1),
    "a region with bytes": datagram("in region", rest=bytes(24)),
    "a piece that nobody announced": datagram("piece", header=b"", rest=bytes(24)),
    "a header above the limit": datagram("header part", header=bytes(5001)),
    "a step that none has": datagram("with array", place=(-2, 0, 0), rest=bytes(24)),
    "a window that none has": datagram("with array", place=(0, 0, 2**53 + 1), rest=bytes(24)),
    "more than any datagram has": datagram("with array", rest=bytes(1 << 17)),
}


@pytest.mark.parametrize("sent", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_dropped_and_the_inbox_goes_on(stranger, sent):
    inbox, sender, _ = stranger
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sender.send(sent)
    sender.send(datagram("with array", rest=bytes(RAW)))
    with pytest.raises(MalformedMessage):
        inbox.receive(PATIENCE)
    assert np.array_equal(inbox.receive(PATIENCE).array, SMALL)


@pytest.mark.parametrize("pieces", [[bytes(25)], [bytes(20), bytes(5)], [bytes(20), None]])
def test_pieces_that_do_not_fit_are_dropped(stranger, pieces):
    """Too many bytes, or another message in their midst."""
    inbox, sender, _ = stranger
    good = datagram("with array", rest=bytes(RAW))
    sender.send(datagram("in pieces"))
    for piece in pieces:
        sender.send(good if piece is None else datagram("piece", header=b"", rest=piece))
    sender.send(good)
    with pytest.raises(MalformedMessage):
        inbox.receive(PATIENCE)
    assert np.array_equal(inbox.receive(PATIENCE).array, SMALL)


def test_memory_that_could_shrink_is_not_mapped(stranger):
    """Reading behind its end would kill the receiver. Nor is a descriptor of it left open."""
    inbox, sender, _ = stranger
    descriptor = os.memfd_create("a stranger's", os.MFD_ALLOW_SEALING)
    os.write(descriptor, bytes(RAW))
    with pytest.raises(TransportTimeout):
        inbox.receive(0)  # lets the sender in
    before = open_descriptors()
    socket.send_fds(sender, [datagram("in region", new=1)], [descriptor])
    with pytest.raises(MalformedMessage, match="cannot shrink"):
        inbox.receive(PATIENCE)
    assert open_descriptors() == before
    os.close(descriptor)


def test_a_closed_outbox_refuses_and_its_name_is_free(pair):
    here, there = pair
    inbox = here.bind("local://a-name")
    outbox = there.connect("local://a-name", PATIENCE)
    outbox.close()
    with pytest.raises(ChannelClosed):
        outbox.send(activation(0))
    inbox.close()
    assert here.bind("local://a-name").address == "local://a-name"

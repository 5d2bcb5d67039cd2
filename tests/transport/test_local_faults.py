"""The lane of one host where the kernel refuses, the peer is lost or Ctrl-C comes: nothing leaks, nothing is lost."""

import errno
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from tests.transport import ways
from tests.transport.ways import PATIENCE, open_descriptors
from transport import Message, PeerLost, open_transport
from transport.one_host import outbox as sending

LARGE = np.arange(1 << 14, dtype=np.float32)
"""An array that goes through a region."""


def activation(number, content=LARGE):
    return ways.activation(number, content)


def test_regions_come_back_also_when_the_socket_does_not_hold_their_numbers(way):
    inbox, outbox = way
    outbox.send(Message("hello"))
    inbox.receive(PATIENCE)
    [peer] = inbox._peers.values()
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is: a few numbers
    made = []
    for round_ in range(6):
        for number in range(60):
            outbox.send(activation(number, LARGE + round_ * number))
        for number in range(60):
            assert np.array_equal(inbox.receive(PATIENCE).array, LARGE + round_ * number)
        made.append(len(outbox._pool._regions))
    assert made[0] == 60 and len(set(made[2:])) == 1 and made[-1] < 2 * 60
    for number in range(60):  # and what was kept back is told with the next number
        outbox.send(activation(number))
        inbox.receive(PATIENCE)
    outbox._take_back()
    assert len(outbox._pool._free) == len(outbox._pool._regions) == made[-1]


def test_what_a_closed_sender_sent_arrives_though_it_read_no_number(way):
    """The kernel reports a reset before what waits."""
    inbox, outbox = way
    for number in range(4):
        outbox.send(activation(number))
    outbox.send(Message("hello"))
    assert inbox.receive(PATIENCE).microbatch == 0
    outbox.close()
    assert [inbox.receive(0).microbatch for _ in range(3)] == [1, 2, 3]
    assert inbox.receive(0).kind == "hello"


def test_a_lost_receiver_leaves_no_descriptor_of_a_new_region_open():
    before = open_descriptors()
    with open_transport("local") as here, open_transport("local") as there:
        inbox = here.bind()
        outbox = there.connect(inbox.address, PATIENCE)
        outbox.send(Message("hello"))
        inbox.receive(PATIENCE)
        inbox.close()
        with pytest.raises(PeerLost):
            outbox.send(activation(0))
        assert open_descriptors() == before


@pytest.mark.parametrize("full", [False, True], ids=["an empty socket", "a full socket"])
def test_ctrl_c_while_a_new_region_is_sent_leaves_no_descriptor_open(way, monkeypatch, full):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    _, outbox = way
    before = open_descriptors()
    while full and not outbox._queue:
        outbox.send(activation(0, LARGE[:8]))
    if full:
        outbox.send(activation(0))  # waits with its descriptor
    monkeypatch.setattr(sending, "PREFIX", SimpleNamespace(pack=interrupt))  # the region is made by then
    with pytest.raises(KeyboardInterrupt):
        outbox.send(activation(1, np.tile(LARGE, 2)))
    assert open_descriptors() == before - 1  # its socket


def test_a_receiver_lost_while_a_message_is_made_ready_is_named(way, monkeypatch):
    """The thread that sends on what waits may notice it first."""
    _, outbox = way
    frames = outbox._frames

    def lose(message):
        outbox._lose()
        return frames(message)

    monkeypatch.setattr(outbox, "_frames", lose)
    for number in range(2):
        with pytest.raises(PeerLost):
            outbox.send(activation(number))


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF, errno.EPIPE], ids=errno.errorcode.get)
def test_whatever_stops_the_thread_that_sends_on_the_next_message_is_refused(way, monkeypatch, code):
    def refuse(datagram):
        raise OSError(code, os.strerror(code))

    _, outbox = way
    while not outbox._queue:
        outbox.send(activation(0, LARGE[:8]))
    later = outbox._later
    monkeypatch.setattr(outbox, "_try", refuse)
    later.join(PATIENCE)
    assert not later.is_alive() and outbox._later is None
    with pytest.raises(PeerLost):
        outbox.send(activation(1))

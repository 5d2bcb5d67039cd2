"""The contract suite: what every transport must do, as functions that need no test framework.

    @pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(lambda limits=DEFAULT_LIMITS: MyTransport(tmp_path, limits))

Each check opens its own transports, needs no sleep and leaves nothing open. Waiting for something that comes later is
bounded by `PATIENCE`, which only a failing check uses up.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from transport.channel import Outbox
from transport.errors import (
    AddressInUse,
    BadAddress,
    ChannelClosed,
    MessageTooLarge,
    PeerLost,
    TransportTimeout,
    Unsendable,
    Watched,
)
from transport.limits import Limits
from transport.message import DRIVER, Message
from transport.testing_tools import PATIENCE, Opener, arrays, channel, expect, free_address, require, until_it_succeeds


def check_every_field_arrives(open_one: Opener) -> None:
    """The extremes of every field, and a value of every plain type."""
    value: Any = {"text": "grüß", "list": [None, True, 1, -2.5, 2**63, {}], "empty": []}
    full = Message("gradient", 2, 10**9, 4, 3, "lstm/state:0", 7, 5, value, np.ones(2))
    with channel(open_one) as (inbox, outbox):
        for message in (full, Message("stop"), Message("reply", stage=DRIVER, value=float("nan"))):
            outbox.send(message, PATIENCE)
            received = inbox.receive(PATIENCE)
            require(received.same(message), "sent", message, "received", received, received.value)


def check_arrays_arrive_whole(open_one: Opener) -> None:
    """Any dtype, shape and layout: equal, native, C order, aligned, writable, owned by nobody else."""
    with channel(open_one) as (inbox, outbox):
        for array in arrays():
            outbox.send(Message("activation", array=array), PATIENCE)
            received = inbox.receive(PATIENCE).array
            require(received is not None and received.shape == array.shape, array.shape)
            assert received is not None
            require(received.dtype == array.dtype.newbyteorder("="), array.dtype, received.dtype)
            native = array.astype(received.dtype)
            require(received.tobytes() == native.tobytes(), "not the same bytes:", array.dtype, array.shape)
            require(received.flags.c_contiguous and received.flags.writeable)
            require(received.__array_interface__["data"][0] % 64 == 0, "misaligned", array.dtype, array.shape)


def check_order_is_kept(open_one: Opener) -> None:
    """Messages of one outbox arrive once each, in order, with their own arrays."""
    with channel(open_one) as (inbox, outbox):
        for number in range(500):
            outbox.send(Message("activation", microbatch=number, array=np.full(number % 7, number)), PATIENCE)
        for number in range(500):
            received = inbox.receive(PATIENCE)
            require(received.microbatch == number, "expected", number, "received", received)
            require(received.array is not None and received.array.tolist() == [number] * (number % 7))


def check_many_senders(open_one: Opener) -> None:
    """Threads that send at once: each sender's messages arrive once and in its order."""
    with open_one() as transport:
        inbox = transport.bind()
        outboxes = [transport.connect(inbox.address, PATIENCE) for _ in range(4)]

        def send_all(source: int) -> None:
            for number in range(100):
                outboxes[source].send(Message("gradient", source=source, step=number), PATIENCE)

        threads = [threading.Thread(target=send_all, args=(source,)) for source in range(4)]
        for thread in threads:
            thread.start()
        received: list[list[int]] = [[], [], [], []]
        for _ in range(400):
            message = inbox.receive(PATIENCE)
            received[message.source].append(message.step)
        for thread in threads:
            thread.join()
        require(received == [list(range(100))] * 4, received)
        expect(TransportTimeout, lambda: inbox.receive(0))


def check_the_sender_may_write_after_send(open_one: Opener) -> None:
    """A writable array is the caller's again when `send` returns, whatever its size."""
    with channel(open_one) as (inbox, outbox):
        for size in (8, 1 << 22):
            array = np.ones(size, np.float32)
            outbox.send(Message("activation", array=array), PATIENCE)
            array[:] = -1
            received = inbox.receive(PATIENCE).array
            require(received is not None and bool((received == 1).all()), "saw a later write, size", size)


def check_the_sender_may_free_after_send(open_one: Opener) -> None:
    """A read-only array is kept alive until it was sent, and what replaces it in memory is not seen."""
    with channel(open_one) as (inbox, outbox):
        for size in (8, 1 << 22):
            for number in range(4):
                array = np.full(size, number, np.float32)
                array.flags.writeable = False
                outbox.send(Message("activation", array=array), PATIENCE)
                del array
                gc.collect()
            for number in range(4):
                received = inbox.receive(PATIENCE).array
                require(received is not None and bool((received == number).all()), "damaged, size", size)


def check_received_arrays_are_independent(open_one: Opener) -> None:
    """Writing to a received array changes neither the sender's array nor what arrives later or came before."""
    with channel(open_one) as (inbox, outbox):
        for size in (4, 1 << 20):
            array = np.zeros(size, np.int64)
            array.flags.writeable = False
            for _ in range(3):
                outbox.send(Message("activation", array=array), PATIENCE)
            received = [inbox.receive(PATIENCE).array for _ in range(3)]
            for number, one in enumerate(received, 1):
                require(one is not None and not one.any(), "shared memory, size", size)
                assert one is not None
                one[:] = number
            require([int(one[-1]) for one in received if one is not None] == [1, 2, 3])
            require(not array.any(), "the sender's array was changed")


def check_timeouts(open_one: Opener) -> None:
    """An empty inbox times out, with 0 at once, and works afterwards."""
    with channel(open_one) as (inbox, outbox):
        expect(TransportTimeout, lambda: inbox.receive(0), inbox.address)
        expect(TransportTimeout, lambda: inbox.receive(0.01), "0.01")
        expect(TransportTimeout, lambda: inbox.receive(-1.0))
        outbox.send(Message("hello"), 0)
        require(inbox.receive(PATIENCE).kind == "hello")


def check_receive_without_timeout_waits(open_one: Opener) -> None:
    """None waits as long as it takes."""
    with channel(open_one) as (inbox, outbox):
        sender = threading.Thread(target=lambda: outbox.send(Message("hello"), None))
        sender.start()
        require(inbox.receive(None).kind == "hello")
        sender.join()


def check_connect_to_nobody_times_out(open_one: Opener) -> None:
    """An address without a receiver is a timeout that names it."""
    with open_one() as transport:
        inbox = transport.bind()
        inbox.close()
        expect(TransportTimeout, lambda: transport.connect(inbox.address, 0.05), inbox.address, "0.05")


def check_connect_may_come_first(open_one: Opener) -> None:
    """`connect` waits for an inbox that is bound later, and what is sent then arrives."""
    with open_one() as transport:
        address = free_address(transport)
        outboxes: list[Outbox] = []
        connecting = threading.Thread(target=lambda: outboxes.append(transport.connect(address, PATIENCE)))
        connecting.start()
        inbox = transport.bind(address)
        connecting.join()
        outboxes[0].send(Message("hello"), PATIENCE)
        require(inbox.receive(PATIENCE).kind == "hello")


def check_an_address_is_used_once(open_one: Opener) -> None:
    """A second inbox is refused and disturbs nothing; after close the address is free again, at once."""
    with open_one() as transport:
        inbox = transport.bind()
        outbox = transport.connect(inbox.address, PATIENCE)
        expect(AddressInUse, lambda: transport.bind(inbox.address))
        with open_one() as another:
            expect(AddressInUse, lambda: another.bind(inbox.address))
        outbox.send(Message("hello"), PATIENCE)
        require(inbox.receive(PATIENCE).kind == "hello")
        for _ in range(5):
            inbox.close()
            inbox = transport.bind(inbox.address)
        transport.connect(inbox.address, PATIENCE).send(Message("hello"), PATIENCE)
        require(inbox.receive(PATIENCE).kind == "hello")


def check_wrong_addresses_are_refused(open_one: Opener) -> None:
    """An address of no or of another scheme is the caller's error."""
    with open_one() as transport:
        for address in ("", "nonsense", "other://place", f"{transport.scheme}://"):
            expect(BadAddress, lambda address=address: transport.bind(address))  # type: ignore[misc]
            expect(BadAddress, lambda address=address: transport.connect(address, 0.05))  # type: ignore[misc]


def check_a_lost_peer_is_noticed(open_one: Opener) -> None:
    """After the inbox is gone, sending fails within moments, and from then on always."""
    with channel(open_one) as (inbox, outbox):
        outbox.send(Message("hello"), PATIENCE)
        inbox.receive(PATIENCE)
        inbox.close()
        deadline = time.monotonic() + PATIENCE
        lost = None
        while lost is None and time.monotonic() < deadline:
            try:
                outbox.send(Message("activation", array=np.zeros(4)), PATIENCE)
            except PeerLost as error:
                lost = error
        require(lost is not None and inbox.address in str(lost), "no PeerLost:", lost)
        require(outbox.closed)
        expect(PeerLost, lambda: outbox.send(Message("stop"), PATIENCE))
        outbox.close()


def check_too_large_is_refused_before_sending(open_one: Opener) -> None:
    """Nothing of a refused message arrives, and the channel goes on."""
    limits = Limits(max_bytes=1000, max_header_bytes=500, max_rank=3)
    with channel(open_one, limits=limits) as (inbox, outbox):
        for message in (
            Message("activation", array=np.zeros(1001, np.uint8)),
            Message("activation", array=np.zeros((1, 1, 1, 1))),
            Message("activation", array=np.zeros((0, 1001))),
            Message("command", value="x" * 500),
        ):
            expect(MessageTooLarge, lambda message=message: outbox.send(message))  # type: ignore[misc]
        outbox.send(Message("activation", array=np.zeros(1000, np.uint8)), PATIENCE)
        received = inbox.receive(PATIENCE).array
        require(received is not None and received.nbytes == 1000)
        expect(TransportTimeout, lambda: inbox.receive(0))


def check_two_gibibytes_are_refused_before_sending(open_one: Opener) -> None:
    """With the default limits a frame of 2 GiB is refused; its memory is never touched."""
    with channel(open_one) as (inbox, outbox):
        expect(MessageTooLarge, lambda: outbox.send(Message("activation", array=np.empty(2**31, np.uint8))))
        outbox.send(Message("hello"), PATIENCE)
        require(inbox.receive(PATIENCE).kind == "hello")


def check_unsendable_is_refused(open_one: Opener) -> None:
    """What has no place on the wire is the sender's error, at once, and the channel goes on."""
    wrong: list[Any] = [
        Message("no such kind"),
        Message("activation", step=-2),
        Message("activation", step=2**53 + 1),
        Message("activation", microbatch=1.5),  # type: ignore[arg-type]
        Message("activation", microbatch=np.int64(1)),  # type: ignore[arg-type]
        Message("activation", tensor="x" * 2000),
        Message("activation", tensor=b"x"),  # type: ignore[arg-type]
        Message("activation", tensor="\ud800"),
        Message("command", value=(1, 2)),  # type: ignore[arg-type]
        Message("command", value={"a": np.float64(1)}),
        Message("command", value={1: 2}),  # type: ignore[dict-item]
        Message("command", value=b"x"),  # type: ignore[arg-type]
        Message("command", value=2**64),
        Message("command", value=object()),  # type: ignore[arg-type]
        Message("activation", array=[1.0]),  # type: ignore[arg-type]
        Message("activation", array=np.array(["text"])),
        Message("activation", array=np.array([object()])),
        Message("activation", array=np.zeros(2, "V4")),
        Message("activation", array=np.zeros(2, "datetime64[s]")),
    ]
    nested: Any = []
    for _ in range(17):
        nested = [nested]
    wrong.append(Message("command", value=nested))
    with channel(open_one) as (inbox, outbox):
        for message in wrong:
            expect(Unsendable, lambda message=message: outbox.send(message))  # type: ignore[misc]
        outbox.send(Message("hello"), PATIENCE)
        require(inbox.receive(PATIENCE).kind == "hello", "something was sent after all")


def check_watching_other_descriptors(open_one: Opener) -> None:
    """One wait for messages and for other objects: by number or by fileno; messages come first."""
    with channel(open_one) as (inbox, outbox):
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", 0) as sink:
            watch = (source,)
            expect(TransportTimeout, lambda: inbox.receive(0, watch))
            outbox.send(Message("hello"), PATIENCE)
            require(inbox.receive(PATIENCE, watch).kind == "hello")
            writing = threading.Thread(target=lambda: sink.write(b"!"))
            writing.start()
            try:
                inbox.receive(PATIENCE, watch)
            except Watched as event:
                require(event.source is source, event)
            else:
                raise AssertionError("a readable descriptor was not noticed")
            writing.join()
            expect(Watched, lambda: inbox.receive(0, [reader]))
            expect(TransportTimeout, lambda: inbox.receive(0))
            outbox.send(Message("hello"), PATIENCE)
            require(until_it_succeeds(lambda: inbox.receive(PATIENCE, watch), Watched).kind == "hello")


def check_close(open_one: Opener) -> None:
    """Closing twice is fine, in any order; using what is closed is an error of its own."""
    transport = open_one()
    inbox = transport.bind()
    outbox = transport.connect(inbox.address, PATIENCE)
    outbox.close()
    outbox.close()
    expect(ChannelClosed, lambda: outbox.send(Message("stop")))
    inbox.close()
    inbox.close()
    expect(ChannelClosed, lambda: inbox.receive(0))
    transport.close()
    transport.close()
    expect(ChannelClosed, transport.bind)
    expect(ChannelClosed, lambda: transport.connect(inbox.address, 0.05))


def check_context_managers_close(open_one: Opener) -> None:
    """Leaving the block closes, a transport with everything it made."""
    with open_one() as transport:
        with transport.bind() as inbox, transport.connect(inbox.address, PATIENCE) as outbox:
            outbox.send(Message("hello"), PATIENCE)
            require(inbox.receive(PATIENCE).kind == "hello")
        expect(ChannelClosed, lambda: inbox.receive(0))
        expect(ChannelClosed, lambda: outbox.send(Message("hello")))
        left = transport.bind()
    expect(ChannelClosed, lambda: left.receive(0))


def check_closing_an_outbox_delivers(open_one: Opener) -> None:
    """What was sent before `close` still arrives when the receiver lives, also if it took some of it before."""
    with open_one() as here, open_one() as there:
        inbox = here.bind()
        outbox = there.connect(inbox.address, PATIENCE)
        array = np.ones(1 << 20)
        for number in range(5):
            outbox.send(Message("activation", microbatch=number, array=array), PATIENCE)
        for number in range(5):
            if number == 2:  # what a receiver says on the way back, unread then, takes nothing away
                outbox.close()
            received = inbox.receive(PATIENCE)
            require(received.same(Message("activation", microbatch=number, array=array)), number, received)


CONTRACT: Final[tuple[Callable[[Opener], None], ...]] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_")
)
"""Every check of the contract."""

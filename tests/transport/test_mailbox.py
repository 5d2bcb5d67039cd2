"""The mailbox: what is asked for comes, what is early waits, what is stale goes."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport import Key, Mailbox, Message, TransportTimeout, Watched, open_transport

PATIENCE = 20.0


@pytest.fixture
def post():
    with open_transport("inproc") as transport:
        inbox = transport.bind()
        yield inbox, transport.connect(inbox.address).send


def activation(microbatch, step=0, **fields):
    return Message("activation", step=step, stage=1, source=0, tensor="x", microbatch=microbatch, **fields)


def test_early_messages_wait(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    for microbatch in range(4):
        send(activation(microbatch))
    for microbatch in (2, 0, 3, 1):
        assert mailbox.take([activation(microbatch).key], PATIENCE).microbatch == microbatch
    assert len(mailbox) == 0


@given(st.permutations(range(8)), st.permutations(range(8)))
def test_any_order_of_arrival_serves_any_order_of_use(arriving, using):
    with open_transport("inproc") as transport:
        inbox = transport.bind()
        outbox = transport.connect(inbox.address)
        for microbatch in arriving:
            outbox.send(activation(microbatch))
        mailbox = Mailbox(inbox)
        assert [mailbox.take([activation(one).key], 0).microbatch for one in using] == list(using)


def test_the_first_of_several_keys_that_is_there_is_taken(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    send(activation(1))
    send(activation(2))
    send(activation(0))
    assert mailbox.take([activation(0).key], PATIENCE).microbatch == 0
    keys = [activation(7).key, activation(2).key, activation(1).key]
    assert [mailbox.take(keys, PATIENCE).microbatch for _ in range(2)] == [2, 1]


def test_equal_keys_come_in_order_of_arrival(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    for value in range(3):
        send(Message("command", value=value))
    send(activation(0))
    mailbox.take([activation(0).key], PATIENCE)
    assert mailbox.held() == (Key("command"),) * 3
    assert [mailbox.take([Key("command")], 0).value for _ in range(3)] == [0, 1, 2]


def test_every_field_of_the_key_counts(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    key = Key("gradient", 1, 2, 3, "h", 4, 5)
    near = [
        key._replace(**{name: value}) for name, value in zip(Key._fields, ("mask", 9, 9, 9, "c", 9, 9), strict=True)
    ]
    for one in (*near, key):
        send(Message(one.kind, 0, *one[1:]))
    assert mailbox.take([key], PATIENCE).key == key
    assert set(mailbox.held()) == set(near)


@pytest.mark.parametrize("kind", ["stop", "error"])
def test_urgent_messages_interrupt_every_wait(post, kind):
    inbox, send = post
    send(activation(1))
    send(Message(kind, step=5, value="why"))
    assert Mailbox(inbox).take([activation(0).key], PATIENCE).kind == kind


def test_urgent_kinds_can_be_chosen(post):
    inbox, send = post
    send(Message("stop"))
    send(activation(0))
    mailbox = Mailbox(inbox, urgent=frozenset())
    assert mailbox.take([activation(0).key], PATIENCE).kind == "activation"
    assert mailbox.held() == (Key("stop"),)


def test_a_timeout_says_who_waits_for_what(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    send(activation(3, step=2))
    keys = [activation(1, step=2).key]
    with pytest.raises(
        TransportTimeout,
        match=r"waited 0 s for activation 'x' of step 2 microbatch 1 from 0; held are activation 'x' of step 2 mic",
    ):
        mailbox.take(keys, 0) and mailbox.take(keys, 0)
    send(activation(1, step=2))
    assert mailbox.take(keys, PATIENCE).microbatch == 1
    assert mailbox.take([activation(3, step=2).key], 0).microbatch == 3


def test_other_messages_do_not_extend_the_timeout(post):
    """A stream of messages for others must not keep a wait alive for ever."""
    inbox, send = post
    mailbox = Mailbox(inbox)
    stopped = threading.Event()

    def babble():
        while not stopped.is_set():
            send(activation(1))

    babbling = threading.Thread(target=babble)
    babbling.start()
    try:
        with pytest.raises(TransportTimeout):
            mailbox.take([activation(0).key], 0.05)
    finally:
        stopped.set()
        babbling.join()


def test_receive_hands_out_held_messages_first(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    send(activation(1))
    send(activation(0))
    mailbox.take([activation(0).key], PATIENCE)
    send(Message("reply"))
    assert [mailbox.receive(PATIENCE).kind for _ in range(2)] == ["activation", "reply"]
    with pytest.raises(TransportTimeout):
        mailbox.receive(0)


def test_watched_objects_interrupt_and_nothing_is_lost(post):
    inbox, send = post
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", 0) as sink:
        mailbox = Mailbox(inbox, watch=(source,))
        send(activation(1))
        sink.write(b"!")
        with pytest.raises(Watched) as event:
            mailbox.take([activation(0).key], PATIENCE)
        assert event.value.source is source
        with pytest.raises(Watched):
            mailbox.take([activation(0).key], PATIENCE)
        mailbox.watch = ()
        with pytest.raises(TransportTimeout):
            mailbox.take([activation(0).key], 0)
        assert mailbox.take([activation(1).key], 0).microbatch == 1


def test_clear_forgets_what_belongs_to_earlier_steps(post):
    inbox, send = post
    mailbox = Mailbox(inbox)
    for step in range(3):
        send(activation(0, step))
        send(activation(0, step))
    send(Message("command", step=0))
    send(Message("hello"))
    mailbox.take([Key("hello")], PATIENCE)
    assert mailbox.clear(before_step=2) == 4
    assert {(key.kind, key.step) for key in mailbox.held()} == {("activation", 2), ("command", 0)}
    assert mailbox.clear() == 3
    assert len(mailbox) == 0


def test_messages_of_earlier_incarnations_are_dropped(post):
    inbox, send = post
    mailbox = Mailbox(inbox, incarnation=2)
    send(activation(0, incarnation=1))
    send(Message("stop", incarnation=1))
    send(activation(0, incarnation=2, value="fresh"))
    send(activation(1, incarnation=1))
    send(activation(1, incarnation=3))
    assert mailbox.take([activation(0).key], PATIENCE).value == "fresh"
    assert mailbox.receive(PATIENCE).incarnation == 3


def test_a_message_to_oneself_is_taken_as_any_other_and_its_array_is_fresh(post):
    """It never leaves the process, and yet nobody else has its memory (rule 2 of channels)."""
    inbox, _ = post
    mailbox = Mailbox(inbox)
    sent = activation(1, array=np.arange(5.0)[::2], value=True)
    mailbox.deliver(sent)
    taken = mailbox.take([sent.key], PATIENCE)
    assert taken.same(sent)
    assert taken.array.flags.writeable and taken.array.__array_interface__["data"][0] % 64 == 0
    assert not np.shares_memory(taken.array, sent.array)
    assert len(mailbox) == 0

"""Nobody gets into a tcp connection without the keys of the run, whatever he tries and whatever has failed."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import numpy as np
import pytest
import zmq

from pipeline import Pipeline
from pipeline.runtime.launch.shared import shared_server
from tests.pipeline.runtime.launch.processes import children
from transport import Limits, Message, TransportTimeout, open_transport
from transport.codec import encode
from transport.keys import RunKeys

PATIENCE = 20.0
FRAME = encode(Message("output", value="forged"))[0]


def plain(socket, keys):
    """No encryption at all."""


def other_pair(socket, keys):
    """Knows where, and for whom the inbox may be taken, and has a pair of his own."""
    own = RunKeys.new()
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret.encode())


def other_run(socket, keys):
    """Has the keys of another run."""
    RunKeys.new().lock_outbox(socket)


def password(socket, keys):
    """Tries a name and a password."""
    socket.setsockopt(zmq.PLAIN_USERNAME, b"tapeline")
    socket.setsockopt(zmq.PLAIN_PASSWORD, b"tapeline")


STRANGERS = (plain, other_pair, other_run, password)


@pytest.mark.parametrize("guarded", [True, False], ids=["handler", "handler ended"])
def test_only_who_has_the_keys_of_the_run_is_heard(guarded):
    keys = RunKeys.new()
    with (
        open_transport("tcp", keys=keys.plain()) as here,
        open_transport("tcp", keys=keys.plain()) as there,
        zmq.Context() as context,
    ):
        inbox = here.bind()
        if not guarded:
            here._doorkeeper.close()
        sockets = [context.socket(zmq.PUSH) for _ in STRANGERS]
        for stranger, socket in zip(STRANGERS, sockets, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            stranger(socket, keys)
            socket.connect(inbox.address)
            socket.send(FRAME)
        if guarded:
            there.connect(inbox.address, PATIENCE).send(Message("hello", value="from a worker"))
            assert inbox.receive(PATIENCE).value == "from a worker"
        else:
            with pytest.raises(TransportTimeout):
                there.connect(inbox.address, 0.5)
        with pytest.raises(TransportTimeout):
            inbox.receive(0.5)
        for socket in sockets:
            socket.close()


@pytest.mark.gate
def test_who_is_connected_goes_on_and_strangers_stay_out_when_the_handler_ends_meanwhile():
    keys = RunKeys.new()
    with (
        open_transport("tcp", keys=keys.plain()) as here,
        open_transport("tcp", keys=keys.plain()) as there,
        zmq.Context() as context,
    ):
        inbox = here.bind()
        outbox = there.connect(inbox.address, PATIENCE)
        here._doorkeeper.close()
        sockets = [context.socket(zmq.PUSH) for _ in STRANGERS]
        for stranger, socket in zip(STRANGERS, sockets, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            stranger(socket, keys)
            socket.connect(inbox.address)
            socket.send(FRAME)
        outbox.send(Message("hello", value="from a worker"))
        assert inbox.receive(PATIENCE).value == "from a worker"
        with pytest.raises(TransportTimeout):
            inbox.receive(0.3)
        for socket in sockets:
            socket.close()


def test_an_inbox_of_somebody_else_is_no_inbox_of_the_run():
    one, other = RunKeys.new(), RunKeys.new()
    with open_transport("tcp", keys=one.plain()) as here, open_transport("tcp", keys=other.plain()) as there:
        address = here.bind().address
        with pytest.raises(TransportTimeout, match="no inbox answered"):
            there.connect(address, 0.5)


def test_the_largest_message_passes_although_encryption_adds_to_it():
    limits = Limits(max_bytes=100_000, max_header_bytes=1000)
    with open_transport("tcp", limits=limits) as transport:
        inbox = transport.bind()
        outbox = transport.connect(inbox.address, PATIENCE)
        for _ in range(20):  # a message may be said to be there before all of it is
            outbox.send(Message("activation", array=np.zeros(100_000, np.uint8)))
            assert inbox.receive(PATIENCE).array.nbytes == 100_000


@pytest.mark.gate
def test_a_run_over_tcp_has_keys_of_its_own_and_shows_them_nowhere():
    """Neither on a command line, nor in the environment, nor to whoever listens at a port."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    with Pipeline.split(model, stages=2, microbatches=2, transport="tcp") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        x = np.ones((4, 3), "float32")
        crew = pipe.session.workers.driver()._crew
        keys = crew._transport._keys
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            for address in (crew._mailbox.inbox.address, *crew.addresses):
                stranger.connect(address)
            for _ in range(8):
                stranger.send(FRAME, zmq.NOBLOCK) if stranger.poll(50, zmq.POLLOUT) else None
            assert np.isfinite(pipe.train_on_batch(x, x[:, :1]))
        for pid in (os.getpid(), shared_server().pid, *children(shared_server().pid)):
            for name in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{name}").read_bytes()
                assert keys.secret.encode() not in content
        assert keys.secret not in repr(keys)
    runs = []
    for _ in range(2):
        with Pipeline.split(model, stages=2, transport="tcp") as pipe:
            runs.append(pipe.session.workers.driver()._crew._transport._keys)
    assert len({one.public for one in (keys, *runs)}) == 3

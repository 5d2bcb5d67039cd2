"""The way of one host between processes: whoever is killed, frozen or forked holds up nobody."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.transport.ways import LARGE, PATIENCE, ROOT, SMALL, activation, mapped_regions, receiving
from transport import (
    PeerLost,
    TransportTimeout,
    open_transport,
)
from transport.one_host import outbox as sending


@pytest.fixture
def receiver():
    with receiving(f"local://test-{os.getpid()}") as found:
        yield found


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_killed_receiver_is_a_lost_peer_at_once_and_for_good(receiver, content):
    """The kernel reports it: the first message after its death is refused. A successor does not get the rest."""
    process, address = receiver
    with open_transport("local") as transport:
        outbox = transport.connect(address, PATIENCE)
        outbox.send(activation(0, content))
        assert process.stdout.readline() == "received\n"
        process.kill()
        process.wait()
        with pytest.raises(PeerLost, match="gone; activation 'x', step 3 microbatch 2"):
            outbox.send(activation(2, content))
        successor = transport.bind(address)
        with pytest.raises(PeerLost):
            outbox.send(activation(3, content))
        with pytest.raises(TransportTimeout):
            successor.receive(0)
    assert mapped_regions() == 0


def test_a_frozen_receiver_holds_up_neither_send_nor_close(receiver, monkeypatch):
    monkeypatch.setattr(sending, "LINGER_SECONDS", 0.05)
    process, address = receiver
    transport = open_transport("local")
    outbox = transport.connect(address, PATIENCE)
    os.kill(process.pid, signal.SIGSTOP)
    for number in range(3000):
        outbox.send(activation(number))
    outbox.send(activation(0, LARGE))
    assert outbox._queue
    closing = threading.Thread(target=transport.close)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive() and mapped_regions() == 0


def test_a_forked_copy_closes_and_sends_nothing_of_its_parents():
    script = """
import os
from transport import ChannelClosed, Message, open_transport
with open_transport("local") as transport, open_transport("local") as other:
    inbox = transport.bind()
    outbox = other.connect(inbox.address, 10)
    while not outbox._queue:
        outbox.send(Message("hello"))
    left = len(outbox._queue)
    if os.fork() == 0:
        for action in (lambda: outbox.send(Message("stop")), lambda: inbox.receive(0)):
            try:
                action()
            except ChannelClosed as error:
                print(error, flush=True)
        other.close()
        transport.close()
        os._exit(0)
    assert os.wait()[1] == 0
    outbox.send(Message("hello"))
    kinds = {inbox.receive(10).kind}
    other.connect(inbox.address, 10).send(Message("stop"))
    while "stop" not in kinds:
        kinds.add(inbox.receive(10).kind)
    print(sorted(kinds))
"""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert [line.split(" ")[-1] for line in done.stdout.splitlines()] == ["it", "it", "'stop']"]


def test_few_descriptors_are_enough():
    """With no descriptor free, connected processes go on sending large arrays both ways."""
    script = """
import os, resource
import numpy as np
from transport import Message, open_transport
with open_transport("local") as here, open_transport("local") as there:
    inboxes = [here.bind(), there.bind()]
    outboxes = [here.connect(inboxes[1].address, 10), there.connect(inboxes[0].address, 10)]
    for outbox, inbox in zip(outboxes, reversed(inboxes)):
        outbox.send(Message("hello"))
        inbox.receive(10)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
    for number in range(3):
        for outbox, inbox in zip(outboxes, reversed(inboxes)):
            outbox.send(Message("activation", array=np.full(1 << 18, number)))
            assert (inbox.receive(10).array == number).all()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")

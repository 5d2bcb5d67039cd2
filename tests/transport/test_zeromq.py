"""What only ipc and tcp can get wrong: frames of strangers, socket files, lost processes, reachable addresses."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from tests.strategies import sealed
from tests.transport.ways import PATIENCE, ROOT, receiving
from transport import (
    AddressInUse,
    BadAddress,
    Limits,
    MalformedMessage,
    Message,
    NotLoopback,
    PeerLost,
    TransportTimeout,
    Watched,
    open_transport,
    zeromq,
)
from transport.codec import encode
from transport.keys import PROCESS_KEYS


@pytest.fixture(params=["ipc", "tcp"])
def transport(request, tmp_path):
    with open_transport(request.param, tmp_path, Limits(max_bytes=1 << 20, max_header_bytes=4096)) as opened:
        yield opened


@pytest.fixture
def stranger(transport):
    """An inbox and a bare ZeroMQ socket connected to it, which can send any frames."""
    inbox = transport.bind()
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.setsockopt(zmq.LINGER, 0)
        if inbox.address.startswith("tcp"):
            PROCESS_KEYS.lock_outbox(sender)  # without them it would not be heard: see test_keys.py
        sender.connect(inbox.address)
        yield inbox, sender


def array_frames(array):
    return [bytes(frame) for frame in encode(Message("activation", array=array))]


GOOD = array_frames(np.arange(6, dtype=np.float32))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], "5 to"),
        ([b"hello, is this a web server?"], "checksum"),
        ([GOOD[0]], "no frame follows"),
        ([GOOD[0], b""], "takes 24 bytes, received 0"),
        ([GOOD[0], b"x" * 23], "takes 24 bytes, received 23"),
        ([GOOD[0], b"x" * 25], "takes 24 bytes, received 25"),
        ([GOOD[0], b"x" * 100_000], "takes 24 bytes, received 100000"),
        ([*GOOD, b""], "more frames"),
        ([*GOOD, GOOD[0], GOOD[1]], "more frames"),
        ([encode(Message("stop"))[0], b"extra"], "more frames"),
        ([GOOD[1], GOOD[0]], "checksum"),
        ([b"x"] * 50, "5 to"),
        ([sealed([1, "activation", 0, 1, 0, -1, "", 0, 0, None, "float64", [2**30], 2**33])], "above the limit"),
        ([b"x" * 4097], "expected a header of 5 to 4096 bytes, received 4097"),
    ],
)
def test_malformed_messages_are_dropped_whole_and_the_next_one_arrives(stranger, frames, words):
    inbox, sender = stranger
    sender.send_multipart(frames)
    sender.send_multipart(GOOD)
    with pytest.raises(MalformedMessage, match=words):
        inbox.receive(PATIENCE)
    assert inbox.receive(PATIENCE).array.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(TransportTimeout):
        inbox.receive(0)


def test_a_frame_above_the_limit_costs_the_stranger_its_connection(transport, stranger):
    """It never reaches the decoder, nor memory; other senders are not disturbed."""
    inbox, sender = stranger
    outbox = transport.connect(inbox.address, PATIENCE)
    with sender.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        sender.send_multipart([GOOD[0], bytes(2**21)])
        assert monitor.poll(PATIENCE * 1000)
        sender.disable_monitor()
    outbox.send(Message("hello"))
    assert inbox.receive(PATIENCE).kind == "hello"
    with pytest.raises(TransportTimeout):
        inbox.receive(0)


def test_an_interrupted_receive_does_not_spoil_the_next(stranger, monkeypatch):
    """Ctrl-C between two frames: the rest of that message is skipped, the next one is whole."""
    inbox, sender = stranger
    sender.send_multipart(GOOD)
    sender.send_multipart(GOOD)

    def interrupt(nbytes):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zeromq, "aligned_empty", interrupt)
        with pytest.raises(KeyboardInterrupt):
            inbox.receive(PATIENCE)
    assert inbox.receive(PATIENCE).array.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_interrupted_send_closes_the_outbox_and_delivers_no_half(transport):
    """The next message must not be glued to the frame that was already handed over."""
    inbox = transport.bind()
    outbox = transport.connect(inbox.address, PATIENCE)

    class Interrupted:
        """A socket in which Ctrl-C arrives before the second frame."""

        def __init__(self, real):
            self.real = real

        def send(self, frame, flags, copy=True):
            if not flags & zmq.SNDMORE:
                raise KeyboardInterrupt
            self.real.send(frame, flags)

        def close(self):
            self.real.close()

    outbox._socket = Interrupted(outbox._socket)
    with pytest.raises(KeyboardInterrupt):
        outbox.send(Message("activation", array=np.ones(3)))
    assert outbox.closed
    transport.connect(inbox.address, PATIENCE).send(Message("hello"))
    assert inbox.receive(PATIENCE).kind == "hello"


def test_messages_come_before_watched_objects(transport):
    inbox = transport.bind()
    outbox = transport.connect(inbox.address, PATIENCE)
    with socket.socket() as listening:  # readable? an unbound TCP socket reports a hang-up: that counts
        outbox.send(Message("hello"))
        assert inbox._socket.poll(PATIENCE * 1000)
        assert inbox.receive(PATIENCE, (listening,)).kind == "hello"
        with pytest.raises(Watched):
            inbox.receive(PATIENCE, (listening,))


def test_socket_files_may_be_removed_once_all_are_connected(tmp_path):
    """What a run's owner does so that not even SIGKILL leaves a file behind."""
    with open_transport("ipc", tmp_path) as transport:
        inbox = transport.bind()
        outbox = transport.connect(inbox.address, PATIENCE)
        for file in tmp_path.iterdir():
            file.unlink()
        for number in range(100):
            outbox.send(Message("activation", microbatch=number))
        assert [inbox.receive(PATIENCE).microbatch for _ in range(100)] == list(range(100))


def test_closing_leaves_alone_what_another_inbox_has_bound_since(tmp_path):
    with open_transport("ipc", tmp_path) as transport:
        first = transport.bind(f"ipc://{tmp_path}/inbox")
        (tmp_path / "inbox").unlink()
        second = transport.bind(first.address)
        first.close()
        transport.connect(second.address, PATIENCE).send(Message("hello"))
        assert second.receive(PATIENCE).kind == "hello"


def test_the_socket_file_is_for_the_owner_only(tmp_path):
    with open_transport("ipc", tmp_path) as transport:
        transport.bind()
        (file,) = tmp_path.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_directory_a_private_one_is_made_and_removed():
    with open_transport("ipc") as transport:
        directory = Path(transport.bind().address.removeprefix("ipc://")).parent
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()


def test_a_stale_socket_file_is_replaced_and_anything_else_is_not(tmp_path):
    stale, plain = tmp_path / "stale", tmp_path / "plain"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    plain.write_text("precious")
    with open_transport("ipc", tmp_path) as transport:
        inbox = transport.bind(f"ipc://{stale}")
        transport.connect(inbox.address, PATIENCE).send(Message("hello"))
        assert inbox.receive(PATIENCE).kind == "hello"
        with pytest.raises(AddressInUse):
            transport.bind(f"ipc://{plain}")
    assert plain.read_text() == "precious"


def test_impossible_paths_say_what_is_wrong(tmp_path):
    with open_transport("ipc", tmp_path) as transport:
        with pytest.raises(BadAddress, match="107 bytes"):
            transport.bind("ipc:///" + "x" * 107)
        with pytest.raises(BadAddress, match="No such file"):
            transport.bind(f"ipc://{tmp_path}/missing/inbox")


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken, open_transport("tcp") as transport:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port}"):
            transport.bind(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.168.1.2", "example.com", "[::]", "", "127.0.0.1.evil.org"])
def test_tcp_stays_on_this_host(host):
    with open_transport("tcp") as transport:
        with pytest.raises(NotLoopback, match="for the processes of one host"):
            transport.bind(f"tcp://{host}:5555")
        with pytest.raises(NotLoopback, match="for the processes of one host"):
            transport.connect(f"tcp://{host}:5555", 1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "[::1]"])
def test_every_form_of_loopback_works(host):
    with open_transport("tcp") as transport:
        inbox = transport.bind(f"tcp://{host}:0")
        transport.connect(inbox.address, PATIENCE).send(Message("hello"))
        assert inbox.receive(PATIENCE).kind == "hello"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:70000", "tcp://:"])
def test_bad_tcp_addresses(address):
    with open_transport("tcp") as transport, pytest.raises(BadAddress):
        transport.bind(address)


def test_port_zero_cannot_be_connected_to():
    with open_transport("tcp") as transport, pytest.raises(BadAddress, match="only for bind"):
        transport.connect("tcp://127.0.0.1:0")


def test_something_else_at_the_port_is_a_timeout():
    """A server that accepts and says nothing is not an inbox."""
    with socket.create_server(("127.0.0.1", 0)) as other, open_transport("tcp") as transport:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(TransportTimeout, match="no answer"):
            transport.connect(address, 0.1)


@pytest.fixture
def receiver(tmp_path):
    with receiving(f"ipc://{tmp_path}/inbox") as found:
        yield found


def test_a_killed_receiver_is_a_lost_peer(receiver):
    process, address = receiver
    with open_transport("ipc") as transport:
        outbox = transport.connect(address, PATIENCE)
        outbox.send(Message("activation", array=np.ones(1 << 16)))
        assert process.stdout.readline() == "received\n"
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        with pytest.raises(PeerLost, match="gone; activation 'x', step 3 microbatch 2"):
            while time.monotonic() < deadline:
                outbox.send(Message("activation", step=3, microbatch=2, tensor="x"))


def test_a_lost_peer_stays_lost_when_another_takes_its_address(receiver, tmp_path):
    """After a loss nobody knows what arrived: a successor must not get the rest of the predecessor's messages."""
    process, address = receiver
    with open_transport("ipc") as transport:
        outbox = transport.connect(address, PATIENCE)
        process.kill()
        process.wait()
        successor = transport.bind(address)
        with successor._socket.get_monitor_socket(zmq.EVENT_ACCEPTED) as monitor:
            assert not monitor.poll(200)  # nobody comes by itself
            successor._socket.disable_monitor()
        deadline = time.monotonic() + PATIENCE
        with pytest.raises(PeerLost):
            while time.monotonic() < deadline:
                outbox.send(Message("activation"))
        with pytest.raises(TransportTimeout):
            successor.receive(0.05)


def test_close_does_not_hang_on_a_peer_that_does_not_read(receiver, monkeypatch):
    """A stopped process accepts no data; what cannot be delivered in the linger time is given up."""
    monkeypatch.setattr(zeromq, "LINGER_SECONDS", 0.05)
    process, address = receiver
    transport = open_transport("ipc")
    outbox = transport.connect(address, PATIENCE)
    os.kill(process.pid, signal.SIGSTOP)
    for _ in range(8):
        outbox.send(Message("activation", array=np.ones(1 << 18)))
    closing = threading.Thread(target=transport.close)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_a_forked_copy_closes_nothing_of_its_parent():
    """A child that inherits an open transport and closes it must not remove the parent's file and directory."""
    script = """
import os
from pathlib import Path
from transport import Message, open_transport
with open_transport("ipc") as transport:
    inbox = transport.bind()
    outbox = transport.connect(inbox.address, 10)
    if os.fork() == 0:
        inbox.close()
        transport.close()
        os._exit(0)
    assert os.wait()[1] == 0
    for sender in (outbox, transport.connect(inbox.address, 10)):
        sender.send(Message("hello"))
        print(inbox.receive(10).kind)
print(Path(inbox.address.removeprefix("ipc://")).parent.exists())
"""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("hello\nhello\nFalse\n", "")

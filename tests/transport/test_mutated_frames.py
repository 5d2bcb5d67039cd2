"""Frames that were changed at random, over every lane: a message or MalformedMessage, the next message, no memory.

The soak sends a million over each. What changes them is cheap, so that as many fit into minutes; Hypothesis, in
`test_codec.py`, looks deeper with fewer, and `fuzz_codec.py` is led by the lines that a frame reaches.
"""

import importlib.util
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import zmq

from tests.levels import SOAK, examples
from tests.transport.mutations import GOOD, SOURCES, datagram, frames
from tests.transport.ways import PATIENCE, ROOT
from transport import Limits, MalformedMessage, Message, TransportTimeout, open_transport
from transport.codec import decode
from transport.keys import PROCESS_KEYS
from transport.one_host import datagrams, local

FRAMES = examples(200, 2_000, 1_000_000)
BETWEEN = 100
"""So many mutated frames there are between two messages that must arrive."""
MOST_GROWTH = 64 << 20
LIMITS = Limits(max_bytes=1 << 20, max_header_bytes=4096)
pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600 if SOAK else 120)]


def resident():
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no file of a folder
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def bounded():
    """After the test: no more memory than a few messages have."""
    before = resident()
    yield
    assert resident() - before < MOST_GROWTH


def test_the_decoder(bounded):
    rng, arrived, refused = random.Random(11), 0, 0
    for _ in range(FRAMES):
        try:
            arrived += isinstance(decode(frames(rng), LIMITS), Message)
        except MalformedMessage:
            refused += 1
    assert arrived + refused == FRAMES and arrived and refused > FRAMES // 2


def outcome(inbox, patience):
    """The message that arrives next; None where it is malformed, or none arrives."""
    try:
        return inbox.receive(patience)
    except (MalformedMessage, TransportTimeout):
        return None


def test_the_local_way(bounded):
    rng = random.Random(12)
    first, raw = SOURCES[0]
    good = datagrams.PREFIX.pack(datagrams.Form.WITH_ARRAY, 0, len(first), 0, len(raw), 3, 0, 0) + first + raw
    with (
        open_transport("local", limits=LIMITS) as transport,
        transport.bind() as inbox,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender,
    ):
        sender.connect(local._place(inbox.address))
        sender.setblocking(False)
        for number in range(FRAMES):
            sender.send(datagram(rng))
            outcome(inbox, 0)
            if number % BETWEEN == 0:
                for _ in range(3):  # the first ends what was begun, a header in parts or an array in pieces
                    sender.send(good)
                    found = outcome(inbox, PATIENCE)
                assert found is not None and np.array_equal(found.array, GOOD.array)


@pytest.mark.parametrize("way", ["ipc", "tcp"])
def test_the_ways_of_zeromq(tmp_path, bounded, way):
    rng = random.Random(13)
    with (
        open_transport(way, tmp_path, LIMITS) as transport,
        transport.bind() as inbox,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as sender,
    ):
        sender.setsockopt(zmq.LINGER, 0)
        if way == "tcp":
            PROCESS_KEYS.lock_outbox(sender)
        sender.connect(inbox.address)
        for number in range(FRAMES):
            sender.send_multipart(frames(rng))
            outcome(inbox, PATIENCE)
            if number % BETWEEN == 0:
                sender.send_multipart(SOURCES[0])
                found = outcome(inbox, PATIENCE)
                assert found is not None and np.array_equal(found.array, GOOD.array)


@pytest.mark.soak
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (pip install atheris)"
)
def test_a_fuzzer_that_is_led_by_coverage_finds_nothing():
    command = [sys.executable, "-m", "tests.transport.fuzz_codec", "-runs=1000000", "-rss_limit_mb=2048"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000)
    assert found.returncode == 0, found.stderr[-3000:]

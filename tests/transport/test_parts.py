"""The small parts: aligned memory, the message, the registry, what importing costs."""

import ast
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from transport import (
    KINDS,
    BadAddress,
    ChannelClosed,
    Key,
    Message,
    TapelineError,
    TransportError,
    aligned_empty,
    errors,
    open_transport,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 4096, 1 << 22])
def test_aligned_memory_is_aligned_writable_and_fresh(nbytes):
    kept = [aligned_empty(nbytes) for _ in range(8)]
    for memory in kept:
        assert memory.shape == (nbytes,) and memory.dtype == np.uint8
        assert memory.flags.writeable and memory.flags.c_contiguous
        assert memory.__array_interface__["data"][0] % 64 == 0
    if nbytes:
        assert len({memory.__array_interface__["data"][0] for memory in kept}) == 8


def test_every_kind_that_may_cross_a_wire_is_sent_by_somebody():
    """A kind that nobody sends is one more thing that a stranger's message may be."""
    files = [path for folder in ("stages/worker", "pipeline/runtime") for path in (ROOT / folder).rglob("*.py")]
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    sent = {argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)}
    assert KINDS - sent == set()


def test_the_key_holds_what_a_receiver_waits_for():
    message = Message("gradient", 9, 1, 2, 3, "x", 4, 5, "value", np.ones(1))
    assert message.key == Key("gradient", 1, 2, 3, "x", 4, 5)
    assert Message("stop").key == Key("stop")


def test_messages_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Message("stop").step = 3


@pytest.mark.parametrize(
    "other",
    [
        Message("stop"),
        Message("output", incarnation=1, array=np.zeros(2)),
        Message("output", array=np.zeros(3)),
        Message("output", array=np.zeros((2, 1))),
        Message("output", array=np.zeros(2, np.int64)),
        Message("output", array=np.ones(2)),
        Message("output", value=0, array=np.zeros(2)),
        Message("output"),
    ],
)
def test_same_sees_every_difference(other):
    message = Message("output", array=np.zeros(2))
    assert message.same(Message("output", array=np.zeros(2)))
    assert not message.same(other) and not other.same(message)


def test_a_message_describes_itself():
    message = Message("activation", step=7, stage=2, tensor="x", microbatch=3, window=1, array=np.zeros((2, 3)))
    expected = "activation 'x', step 7 microbatch 3, window 1, driver -> stage 2, float64[2, 3]"
    assert str(message) == expected


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [("local", "local"), ("ipc", "ipc"), ("tcp", "tcp"), ("inproc", "inproc"), ("tcp://127.0.0.1:1", "tcp")],
)
def test_the_registry_knows_schemes_and_addresses(asked, scheme):
    with open_transport(asked) as transport:
        assert transport.scheme == scheme


def test_an_unknown_scheme_lists_the_known_and_the_nearest():
    with pytest.raises(
        BadAddress, match="unknown transport 'ipcs', known are inproc, local, ipc, tcp; did you mean 'ipc'"
    ):
        open_transport("ipcs")


FAMILIES = (errors.MistakeError, errors.PeerError, errors.TimedOutError, errors.ClosedError)


def test_errors_have_one_ground_and_the_builtin_ones_too():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert TransportError in kinds and len(kinds) > 10
    assert all(issubclass(kind, TapelineError) for kind in kinds)
    assert all(kind is TapelineError or issubclass(kind, (TransportError, *FAMILIES)) for kind in kinds)
    assert issubclass(errors.TransportTimeout, TimeoutError)
    assert issubclass(errors.PeerLost, ConnectionError)


def test_closing_an_inproc_inbox_wakes_its_receiver():
    with open_transport("inproc") as transport:
        inbox = transport.bind()
        raised = []

        def wait():
            try:
                inbox.receive()
            except ChannelClosed as error:
                raised.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        inbox.close()
        waiting.join(20)
        assert len(raised) == 1


def test_inproc_addresses_are_shared_by_all_transports_of_the_process():
    with open_transport("inproc") as one, open_transport("inproc") as other:
        inbox = one.bind("inproc://shared")
        other.connect("inproc://shared", 0).send(Message("hello"))
        assert inbox.receive(0).kind == "hello"


def test_importing_transport_imports_no_tensorflow():
    script = "import sys, transport; print([n for n in ('tensorflow', 'keras', 'stages') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"

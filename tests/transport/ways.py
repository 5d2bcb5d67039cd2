"""What tests of a way between two inboxes share: messages, counts of what is open, a receiver in another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transport import Message

PATIENCE = 20.0
ROOT = Path(__file__).resolve().parents[2]
LARGE = np.arange(1 << 18, dtype=np.float32)
"""An array that goes through a region."""
SMALL = np.arange(6, dtype=np.float32)

_RECEIVER = """
import sys
from transport import open_transport
with open_transport(sys.argv[1].partition(":")[0]) as transport:
    inbox = transport.bind(sys.argv[1])
    print("bound", flush=True)
    inbox.receive()
    print("received", flush=True)
    inbox.receive()
"""


def activation(number: int, content: Any = SMALL) -> Message:
    return Message("activation", step=3, tensor="x", microbatch=number, array=content)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_regions() -> int:
    return Path("/proc/self/maps").read_text().count("tapeline-region")


@contextmanager
def receiving(address: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that receives one message at an address and waits for a second."""
    command = [sys.executable, "-c", _RECEIVER, address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "bound\n"
        yield process, address
        process.kill()

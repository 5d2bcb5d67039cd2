"""Measure how long messages take from one end of a transport to the other, here and now.

Messages of two sizes give the two figures of `pipeline.cutting.costs.Transfer`. One thread sends and then receives, so
what is measured is the way through encoding, socket and decoding, without waiting for another process to wake up.
"""

from __future__ import annotations

import time
from functools import lru_cache
from statistics import median

import numpy as np

from pipeline.cutting.costs import Transfer
from transport.message import Message
from transport.registry import AUTO, open_transport

__all__ = ["measure_transfer"]

_SMALL, _LARGE = 1 << 10, 1 << 22
_SECONDS = 30.0
"""How long a message may take before something is wrong."""


@lru_cache(maxsize=8)
def measure_transfer(scheme: str = AUTO, repeats: int = 9) -> Transfer:
    """What a message costs, measured once per process (some 50 ms).

    Args:
        scheme: ``"local"``, ``"ipc"``, ``"tcp"`` or ``"inproc"``.
        repeats: How many messages of each size to take the median of, after two that are not counted.
    """
    taken = []
    with open_transport(scheme) as there, open_transport(scheme) as here:  # within one, a message may go no way at all
        inbox = there.bind(None)
        outbox = here.connect(inbox.address, _SECONDS)
        for size in (_SMALL, _LARGE):
            array = np.zeros(size, np.uint8)
            array.setflags(write=False)  # as a tensor's memory is: sent in place
            times = []
            for _ in range(repeats + 2):
                begin = time.perf_counter()
                outbox.send(Message("activation", array=array), _SECONDS)
                inbox.receive(_SECONDS)
                times.append(time.perf_counter() - begin)
            taken.append(median(times[2:]))
    per_byte = max(taken[1] - taken[0], 0.0) / (_LARGE - _SMALL)
    return Transfer(max(taken[0] - _SMALL * per_byte, 0.0), per_byte)

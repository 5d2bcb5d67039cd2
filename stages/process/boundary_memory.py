"""The memory in which a worker writes down its values, so that they outlive it.

It is anonymous memory (a memfd) that the driver makes and hands over at launch, as it does with the status board. There
are regions of two slots each. A new entry goes into the slot with the older one, and its stamp is written last:
whoever dies while writing leaves the other slot as it was.

    byte 0                     4096
    | 2 regions x 2 slots x    | slot | slot | slot | slot | larger slots, made when an entry has grown ...
    | (stamp, place, room,     |
    |  length of head, of data)|
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["NEVER", "BoundaryMemory", "Region"]

NEVER = -1
"""The stamp of a slot that holds nothing whole."""

_BEGIN = 4096
_FIELDS = 5
_STAMP, _PLACE, _ROOM, _HEAD, _DATA = range(_FIELDS)
_PAGE = 4096

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Region:
    """The regions of the memory, by number: what is written as a whole, and by itself."""

    LARGE = 0  # what an update changes: weights and slots
    SMALL = 1  # what every pass changes: statistics, seeds, metrics
    COUNT = 2


class BoundaryMemory:
    """One worker's memory, as the worker or its driver sees it.

    Args:
        descriptor: from `BoundaryMemory.create`; a copy is kept, the original stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = -1
        self._descriptor = os.dup(descriptor)
        self._map()

    @staticmethod
    def create() -> int:
        """Return a new file descriptor of memory with nothing in it; the caller closes it."""
        descriptor = os.memfd_create("tapeline-boundary")
        os.ftruncate(descriptor, _BEGIN)
        fields = np.zeros((Region.COUNT, 2, _FIELDS), np.int64)
        fields[..., _STAMP] = NEVER
        os.pwrite(descriptor, fields.tobytes(), 0)
        return descriptor

    def close(self) -> None:
        """Let go of the memory, whoever still has this object; what was read stays. Idempotent."""
        self._bytes = np.zeros(0, np.uint8)  # the map goes with its last view
        self._fields = np.full((Region.COUNT, 2, _FIELDS), NEVER, np.int64)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def stamps(self, region: int) -> tuple[int, ...]:
        """The stamps of a region's two slots, `NEVER` of one that holds nothing whole."""
        return tuple(int(stamp) for stamp in self._fields[region, :, _STAMP])

    def write(self, region: int, stamp: int, head: bytes, arrays: Sequence[Bytes]) -> None:
        """Put an entry in the place of the region's older one.

        Args:
            region: Number of a region.
            stamp: Of the entry, 0 or more and larger than all before it.
            head: What says what the arrays are.
            arrays: uint8, of shape (n,).
        """
        slot = int(np.argmin(self._fields[region, :, _STAMP]))
        size = sum(array.nbytes for array in arrays)
        self._fields[region, slot, _STAMP] = NEVER
        if len(head) + size > self._fields[region, slot, _ROOM]:
            self._make_room(region, slot, len(head) + size)
        place = int(self._fields[region, slot, _PLACE])
        self._bytes[place : place + len(head)] = np.frombuffer(head, np.uint8)
        place += len(head)
        for array in arrays:
            self._bytes[place : place + array.nbytes] = array
            place += array.nbytes
        self._fields[region, slot, _HEAD], self._fields[region, slot, _DATA] = len(head), size
        self._fields[region, slot, _STAMP] = stamp

    def forget(self, stamp: int) -> None:
        """Let no slot hold the entries of a stamp any more."""
        for region in range(Region.COUNT):
            for slot in range(2):
                if self._fields[region, slot, _STAMP] == stamp:
                    self._fields[region, slot, _STAMP] = NEVER

    def read(self, region: int, latest: int | None) -> tuple[bytes, Bytes] | None:
        """The head and the data of the newest entry that is not newer than `latest`; None if there is none.

        Args:
            region: Number of a region.
            latest: A stamp; None: the newest there is.

        Returns:
            The data, uint8 of shape (n,), is a copy.
        """
        if os.fstat(self._descriptor).st_size > len(self._bytes):
            self._map()
        stamps = [stamp if latest is None or stamp <= latest else NEVER for stamp in self.stamps(region)]
        if max(stamps) == NEVER:
            return None
        _, place, _, head, size = (int(field) for field in self._fields[region, int(np.argmax(stamps))])
        return self._bytes[place : place + head].tobytes(), self._bytes[place + head : place + head + size].copy()

    def _make_room(self, region: int, slot: int, size: int) -> None:
        """Give a slot a larger place, behind all others."""
        place, room = len(self._bytes), -(-size // _PAGE) * _PAGE
        os.ftruncate(self._descriptor, place + room)
        self._map()
        self._fields[region, slot, _PLACE], self._fields[region, slot, _ROOM] = place, room

    def _map(self) -> None:
        memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._fields = np.frombuffer(memory, np.int64, Region.COUNT * 2 * _FIELDS).reshape(Region.COUNT, 2, _FIELDS)

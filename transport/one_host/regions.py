"""Shared memory for large arrays: regions without a name that one sender fills and one receiver copies out of.

    sender                          kernel                       receiver
    take a free region, fill it ── its number, by socket ────►  copy it into memory of its own
    free again  ◄────────────────── its number, by socket ─────  done with it

A region is a memfd, so there is no file to leave behind and `/dev/shm` is not needed. Its descriptor travels once, and
both sides close it as soon as the memory is mapped: what stays open is nothing. It is used again and again, since fresh
pages cost the kernel more than a second copy costs the processor (64 MiB: 0.7 GB/s fresh, 2 to 4 GB/s twice copied).

Rules:

1. A region holds one message. The receiver never hands its memory out: what it received is a copy.
2. The sender writes to a region only between making or getting it back and sending its number. Both go through the
   kernel's socket, which orders memory between processors.
3. A region cannot shrink (the kernel's seal, which the receiver checks), so reading it cannot kill the receiver.
4. Free regions stay mapped for the next message; of those that are too small for it, no more than `KEPT_BYTES`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any, Final

import numpy as np

KEPT_BYTES: Final = 32 << 20
"""How much memory free regions may keep that are too small for what is sent now."""

_GRAIN: Final = 1 << 16
_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class SharedRegion:
    """One mapped region. Python's own `mmap` would keep a descriptor open for each.

    Args:
        descriptor: the memfd, which stays the caller's.
        size: bytes.
        writable: whether this side fills it.

    Attributes:
        memory: uint8 array of shape (size,).
    """

    def __init__(self, descriptor: int, size: int, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"a shared region of {size} bytes cannot be mapped: {os.strerror(code)}")
        self.size = size
        self.memory: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(
            memoryview((ctypes.c_char * size).from_address(address)), np.uint8
        )
        self._unmap = weakref.finalize(self, _libc.munmap, address, size)
        self._unmap.atexit = False

    def close(self) -> None:
        """Give the memory back; `memory` must not be used any more. Idempotent."""
        del self.memory
        self._unmap()


class RegionPool:
    """The regions of one sender, which knows which of them the receiver has done with."""

    def __init__(self) -> None:
        self._regions: dict[int, SharedRegion] = {}
        self._free: dict[int, None] = {}  # in the order in which they came back
        self._descriptors: set[int] = set()  # of regions that the receiver was not told of yet
        self._next = 0

    def take(self, size: int) -> tuple[int, SharedRegion] | None:
        """The smallest free region of at least `size` bytes, which is not free then; None if there is none.

        Of several the one that came back last: the processor's caches still have it.
        """
        fitting = [number for number in reversed(self._free) if self._regions[number].size >= size]
        if not fitting:
            return None
        number = min(fitting, key=lambda one: self._regions[one].size)
        del self._free[number]
        return number, self._regions[number]

    def make(self, size: int) -> tuple[int, SharedRegion, int]:
        """A new region of at least `size` bytes: its number, itself, and its descriptor.

        The descriptor stays open until `passed_on`, or until the pool is closed.

        Raises:
            OSError: there is no descriptor or no memory for it.
        """
        size = -(-size // _GRAIN) * _GRAIN
        descriptor = os.memfd_create("tapeline-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            region = SharedRegion(descriptor, size, writable=True)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors.add(descriptor)
        number, self._next = self._next, self._next + 1
        self._regions[number] = region
        return number, region, descriptor

    def passed_on(self, descriptor: int) -> None:
        """The receiver has a region's descriptor in its socket, so this one is closed."""
        self._descriptors.remove(descriptor)
        os.close(descriptor)

    def give_back(self, number: int) -> None:
        """The receiver has copied a region; a number that is not out is ignored."""
        if number in self._regions:
            self._free[number] = None

    def surplus(self, size: int) -> list[int]:
        """Free regions below `size` bytes, if they keep more than `KEPT_BYTES`; they are unmapped and forgotten."""
        small = [number for number in self._free if self._regions[number].size < size]
        if sum(self._regions[number].size for number in small) <= KEPT_BYTES:
            return []
        for number in small:
            self.forget(number)
        return small

    def forget(self, number: int) -> None:
        """Unmap a region that the receiver never got, or has done with."""
        self._free.pop(number, None)
        self._regions.pop(number).close()

    def close(self) -> None:
        """Unmap all of them, and close the descriptors that were not passed on."""
        for number in list(self._regions):
            self.forget(number)
        for descriptor in list(self._descriptors):
            self.passed_on(descriptor)


class ReceivedRegions:
    """The regions of one sender on the side of its receiver."""

    def __init__(self) -> None:
        self._regions: dict[int, SharedRegion] = {}

    def learn(self, number: int, descriptor: int) -> None:
        """Map a region whose descriptor arrived; the descriptor stays the caller's.

        Raises:
            ValueError: it is not sealed memory, or its number is known.
            OSError: it cannot be mapped.
        """
        if number in self._regions:
            raise ValueError(f"region {number} arrived twice")
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:  # not a memfd
            sealed = 0
        size = os.fstat(descriptor).st_size
        if not sealed or not size:
            raise ValueError(f"region {number} is not memory that cannot shrink")
        self._regions[number] = SharedRegion(descriptor, size, writable=False)

    def read(self, number: int, into: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy the beginning of a region.

        Raises:
            ValueError: there is no such region, or it is smaller.
        """
        region = self._regions.get(number)
        if region is None or region.size < into.nbytes:
            raise ValueError(f"region {number} does not hold {into.nbytes} bytes")
        into[:] = region.memory[: into.nbytes]

    def forget(self, number: int) -> None:
        """Unmap a region, if there is such a one."""
        if number in self._regions:
            self._regions.pop(number).close()

    def close(self) -> None:
        """Unmap all of them."""
        for number in list(self._regions):
            self.forget(number)


__all__ = ["KEPT_BYTES", "ReceivedRegions", "RegionPool", "SharedRegion"]

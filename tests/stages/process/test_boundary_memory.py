"""The memory in which a worker writes down its values: two slots, of which a death leaves one whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stages.process.boundary_memory import NEVER, BoundaryMemory, Region


@pytest.fixture
def memory():
    descriptor = BoundaryMemory.create()
    found = BoundaryMemory(descriptor)
    os.close(descriptor)
    yield found
    found.close()


def entry(number, size):
    return [np.full(size, number, np.uint8), np.full(1, 255, np.uint8)]


class Torn(list):
    """Arrays the last of which cannot be read when it is copied: the writer dies there."""

    def __iter__(self):
        self.rounds = getattr(self, "rounds", 0) + 1
        for k, array in enumerate(super().__iter__()):
            if self.rounds == 2 and k == len(self) - 1:
                raise ProcessLookupError
            yield array


@pytest.mark.parametrize("region", [Region.LARGE, Region.SMALL])
def test_the_last_two_entries_can_be_read_whatever_their_size(memory, region):
    for number in range(1, 12):
        memory.write(region, number, b"head %d" % number, entry(number, 100 * number))
        assert set(memory.stamps(region)) == {number, number - 1 or NEVER}
        for latest in {max(number - 1, 1), number, number + 5}:
            head, data = memory.read(region, latest)
            whole = min(latest, number)
            assert head == b"head %d" % whole
            assert data.tobytes() == b"".join(array.tobytes() for array in entry(whole, 100 * whole))
    assert memory.read(region, None)[0] == b"head 11"
    assert memory.read(region, 9) is None
    assert memory.read(1 - region, None) is None


@pytest.mark.parametrize("size", [10, 100_000], ids=["as large", "larger"])
def test_who_dies_while_writing_leaves_the_other_entry(memory, size):
    memory.write(Region.LARGE, 1, b"one", entry(1, 10))
    memory.write(Region.LARGE, 2, b"two", entry(2, 10))
    with pytest.raises(ProcessLookupError):
        memory.write(Region.LARGE, 3, b"three", Torn(entry(3, size)))
    assert set(memory.stamps(Region.LARGE)) == {2, NEVER}
    assert memory.read(Region.LARGE, None)[0] == b"two"
    assert memory.read(Region.LARGE, 1) is None
    memory.write(Region.LARGE, 4, b"four", entry(4, 10))
    assert set(memory.stamps(Region.LARGE)) == {2, 4}, "the torn one's place is taken first"


def test_what_is_closed_takes_no_memory_though_somebody_has_the_object(memory):
    def maps():
        return Path("/proc/self/maps").read_text().count("tapeline-boundary")

    before = maps()
    other = BoundaryMemory(memory._descriptor)
    other.write(Region.LARGE, 1, b"", entry(1, 1_000_000))
    read = other.read(Region.LARGE, None)[1]
    assert maps() == before + 1
    other.close()
    assert maps() == before and set(other.stamps(Region.LARGE)) == {NEVER}
    assert read[0] == 1 and len(read) == 1_000_001


def test_another_process_sees_what_has_grown_and_nothing_of_what_was_forgotten(memory):
    other = BoundaryMemory(memory._descriptor)
    memory.write(Region.SMALL, 1, b"", entry(1, 10))
    memory.write(Region.SMALL, 2, b"", entry(2, 1_000_000))
    assert len(other.read(Region.SMALL, None)[1]) == 1_000_001
    memory.forget(2)
    assert other.read(Region.SMALL, None)[1].tobytes() == b"\1" * 10 + b"\xff"
    other.close()

"""Microbatches are those of `np.array_split`, never empty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.microbatch import microbatch_sizes, microbatch_slices
from pipeline.errors import MicrobatchError


@pytest.mark.parametrize(
    ("batch", "microbatches", "sizes"),
    [(8, 4, (2, 2, 2, 2)), (10, 4, (3, 3, 2, 2)), (3, 8, (1, 1, 1)), (1, 1, (1,)), (7, 1, (7,)), (7, 7, (1,) * 7)],
)
def test_sizes(batch, microbatches, sizes):
    assert microbatch_sizes(batch, microbatches) == sizes


@given(st.integers(1, 300), st.integers(1, 300))
def test_sizes_and_slices_are_those_of_numpy(batch, microbatches):
    parts = np.array_split(np.arange(batch), min(batch, microbatches))
    assert microbatch_sizes(batch, microbatches) == tuple(len(part) for part in parts)
    slices = microbatch_slices(batch, microbatches)
    assert [np.arange(batch)[piece].tolist() for piece in slices] == [part.tolist() for part in parts]
    assert min(microbatch_sizes(batch, microbatches)) >= 1


def test_whole_numbers_of_numpy_will_do():
    assert microbatch_sizes(np.int64(5), np.int32(2)) == (3, 2)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, None, "4"])
@pytest.mark.parametrize("name", ["batch", "microbatches"])
def test_impossible_numbers_are_refused(name, bad):
    with pytest.raises(MicrobatchError, match=f"`{name}` must be a whole number of at least 1, received {bad!r}"):
        microbatch_sizes(**{"batch": 4, "microbatches": 2, name: bad})

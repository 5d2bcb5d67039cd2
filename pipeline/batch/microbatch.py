"""The cutting of a batch into microbatches: the sizes of `np.array_split`, never an empty one.

Sizes differ by at most one, the larger come first, and order is kept, so that the microbatches put back
together are the batch.  A last batch that is smaller than the number of microbatches gets one sample in each
of fewer.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import index

from pipeline.errors import MicrobatchError
from pipeline.saying import is_whole, not_whole

__all__ = ["microbatch_sizes", "microbatch_slices"]


def microbatch_sizes(batch: int, microbatches: int) -> tuple[int, ...]:
    """The number of samples in each microbatch.

    Args:
        batch: samples in the batch, at least 1.
        microbatches: how many microbatches are wanted, at least 1; no more than `batch` are made.

    Returns:
        `min(batch, microbatches)` positive sizes that sum to `batch`, descending, apart by at most 1.

    Raises:
        MicrobatchError: either number is no whole number of at least 1.
    """
    batch = _at_least_one("batch", batch, "a batch without samples has no gradient")
    microbatches = _at_least_one("microbatches", microbatches, "1 means that the batch is not cut")
    smaller, larger = divmod(batch, count := min(batch, microbatches))
    return (smaller + 1,) * larger + (smaller,) * (count - larger)


def microbatch_slices(batch: int, microbatches: int) -> tuple[slice, ...]:
    """Where each microbatch lies along the batch axis.

    Args:
        batch: as in `microbatch_sizes`.
        microbatches: as in `microbatch_sizes`.

    Returns:
        Adjoining slices that cover `range(batch)` in order.

    Raises:
        MicrobatchError: as `microbatch_sizes`.
    """
    bounds = accumulate(microbatch_sizes(batch, microbatches), initial=0)
    return tuple(slice(start, stop) for start, stop in pairwise(bounds))


def _at_least_one(name: str, value: int, why: str) -> int:
    if not is_whole(value):
        raise MicrobatchError(f"{not_whole(f'`{name}`', value)}: {why}")
    return index(value)

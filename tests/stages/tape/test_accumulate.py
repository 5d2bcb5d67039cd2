"""Sums over microbatches are taken in one order, bit for bit, whatever order the summands arrive in."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import tensorflow as tf

from stages.tape.accumulate import OrderedSum, dense

# Sums of these depend on the order: float32 has 24 bits.
SUMMANDS = (1e8, 1.0, -1e8, 3.0)


def ascending() -> Any:
    total = np.float32(SUMMANDS[0])
    for value in SUMMANDS[1:]:
        total = total + np.float32(value)
    return total


def test_every_order_of_arrival_gives_the_ascending_sum() -> None:
    """All 24 orders of four summands that do not commute with rounding."""
    seen = set()
    for order in permutations(range(4)):
        seen.add(float(np.float32(sum((np.float32(SUMMANDS[k]) for k in order), np.float32(0)))))
        sums = OrderedSum()
        for k in order:
            sums.add(k, [tf.constant(SUMMANDS[k], tf.float32)])
        total = sums.total()
        assert total is not None
        assert float(total[0]) == float(ascending())
    assert len(seen) > 1, "the summands should tell orders apart"


def test_asking_early_does_not_change_the_order_of_what_is_there() -> None:
    """With a gap, the total is that of what came, ascending; it can be asked for twice."""
    sums = OrderedSum()
    for k in (3, 0, 2):
        sums.add(k, [tf.constant(SUMMANDS[k], tf.float32)])
    expected = np.float32(np.float32(SUMMANDS[0]) + np.float32(SUMMANDS[2])) + np.float32(SUMMANDS[3])
    for _ in range(2):
        total = sums.total()
        assert total is not None
        assert float(total[0]) == float(expected)


def test_windows_are_added_within_their_microbatch_first() -> None:
    """In the order in which they come, and the microbatch counts once all of them are there."""
    sums = OrderedSum()
    for k, value, complete in [(1, -1e8, False), (0, 1e8, False), (1, 3.0, True), (0, 11.0, True)]:
        sums.add(k, [tf.constant(value, tf.float32)], complete)
    total = sums.total()
    assert total is not None
    first, second = np.float32(1e8) + np.float32(11.0), np.float32(-1e8) + np.float32(3.0)
    assert float(total[0]) == float(first + second) != 14.0


def test_no_gradient_adds_nothing() -> None:
    """None beside a tensor is the tensor; only None is None; nothing at all is no sum."""
    sums = OrderedSum()
    assert sums.total() is None
    sums.add(0, [None, None, tf.constant(1.0)])
    sums.add(1, [tf.constant(2.0), None, None])
    total = sums.total()
    assert total is not None
    assert [None if value is None else float(value) for value in total] == [2.0, None, 1.0]


def test_clear_forgets_sums_and_what_waits() -> None:
    """After it, microbatch 0 is the first again."""
    sums = OrderedSum()
    sums.add(0, [tf.constant(5.0)])
    sums.add(2, [tf.constant(5.0)])
    sums.clear()
    sums.add(0, [tf.constant(7.0)])
    total = sums.total()
    assert total is not None
    assert float(total[0]) == 7.0


def test_rows_that_an_embedding_used_twice_are_summed() -> None:
    """IndexedSlices become dense, duplicates added; dense tensors and None stay."""
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([2, 0, 2]), tf.constant([4, 1]))
    found = dense(slices)
    assert found is not None
    np.testing.assert_array_equal(found, [[2.0], [0.0], [5.0], [0.0]])
    same = tf.constant(1.0)
    assert dense(same) is same
    assert dense(None) is None

"""Losses that layers add by themselves, tried on a batch and its parts: a mean over samples or a constant, or neither?

    a layer's calls, one a microbatch  ──► joined: L     against     sum of n_k / N * L_k, for several cuts

`add_loss` and activity regularisers count with a microbatch's share of the batch, which is right for means and for
constants. Only the layer itself is called again, in the user's process, on what it was given and on random numbers in
its place, without chance (`pipeline.own.layer_calls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.compare.tolerance import eps
from pipeline.own.layer_calls import JoinedCall, LayerCall, by_layer, nothing_drawn
from stages.keras_internals import own_added_losses
from stages.masks import mask_of, with_mask

NOT_EQUAL = 1e-4
"""Losses that are farther apart, as a part of the largest, are not the same."""
ROUNDINGS = 8
"""Or this many roundings, of a layer that computes in half precision."""


def no_mean(calls: Sequence[LayerCall], microbatches: int, training: bool) -> str:
    """Of which layer a loss does not count in a batch as its microbatches' do, in words; "" of none.

    Args:
        calls: All calls of a batch that added losses, microbatch after microbatch.
        microbatches: How many there were.
        training: Whether layers ran as in training.
    """
    for some in by_layer(calls, microbatches):
        layer = some[0].layer
        try:
            what = _tried(layer, JoinedCall(some), training)
        except Exception:  # it cannot be called with other numbers of samples, or not outside of its model
            continue
        if what:
            return f"the layer {layer.name!r} adds a loss (add_loss or activity_regularizer) that is {what}"
    return ""


def _tried(layer: Any, joined: JoinedCall, training: bool) -> str:
    total, draw = joined.total, np.random.default_rng(0)
    not_equal = max(NOT_EQUAL, ROUNDINGS * _coarsest(layer, joined.values))
    for values in (joined.values, [_drawn(value, total, draw) for value in joined.values]):

        def losses(begin: int, end: int, values: Sequence[Any] = values) -> Any:
            args, kwargs = joined.arguments(begin, end, values)
            layer(*args, **{"training": training, **kwargs})
            return np.array([float(tf.reduce_sum(loss)) for loss in own_added_losses(layer)])

        with nothing_drawn():
            whole = losses(0, total)
            if not np.isfinite(whole).all() or not np.array_equal(losses(0, total), whole):
                continue
            ways = {"mean", "sum"}
            for sizes in _cuts(total):
                parts = [losses(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0))]
                scale = not_equal * np.max([np.abs(whole), *(np.abs(part) for part in parts)], axis=0)
                weighed = sum(size / total * part for size, part in zip(sizes, parts, strict=True))
                ways -= {
                    way
                    for way, found in (("mean", weighed), ("sum", sum(parts)))
                    if not (np.abs(found - whole) <= scale).all()
                }
        if "mean" not in ways:
            if "sum" in ways:
                return "a sum over samples"
            return "neither a mean over samples nor the same for all of them"
    return ""


def _coarsest(layer: Any, values: Sequence[Any]) -> float:
    """The distance from 1 to the next number in the coarsest dtype that a layer computes in or is given."""
    dtypes = [tf.as_dtype(layer.compute_dtype or "float32"), *(value.dtype for value in values if tf.is_tensor(value))]
    return max((eps(dtype.name) for dtype in dtypes if dtype.is_floating), default=0.0)


def _drawn(value: Any, total: int, draw: np.random.Generator) -> Any:
    """Random numbers of the same kind, where an untrained model's may be all alike."""
    if not (tf.is_tensor(value) and value.dtype.is_floating and value.shape.rank and value.shape[0] == total):
        return value
    array = np.asarray(tf.cast(value, tf.float64))
    low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
    size = max(high, -low) or 1.0
    found = draw.uniform(0.05 * size if low >= 0 else -size, 0.95 * size, array.shape)
    if array.ndim > 1 and low >= 0 and np.allclose(array.sum(axis=-1), 1, atol=1e-2):
        found /= found.sum(axis=-1, keepdims=True)
    return with_mask(tf.cast(found, value.dtype), mask_of(value))


def _cuts(samples: int) -> list[tuple[int, ...]]:
    """The sizes of parts: one sample against the rest, a third against the rest, and in two."""
    cuts = {(1, samples - 1), (samples - samples // 3, samples // 3), (samples // 2, samples - samples // 2)}
    return sorted(sizes for sizes in cuts if all(sizes))


__all__ = ["no_mean"]

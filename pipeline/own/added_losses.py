"""Losses that layers add by themselves, tried on a batch and its parts: a mean over samples or a constant, or neither?

    a layer's calls, one a microbatch  ──► joined: L     against     sum of n_k / N * L_k, for several cuts

`add_loss` and activity regularisers count with a microbatch's share of the batch, which is right for means and for
constants. Only the layer itself is called again, in the user's process, on what it was given and on random numbers in
its place. What it draws itself is the same for every sample meanwhile, and a BatchNormalization in it runs as in
inference: what that takes from each microbatch is told of it elsewhere, and is nothing that the loss does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from stages.keras_internals import layer_call, own_added_losses, replaced_draws, takes_training
from stages.masks import mask_of, with_mask
from stages.tape.eagerly import eagerly
from stages.tensorflow_internals import replaced

NOT_EQUAL = 1e-4
"""Losses that are farther apart, as a part of the largest, are not the same."""


class AddingCall(NamedTuple):
    """One call of a layer that added losses.

    Attributes:
        layer: The layer.
        given: Its arguments and keyword arguments, tensors among them.
    """

    layer: Any
    given: tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def calls_that_add_losses() -> Iterator[list[AddingCall]]:
    """Note the calls of layers inside of a model in which they add losses, while something runs eagerly."""
    found: list[AddingCall] = []
    depth = [0]

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(own_added_losses(layer)) if depth[0] else 0  # the outermost call forgets earlier ones
            depth[0] += 1
            try:
                return call(layer, *args, **kwargs)
            finally:
                depth[0] -= 1
                if len(own_added_losses(layer)) > before:
                    found.append(AddingCall(layer, (args, kwargs)))

        return called

    with replaced(*layer_call(), noted):
        yield found


def no_mean(calls: Sequence[AddingCall], microbatches: int, training: bool) -> str:
    """Of which layer a loss does not count in a batch as its microbatches' do, in words; "" of none.

    Args:
        calls: All calls of a batch, microbatch after microbatch.
        microbatches: How many there were.
        training: Whether layers ran as in training.
    """
    each = len(calls) // microbatches
    if each * microbatches != len(calls):  # layers that add losses now and then
        return ""
    for k in range(each):
        some = calls[k::each]
        layer = some[0].layer
        if any(call.layer is not layer for call in some):
            return ""
        try:
            what = _tried(layer, [call.given for call in some], training)
        except Exception:  # it cannot be called with other numbers of samples, or not outside of its model
            continue
        if what:
            return f"the layer {layer.name!r} adds a loss (add_loss or activity_regularizer) that is {what}"
    return ""


def _tried(layer: Any, given: Sequence[Any], training: bool) -> str:
    leaves = [keras.tree.flatten(one) for one in given]
    samples = [_rows(some) for some in leaves]
    joined = [_joined(values, samples) for values in zip(*leaves, strict=True)]
    total = sum(samples)
    draw = np.random.default_rng(0)
    for values in (joined, [_drawn(value, total, draw) for value in joined]):

        def losses(begin: int, end: int, values: Sequence[Any] = values) -> Any:
            rows = [_part(value, total, begin, end) for value in values]
            args, kwargs = keras.tree.pack_sequence_as(given[0], rows)
            layer(*args, **{"training": training, **kwargs})
            return np.array([float(tf.reduce_sum(loss)) for loss in own_added_losses(layer)])

        with ExitStack() as stack:
            stack.enter_context(eagerly())
            stack.enter_context(replaced(*layer_call(), _normalising_by_what_is_known))
            stack.enter_context(replaced_draws(dict.fromkeys(_DRAWS, _same_for_all) | {"dropout": _nothing_dropped}))
            whole = losses(0, total)
            if not np.isfinite(whole).all() or not np.array_equal(losses(0, total), whole):
                continue
            ways = {"mean", "sum"}
            for sizes in _cuts(total):
                parts = [losses(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0))]
                scale = NOT_EQUAL * np.max([np.abs(whole), *(np.abs(part) for part in parts)], axis=0)
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


def _rows(values: Sequence[Any]) -> int:
    """The number of samples: the first axis of the first tensor."""
    return int(next(value.shape[0] for value in values if tf.is_tensor(value) and value.shape.rank))


def _joined(values: Sequence[Any], samples: Sequence[int]) -> Any:
    """An argument of all microbatches; what has not a row per sample as it is, as for the first."""
    pairs = zip(values, samples, strict=True)
    if not all(tf.is_tensor(value) and value.shape.rank and value.shape[0] == rows for value, rows in pairs):
        return values[0]
    masks = [mask_of(value) for value in values]
    joined = tf.concat(list(values), axis=0)
    return joined if masks[0] is None else with_mask(joined, tf.concat(masks, axis=0))


def _part(value: Any, total: int, begin: int, end: int) -> Any:
    if not (tf.is_tensor(value) and value.shape.rank and value.shape[0] == total):
        return value
    mask = mask_of(value)
    return with_mask(tf.identity(value[begin:end]), None if mask is None else mask[begin:end])


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


_DRAWS = ("normal", "uniform", "truncated_normal", "randint")


def _same_for_all(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw for one sample what all get, from a seed of our own."""

    def drawn(shape: Any, *args: Any, **kwargs: Any) -> Any:
        one = draw((1, *shape[1:]), *args, **{**kwargs, "seed": 1})
        return tf.repeat(one, shape[0], axis=0)

    return drawn


def _normalising_by_what_is_known(call: Callable[..., Any]) -> Callable[..., Any]:
    """Call layers, but a BatchNormalization as in inference, so that no sample's result depends on others."""

    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, keras.layers.BatchNormalization) and takes_training(layer):
            kwargs["training"] = False
        return call(layer, *args, **kwargs)

    return called


def _nothing_dropped(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inputs, *args, **kwargs: inputs


__all__ = ["AddingCall", "calls_that_add_losses", "no_mean"]

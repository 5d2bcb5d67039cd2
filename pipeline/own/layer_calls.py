"""The calls of layers in a run of the user's own model, to be made again on all samples at once and on some of them.

    a layer's calls, one a microbatch  ──► joined ──► called on samples begin to end

What a layer draws itself is the same for every sample meanwhile, and a BatchNormalization runs as in inference: what
that takes from each microbatch is told of it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from stages.keras_internals import layer_call, own_added_losses, replaced_draws, takes_training
from stages.masks import mask_of, with_mask
from stages.tape.eagerly import eagerly
from stages.tensorflow_internals import replaced


class LayerCall(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: The layer.
        given: Its arguments and keyword arguments, tensors among them.
        adds: Whether it added losses.
    """

    layer: Any
    given: tuple[tuple[Any, ...], dict[str, Any]]
    adds: bool


@contextmanager
def recorded_calls(adding: bool) -> Iterator[list[LayerCall]]:
    """Note the calls of layers inside of a model while something runs eagerly, inner ones before those around them.

    Args:
        adding: Note only those in which losses are added.
    """
    found: list[LayerCall] = []
    depth = [0]

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(own_added_losses(layer)) if depth[0] else 0  # the outermost call forgets earlier ones
            depth[0] += 1
            try:
                return call(layer, *args, **kwargs)
            finally:
                depth[0] -= 1
                adds = len(own_added_losses(layer)) > before
                if adds or (depth[0] and not adding):
                    found.append(LayerCall(layer, (args, kwargs), adds))

        return called

    with replaced(*layer_call(), noted):
        yield found


def by_layer(calls: Sequence[LayerCall], microbatches: int) -> Iterator[list[LayerCall]]:
    """One call after the other, as it was made for each microbatch; nothing where these do not make the same calls."""
    each = len(calls) // microbatches
    if each * microbatches != len(calls):
        return
    for k in range(each):
        some = list(calls[k::each])
        if any(call.layer is not some[0].layer for call in some):
            return
        yield some


class JoinedCall:
    """The arguments of one layer in all microbatches, joined.

    Args:
        calls: Its calls, one a microbatch.

    Attributes:
        values: Its arguments, flat.
        total: The number of samples.
    """

    def __init__(self, calls: Sequence[LayerCall]) -> None:
        self._nested = calls[0].given
        leaves = [keras.tree.flatten(call.given) for call in calls]
        self.sizes = [_rows(some) for some in leaves]
        self.values = [_joined(values, self.sizes) for values in zip(*leaves, strict=True)]
        self.total = sum(self.sizes)

    def arguments(
        self, begin: int, end: int, values: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and keyword arguments of some samples; `values` in place of its own."""
        rows = [_part(value, self.total, begin, end) for value in (self.values if values is None else values)]
        args, kwargs = keras.tree.pack_sequence_as(self._nested, rows)
        return args, kwargs


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Layers run eagerly, without chance from sample to sample and without statistics of a batch."""
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(replaced(*layer_call(), _normalising_by_what_is_known))
        stack.enter_context(replaced_draws(dict.fromkeys(_DRAWS, _same_for_all) | {"dropout": _nothing_dropped}))
        yield


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


_DRAWS = ("normal", "uniform", "truncated_normal", "randint")


def _same_for_all(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw for one sample what all get, from a seed of our own."""

    def drawn(shape: Any, *args: Any, **kwargs: Any) -> Any:
        if not len(shape):
            return draw(shape, *args, **{**kwargs, "seed": 1})
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


__all__ = ["JoinedCall", "LayerCall", "by_layer", "nothing_drawn", "recorded_calls"]

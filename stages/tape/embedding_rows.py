"""An embedding's gradient: rows, and the places in the variable that they belong to (`tf.IndexedSlices`).

    tape ──► values (n, ...) and places (n,)     a place that was read twice is there twice

Over microbatches the sum is what one tape over the whole batch would give to an optimizer. That is more than rounding:
Keras's Adam squares the rows as they are, before it adds up those of one place.

    words      looked up for every sample: the rows of one microbatch, and behind them those of the next
    positions  looked up once for all samples: the same rows in every microbatch, whose values are added
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import tensorflow as tf

from stages.tape.model_call import Part, watch
from stages.tape.tensors import is_differentiable


def is_sparse(gradient: Any) -> TypeGuard[tf.IndexedSlices]:
    """Whether a gradient is rows and their places."""
    return isinstance(gradient, tf.IndexedSlices)


def sparse(values: Any, places: Any, shape: Sequence[int]) -> tf.IndexedSlices:
    """A gradient of a variable of this shape, from values (n, ...) and places (n,)."""
    return tf.IndexedSlices(values, places, tf.constant(list(shape), tf.int64))


def parts_of(gradient: Any | None) -> tuple[Any | None, Any | None]:
    """A gradient as two tensors: its values, and the places of its rows, None where it is dense."""
    return (gradient.values, gradient.indices) if is_sparse(gradient) else (gradient, None)


def from_parts(values: Any | None, places: Any | None, shape: Sequence[int]) -> Any | None:
    """The inverse of `parts_of`, for a variable of this shape."""
    return values if places is None else sparse(values, places, shape)


def joined_rows(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """All rows of some gradients of one variable, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    values = tf.concat([part.values for part in parts], axis=0)
    places = tf.concat([tf.cast(part.indices, tf.int64) for part in parts], axis=0)
    return tf.IndexedSlices(values, places, parts[0].dense_shape)


class Rows:
    """Rows of several variables that wait for an update, in the order in which they came."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tf.IndexedSlices]] = {}

    def add(self, variable: int, gradient: tf.IndexedSlices, fixed: bool = False) -> None:
        """Put rows behind those that a variable (by place) has, or add the values of rows that are `fixed`."""
        parts = self._parts.setdefault(variable, [])
        if fixed and parts and parts[-1].values.shape == gradient.values.shape:
            parts[-1] = added(parts[-1], gradient)
        else:
            parts.append(gradient)

    def replace(self, variable: int, gradient: tf.IndexedSlices | None) -> None:
        """Put others in place of a variable's rows, or none."""
        self._parts.pop(variable, None)
        if gradient is not None:
            self.add(variable, gradient)

    def of(self, variable: int) -> tf.IndexedSlices | None:
        """All rows of a variable; None if it has none."""
        parts = self._parts.get(variable)
        return None if parts is None else joined_rows(parts)

    def variables(self) -> list[int]:
        """Which variables have rows, ascending."""
        return sorted(self._parts)

    def clear(self) -> None:
        """Forget all."""
        self._parts.clear()


def added(a: tf.IndexedSlices, b: tf.IndexedSlices) -> tf.IndexedSlices:
    """Rows of the same places, value by value."""
    return tf.IndexedSlices(a.values + b.values, a.indices, a.dense_shape)


def fixed_rows(
    part: Part, inputs: Sequence[tf.TensorSpec], masked: Sequence[int], trained: Sequence[Any] | None = None
) -> frozenset[int]:
    """Which of a part's variables have as many rows whatever the batch: those that are looked up once for all samples.

    That is asked of a trace of the part with a free number of samples. Nothing is computed.

    Args:
        part: The model.
        inputs: Its flat inputs; the first axis is free.
        masked: Which of them the masks behind them belong to.
        trained: The variables; default: those that the part trains at present.
    """
    found: set[int] = set()
    asked = part.trainable_variables if trained is None else trained

    def trace(*tensors: Any) -> None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            variables = watch(tape, tensors, (False,) * len(tensors), asked)
            called = part.call(tensors, True, masked)
        targets = [t for t in called.outputs if is_differentiable(t.dtype)]
        gradients = tape.gradient([*targets, *called.own], variables)
        found.clear()
        found.update(i for i, g in enumerate(gradients) if is_sparse(g) and g.values.shape[0] is not None)

    tf.function(trace, input_signature=tuple(inputs), autograph=False).get_concrete_function()
    return frozenset(found)


def free_batch(tensors: Sequence[Any]) -> list[tf.TensorSpec]:
    """The signature of tensors like these, with any number of samples."""
    return [tf.TensorSpec((None, *tensor.shape[1:]) if tensor.shape.rank else (), tensor.dtype) for tensor in tensors]

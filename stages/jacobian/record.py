"""One segment, run once under its own tape: what the Jacobian path differentiates.

Why: the Jacobian path evaluates many rows of many Jacobians, but every one of them belongs to the *same* forward pass:
the same dropout mask, one move of the moving statistics. So each segment runs once, under a persistent tape that is
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from stages.variable_names import unique_names

SegmentLike: TypeAlias = Callable[..., Any]
"""A Keras model or layer, or a callable that takes what the segment below returns."""


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A segment's forward pass.

    Attributes:
        tape: persistent, no longer recording.
        inputs, outputs: flat lists of tensors, and `structure` the outputs as the segment returned them.
        variables: path -> the trainable variable.
        losses: the segment's own losses (regularisers, `add_loss`), scalars.
    """

    tape: Any
    inputs: list[Any]
    outputs: list[Any]
    structure: Any
    variables: dict[str, Any]
    losses: list[Any]

    def float_inputs(self) -> list[Any]:
        """The inputs that can have a gradient."""
        return [tensor for tensor in self.inputs if tensor.dtype.is_floating]

    def float_outputs(self) -> list[Any]:
        """The outputs that can have a gradient."""
        return [tensor for tensor in self.outputs if tensor.dtype.is_floating]


def record(segment: SegmentLike, inputs: Any, training: bool) -> Recorded:
    """Run `segment` once under a persistent tape that watches every floating input.

    Args:
        segment: a Keras model or layer (called with `training`), or a callable of tensors (called with `inputs` alone).
        inputs: a tensor or structure of tensors. Not copied: a Keras mask travels on the tensor itself.
        training: passed to Keras segments.

    Raises:
        TypeError: an output is complex; Jacobians of complex functions are not offered.
    """
    flat = tf.nest.flatten(inputs)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([tensor for tensor in flat if tensor.dtype.is_floating])
        if isinstance(segment, keras.Layer):
            structure = segment(inputs, training=training)
            # Asked for inside the tape: Keras evaluates regularisers on access.
            losses = [tf.convert_to_tensor(loss) for loss in segment.losses]
        else:
            structure = segment(inputs)
            losses = []
        outputs = [tf.convert_to_tensor(output) for output in tf.nest.flatten(structure)]
    if any(output.dtype.is_complex for output in outputs):
        raise TypeError(
            f"segment {segment_name(segment, 0)!r}: expected real outputs, received {[o.dtype.name for o in outputs]}; "
            "split it into real and imaginary part before the cut"
        )
    return Recorded(tape, flat, outputs, structure, _variables(segment, tape), losses)


def segment_name(segment: SegmentLike, index: int) -> str:
    """Name a segment for people: its own name, or its place in the chain."""
    name = getattr(segment, "name", None) or getattr(segment, "__name__", None)
    return name if isinstance(name, str) and name != "<lambda>" else f"segment {index}"


def _variables(segment: SegmentLike, tape: Any) -> dict[str, Any]:
    """Map paths to trainable variables; those of a plain callable are the ones that its tape saw."""
    if isinstance(segment, keras.Layer):
        named = [(variable.path, variable.value) for variable in segment.trainable_variables]
    else:
        named = [(variable.name, variable) for variable in tape.watched_variables()]
    names = unique_names([name for name, _ in named])  # those of tf.Variable need not be
    return dict(zip(names, (variable for _, variable in named), strict=True))

"""The memory of Jacobians in bytes, estimated before they are evaluated, and the error that refuses them.

Why: dOut/dW has size(Out) * size(W) entries where dL/dW has only size(W). A layer of 256 units on a batch of 1024 with
65 536 weights already asks for 64 GiB. The size follows from shapes alone, so nobody has to find out by running it.

    kind of Jacobian                       entries
    weights   d Out / d W                  size(Out) * size(W)
    inputs    independent samples          size(Out) * size(In) / batch      (one block per sample: `batch_jacobian`)
    inputs    dependent samples            size(Out) * size(In)              (`jacobian`)

TensorFlow holds a Jacobian about twice while it builds it: its rows wait in a list and are then stacked. What is
compared with a limit is therefore `BUILD_FACTOR` times the entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from stages.errors import StageError
from stages.jacobian.record import SegmentLike, record, segment_name
from stages.tensorflow_internals import called_graph
from transport.errors import MistakeError

BUILD_FACTOR = 2
"""Bytes in use while a Jacobian is built, as a multiple of the bytes of the Jacobian."""


class MemoryLimitExceeded(StageError, MistakeError):  # noqa: N818 - the name says what happened, as in the public contract
    """A Jacobian would take more memory than allowed. Nothing of it has been evaluated.

    Attributes:
        needed: bytes that the evaluation would take.
        limit: bytes that were allowed.
    """

    def __init__(self, message: str, needed: int, limit: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.limit = limit


@dataclass(frozen=True, slots=True)
class SegmentJacobians:
    """The sizes, in bytes, of one segment's Jacobians.

    Attributes:
        name: the segment's name.
        outputs: number of output elements that can have a gradient, batch included.
        weights: bytes of all d Out / d W.
        inputs_independent: bytes of all d Out / d In if samples are independent; None if the shapes rule that out.
        inputs_dependent: bytes of all d Out / d In if every sample may depend on every other.
        independent: True or False where that is decided, None where only a run can tell.
    """

    name: str
    outputs: int
    weights: int
    inputs_independent: int | None
    inputs_dependent: int
    independent: bool | None = None

    @property
    def least(self) -> int:
        """Bytes of the larger of the two groups (they are evaluated one after the other), at best."""
        certain = self.independent is False or self.inputs_independent is None
        return max(self.weights, self.inputs_dependent if certain else self.inputs_independent or 0)

    @property
    def most(self) -> int:
        """As `least`, at worst: samples that may depend on each other are taken to do so."""
        certain = self.independent is True and self.inputs_independent is not None
        return max(self.weights, (self.inputs_independent or 0) if certain else self.inputs_dependent)


@dataclass(frozen=True, slots=True)
class JacobianEstimate:
    """The bytes that the Jacobians of a chain of segments would take. `int(estimate)` is `needed`.

    Attributes:
        segments: one entry a segment, bottom first.
    """

    segments: tuple[SegmentJacobians, ...]

    @property
    def held(self) -> int:
        """Bytes of the largest group of Jacobians that exists at one time, at worst."""
        return max(segment.most for segment in self.segments)

    @property
    def needed(self) -> int:
        """Bytes in use while that group is built, at worst: what `memory_limit` is compared with."""
        return BUILD_FACTOR * self.held

    @property
    def least_needed(self) -> int:
        """As `needed`, if samples turn out to be independent wherever the shapes allow it."""
        return BUILD_FACTOR * max(segment.least for segment in self.segments)

    def __int__(self) -> int:
        return self.needed

    def __str__(self) -> str:
        lines = []
        for segment in self.segments:
            batched = segment.inputs_independent
            inputs = {
                True: f"inputs {readable_bytes(batched or 0)}",
                False: f"inputs {readable_bytes(segment.inputs_dependent)}",
                None: f"inputs {readable_bytes(batched or 0)} if samples are independent, "
                f"else {readable_bytes(segment.inputs_dependent)}",
            }[False if batched is None else segment.independent]
            lines.append(
                f"{segment.name}: {segment.outputs} outputs; weights {readable_bytes(segment.weights)}, {inputs}"
            )
        least, most = readable_bytes(self.least_needed), readable_bytes(self.needed)
        lines.append(f"needed at one time: {most}" if least == most else f"needed at one time: {least} to {most}")
        return "\n".join(lines)


def jacobian_bytes(
    segments: Sequence[SegmentLike],
    inputs: Any,
    *,
    training: bool = True,
    independent_samples: bool | Sequence[bool | None] | None = None,
    input_gradient: bool = False,
) -> JacobianEstimate:
    """Say what `chain_rule` would take, without running a segment.

    The segments are traced for their shapes; no operation of theirs is executed and no state changes. Unbuilt Keras
    layers are built by it, and Python code in a callable runs once, with symbolic tensors.

    Args:
        segments: Keras models or layers, or callables of tensors, bottom first.
        inputs: the first segment's input: a tensor, array, `tf.TensorSpec`, or a structure of these.
        training: passed to Keras segments.
        independent_samples: as in `chain_rule`; None leaves a range from `least_needed` to `needed`.
        input_gradient: whether dL/dInput of the first segment is wanted too.

    Returns:
        The estimate: `int()` of it is the bytes needed at one time, `str()` of it a text for people.
    """
    forced = per_segment(independent_samples, segments)
    value = tf.nest.map_structure(_spec, inputs)
    sizes = []
    for index, segment in enumerate(segments):
        value, size = _trace(segment, value, training, index > 0 or input_gradient)
        sizes.append(SegmentJacobians(segment_name(segment, index), *size, forced[index]))
    return JacobianEstimate(tuple(sizes))


def per_segment(
    independent_samples: bool | Sequence[bool | None] | None, segments: Sequence[SegmentLike]
) -> tuple[bool | None, ...]:
    """Spread one answer over all segments, or check that there is one a segment. Raises ValueError if not."""
    if not segments:
        raise ValueError("expected at least one segment, received none")
    if independent_samples is None or isinstance(independent_samples, bool):
        return (independent_samples,) * len(segments)
    answers = tuple(independent_samples)
    if len(answers) != len(segments):
        raise ValueError(
            f"independent_samples: expected one answer for each of {len(segments)} segments, received "
            f"{len(answers)}; pass one bool (or None) for all of them, or one a segment"
        )
    return answers


def group_sizes(
    outputs: Sequence[Any], variables: Sequence[Any], inputs: Sequence[Any]
) -> tuple[int, int, int | None, int]:
    """Size Jacobians from shapes: (output elements, weights bytes, inputs bytes independent, inputs bytes dependent).

    Args:
        outputs, variables, inputs: floating tensors, variables or specs with fully known shapes.
    """
    rows = sum(_elements(output) for output in outputs)
    weights = rows * sum(_bytes(variable) for variable in variables)
    dependent = rows * sum(_bytes(tensor) for tensor in inputs)
    batch = common_batch([*outputs, *inputs])
    return rows, weights, dependent if batch is None else dependent // max(batch, 1), dependent


def common_batch(tensors: Sequence[Any]) -> int | None:
    """Return the length of axis 0 that all `tensors` share, or None if they do not share one."""
    lengths = {int(tensor.shape[0]) if tensor.shape.rank else None for tensor in tensors}
    return lengths.pop() if len(lengths) == 1 else None


def row_bytes(graph: Any) -> int:
    """Bytes of every tensor that a traced function makes, called functions included: a bound on what it holds.

    The sum, not the peak over time: TensorFlow runs operations as they become ready, in no fixed order, so only the sum
    bounds every order.
    """
    return sum(_tensor_bytes(tensor) for tensor in _made_by(graph))


def readable_bytes(count: int) -> str:
    """Write a number of bytes for people: 1536 -> '1.5 KiB'."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _trace(
    segment: SegmentLike, value: Any, training: bool, wants_inputs: bool
) -> tuple[Any, tuple[int, int, int | None, int]]:
    seen: list[tuple[int, int, int | None, int]] = []

    def forward(given: Any) -> Any:
        recorded = record(segment, given, training)
        inputs = recorded.float_inputs() if wants_inputs else []
        seen.append(group_sizes(recorded.float_outputs(), list(recorded.variables.values()), inputs))
        return recorded.structure

    traced = tf.function(forward, autograph=False).get_concrete_function(value)
    return tf.nest.map_structure(_spec, traced.structured_outputs), seen[-1]


def _spec(value: Any) -> tf.TensorSpec:
    if isinstance(value, tf.TensorSpec):
        spec = value
    else:
        tensor = value if hasattr(value, "shape") and hasattr(value, "dtype") else tf.convert_to_tensor(value)
        spec = tf.TensorSpec(tensor.shape, tensor.dtype)
    if spec.shape.num_elements() is None:
        raise ValueError(
            f"expected inputs and outputs of known shape, received {spec.shape}; give the batch size and every "
            "other axis"
        )
    return spec


def _elements(tensor: Any) -> int:
    return math.prod(int(length) for length in tensor.shape)


def _bytes(tensor: Any) -> int:
    return _elements(tensor) * int(tf.as_dtype(tensor.dtype).size)


def _tensor_bytes(tensor: Any) -> int:
    elements = tensor.shape.num_elements()
    return (
        0 if elements is None or tensor.dtype in (tf.variant, tf.resource) else int(elements) * int(tensor.dtype.size)
    )


def _made_by(graph: Any) -> Iterator[Any]:
    for operation in graph.get_operations():
        if operation.type != "Placeholder":
            yield from operation.outputs
        if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):
            called = called_graph(graph, operation.get_attr("f").name)
            if called is not None:
                yield from _made_by(called)

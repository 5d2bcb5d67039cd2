"""Influence map: for pairs of output steps and input steps (states, variables), whether a gradient flows and how large.

Why: "does this output learn from that step?" is asked of every recurrent model, and a look at one gradient does not
answer it. A tape says None for a tensor that is not on its way, but where steps are slices of one tensor it says zeros;
a gradient can be there and vanish; a sum over a batch can cancel. So the whole derivative is evaluated, block by block:

                  x[0]    x[1]    x[2]
    out[0]     │  0.84    0       0            size of each block of the Jacobian, d out[i] / d x[j]
    out[1]     │  0.31    0.79    0            (Frobenius norm: the root of the sum of all its squared entries)
    out[2]     │  0.12    0.28    0.81

Two questions, two answers:

1. *Connected* is structure: does any path of differentiable operations lead from the source to the output? No path is
   what the tape reports as None. It is asked of whole tensors: if an output was stacked from its steps, or a source is
   sliced into them, every step is connected with whatever any of them is connected with.
2. *Flows* is value, at these inputs: is any entry of d output / d source different from zero? It is exact for steps of
   stacked tensors also. What is connected and does not flow is zero here (a slice of another step, a dead ReLU).

A tensor that the function returns can be a source too. What is asked then is how the output depends on *that tensor*,
with all that reaches the output through it. Whether steps influence each other shows only if the function returns them
as tensors of their own (a list): in a stacked tensor, no step is on the way to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.jacobian.memory import MemoryLimitExceeded, readable_bytes, row_bytes
from stages.jacobian.rows import InBlocks, row_function, stacked_rows
from stages.step_influence.map import InfluenceMap
from stages.step_influence.places import INPUT, OUTPUT, Piece, Places, Root, elements_of, leaves
from stages.tape.eagerly import eagerly

INFLUENCE_LIMIT = 2 << 30
"""Bytes that the evaluation may take beside the forward pass unless told otherwise: 2 GiB."""

FEW_ROWS = 48
"""Up to so many rows of one output tensor are evaluated eagerly: tracing a loop over them would take longer."""

_BLOCK_BYTES = 64 << 20
"""A block of rows takes no more than this, whatever the limit: larger ones leave the caches and gain nothing."""

_NORM_BYTES = 32
"""Bytes per entry while norms are taken in float64: the entries, their order by blocks, and two intermediates."""

Array = np.ndarray[Any, Any]


def influence(
    function: Callable[..., Any],
    inputs: Any,
    *,
    outputs: Any = None,
    sources: Any = None,
    output_axis: int = 1,
    source_axis: int = 1,
    training: bool = False,
    memory_limit: int | None = INFLUENCE_LIMIT,
) -> InfluenceMap:
    """Evaluate which sources influence which outputs, and how much.

    Args:
        function: a Keras model or layer, or a callable of tensors. It is called once, eagerly, with `inputs`. Compiled
            functions in it run eagerly too, so that what happens inside is seen.
        inputs: a tensor or array, or nested dicts, lists and tuples of them. A small batch is enough: its size enters
            the cost squared.
        outputs: what the rows are: an entry or a list of entries. An entry is a number (step of a tensor, element of a
            list), a tuple of names, numbers and slices that leads down what the function returns and then to a step,
            e.g. ``(0, 1)`` for Out[0][1] or ``("state", 3)``, or a name. Default: all outputs, cut into steps; a tensor
            with no axis behind that of the steps, such as a state (batch, units), is whole.
        sources: what the columns are: entries as above for the inputs; names of inputs, of returned tensors, and of the
            model's variables by path or its end; or variables themselves. ``("input", ...)`` and ``("output", ...)``
            say which of the two is meant. Default: all inputs, cut into steps likewise.
        output_axis, source_axis: the axis that a number at a tensor is an index of; more numbers index the axes behind.
            For returned tensors, sources or outputs, it is `output_axis`. The default takes axis 0 for the batch.
        training: passed to Keras models.
        memory_limit: bytes that the evaluation may take beside one forward and backward pass; blocks of rows are chosen
            to fit. None for no limit.

    Returns:
        The map: sizes, connections, a table as `str()`, JSON, and a picture.

    Raises:
        MemoryLimitExceeded: not even one row of the Jacobian (one output element, all sources) fits. Nothing of it has
            been evaluated.
        ValueError: an output or source does not exist, is not floating, or has no such step; a model that is not built.
        TypeError: the function returns something other than dense tensors, or a complex output.

    Non-trainable variables of a Keras model (moving statistics, states, random seeds) are back at their old values
    afterwards. A callable's own variables are not known here: what it assigns stays assigned.

    Example:
        >>> model = keras.Sequential([keras.Input((3, 2)), keras.layers.SimpleRNN(4, return_sequences=True)])
        >>> found = influence(model, np.ones((1, 3, 2), "float32"))
        >>> found.flows.tolist()
        [[True, False, False], [True, True, False], [True, True, True]]
    """
    if memory_limit is not None and memory_limit <= 0:
        raise ValueError(f"memory_limit: expected a positive number of bytes or None, received {memory_limit!r}")
    model = function if isinstance(function, keras.Layer) else None
    if model is not None and not model.built:
        raise ValueError(
            f"influence: the model {model.name!r} is not built, so it has no variables yet; begin it with "
            "keras.Input(shape) or call it once"
        )
    state = [] if model is None else [(variable, variable.numpy()) for variable in model.non_trainable_variables]
    inputs = _map(inputs, tf.convert_to_tensor)
    try:
        with eagerly(), tf.GradientTape(persistent=True) as tape:
            tape.watch([tensor for _, tensor in leaves(inputs) if tensor.dtype.is_floating])
            tape.watch(_variables(model, sources))
            returned = function(inputs) if model is None else function(inputs, training=training)
            returned = _map(returned, _dense_output)
    finally:
        for variable, before in state:
            variable.assign(before)
    places = Places(
        Root(INPUT, inputs, source_axis, "source_axis"),
        Root(OUTPUT, returned, output_axis, "output_axis"),
        {variable.path: variable for variable in model.weights} if model is not None else {},
    )
    rows, columns = places.choose_outputs(outputs), places.choose_sources(sources)
    _refuse_own_steps(rows, columns, {id(tensor) for _, tensor in leaves(inputs)})
    return _evaluate(tape, rows, columns, memory_limit)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One output tensor, the pieces of it that are rows, and the source tensors that it is connected with."""

    tensor: Any
    rows: list[int]
    sources: list[Any]


def _evaluate(tape: Any, rows: list[Piece], columns: list[Piece], limit: int | None) -> InfluenceMap:
    matrix, connected = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), bool)
    tensors = list({id(piece.tensor): piece.tensor for piece in columns}.values())
    jobs = []
    for tensor in {id(piece.tensor): piece.tensor for piece in rows}.values():
        found = tape.gradient(tensor, tensors)
        reached = [source for source, gradient in zip(tensors, found, strict=True) if gradient is not None]
        jobs.append(_Job(tensor, [i for i, piece in enumerate(rows) if piece.tensor is tensor], reached))
    _refuse_too_large(jobs, limit)
    for job in jobs:
        blocks = [
            [(j, piece.indices) for j, piece in enumerate(columns) if piece.tensor is source] for source in job.sources
        ]
        connected[np.ix_(job.rows, [j for group in blocks for j, _ in group])] = True
        count = sum(len(rows[i].indices) for i in job.rows)
        derivatives = _Derivatives(tape, job, limit, eager=count <= FEW_ROWS)
        for i in job.rows:
            for jacobians in derivatives(rows[i].indices):
                for jacobian, group in zip(jacobians, blocks, strict=True):
                    for j, elements in group:
                        # hypot adds a square under a root without leaving the range of the numbers
                        matrix[i, j] = np.hypot(matrix[i, j], _norm(jacobian[:, elements]))
                del jacobians, jacobian  # or they would be there beside the next block
    return InfluenceMap(
        tuple(piece.label for piece in rows), tuple(piece.label for piece in columns), matrix, connected
    )


class _Derivatives:
    """Rows of one output tensor's Jacobian, one after the other: eagerly where they are few, else in a traced loop."""

    def __init__(self, tape: Any, job: _Job, limit: int | None, eager: bool) -> None:
        self._job, self._limit, self._eager = job, limit, eager
        self._row = row_function(tape, job.tensor, job.sources)
        self._blocks = InBlocks(lambda indices: stacked_rows(self._row, indices, job.sources))
        self._most: int | None = None

    def __call__(self, elements: Array) -> Iterator[list[Array]]:
        """For some elements of the tensor, block by block: for each source (rows of the block, source elements)."""
        if not len(elements) or not self._job.sources:
            return
        if self._eager:
            for element in elements:
                yield [np.asarray(row).reshape(1, -1) for row in self._row(tf.constant(element, tf.int32))]
            return
        if self._most is None:
            self._most = self._rows_that_fit()
        for block in self._blocks.over(elements, self._most):
            yield [np.asarray(rows).reshape(rows.shape[0], -1) for rows in block]

    def _rows_that_fit(self) -> int:
        allowed = _BLOCK_BYTES if self._limit is None else min(self._limit, _BLOCK_BYTES)
        graph = tf.function(self._row, autograph=False).get_concrete_function(tf.TensorSpec((), tf.int32)).graph
        return int(max(1, allowed // (row_bytes(graph) + _row_bytes(self._job))))


def _row_bytes(job: _Job) -> int:
    """Bytes of one row of the Jacobian with all sources, and of taking the norm of the largest."""
    widths = [elements_of(source) for source in job.sources]
    entries = sum(
        width * int(tf.as_dtype(source.dtype).size) for width, source in zip(widths, job.sources, strict=True)
    )
    return entries + _NORM_BYTES * max(widths, default=0)


def _refuse_too_large(jobs: Sequence[_Job], limit: int | None) -> None:
    needed = max((_row_bytes(job) for job in jobs), default=0)
    if limit is not None and needed > limit:
        raise MemoryLimitExceeded(
            f"influence: one row of the Jacobian (one output element, all sources) takes {readable_bytes(needed)}, "
            f"more than memory_limit = {readable_bytes(limit)}; raise memory_limit to at least {needed} bytes, or ask "
            "for fewer sources or with a smaller batch",
            needed,
            limit,
        )


def _refuse_own_steps(rows: Sequence[Piece], columns: Sequence[Piece], inputs: set[int]) -> None:
    for source in (column for column in columns if id(column.tensor) not in inputs):
        for output in rows:
            if source.tensor is output.tensor and source.elements is not None:
                raise ValueError(
                    f"sources: {source.label} is a part of the same tensor as the output {output.label}, so no part is "
                    "on the way to another; let the function return the steps as tensors of their own, in a list"
                )


def _norm(entries: Array) -> float:
    """The Frobenius norm in float64; zero only if every entry is."""
    values = np.abs(entries.astype(np.float64))
    largest = float(values.max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    values /= largest
    return largest * math.sqrt(float(np.vdot(values, values)))


def _variables(model: Any, sources: Any) -> list[Any]:
    """What the tape must watch besides trainable variables: those given as sources, and a model's others."""
    given = sources if isinstance(sources, list) else [sources]
    given = [entry for entry in given if hasattr(entry, "assign")]
    given += [] if model is None else model.weights
    found = [v.value if isinstance(v, keras.Variable) else v for v in given]
    return [variable for variable in found if variable.dtype.is_floating]


def _dense_output(value: Any) -> Any:
    if isinstance(value, tf.RaggedTensor | tf.SparseTensor):
        raise TypeError(
            f"influence: expected the function to return dense tensors, received a {type(value).__name__}; return "
            "its to_tensor(), which is differentiable, or its rows in a list"
        )
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype.is_complex:
        raise TypeError(f"influence: expected real outputs, received {tensor.dtype.name}; return the two parts apart")
    return tensor


def _map(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every leaf; None stays None."""
    if isinstance(structure, Mapping):
        return {key: _map(value, function) for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        mapped = [_map(value, function) for value in structure]
        if hasattr(structure, "_fields"):
            return type(structure)(*mapped)
        return tuple(mapped) if isinstance(structure, tuple) else mapped
    return None if structure is None else function(structure)

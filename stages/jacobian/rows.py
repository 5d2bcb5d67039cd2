"""Contract dL/dOut with a Jacobian, whole or in blocks of rows that stay within a memory limit.

Why: only the product dL/dOut * dOut/dW is wanted, and it is a sum over the rows of the Jacobian (one row an output
element). So the rows can be made a block at a time and thrown away:

    dL/dW = sum over blocks of  dL/dOut[block] * (dOut/dW)[block, :]

The whole Jacobian comes from `GradientTape.jacobian` and `batch_jacobian`; the blocks from one row after the other.
Both give the same numbers up to the order of summation, which makes each a check of the other. Rows are never
vectorised (`pfor`, `tf.vectorized_map`): that runs other operations than the model does, with one axis more, and
oneDNN's batched matrix product corrupts the heap on some of them and ends the process (attention with one head on one
sample, TensorFlow 2.21).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from stages.jacobian.memory import MemoryLimitExceeded, readable_bytes, row_bytes
from stages.tape.accumulate import dense


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """One output tensor of a recorded segment, to be differentiated by several sources.

    Attributes:
        tape: the persistent tape that recorded `output`.
        output: (batch, ...) or any shape.
        output_gradient: dL/dOut, shape and dtype of `output`.
        sources: variables or inputs that `output` depends on.
        per_sample: the sources are inputs and samples are independent: one block of the Jacobian a sample.
        where: what is being differentiated, for messages.
    """

    tape: Any
    output: Any
    output_gradient: Any
    sources: list[Any]
    per_sample: bool
    where: str

    @property
    def rows(self) -> int:
        """Rows of the Jacobian: output elements, of one sample if `per_sample`."""
        elements = int(self.output.shape.num_elements())
        return elements // max(int(self.output.shape[0]), 1) if self.per_sample else elements


def contract_whole(work: Contraction) -> list[Any]:
    """Evaluate the whole Jacobian and contract it. Returns dL/dSource for every source, in the source's dtype."""
    if work.rows == 0:
        return [tf.zeros_like(source) for source in work.sources]
    if not work.per_sample:
        return _run_once(lambda: _contract_dependent(work))
    if any(tensor.shape.rank < 2 for tensor in [work.output, *work.sources]):
        return contract_blocked(work, None)[0]  # `batch_jacobian` wants a feature axis; the rows do not
    return _run_once(lambda: _contract_per_sample(work))


def _contract_dependent(work: Contraction) -> list[Any]:
    jacobians = work.tape.jacobian(work.output, work.sources, experimental_use_pfor=False)
    rank = work.output.shape.rank
    return [tf.tensordot(tf.cast(work.output_gradient, j.dtype), j, axes=rank) for j in jacobians]


def _contract_per_sample(work: Contraction) -> list[Any]:
    batch = int(work.output.shape[0])
    gradients = []
    for source in work.sources:
        jacobian = work.tape.batch_jacobian(work.output, source, experimental_use_pfor=False)
        seeds = tf.cast(tf.reshape(work.output_gradient, (batch, -1)), jacobian.dtype)
        product = tf.einsum("br,brc->bc", seeds, tf.reshape(jacobian, (batch, work.rows, -1)))
        gradients.append(tf.reshape(product, source.shape))
    return gradients


def _run_once(function: Callable[[], list[Any]]) -> list[Any]:
    """Trace a function and run it: TensorFlow traces a Jacobian in any case, and in here does not warn that it did."""
    found: list[Any] = tf.function(function, autograph=False).get_concrete_function()()
    return found


def contract_blocked(work: Contraction, limit: int | None) -> tuple[list[Any], int]:
    """Evaluate and contract the Jacobian in blocks of rows.

    Args:
        work: what to contract.
        limit: bytes that a block may take; every tensor that it makes on the way is counted. None for no limit.

    Returns:
        dL/dSource for every source, and the number of blocks.

    Raises:
        MemoryLimitExceeded: not even one row fits. Nothing has been evaluated.
    """
    if work.rows == 0:
        return [tf.zeros_like(source) for source in work.sources], 0
    row = row_function(work.tape, work.output, work.sources, work.per_sample)
    length = work.rows if limit is None else rows_that_fit(work, row, limit)
    totals: list[Any] | None = None
    count = 0
    for parts in InBlocks(_block_function(work, row)).over(np.arange(work.rows), length):
        totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
        count += 1
    assert totals is not None
    return totals, count


def rows_that_fit(work: Contraction, row: Callable[[Any], list[Any]], limit: int) -> int:
    """Count the rows that a block may have, from a trace of one row. Raises if not even one fits."""
    graph = tf.function(row, autograph=False).get_concrete_function(tf.TensorSpec((), tf.int32)).graph
    width = sum(int(source.shape.num_elements()) * int(source.dtype.size) for source in work.sources)
    # A block's rows wait in a list, are stacked, and their product with dL/dOut may turn them: two more copies of each.
    one = row_bytes(graph) + 2 * width
    # The running sum, and the block's own contribution to it.
    fixed = 2 * width
    length = (limit - fixed) // one
    if length < 1:
        raise MemoryLimitExceeded(
            f"{work.where}: one row of the Jacobian takes {readable_bytes(one + fixed)}, more than memory_limit = "
            f"{readable_bytes(limit)}; raise memory_limit to at least {one + fixed} bytes, cut the segment into "
            "smaller ones, or use the hand-off (Stage), which needs no Jacobian",
            one + fixed,
            limit,
        )
    return min(length, work.rows)


def row_function(
    tape: Any, output: Any, sources: Sequence[Any], per_sample: bool = False
) -> Callable[[Any], list[Any]]:
    """Make the function from a row's index to that row of every source's Jacobian.

    Args:
        tape: the persistent tape that recorded `output`.
        output: any shape; row i of a Jacobian belongs to its element i, in row-major order.
        sources: tensors or variables that `output` depends on.
        per_sample: row i is instead that of element i of every sample, summed over samples, which are independent.

    Returns:
        A function of an int32 scalar; a gradient for each source, of its shape.
    """
    elements = int(output.shape.num_elements())
    batch = int(output.shape[0]) if per_sample else 1

    def row(index: Any) -> list[Any]:
        seed = tf.one_hot(index, elements // max(batch, 1), dtype=output.dtype)
        if per_sample:
            seed = tf.broadcast_to(seed, (batch, elements // batch))
        found = tape.gradient(output, sources, output_gradients=tf.reshape(seed, output.shape))
        return [dense(gradient) for gradient in found]

    return row


def stacked_rows(row: Callable[[Any], list[Any]], indices: Any, sources: Sequence[Any]) -> list[Any]:
    """Rows of every source's Jacobian, one after the other in a loop of the graph; to be called while tracing.

    Args:
        row: as `row_function` makes it.
        indices: (rows,), int32.
        sources: those of `row`.

    Returns:
        For each source (rows, *its shape).
    """
    found = tf.map_fn(row, indices, fn_output_signature=[source.dtype for source in sources])
    return [
        tf.ensure_shape(stacked, (indices.shape[0], *source.shape))
        for stacked, source in zip(found, sources, strict=True)
    ]


class InBlocks:
    """A function of row indices, called for a block of them at a time and traced once for each length of a block.

    Args:
        function: of indices (rows,), int32, whose number is known while tracing.
    """

    def __init__(self, function: Callable[[Any], list[Any]]) -> None:
        self._function = tf.function(function, autograph=False)
        self._traced: dict[int, Any] = {}

    def over(self, indices: np.ndarray[Any, Any], most: int) -> Iterator[list[Any]]:
        """What the function gives for at most so many indices at a time, block by block.

        Blocks are of nearly equal length: at most two lengths, so at most two traces.
        """
        for block in np.array_split(indices.astype(np.int32), -(-len(indices) // most)):
            if len(block) not in self._traced:
                spec = tf.TensorSpec(block.shape, tf.int32)
                self._traced[len(block)] = self._function.get_concrete_function(spec)
            yield self._traced[len(block)](tf.constant(block))


def _block_function(work: Contraction, row: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Make the function from a block's indices to the block's share of every dL/dSource."""
    batch = int(work.output.shape[0]) if work.per_sample else 1
    gradient = tf.reshape(work.output_gradient, (batch, work.rows))

    def block(indices: Any) -> list[Any]:
        parts = []
        length = int(indices.shape[0])
        chosen = tf.gather(gradient, indices, axis=1)
        for rows, source in zip(stacked_rows(row, indices, work.sources), work.sources, strict=True):
            seeds = tf.cast(chosen, rows.dtype)
            product = tf.einsum("br,rbc->bc", seeds, tf.reshape(rows, (length, batch, -1)))
            parts.append(tf.reshape(product, source.shape))
        return parts

    return block


def connected(work: Contraction) -> list[bool]:
    """Tell which sources the output depends on at all, at the price of one backward pass."""
    if not work.sources:
        return []
    found = work.tape.gradient(work.output, work.sources, output_gradients=work.output_gradient)
    return [gradient is not None for gradient in found]

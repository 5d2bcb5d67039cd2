"""Contract dL/dOut with a Jacobian one row at a time, in one loop inside a traced function.

    dL/dW = sum over rows r of  dL/dOut[r] * (dOut/dW)[r, :]

`stages.jacobian.rows` stacks blocks of rows in the dtype of the model. A witness adds the same rows up in float64, and
no more than one exists at a time.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from stages.jacobian.rows import Contraction, row_function, rows_that_fit

_SUM = tf.float64


def contract_by_rows(work: Contraction, limit: int | None) -> list[Any]:
    """Evaluate and contract a Jacobian.

    Args:
        work: What to contract; not per sample.
        limit: Bytes that a row may take, with every tensor that it makes on the way; None for no limit.

    Returns:
        dL/dSource for every source, in its dtype.

    Raises:
        MemoryLimitExceeded: A row does not fit; nothing was evaluated.
    """
    row = row_function(work.tape, work.output, work.sources)
    if limit is not None and work.rows:
        rows_that_fit(work, row, limit)
    gradient = tf.cast(tf.reshape(work.output_gradient, (-1,)), _SUM)

    def total() -> list[Any]:
        def add(index: Any, sums: list[Any]) -> tuple[Any, list[Any]]:
            return index + 1, [s + gradient[index] * tf.cast(r, _SUM) for s, r in zip(sums, row(index), strict=True)]

        start = [tf.zeros(source.shape, _SUM) for source in work.sources]
        shapes = (tf.TensorShape([]), [source.shape for source in work.sources])
        _, sums = tf.while_loop(lambda index, _: index < work.rows, add, (0, start), shapes, parallel_iterations=1)
        return [tf.cast(s, source.dtype) for s, source in zip(sums, work.sources, strict=True)]

    found: list[Any] = tf.function(total, autograph=False).get_concrete_function()()
    return found


__all__ = ["contract_by_rows"]

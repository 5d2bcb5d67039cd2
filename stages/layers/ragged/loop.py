"""Ragged inner steps inside a compiled function: one loop of TensorFlow's over all steps of all elements.

Written out, every step would be traced and compiled by itself: seconds for dozens of steps. Here the cell is traced
once, and the loop goes on to the next element as soon as no sample of the batch has steps left.

    element   0 0 0   1 1 1 1   2 2        the loop's turn; `step` counts within the element
    step      0 1 2   0 1 2 3   0 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

__all__ = ["choose", "run_loop"]


def choose(active: Any, then: Any, otherwise: Any) -> Any:
    """Choose by sample; `active` is (batch,), the others (batch, ...)."""
    condition = tf.reshape(active, [-1] + [1] * (then.shape.rank - 1))
    return tf.where(condition, then, otherwise)


def run_loop(
    step: Callable[[Any, Any], tuple[Any, Any, Any]],
    goes_on: Callable[[Any, Any, Any], Any],
    series: Any,
    initial: Any,
    starts: Any,
    longest: int,
    carry_state: bool,
    dtype: Any,
) -> tuple[Any, Any]:
    """Run the steps of all elements; in a graph only.

    Args:
        step: From an element (batch, features) and the state to the output (batch, units), the state after it, and
            what `goes_on` looks at.
        goes_on: From the element's index and the number of its steps so far, both scalars, and the third result of
            `step`, to (batch,) bool: who makes another step.
        series: (batch, elements, features).
        initial: The state, nested tensors (batch, ...).
        starts: (batch, elements) bool: who makes a first step.
        longest: At most so many steps.
        carry_state: Whether the state runs on from one element to the next.
        dtype: Of the outputs.

    Returns:
        The outputs (elements * longest, batch, units), zero where there is no step, and the number of steps
        (batch, elements) int32.
    """
    count = series.shape[1]
    elements = tf.TensorArray(series.dtype, size=count, clear_after_read=False)
    elements = elements.unstack(tf.transpose(series, [1, 0, 2]))
    begins = tf.transpose(starts)

    def body(i: Any, made: Any, active: Any, state: Any, counts: Any, outputs: Any) -> tuple[Any, ...]:
        output, after, watched = step(elements.read(i), state)
        outputs = outputs.write(i * longest + made, choose(active, output, tf.zeros_like(output)))
        state = keras.tree.map_structure(lambda new, old: choose(active, new, old), after, state)
        counts += tf.cast(active, tf.int32)[:, None] * tf.one_hot(i, count, dtype=tf.int32)
        made += 1
        active = active & goes_on(i, made, watched)
        done = (made == longest) | ~tf.reduce_any(active)
        following = tf.minimum(i + 1, count - 1)
        if not carry_state:
            state = keras.tree.map_structure(lambda now, first: tf.where(done, first, now), state, initial)
        active = tf.where(done, begins[following], active)
        return tf.where(done, i + 1, i), tf.where(done, 0, made), active, state, counts, outputs

    def free(tensor: Any) -> Any:
        return tf.TensorShape([None, *tensor.shape[1:]])

    variables = (
        tf.constant(0),
        tf.constant(0),
        begins[0],
        initial,
        tf.zeros((tf.shape(series)[0], count), tf.int32),
        tf.TensorArray(dtype, size=count * longest),
    )
    shapes = (
        *(tf.TensorShape([]),) * 2,
        tf.TensorShape([None]),
        keras.tree.map_structure(free, initial),
        tf.TensorShape([None, count]),
        tf.TensorShape(None),
    )
    *_, counts, outputs = tf.while_loop(lambda i, *_: i < count, body, variables, shapes)
    return outputs.stack(), counts

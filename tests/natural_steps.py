"""Ragged inner steps as anyone would write them: two loops of Python, from TensorFlow alone.

Written without the packages, so that both can be wrong only independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def zeros(cell: Any, batch: int) -> list[Any]:
    """A cell's first state."""
    return list(cell.get_initial_state(batch_size=batch))


def loop(cell: Any, series: Any, steps: Sequence[int], carry: bool, training: bool = True) -> list[list[Any]]:
    """Run `cell` steps[i] times on series[:, i]; the outputs (batch, units) of every element."""
    state, found = zeros(cell, series.shape[0]), []
    for i, count in enumerate(steps):
        element, row = series[:, i], []
        if not carry:
            state = zeros(cell, series.shape[0])
        for _ in range(count):
            output, state = cell(element, state, training=training)
            row.append(output)
        found.append(row)
    return found


def pad(rows: Sequence[Sequence[Any]], longest: int) -> Any:
    """(elements, longest, batch, units), zero where there is no output."""
    some = next(row[0] for row in rows if row)
    return tf.stack([tf.stack([*row, *[tf.zeros_like(some)] * (longest - len(row))]) for row in rows])


def one_by_one(
    cell: Any, series: Any, stops: Callable[[int, int, int, Any], bool], most: int
) -> tuple[list[list[list[Any]]], np.ndarray]:
    """Each sample by itself: its outputs (units,), and the lengths (batch, elements).

    Args:
        cell: Has one state tensor.
        series: (batch, elements, features).
        stops: Of sample, element, steps made so far and the state (units,): whether to end there; asked first at 0.
        most: At most so many steps.
    """
    batch, elements = series.shape[:2]
    outputs, lengths = [], np.zeros((batch, elements), np.int32)
    for b in range(batch):
        state, rows = zeros(cell, 1), []
        for i in range(elements):
            row: list[Any] = []
            while len(row) < most and not stops(b, i, len(row), state[0][0]):
                output, state = cell(series[b : b + 1, i], state)
                row.append(output[0])
            rows.append(row)
            lengths[b, i] = len(row)
        outputs.append(rows)
    return outputs, lengths


def masked_mean_square(targets: Any, outputs: Sequence[Sequence[Sequence[Any]]], lengths: np.ndarray) -> Any:
    """What Keras's masked mean squared error is, from outputs one by one."""
    terms = [
        tf.reduce_mean(tf.square(targets[b, i, j] - outputs[b][i][j]))
        for (b, i), count in np.ndenumerate(lengths)
        for j in range(count)
    ]
    return tf.add_n(terms) / float(lengths.sum())


CELLS = {
    "simple": lambda: keras.layers.SimpleRNNCell(4),
    "gru": lambda: keras.layers.GRUCell(4),
    "lstm": lambda: keras.layers.LSTMCell(4),
    "stacked": lambda: keras.layers.StackedRNNCells([keras.layers.GRUCell(3), keras.layers.LSTMCell(4)]),
}

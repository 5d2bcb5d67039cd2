"""One `tf.GradientTape` over a whole model as Keras made it: several inputs, outputs and losses, nothing cut or copied.

Written from TensorFlow and Keras alone, as `tests.one_tape` is, and with no knowledge of where a pipeline is cut. So a
sum of three or more gradients may have another order here than in the cut model, and the last bit may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.one_tape import Gradients, plus


def natural_tape(
    model: Any,
    x: Any,
    y: Sequence[Any],
    losses: Sequence[Any],
    microbatches: int,
    *,
    factors: Sequence[float] | None = None,
    sample_weights: Sequence[Any] | None = None,
    restore: bool = True,
    dense: bool = True,
) -> tuple[float, Gradients]:
    """The loss of one batch and its gradients, microbatch after microbatch.

    Args:
        model: A Keras model.
        x: Its inputs in any nesting, (n, ...) each.
        y: Targets, one for each output in flat order.
        losses: Keras losses whose values are means over samples, one for each output.
        microbatches: Into how many parts the batch is cut; at most n.
        factors: Loss weights.
        sample_weights: One for each output, (n, ...).
        restore: Whether statistics and seeds are put back.
        dense: Whether embeddings' gradients become arrays; else they stay rows, as an optimizer gets them.

    Returns:
        The loss with regularisers, and dL/dvariables in the order of the model's trainable variables.
    """
    samples = len(y[0])
    states = model.variables  # all: SpectralNormalization changes weights too
    before = [variable.numpy() for variable in states]
    loss, sums = 0.0, [None] * len(model.trainable_variables)
    for rows in np.array_split(np.arange(samples), min(microbatches, samples)):
        share = np.float32(len(rows) / samples)
        given = keras.tree.map_structure(lambda array, rows=rows: tf.constant(array[rows]), x)
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(model(given, training=True))
            own = [tf.reduce_sum(term) for term in model.losses]
            values = [
                judge(y[i][rows], outputs[i], None if sample_weights is None else sample_weights[i][rows])
                * (share * np.float32(1 if factors is None else factors[i]))
                for i, judge in enumerate(losses)
            ]
        seeds = [tf.ones_like(value) for value in values] + [tf.fill((), share) for _ in own]
        found = tape.gradient([*values, *own], model.trainable_variables, output_gradients=seeds)
        sums = [plus(a, b) for a, b in zip(sums, found, strict=True)]
        loss += float(sum(value.numpy() for value in values) + sum(share * term.numpy() for term in own))
    for variable, value in zip(states, before, strict=True) if restore else ():
        variable.assign(value)
    return loss, [total if total is None or not dense else tf.convert_to_tensor(total).numpy() for total in sums]

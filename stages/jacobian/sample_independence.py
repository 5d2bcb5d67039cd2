"""The test, on a recorded tape, of whether each output sample depends on its own input sample alone.

Why: `GradientTape.batch_jacobian` sums d Out[b] / d In over all b and reads the result as if every sample had answered
for itself alone. With BatchNormalization in training mode (or anything else that looks across the batch) it is
silently wrong: no error, plausible numbers.

The test sends random gradients into some samples S of the output only. If no sample outside S receives a gradient, no
sample of S depends on one outside S. With S = "bit k of the index is 0" and its complement, for every bit k, each pair
of different samples is separated at least once in each direction: 2 * ceil(log2(batch)) backward passes for all.

    batch of 4      S = {0, 1}  {2, 3}  {0, 2}  {1, 3}

Rules:
1. Seeds are random, not ones: outputs whose sum is constant (a softmax, a normalisation) answer ones with zero.
2. "No gradient" means exactly zero. A dependence too small to matter costs memory, never correctness; NaN counts as a
   dependence.
3. What is tested are the entries that `batch_jacobian` would drop or add up wrongly, at this point, so "independent" is
   enough for it to be right here, whatever the function does elsewhere. (A dependence is missed only if random numbers
   cancel exactly.)
4. No forward pass runs again and TensorFlow's random state is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.jacobian.memory import common_batch


def samples_are_independent(tape: Any, outputs: Sequence[Any], inputs: Sequence[Any]) -> bool:
    """Tell whether each sample of `outputs` depends on the same sample of `inputs` alone.

    Args:
        tape: the persistent tape that recorded `outputs` from `inputs`, which it watched.
        outputs, inputs: floating tensors; axis 0 is the sample where they all share its length.

    Returns:
        False also where axis 0 differs, so that there are no common samples.
    """
    batch = common_batch([*outputs, *inputs])
    if batch is None:
        return False
    draw = np.random.default_rng(0)
    index = np.arange(batch)
    for bit in range(max(batch - 1, 0).bit_length()):
        for side in (0, 1):
            inside = (index >> bit) & 1 == side
            seeds = [_seed(draw, output, inside) for output in outputs]
            received = tape.gradient(list(outputs), list(inputs), output_gradients=seeds)
            outside = np.flatnonzero(~inside)
            if any(_any_nonzero(gradient, outside) for gradient in received if gradient is not None):
                return False
    return True


def _seed(draw: np.random.Generator, output: Any, inside: np.ndarray[Any, Any]) -> Any:
    values = draw.standard_normal(tuple(output.shape)) * inside.reshape((-1,) + (1,) * (output.shape.rank - 1))
    return tf.cast(values, output.dtype)


def _any_nonzero(gradient: Any, samples: np.ndarray[Any, Any]) -> bool:
    # `!=` is true of NaN, which is what rule 2 asks for.
    return bool(tf.reduce_any(tf.gather(tf.convert_to_tensor(gradient), samples) != 0))

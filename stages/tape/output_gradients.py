"""Output gradients as a user or a neighbour gives them: flat, and like the outputs.

`tape.gradient` itself does not check the shape of `output_gradients`: a wrong one gives wrong numbers, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from stages.errors import HandoffError
from stages.tape.tensors import describe_tensor, is_differentiable
from stages.tensorflow_internals import sizes_of


def flat_gradients(given: Any, outputs: Sequence[Any], where: str) -> list[Any | None]:
    """One tensor or None per output.

    Args:
        given: In the nesting of the outputs; one tensor for one output; None for an output without a gradient.
        outputs: The stage's outputs, flat.
        where: Stage and microbatch, for messages.

    Raises:
        HandoffError: Their number is not that of the outputs.
    """
    if given is None:
        return [None] * len(outputs)
    leaves = [given] if len(outputs) == 1 and not isinstance(given, list | tuple | dict) else _leaves(given)
    if len(leaves) != len(outputs):
        raise HandoffError(
            f"{where}: expected {len(outputs)} output gradient(s), one for each output, received {len(leaves)}"
        )
    return [None if leaf is None else tf.convert_to_tensor(leaf) for leaf in leaves]


def check_gradients(given: Sequence[Any | None], outputs: Sequence[Any], where: str) -> None:
    """Compare gradients with the outputs that they are of.

    Raises:
        HandoffError: A shape or dtype differs.
    """
    for i, (gradient, output) in enumerate(zip(given, outputs)):  # noqa: B905 - with the loss on the tape: none
        if gradient is None or not is_differentiable(output.dtype):
            continue
        if sizes_of(gradient) != sizes_of(output) or gradient.dtype != output.dtype:
            raise HandoffError(
                f"{where}: the gradient of output {i} must be like the output, {describe_tensor(output)}, received "
                f"{describe_tensor(gradient)}"
            )


def _leaves(structure: Any) -> list[Any]:
    """Flatten a nesting whose leaves may be None."""
    if isinstance(structure, dict):
        return [leaf for key in sorted(structure) for leaf in _leaves(structure[key])]
    if isinstance(structure, list | tuple):
        return [leaf for item in structure for leaf in _leaves(item)]
    return [structure]

"""Output gradients as a user or a neighbour gives them: flat, and like the outputs.

`tape.gradient` itself does not check the shape of `output_gradients`: a wrong one gives wrong numbers, not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.tape.tensors import describe_tensor, is_differentiable
from stages.tensorflow_internals import sizes_of
from stages.versions import received


def flat_gradients(given: Any, outputs: Sequence[Any], where: str, structure: Any = None) -> list[Any | None]:
    """One tensor or None per output.

    Args:
        given: In the nesting of the outputs; one tensor for one output; None for an output without a gradient.
        outputs: The stage's outputs, flat.
        where: Stage and microbatch, for messages.
        structure: The nesting of the outputs, with anything at its leaves; None: not known.

    Raises:
        HandoffError: They are not nested as the outputs are, or are no tensors.
    """
    if given is None:
        return [None] * len(outputs)
    if len(outputs) == 1 and not isinstance(structure, Mapping):
        leaves = _leaves(given)
        if isinstance(given, list | tuple) and all(isinstance(leaf, int | float) for leaf in leaves):
            leaves = [given]  # rows of numbers
    elif structure is not None and not _alike(given, structure):
        raise HandoffError(
            f"{where}: output gradients must be nested like the outputs, {_pattern(structure)}, received "
            f"{_pattern(given)}; None stands for an output without a gradient"
        )
    else:
        leaves = _leaves(given) if structure is None else _placed(given, structure, len(outputs))
    if len(leaves) != len(outputs):
        raise HandoffError(
            f"{where}: expected {len(outputs)} output gradient(s), one for each output, received {len(leaves)}"
        )
    return [None if leaf is None else _tensor(leaf, where) for leaf in leaves]


def _tensor(leaf: Any, where: str) -> Any:
    try:
        return tf.convert_to_tensor(leaf)
    except (ValueError, TypeError) as error:
        raise HandoffError(f"{where}: an output gradient must be a tensor or an array, {received(leaf)}") from error


def _alike(given: Any, structure: Any) -> bool:
    """Whether gradients are nested as outputs are; None stands for any part of them."""
    if given is None:
        return True
    if isinstance(structure, Mapping):
        return (
            isinstance(given, Mapping)
            and set(given) == set(structure)
            and all(_alike(given[key], structure[key]) for key in structure)
        )
    if isinstance(structure, list | tuple):
        return isinstance(given, list | tuple) and len(given) == len(structure) and all(map(_alike, given, structure))
    return not isinstance(given, Mapping | list | tuple)


def _placed(given: Any, structure: Any, count: int) -> list[Any]:
    """The leaves of gradients that are nested as a structure, in Keras's order; None where a part is left out."""
    leaves: list[Any] = [None] * count

    def place(some: Any, numbered: Any) -> None:
        if some is None:
            return
        if isinstance(numbered, int):
            leaves[numbered] = some
        else:
            for key in numbered if isinstance(numbered, Mapping) else range(len(numbered)):
                place(some[key], numbered[key])

    place(given, keras.tree.pack_sequence_as(structure, list(range(count))))
    return leaves


def _pattern(structure: Any) -> str:
    """A nesting in words: ``{'a': ., 'b': [., .]}``."""
    if isinstance(structure, Mapping):
        return "{" + ", ".join(f"{key!r}: {_pattern(value)}" for key, value in structure.items()) + "}"
    if isinstance(structure, list | tuple):
        return "[" + ", ".join(map(_pattern, structure)) + "]"
    return "None" if structure is None else "."


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

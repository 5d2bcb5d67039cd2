"""The tensors that a user gives to a stage, one by one: made dense, of the model's dtype, in the model's order."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.versions import received


def dense_tensor(given: Any, dtype: Any, where: str) -> Any:
    """One input as an eager tensor.

    Args:
        given: Array, tensor, variable or number.
        dtype: What the model takes, a name; None: as it is.
        where: Stage and microbatch, for messages.

    Raises:
        HandoffError: It is ragged, sparse, symbolic, text, or nothing that TensorFlow can make a tensor of.
    """
    if isinstance(given, tf.RaggedTensor):
        raise HandoffError(
            f"{where}: a ragged tensor cannot cross between stages; give x.to_tensor(), and a mask (Masking, mask_zero)"
        )
    if isinstance(given, tf.SparseTensor):
        raise HandoffError(f"{where}: a sparse tensor cannot cross between stages; give tf.sparse.to_dense(x)")
    if isinstance(given, keras.KerasTensor):
        raise HandoffError(f"{where}: received a symbolic tensor, which has no values; give an array or a tensor")
    try:
        tensor = tf.convert_to_tensor(given)
    except (ValueError, TypeError) as error:
        raise HandoffError(f"{where}: an input must be a tensor or an array of numbers, {received(given)}") from error
    if tensor.dtype == tf.string:
        raise HandoffError(f"{where}: text cannot cross between stages; look words up before, in tf.data")
    return tensor if dtype is None or tensor.dtype == dtype else tf.cast(tensor, dtype)


def named_inputs(inputs: Any, structure: Any, where: str) -> Any:
    """Inputs in the nesting of a Functional model's.

    Args:
        inputs: As the user nests them. A dict goes by key to the inputs of that name.
        structure: The model's nesting, with a symbolic tensor at each leaf; None: a bare tensor's.
        where: Stage and microbatch, for messages.

    Raises:
        HandoffError: Keys are missing or too many, or a list is given where the model takes a dict.
    """
    leaves = [structure] if isinstance(structure, keras.KerasTensor) else structure
    wanted = structure if isinstance(structure, dict) else None
    flat = isinstance(leaves, list | tuple) and all(isinstance(leaf, keras.KerasTensor) for leaf in leaves)
    if isinstance(inputs, dict) and flat:
        wanted = {leaf.name: leaf for leaf in leaves}
    if wanted is None or (len(wanted) == 1 and not isinstance(inputs, dict)):
        return inputs
    if not isinstance(inputs, dict) or set(inputs) != set(wanted):
        names = ", ".join(map(repr, wanted))
        got = (
            ", ".join(map(repr, inputs))
            if isinstance(inputs, dict)
            else f"{type(inputs).__name__}, whose order says nothing"
        )
        raise HandoffError(f"{where}: the inputs must be a dict with the keys {names}, received {got}")
    return inputs if isinstance(structure, dict) else [inputs[name] for name in wanted]


__all__ = ["dense_tensor", "named_inputs"]

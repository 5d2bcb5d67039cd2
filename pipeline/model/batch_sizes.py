"""The models that take batches of one size only, of those whose `keras.Input` has a `batch_size`.

Keras lets other sizes through such an input, and most layers do not care. Two kinds do: layers that keep a state per
sample (`stateful=True`), and operations in which the number of samples is written down.
"""

from __future__ import annotations

from typing import Any

import keras

from stages.keras_internals import layers_of
from stages.tape.model_call import packer


def only_size(model: Any) -> tuple[Any, int] | None:
    """The input of a model that takes batches of one size only, and that size; None: it takes any.

    Args:
        model: A built Keras model; None for one that its worker builds.
    """
    fixed = [] if model is None else [symbol for symbol in model.inputs or () if symbol.shape[:1] not in ((), (None,))]
    if not fixed or _takes_any(model):
        return None
    return fixed[0], int(fixed[0].shape[0])


def _takes_any(model: Any) -> bool:
    """Whether outputs have as many samples as inputs, however many these are; calls no layer."""
    if any(getattr(layer, "stateful", False) for layer in layers_of(model)):
        return False
    free = [keras.KerasTensor((None, *symbol.shape[1:]), symbol.dtype) for symbol in model.inputs]
    try:
        outputs = keras.tree.flatten(model.compute_output_spec(packer(model)(free)))
    except Exception:  # whatever layers say of a size that they do not know
        return False
    return all(output.shape[:1] == (None,) for output in outputs)


__all__ = ["only_size"]

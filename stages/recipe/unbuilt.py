"""Layers that Keras builds only when they are first called, inside a model that counts as built.

A layer in another layer's argument (``Dense(activation=PReLU())``) is such a one: shapes go past it when the model is
put together, so its variables come with the first batch. A stage must know them before that. A layer that no call
reaches (one that is made and used under a condition only) never has any, as in Keras.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from stages.errors import SegmentError
from stages.keras_internals import graph_model, input_structure, layers_of


def build_rest(model: Any) -> None:
    """Let a built model make the variables that its first calls would make, by calling it on one sample of zeros.

    In inference and, if a layer still waits, in training. All values are afterwards as they were.

    Raises:
        SegmentError: That cannot be done; names the layer.
    """
    structure = input_structure(graph_model(model) or model)
    for training in (False, True):
        waiting = _waiting(model)
        if not waiting:
            return
        before = [(variable, variable.numpy()) for variable in model.variables]
        try:
            zeros = keras.tree.map_structure(_zeros, model.inputs if structure is None else structure)
            model(zeros, training=training)
        except Exception as error:
            raise SegmentError(
                f"the layer {waiting[0].name!r} ({type(waiting[0]).__name__}) in the model {model.name!r} is not built "
                f"yet, so its variables are not known ({type(error).__name__} on zeros); call the model once on a "
                "batch before it is cut"
            ) from error
        finally:
            for variable, value in before:
                variable.assign(value)


def _waiting(model: Any) -> list[Any]:
    return [layer for layer in layers_of(model) if not layer.built and not isinstance(layer, keras.Model)]


def _zeros(symbol: Any) -> Any:
    shape = [1 if size is None else size for size in symbol.shape]
    if symbol.dtype == "string":
        return tf.fill(shape, "")
    return tf.zeros(shape, symbol.dtype)


__all__ = ["build_rest"]

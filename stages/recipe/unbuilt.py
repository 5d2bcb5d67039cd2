"""Layers that Keras builds only when they are first called, inside a model that counts as built.

A layer in another layer's argument (``Dense(activation=PReLU())``) is such a one: shapes go past it when the model is
put together, so its variables come with the first batch. A stage must know them before that.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from stages.errors import SegmentError
from stages.keras_internals import graph_model, input_structure, layers_of


def build_rest(model: Any) -> None:
    """Let a built model make the variables that its first call would make, by calling it on one sample of zeros.

    Raises:
        SegmentError: That cannot be done; names the layer.
    """
    waiting = _waiting(model)
    if not waiting:
        return
    structure = input_structure(graph_model(model) or model)
    try:
        model(keras.tree.map_structure(_zeros, model.inputs if structure is None else structure), training=False)
    except Exception as error:
        raise SegmentError(_said(model, waiting[0], f" ({type(error).__name__} on zeros)")) from error
    if _waiting(model):
        raise SegmentError(_said(model, _waiting(model)[0], ""))


def _said(model: Any, layer: Any, why: str) -> str:
    return (
        f"the layer {layer.name!r} ({type(layer).__name__}) in the model {model.name!r} is not built yet, so its "
        f"variables are not known{why}; call the model once on a batch before it is cut"
    )


def _waiting(model: Any) -> list[Any]:
    return [layer for layer in layers_of(model) if not layer.built and not isinstance(layer, keras.Model)]


def _zeros(symbol: Any) -> Any:
    shape = [1 if size is None else size for size in symbol.shape]
    if symbol.dtype == "string":
        return tf.fill(shape, "")
    return tf.zeros(shape, symbol.dtype)


__all__ = ["build_rest"]

"""One ordinary Keras model from the segments of a pipeline, with given values.

A pipeline that was split from a model gives back that model's architecture. One that was put together from segments
gives their composition, each segment a model inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from pipeline.wiring import Wires
from stages.recipes import create, describe
from stages.segment import Segment

Values = Mapping[int, Sequence[np.ndarray[Any, Any]]]
"""For each stage the values of its model's variables, in order."""


def merge(segments: Sequence[Segment], wires: Wires, original: Any | None, values: Values) -> Any:
    """The joined model with these values; the segments' own models stay as they are."""
    if original is not None:
        return _like_original(segments, original, values)
    return _composed(segments, wires, values)


def _like_original(segments: Sequence[Segment], original: Any, values: Values) -> Any:
    by_variable: dict[int, np.ndarray[Any, Any]] = {}
    for i, segment in enumerate(segments):
        for variable, value in zip(segment.model.variables, values[i], strict=True):
            by_variable[id(variable)] = value
    model = create(describe(original, f"the model {original.name!r}"))
    for theirs, ours in zip(original.variables, model.variables, strict=True):
        ours.assign(by_variable.get(id(theirs), np.array(theirs.value)))
    return model


def _composed(segments: Sequence[Segment], wires: Wires, values: Values) -> Any:
    tensors: dict[str, Any] = {}
    for i, segment in enumerate(segments):
        model = copy_model(segment)
        for variable, value in zip(model.variables, values[i], strict=True):
            variable.assign(value)
        model.name = wires.names[i]
        for (name, _), symbol in zip(wires.takes[i], model.inputs, strict=True):
            if name not in tensors:
                tensors[name] = keras.Input(batch_shape=tuple(symbol.shape), dtype=symbol.dtype, name=name)
        taken = [tensors[name] for name, _ in wires.takes[i]]
        given = keras.tree.flatten(model(taken[0] if len(taken) == 1 else taken))
        tensors |= {name: tensor for (name, _), tensor in zip(wires.gives[i], given, strict=True)}
    inputs = [tensors[name] for name in wires.inputs]
    outputs = [tensors[name] for name, _ in wires.outputs]
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, outputs[0] if len(outputs) == 1 else outputs)


def copy_model(segment: Segment) -> Any:
    """A new model from a segment's recipe."""
    return segment.create() if segment.model is None else create(segment.recipe()["model"])

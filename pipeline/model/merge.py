"""One ordinary Keras model from the segments of a pipeline, with given values.

A pipeline that was split from a model gives back that model's architecture. One that was put together from segments
gives their composition, each segment a model inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from pipeline.model.shared_variables import groups, share
from pipeline.model.wiring import Wires
from stages.recipe.by_value import copied
from stages.recipe.segment import Segment
from stages.tape.model_call import packer
from stages.worker import snapshot

StageValues = Mapping[int, Sequence[np.ndarray[Any, Any]]]
"""For each stage the values of its model's variables, in order."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A joined model, and which of its variables belong to which stage.

    Attributes:
        model: The Keras model; the segments' own models share nothing with it.
        variables: For each stage the joined model's variables, in the order of the stage's own.
        trainable: The same, trainable ones only.
    """

    model: Any
    variables: tuple[tuple[Any, ...], ...]
    trainable: tuple[tuple[Any, ...], ...]

    def assign(self, values: StageValues) -> None:
        """Give the model a pipeline's values."""
        for i, variables in enumerate(self.variables):
            for variable, value in zip(variables, values[i], strict=True):
                variable.assign(value)

    def values(self) -> dict[int, list[np.ndarray[Any, Any]]]:
        """The model's values as a pipeline takes them."""
        return {i: snapshot.read(part) for i, part in enumerate(self.variables)}


def merge(segments: Sequence[Segment], wires: Wires, original: Any | None, values: StageValues) -> Merged:
    """The joined model with these values; the segments' own models stay as they are."""
    merged = _composed(segments, wires) if original is None else _like_original(segments, original)
    merged.assign(values)
    return merged


def _like_original(segments: Sequence[Segment], original: Any) -> Merged:
    model = copied(original, f"the model {original.name!r}")
    twin: dict[int, Any] = {}
    for theirs, ours in zip(original.variables, model.variables, strict=True):
        twin[id(theirs)] = ours
    models = [segment.model for segment in segments]
    return Merged(
        model,
        tuple(tuple(twin[id(variable)] for variable in part.variables) for part in models),
        tuple(tuple(twin[id(variable)] for variable in part.trainable_variables) for part in models),
    )


def _composed(segments: Sequence[Segment], wires: Wires) -> Merged:
    tensors: dict[str, Any] = {}
    parts = [copy_model(segment) for segment in segments]
    share(parts, groups(segments))
    for i, part in enumerate(parts):
        part.name = wires.names[i]
        for (name, _), symbol in zip(wires.takes[i], part.inputs, strict=True):
            if name not in tensors:
                tensors[name] = keras.Input(batch_shape=tuple(symbol.shape), dtype=symbol.dtype, name=name)
        taken = [tensors[name] for name, _ in wires.takes[i]]
        given = keras.tree.flatten(part(packer(part)(taken)))
        tensors |= {name: tensor for (name, _), tensor in zip(wires.gives[i], given, strict=True)}
    inputs = [tensors[name] for name in wires.inputs]
    outputs = [tensors[name] for name, _ in wires.outputs]
    model = keras.Model(inputs[0] if len(inputs) == 1 else inputs, outputs[0] if len(outputs) == 1 else outputs)
    return Merged(model, tuple(tuple(p.variables) for p in parts), tuple(tuple(p.trainable_variables) for p in parts))


def copy_model(segment: Segment) -> Any:
    """A new model like a segment's."""
    return segment.create() if segment.model is None else copied(segment.model, f"the model {segment.model.name!r}")

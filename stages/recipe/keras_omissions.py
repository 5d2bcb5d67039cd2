"""Settings that Keras's own configuration of an object leaves out, carried along so that a copy is the same object.

Keras 3.15 forgets, among others, the `delta` of Huber, the `axis` of CosineSimilarity, what
`Optimizer.exclude_from_weight_decay` was told, and that single variables of a layer are frozen. A worker that is built
from the configuration alone would train with the defaults, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.keras_internals import has_layers, layers_of, own_trainable_variables
from stages.keras_training_internals import (
    function_arguments,
    loss_dtype,
    names_excluded_from_decay,
    set_function_arguments,
    set_loss_dtype,
)

Forgotten = dict[str, Any]


def forgotten(thing: Any, config: Any) -> Forgotten:
    """What is missing in the configuration of a model, loss, metric or optimizer.

    Variable *objects* that weight decay leaves out are not in it: they exist in one process only, and whoever carries
    an optimizer into another must say which variables they are there (`StageSpec.undecayed`).

    Args:
        thing: The object.
        config: What `keras.saving.serialize_keras_object` made of it.

    Returns:
        Plain data for `restore_omitted`; empty for most objects.
    """
    found: Forgotten = {}
    if arguments := _arguments(thing, config):
        found["arguments"] = arguments
    if (dtype := _loss_dtype(thing)) is not None:
        found["dtype"] = dtype
    if (names := names_excluded_from_decay(thing)) is not None:
        found["without_decay"] = names
    if has_layers(thing) and (frozen := _frozen(thing)):
        found["frozen"] = frozen
    return found


def restore_omitted(thing: Any, found: Mapping[str, Any]) -> None:
    """Give an object that was made from its configuration what the configuration left out."""
    if "arguments" in found:
        set_function_arguments(thing, found["arguments"])
    if "dtype" in found:
        set_loss_dtype(thing, found["dtype"])
    if "without_decay" in found:
        thing.exclude_from_weight_decay(var_names=[found["without_decay"]])
    for place in found.get("frozen", ()):
        thing.variables[place].trainable = False


def _loss_dtype(thing: Any) -> str | None:
    """What a loss computes in: no Keras loss says it in its configuration, and a worker's default may be another."""
    import keras

    return loss_dtype(thing) if isinstance(thing, keras.losses.Loss) else None


def _frozen(model: Any) -> list[int]:
    """Which variables of a model are frozen by themselves (``layer.bias.trainable = False``), not with their layer."""
    alone = {
        id(variable)
        for layer in layers_of(model)
        for variable in (own_trainable_variables(layer) if layer.trainable else ())
        if not variable.trainable
    }
    return [place for place, variable in enumerate(model.variables) if id(variable) in alone]


def _arguments(thing: Any, config: Any) -> dict[str, Any]:
    """Arguments of the function inside a loss or metric that differ in a copy made from the configuration."""
    import keras

    ours = {name: value for name, value in function_arguments(thing).items() if _is_plain(value)}
    if not ours:
        return {}
    copy = function_arguments(keras.saving.deserialize_keras_object(config))
    return {name: value for name, value in ours.items() if name not in copy or copy[name] != value}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)

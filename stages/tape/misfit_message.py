"""The place in a model where an operation failed: its layer, the tensors it was given, the layers that made them.

TensorFlow names an operation and its shapes, not the layer; inside a compiled function not even that. So the model is
run once more, one layer after the other, up to the one that fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.keras_internals import graph_model, maker_of, node_arguments, nodes_in_order, takes_training
from stages.tape.model_call import CallState
from stages.tape.tensors import describe_tensor, flatten

MISFITS = (tf.errors.InvalidArgumentError, ValueError)
"""What an operation raises that is given tensors it cannot take."""


def named_misfit(error: Exception, where: str, model: Any, inputs: Sequence[Any], training: bool) -> Exception:
    """The error that tells an operation which failed (`MISFITS`) with its layer and what it was given.

    Args:
        error: What was raised while the model ran.
        where: Stage and microbatch, for the message.
        model: As in `misfit`, like the others.
        inputs: As in `misfit`.
        training: As in `misfit`.

    Returns:
        A HandoffError with the other as its cause; the other itself where no layer's operation fails.
    """
    found = misfit(model, inputs, training)
    if found is None:
        return error
    plain = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())  # one line, without a terminal's colours
    named = HandoffError(f"{where}: {found}; change the model, or the data's shape. The error was: {plain}")
    named.__cause__ = error
    return named


def misfit(model: Any, inputs: Sequence[Any], training: bool) -> str | None:
    """What does not fit, in words; None if the model is no graph of layers, or nothing fails.

    Args:
        model: A Keras model.
        inputs: Flat eager tensors in the order of the model's inputs, without masks.
        training: Keras's flag.

    What a call changes by itself (statistics, random generators) is as before afterwards.
    """
    functional = graph_model(model)
    if functional is None:
        return None
    states = CallState(functional)
    before = states.read()
    try:
        return _replayed(functional, inputs, training)
    finally:
        states.write(before)


def _replayed(model: Any, inputs: Sequence[Any], training: bool) -> str | None:
    tensors = {id(symbol): value for symbol, value in zip(model.inputs, inputs, strict=True)}
    for node in nodes_in_order(model):
        if node.is_input or any(id(symbol) not in tensors for symbol in node.input_tensors):
            continue
        given = [tensors[id(symbol)] for symbol in node.input_tensors]
        args, kwargs = node_arguments(node, tensors)
        if "training" in kwargs or takes_training(node.operation):
            kwargs.setdefault("training", training)
        try:
            results = node.operation(*args, **kwargs)
        except Exception:
            inner = misfit(node.operation, given, training) if isinstance(node.operation, keras.Model) else None
            return inner or _described(node, given)
        tensors |= {id(symbol): value for symbol, value in zip(node.outputs, flatten(results), strict=True)}
    return None


def _described(node: Any, given: Sequence[Any]) -> str:
    taken = [
        f"{describe_tensor(value)} from {maker_of(symbol).name!r}"
        for symbol, value in zip(node.input_tensors, given, strict=True)
    ]
    kind, together = type(node.operation).__name__, " together" if len(taken) > 1 else ""
    return f"the layer {node.operation.name!r} ({kind}) cannot take {' and '.join(taken)}{together}"

"""The argument of `explain` (a function, a Keras model or a stage) as a function that gives named targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.explanation.flow.user_tapes import leaf_names, unique
from stages.loss.heads import Objective
from stages.stage import Stage
from stages.tape.tensors import flatten

Run = Callable[[], Mapping[str, Any]]


def run_of(what: Any, inputs: Any, y: Any, loss: Any, training: bool) -> Run:
    """A function that computes the targets; the arguments are those of `explain`.

    Raises:
        HandoffError: `y` and `loss` do not fit each other.
    """
    if isinstance(what, Stage):
        return _stage_run(what, inputs, y, loss, training)
    if isinstance(what, keras.Layer):
        return _model_run(what, inputs, y, loss, training)
    return _function_run(what, inputs)


def _stage_run(stage: Stage, inputs: Any, y: Any, loss: Any, training: bool) -> Run:
    """A stage: its states begin as zeros, and it may have losses of its own."""
    model, names = stage.model, stage.carried.names if stage.carried is not None else ()
    given = _with_states(model, inputs, len(names))
    if y is not None and loss is None and len(stage.heads):
        targets = [y] if len(stage.heads) == 1 else list(y)
        objective = Objective(tuple(map(tf.convert_to_tensor, targets)), (None,) * len(targets), (1.0,) * len(targets))

        def judged() -> Mapping[str, Any]:
            outputs = flatten(model(given, training=training))
            return {"loss": _sum([*stage.heads.terms(stage.heads.values(outputs, objective)), *model.losses])}

        return judged
    run = _model_run(model, given, y, loss, training)
    if y is not None or not names:
        return run

    def named() -> Mapping[str, Any]:
        found = list(run().items())
        states = [tensor for _, tensor in found[len(found) - len(names) :]]
        return dict(found[: len(found) - len(names)]) | dict(zip(names, states, strict=True))

    return named


def _with_states(model: Any, inputs: Any, states: int) -> Any:
    """Inputs with zeros for the states behind them, if they are not there."""
    flat = flatten(inputs)
    if not states or len(flat) == len(model.inputs):
        return inputs
    samples = len(flat[0])
    zeros = [tf.zeros((samples, *state.shape[1:]), state.dtype) for state in model.inputs[len(flat) :]]
    return [*map(tf.convert_to_tensor, flat), *zeros]


def _function_run(function: Callable[..., Any], inputs: Any) -> Run:
    def run() -> Mapping[str, Any]:
        returned = function() if inputs is None else function(inputs)
        if returned is None:
            raise HandoffError("explain: the function returned None; let it return the target, such as the loss")
        if isinstance(returned, Mapping):
            return {str(name): _tensor(value) for name, value in returned.items()}
        values = returned if isinstance(returned, list | tuple) else [returned]
        names = leaf_names(values, "target") if len(values) > 1 else ["target"]
        return dict(zip(names, map(_tensor, values), strict=True))

    return run


def _model_run(model: Any, inputs: Any, y: Any, loss: Any, training: bool) -> Run:
    if y is not None and loss is None and not getattr(model, "compiled", False):
        raise HandoffError("explain was given y, but no loss; pass loss=..., or compile the model with one")
    if y is None and loss is not None:
        raise HandoffError("explain was given a loss, but no y to compare with")

    def run() -> Mapping[str, Any]:
        returned = model(inputs, training=training)
        if y is None:
            flat = keras.tree.flatten(returned)
            names = getattr(model, "output_names", None) or [f"output {i}" for i in range(len(flat))]
            return dict(zip(unique(list(names)[: len(flat)]), flat, strict=True))
        if loss is None:
            return {"loss": model.compute_loss(inputs, y, returned, training=training)}
        return {"loss": _sum([tf.reduce_mean(keras.losses.get(loss)(y, returned)), *model.losses])}

    return run


def _sum(terms: Sequence[Any]) -> Any:
    return tf.add_n([tf.reduce_sum(tf.cast(term, "float32")) for term in terms])


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | float | int):
        raise HandoffError(
            f"explain: the function returned a {type(value).__name__}, not a tensor: what left TensorFlow has no "
            "gradient; return the tensor from before .numpy(), float() or the NumPy function"
        )
    return tf.convert_to_tensor(value)


__all__ = ["Run", "run_of"]

"""Methods of `Pipeline` that `keras.Model` has too: tables, counts, calling it, and values in the user's own model.

Each function is a method of `pipeline.pipeline.Pipeline`, and `pipe` the pipeline. Arguments, defaults and return
values are those of `keras.Model`'s methods of the same name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.model.summary import TensorSpec, summary_text
from pipeline.training import own_metrics
from stages.tape.model_call import states_of_layers
from stages.worker import snapshot
from stages.worker.orders import Service
from transport.errors import TapelineError

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline


def summary(
    pipe: Pipeline,
    line_length: int | None = None,
    positions: Sequence[float] | None = None,
    print_fn: Callable[[str], Any] | None = None,
    expand_nested: bool = False,
    show_trainable: bool = False,
    layer_range: Sequence[str] | None = None,
) -> None:
    """Print the stages, their layers and parameters, and what crosses each cut, with shape, dtype and bytes a sample.

    Starts the workers only if a stage is built in its worker.

    Args:
        line_length: Characters in a line; default: the terminal's, at most 100.
        positions: Where the columns end, as parts of the line or in characters.
        print_fn: Called with the text in place of printing it.
        expand_nested: List the layers of models inside a stage too.
        show_trainable: Say of each layer whether it is trained.
        layer_range: (first, last) layer to list: names or regular expressions.

    Raises:
        DataError: `positions` or `layer_range` does not fit.
    """
    text = summary_text(
        pipe.segments,
        pipe.wires,
        lambda stage, name: _given(pipe, stage, name),
        (_count(pipe, trained=False), _count(pipe, trained=True)),
        line_length=line_length,
        positions=positions,
        expand_nested=expand_nested,
        show_trainable=show_trainable,
        layer_range=layer_range,
    )
    split = pipe.session.setup.split
    if split is not None and split.why:
        text += f"\n Schedule {split.why}"
    (print if print_fn is None else print_fn)(text)


def count_params(pipe: Pipeline) -> int:
    """The number of parameters of all stages' weights; one that several stages share counts once."""
    return _count(pipe, trained=False)


def call(pipe: Pipeline, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
    """Outputs of one batch as tensors, in inference mode: ``pipe(x)``, as ``model(x)``.

    Args:
        inputs: Arrays or eager tensors (n, ...), as the model takes them.
        training: None or False.
        mask: None.

    Returns:
        Tensors (n, ...) in the nesting in which the model gives them. No tape sees into the workers: asking one for a
        gradient through them is an error.

    Raises:
        DataError: It was called for something that only a model in this process can do.
    """
    flat = keras.tree.flatten(inputs)
    if not tf.executing_eagerly() or any(isinstance(one, keras.KerasTensor) for one in flat):
        raise DataError(
            "pipe(x) runs in other processes, so x must hold values: it cannot be part of a Keras model or of a "
            "tf.function; use pipe.merge() for one ordinary Keras model"
        )
    if training or mask is not None:
        raise DataError(
            "pipe(x) computes outputs in inference mode; training=True and mask= are not taken: use train_on_batch, "
            "gradients, or pipe.merge() for one ordinary Keras model"
        )
    shape: list[Any] = []

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def through_workers(*_: Any) -> Any:
        outputs = keras.tree.map_structure(tf.convert_to_tensor, pipe.predict_on_batch(inputs))
        shape.append(outputs)

        def refuse(*_: Any, **__: Any) -> Any:
            raise DataError(
                "a tape of this process cannot see into the workers, so there is no gradient through pipe(x); use "
                "pipe.gradients(x, y), or pipe.merge() for one ordinary Keras model"
            )

        return tuple(keras.tree.flatten(outputs)), refuse

    found = through_workers(*(one for one in flat if tf.is_tensor(one)))
    return keras.tree.pack_sequence_as(shape[0], list(found))


def get_weights(pipe: Pipeline) -> list[np.ndarray[Any, Any]]:
    """All weights, in the order of `get_weights` of the model that was split, else stage after stage."""
    pipe.changes.look(closely=not pipe.session.values.ahead)
    return pipe.session.values.get_weights()


def set_weights(pipe: Pipeline, weights: Sequence[np.ndarray[Any, Any]]) -> None:
    """Set all weights, in the order of `get_weights`.

    Raises:
        DataError: The number of arrays, or a shape, is not that of the weights; nothing was set.
    """
    pipe.session.values.set_weights(weights)


def predict_on_batch(pipe: Pipeline, x: Any) -> Any:
    """Outputs (n, ...) of one batch, as `keras.Model.predict_on_batch`."""
    outputs, split = pipe.session.steps.predict(x), pipe.session.setup.split
    if split is not None:
        return split.pack(outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def reset_metrics(pipe: Pipeline) -> None:
    """Let the metrics count anew."""
    if own_metrics.are_any(pipe.session):
        pipe.session.workers.driver().call(Service.RESET_METRICS)


def reset_state(pipe: Pipeline) -> None:
    """Let the next batch begin with the initial states, under `keep_state` and in layers with ``stateful=True``."""
    pipe.session.workers.driver().call(Service.RESET_STATE)


def give_back(pipe: Pipeline) -> None:
    """Give the user's own models the values that the workers have now: weights, statistics, seeds.

    The optimizer too, if it was built for the models' variables before, as `model.optimizer` of a trained model is.

    Does nothing where nothing was trained or set since the last time, or the workers have ended.
    """
    if not pipe.session.values.ahead or not pipe.session.workers.are_running:
        return
    pipe.changes.take_variables()
    values, states = pipe.session.values.read("model"), pipe.session.values.read("layer states")
    for i, segment in enumerate(pipe.segments):
        if segment.model is not None:
            snapshot.write(segment.model.variables, values[i], f"the user's own model of stage {pipe.names[i]!r}")
            snapshot.write(states_of_layers(segment.model), states[i], f"the states of stage {pipe.names[i]!r}")
    pipe.session.workers.give_back_slots()
    pipe.session.values.ahead = False
    pipe.changes.hold_model()


def close(pipe: Pipeline) -> None:
    """End the workers; your own model gets the trained values that it has not yet. Idempotent.

    In a forked copy of the process nothing is done.
    """
    if pipe.session.ours:
        with pipe.session.workers.turns:
            try:
                give_back_if_possible(pipe)
            finally:
                pipe.session.close()


def give_back_if_possible(pipe: Pipeline) -> None:
    """The same for a pipeline that is being closed: what fails is a warning, since closing must go on."""
    try:
        give_back(pipe)
    except TapelineError as error:
        warnings.warn(
            f"your own model has not the last trained values, since the workers could not give them: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


def _count(pipe: Pipeline, trained: bool) -> int:
    found: dict[Any, int] = {}
    for i, segment in enumerate(pipe.segments):
        if segment.model is not None:
            weights = segment.model.trainable_weights if trained else segment.model.weights
            found |= {id(weight): math.prod(weight.shape) for weight in weights}
        else:
            for k, weight in enumerate(pipe.session.workers.driver().descriptions[i].weights):
                if weight.trained or not trained:
                    found[i, k] = math.prod(weight.shape)
    return sum(found.values())


def _given(pipe: Pipeline, stage: int, name: str) -> TensorSpec | None:
    """(dtype, shape) of a tensor that a stage gives."""
    model = pipe.segments[stage].model
    if model is None:
        return pipe.session.workers.driver().output_spec(stage, name)
    names = [one for one, _ in pipe.wires.gives[stage]]
    tensor = model.outputs[names.index(name)]
    return str(tensor.dtype), tuple(tensor.shape)

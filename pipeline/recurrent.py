"""Keras models with recurrent layers, as parts that hand their states to their next window.

    model   x ─► GRU ─► Dense ─► y         becomes         x, h ─► GRU(initial_state=h) ─► Dense ─► y, h'

Neither TensorFlow nor Keras lets a gradient pass from one call of a stateful layer to the one before it: the state is a
variable, and assigning to it blocks the gradient. Here the state is an input and an output of the model, so its
gradient is handed back like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from pipeline.errors import SplitError
from pipeline.graph import Call, Graph, read_graph
from pipeline.sharing import replace_in
from stages.running_order import order_of, run_in_order
from stages.tensors import is_differentiable

RNN = keras.layers.RNN


@dataclass(frozen=True, eq=False)
class Stateful:
    """A model whose states are inputs and outputs.

    Attributes:
        model: Takes the original's inputs, then the states; gives the original's outputs, then the states. It shares
            the original's variables.
        states: The states' names: the layer's name, numbered where it has several.
    """

    model: Any
    states: tuple[str, ...]


def stateful(model: Any) -> Stateful:
    """Turn a model with recurrent layers into one that takes and gives their states.

    Args:
        model: A built Sequential or Functional model with SimpleRNN, GRU, LSTM or RNN layers, (n, time, ...) inputs.
            The time axis becomes free, so that any window fits.

    Returns:
        The model for `Stage(part.model, states=part.states)`.

    Raises:
        SplitError: A layer that looks at the whole sequence at once (Bidirectional, attention over time, convolution
            and pooling over time, Flatten), a recurrent layer with an initial state of its own, or no recurrent layer.
    """
    graph = read_graph(model)
    found = converted(graph, graph.calls, graph.inputs, graph.outputs, f"{model.name}_stateful")
    if not found.states:
        raise SplitError(f"the model {model.name!r} has no recurrent layer, so there is no state to hand over")
    return found


def converted(
    graph: Graph, calls: Sequence[Call], inputs: Sequence[int], outputs: Sequence[int], name: str
) -> Stateful:
    """Some of a graph's calls as a model of their own that takes and gives the states of their recurrent layers.

    Args:
        graph: The whole.
        calls: Which calls, in order.
        inputs: Tensor numbers that they read but do not make.
        outputs: Tensor numbers to give.
        name: The model's name.
    """
    steps = _steps(graph)
    tensors: dict[int, Any] = {number: _free_input(graph.symbols[number], steps) for number in inputs}
    given = [tensors[number] for number in inputs]
    states: list[tuple[str, Any, Any]] = []
    copies: dict[int, Any] = {}
    for call in calls:
        layer = call.operation
        if not isinstance(layer, RNN):
            _refuse_what_mixes_time(call, graph)
            results = keras.tree.flatten(call.play(tensors))
        else:
            _refuse_own_state(call)
            if id(layer) in copies:
                raise SplitError(
                    f"the recurrent layer {layer.name!r} is called several times; give each call a layer of its own, "
                    "so that it is clear which call hands its state to which"
                )
            copies[id(layer)] = copy = giving_its_state(layer, tensors[call.reads[0]].shape)
            enter = [
                keras.Input(batch_shape=(None, *_sizes(size)), dtype=layer.compute_dtype, name=f"{state}_in")
                for state, size in zip(_names(layer), keras.tree.flatten(layer.state_size), strict=True)
            ]
            mask = {"mask": tensors[call.reads[1]]} if len(call.reads) > 1 else {}
            output, *leave = copy(tensors[call.reads[0]], initial_state=_as_layer_takes(layer, enter), **mask)
            leave = keras.tree.flatten(leave)
            output = _last_output(layer, output, leave, masked=bool(mask))
            states += list(zip(_names(layer), enter, leave, strict=True))
            results = [output, *leave] if layer.return_state else [output]
        tensors |= dict(zip(call.makes, results, strict=True))
    joined = keras.Model(
        [*given, *(enter for _, enter, _ in states)],
        [*(tensors[number] for number in outputs), *(leave for _, _, leave in states)],
        name=name,
    )
    run_in_order(joined, order_of([call.name for call in calls]))
    return Stateful(joined, tuple(state for state, _, _ in states))


def giving_its_state(layer: Any, shape: Sequence[int | None]) -> Any:
    """A recurrent layer like this one, with the same variables and random generators, that returns its state."""
    config = {**layer.get_config(), "return_state": True, "stateful": False, "unroll": False}
    if layer.stateful:
        warnings.warn(
            f"the layer {layer.name!r} is stateful: its state is a variable, which no gradient passes; here it is "
            "handed from window to window instead",
            stacklevel=2,
        )
    copy = type(layer).from_config(config)
    copy.build(tuple(shape))
    for ours, theirs in zip(copy._flatten_layers(), layer._flatten_layers(), strict=True):
        for new, old in zip(list(ours._trainable_variables), theirs._trainable_variables, strict=True):
            replace_in(ours, new, old)
        for name, value in vars(theirs).items():
            if isinstance(value, keras.random.SeedGenerator):
                replace_in(ours, getattr(ours, name), value)
        ours.trainable = theirs.trainable
    return copy


def _last_output(layer: Any, output: Any, states: Sequence[Any], masked: bool) -> Any:
    """What a layer gives for the whole sequence, where that is its last output.

    At a masked step Keras repeats the output before it, and in front of a window there is none: a sequence that ended
    in an earlier window would give zeros. Keras's own cells put their output into their first state, which is carried.
    """
    if layer.return_sequences or not masked:
        return output
    cells = getattr(layer.cell, "cells", [layer.cell])
    if type(cells[-1]).__module__.split(".")[0] != "keras":
        raise SplitError(
            f"the layer {layer.name!r} gives only the last output of masked sequences, and its cell "
            f"{type(cells[-1]).__name__} keeps no output in its state, so a sequence that ends in an earlier window "
            "would be lost; return sequences, or leave windows out"
        )
    before = sum(len(keras.tree.flatten(cell.state_size)) for cell in cells[:-1])
    return states[before]


def _names(layer: Any) -> list[str]:
    count = len(keras.tree.flatten(layer.state_size))
    return [layer.name] if count == 1 else [f"{layer.name}_{i}" for i in range(count)]


def _sizes(size: Any) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (int(size),)


def _as_layer_takes(layer: Any, states: Sequence[Any]) -> Any:
    """States in the nesting of the cell's `state_size`."""
    nested = isinstance(layer.state_size, list | tuple)
    return keras.tree.pack_sequence_as(layer.state_size, list(states)) if nested else [states[0]]


def _steps(graph: Graph) -> int | None:
    """The length of the sequences that the recurrent layers read; None is any.

    Raises:
        SplitError: They read sequences of different lengths.
    """
    found = {graph.symbols[call.reads[0]].shape[1] for call in graph.calls if isinstance(call.operation, RNN)}
    if len(found) > 1:
        raise SplitError(
            f"the recurrent layers of {graph.model.name!r} read sequences of different lengths "
            f"({', '.join(sorted(map(str, found)))}); windows need one time axis"
        )
    return next(iter(found), None)


def _free_input(symbol: Any, steps: int | None) -> Any:
    """An input whose second axis, if it is the time, may have any length.

    It is the time where it has the length of the sequences: of a feature table (n, steps, ...), or of word numbers
    (n, steps).
    """
    shape = tuple(symbol.shape)
    words = len(shape) == 2 and not is_differentiable(symbol.dtype)
    if (len(shape) > 2 or words) and shape[1] in (steps, None):
        shape = (shape[0], None, *shape[2:])
    return keras.Input(batch_shape=shape, dtype=symbol.dtype)


def _refuse_own_state(call: Call) -> None:
    layer = call.operation
    if getattr(layer, "go_backwards", False):
        raise SplitError(
            f"the layer {layer.name!r} goes backward in time, so its first window would need the last one's state; "
            "leave go_backwards out, or take the whole sequence at once"
        )
    mask = call.arguments[1].get("mask")
    expected = 1 + (mask is not None)
    if len(call.reads) != expected:
        raise SplitError(
            f"the recurrent layer {layer.name!r} is called with an initial state of its own; leave it out, and give "
            "the stage its initial state"
        )


_TIME = (
    "Bidirectional",
    "Conv1D",
    "SeparableConv1D",
    "DepthwiseConv1D",
    "Conv1DTranspose",
    "ConvLSTM1D",
    "MaxPooling1D",
    "AveragePooling1D",
    "GlobalMaxPooling1D",
    "GlobalAveragePooling1D",
    "Attention",
    "AdditiveAttention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "Flatten",
    "Permute",
    "Reshape",
    "UpSampling1D",
    "ZeroPadding1D",
    "Cropping1D",
    "RepeatVector",
)
"""Keras layers that read several time steps at once, or move them."""


def _refuse_what_mixes_time(call: Call, graph: Graph) -> None:
    layer = call.operation
    kind = next((base.__name__ for base in type(layer).__mro__ if base.__name__ in _TIME), None)
    if kind is None or (kind.endswith("Conv1D") and set(layer.kernel_size) == {1}):
        return
    if all(len(graph.symbols[number].shape) < 3 for number in call.reads):
        return  # no time axis left
    why = {
        "Bidirectional": "it reads the sequence from its end, so no window can begin before the last one is there",
    }.get(kind, "it reads several time steps at once, and windows would cut between them")
    raise SplitError(
        f"the layer {call.name!r} ({kind}) cannot be run window by window: {why}. Put it into a stage that sees the "
        "whole sequence, or leave windows out"
    )


def recurrent_layers(model: Any) -> Iterator[Any]:
    """The recurrent layers of a model, nested ones included."""
    return (layer for layer in model._flatten_layers(include_self=False) if isinstance(layer, RNN))


def stateful_layers(model: Any) -> Mapping[str, Any]:
    """Layers that keep a state in a variable between calls, by name: no gradient passes from call to call."""
    return {layer.name: layer for layer in recurrent_layers(model) if layer.stateful}

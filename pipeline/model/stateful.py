"""Keras models with recurrent layers, as parts that hand their states to their next window.

    model   x ─► GRU ─► Dense ─► y         becomes         x, h ─► GRU(initial_state=h) ─► Dense ─► y, h'

Neither TensorFlow nor Keras lets a gradient pass from one call of a stateful layer to the one before it: the state is a
variable, and assigning to it blocks the gradient. Here the state is an input and an output of the model, so its
gradient is handed back like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from pipeline.errors import SplitError
from pipeline.model.call_graph import ArgumentPlace, Call, CallGraph, read_graph
from pipeline.model.in_windows import called
from pipeline.model.over_time import WITHOUT_WINDOWS, refuse_what_windows_change
from stages.keras_internals import (
    forget_variables,
    layers_of,
    own_other_variables,
    own_seed_generators,
    own_trainable_variables,
)
from stages.layers.initial_states import BeginWith, Begun, LastStep, LearnedState, Repeated
from stages.recipe.by_value import copied
from stages.recipe.running_order import order_of_names, run_in_order
from stages.tape.tensors import is_differentiable

RNN = keras.layers.RNN
CONVOLUTIONAL = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D)


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
        SplitError: The model would compute something else in windows than over the whole length (attention,
            convolution, normalisation or any other operation over time), a recurrent layer is called twice or
            backward, or there is none.
    """
    graph = read_graph(model)
    found = converted(graph, graph.calls, graph.inputs, graph.outputs, f"{model.name}_stateful")
    if not found.states:
        raise SplitError(f"the model {model.name!r} has no recurrent layer, so there is no state to hand over")
    refuse_what_mixes_time(graph)
    return found


def converted(
    graph: CallGraph, calls: Sequence[Call], inputs: Sequence[int], outputs: Sequence[int], name: str
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
    states: list[_State] = []
    order: list[str] = []
    converted_layers: set[int] = set()
    for call in calls:
        if not isinstance(call.operation, RNN):
            results = keras.tree.flatten(_played(call, tensors))
            order.append(call.name)
        else:
            if id(call.operation) in converted_layers:
                raise SplitError(
                    f"the recurrent layer {call.name!r} is called several times; give each call a layer of its own, "
                    "so that it is clear which call hands its state to which"
                )
            converted_layers.add(id(call.operation))
            _refuse_initial_state_of_a_sequence(call, graph)
            results, more, names = _recurrent_call(call, tensors)
            states += more
            order += names
        tensors |= dict(zip(call.makes, results, strict=True))
    joined = keras.Model(
        [*given, *(state.enter for state in states)],
        [*(tensors[number] for number in outputs), *(state.leave for state in states)],
        name=name,
    )
    run_in_order(joined, order_of_names(order))
    return Stateful(joined, tuple(state.name for state in states))


def refuse_what_mixes_time(graph: CallGraph) -> None:
    """Try a model in windows, with random numbers; see `pipeline.model.over_time`.

    Raises:
        SplitError: It would compute something else than over the whole length.
    """
    made = [tensor for call in graph.calls for tensor in call.makes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        windowed = converted(graph, graph.calls, graph.inputs, made, "windows")
    refuse_what_windows_change(graph, windowed.model, len(windowed.states))


def _played(call: Call, tensors: Mapping[int, Any]) -> Any:
    """A call on tensors whose length is free.

    Raises:
        SplitError: It needs a certain length.
    """
    try:
        return call.play(tensors)
    except Exception as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise SplitError(
            f"{called(call)} cannot be run window by window: it needs the whole length of the sequence ({said[0]}); "
            f"{WITHOUT_WINDOWS}"
        ) from error


class _State(NamedTuple):
    """A state of a converted model: its name, the symbolic input and output."""

    name: str
    enter: Any
    leave: Any


def _recurrent_call(call: Call, tensors: Mapping[int, Any]) -> tuple[list[Any], list[_State], list[str]]:
    """A recurrent layer's call with its states outside: its results, the states, the operations called."""
    layer = call.operation
    series, initial, mask = _arguments(call, tensors)
    copy = giving_its_state(layer)
    shapes = _state_shapes(layer, copy, series)
    names = [layer.name] if len(shapes) == 1 else [f"{layer.name}_{i}" for i in range(len(shapes))]
    enter = [
        keras.Input(batch_shape=(None, *shape), dtype=layer.compute_dtype, name=f"{state}_in")
        for state, shape in zip(names, shapes, strict=True)
    ]
    begins, order = enter, []
    if not initial:
        _refuse_a_begin_of_its_own(layer)
    else:
        begun = keras.Input((1,), dtype=layer.compute_dtype, name=f"{layer.name}_begun_in")
        layers = [BeginWith(name=f"{state}_begin") for state in names]
        begins = [one([e, begun, i]) for one, e, i in zip(layers, enter, initial, strict=True)]
        order += [one.name for one in layers]
    masked = {} if mask is None else {"mask": mask}
    output, *rest = copy(series, initial_state=_as_layer_takes(layer, begins), **masked)
    order.append(layer.name)
    leave = keras.tree.flatten(rest)
    states = [_State(*one) for one in zip(names, enter, leave, strict=True)]
    if mask is not None and not layer.zero_output_for_mask:
        output, last, called = _repeated(layer, output, mask)
        states.append(last)
        order += called
    if initial:
        done = Begun(name=f"{layer.name}_begun")
        states.append(_State(f"{layer.name}_begun", begun, done(begun)))
        order.append(done.name)
    return [output, *leave] if layer.return_state else [output], states, order


def _repeated(layer: Any, output: Any, mask: Any) -> tuple[Any, _State, list[str]]:
    """What a layer gives where the first steps of a window are masked, and its last output as one more state.

    At a masked step Keras repeats the output before it. In front of a window there is none, so it would give zeros.
    """
    shape = output.shape[2:] if layer.return_sequences else output.shape[1:]
    name = f"{layer.name}_output"
    enter = keras.Input(batch_shape=(None, *shape), dtype=layer.compute_dtype, name=f"{name}_in")
    again = Repeated(name=f"{name}_repeated", dtype=layer.dtype_policy)
    output = again([output, mask, enter])
    if not layer.return_sequences:
        return output, _State(name, enter, output), [again.name]
    last = LastStep(name=f"{name}_last", dtype=layer.dtype_policy)
    return output, _State(name, enter, last(output)), [again.name, last.name]


def _refuse_a_begin_of_its_own(layer: Any) -> None:
    """Refuse a cell whose own initial state is not zeros: states that windows hand over begin with zeros."""
    if isinstance(layer, CONVOLUTIONAL):
        return
    own = keras.tree.flatten(layer.get_initial_state(2))
    if any(np.any(np.asarray(keras.ops.cast(state, "float32"))) for state in own):
        raise SplitError(
            f"the recurrent layer {layer.name!r} begins with a state of its own that is not zeros (get_initial_state), "
            "and what windows hand over begins with zeros; give that state in the call, initial_state=, as an input of "
            "the model or as a stages.LearnedState"
        )


def _arguments(call: Call, tensors: Mapping[int, Any]) -> tuple[Any, list[Any], Any | None]:
    """The series, the initial states (none: zeros) and the mask that a recurrent layer is called with."""
    layer = call.operation
    if getattr(layer, "go_backwards", False):
        raise SplitError(
            f"the layer {layer.name!r} goes backward in time, so its first window would need the last one's state; "
            "leave go_backwards out, or take the whole sequence at once"
        )
    args, kwargs = keras.tree.map_structure(
        lambda argument: tensors[argument.tensor] if isinstance(argument, ArgumentPlace) else argument, call.arguments
    )
    initial = kwargs.get("initial_state", args[1] if len(args) > 1 else None)
    states = [] if initial is None else [one for one in keras.tree.flatten(initial) if one is not None]
    return args[0], states, kwargs.get("mask")


def giving_its_state(layer: Any) -> Any:
    """A recurrent layer like this one, with the same variables and random generators, that returns its state."""
    if layer.stateful:
        warnings.warn(
            f"the layer {layer.name!r} is stateful: its state is a variable, which no gradient passes; here it is "
            "handed from window to window instead, and from batch to batch with keep_state=True only",
            stacklevel=2,
        )
    inner = layers_of(layer)
    shared = [v for one in inner for v in (*own_trainable_variables(one), *own_other_variables(one))]
    shared += [generator for one in inner for generator in own_seed_generators(one)]
    copy = copied(layer, f"the layer {layer.name!r}", keep=shared)
    if layer.stateful:
        forget_variables(copy, keras.tree.flatten(layer.states))
        copy.states = None
    copy.return_state, copy.stateful, copy.unroll = True, False, False
    return copy


def _state_shapes(layer: Any, copy: Any, series: Any) -> list[tuple[int, ...]]:
    """The shapes of a layer's states, without the batch: in order, flat."""
    if isinstance(layer, CONVOLUTIONAL):  # whose cell does not know them
        _, *states = copy(series)
        return [tuple(state.shape[1:]) for state in keras.tree.flatten(states)]
    sizes = keras.tree.flatten(layer.state_size)
    return [tuple(size) if isinstance(size, list | tuple) else (int(size),) for size in sizes]


def _as_layer_takes(layer: Any, states: Sequence[Any]) -> Any:
    """States in the nesting of the cell's `state_size`."""
    if isinstance(layer, CONVOLUTIONAL):
        return list(states)
    nested = isinstance(layer.state_size, list | tuple)
    return keras.tree.pack_sequence_as(layer.state_size, list(states)) if nested else [states[0]]


def _steps(graph: CallGraph) -> int | None:
    """The length of the sequences that the recurrent layers read (without any, of the inputs over time); None is any.

    Raises:
        SplitError: They read sequences of different lengths.
    """
    found = {graph.symbols[call.reads[0]].shape[1] for call in graph.calls if isinstance(call.operation, RNN)}
    if len(found) > 1:
        raise SplitError(
            f"the recurrent layers of {graph.model.name!r} read sequences of different lengths "
            f"({', '.join(sorted(map(str, found)))}); windows need one time axis"
        )
    if not found:
        found = {graph.symbols[number].shape[1] for number in graph.inputs if len(graph.symbols[number].shape) > 2}
    return next(iter(found)) if len(found) == 1 else None


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


def _refuse_initial_state_of_a_sequence(call: Call, graph: CallGraph) -> None:
    """Refuse an initial state that another recurrent layer gives: its first window would need the other's last one."""
    makers = {tensor: one for one in graph.calls for tensor in one.makes}
    _, initial, _ = _arguments(call, {tensor: tensor for one in graph.calls for tensor in one.reads})
    waiting = [makers[tensor] for tensor in initial if tensor in makers]
    while waiting:
        one = waiting.pop()
        if isinstance(one.operation, RNN):
            raise SplitError(
                f"the recurrent layer {call.name!r} begins with a state of {one.name!r}, which is there only behind "
                "its last window; run the two in pipelines of their own, or leave windows out"
            )
        if not isinstance(one.operation, LearnedState):  # which reads the batch size only
            waiting += [makers[tensor] for tensor in one.reads if tensor in makers]


def refuse_states_kept_by_some(graph: CallGraph) -> None:
    """Refuse ``keep_state=True``, which is about all recurrent layers, where only some say ``stateful=True``.

    Raises:
        SplitError: Names a layer of either kind.
    """
    layers = {call.operation.name: call.operation.stateful for call in graph.calls if isinstance(call.operation, RNN)}
    kept, anew = ([name for name, keeps in layers.items() if keeps is kind] for kind in (True, False))
    if kept and anew:
        raise SplitError(
            f"keep_state=True keeps the states of all recurrent layers from batch to batch, and {anew[0]!r} is not "
            f"stateful while {kept[0]!r} is; make all of them stateful=True or none, or leave keep_state out"
        )


def warn_of_stateful_layers(models: Iterable[Any]) -> None:
    """Warn of layers that keep their state in a variable: no gradient passes from one call of them to the next."""
    for model in models:
        for layer in layers_of(model, include_self=False):
            if isinstance(layer, RNN) and layer.stateful:
                warnings.warn(
                    f"the layer {layer.name!r} is stateful: it keeps its state in a variable, so values pass from one "
                    "batch (and microbatch) to the next, and gradients do not. To hand the state over, split the model "
                    "with windows=..., or with keep_state=True for values only",
                    stacklevel=2,
                )

"""A built Keras model as a flat list of calls, nested models dissolved.

    Sequential / Functional ─► [ layer call, operation call, layer call ... ] in an order in which each call's
                               inputs exist before it

A tensor is a number; a call says which tensors it reads and makes. Calls can be played again on other tensors: that is
how a part of a model becomes a model of its own, with the same layer objects and so the same variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from pipeline.errors import SplitError
from stages.keras_internals import graph_model, maker_of, nodes_in_order, output_structure
from stages.recipe.overrides import CALLING, overridden
from stages.recipe.running_order import order_of_names, run_in_order
from stages.versions import received


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer or operation.

    Attributes:
        operation: The Keras layer or operation object.
        reads: Tensor numbers among its arguments, in flat order.
        makes: Tensor numbers of its results, in flat order.
        arguments: Positional and keyword arguments, `ArgumentPlace` where a tensor goes.
    """

    operation: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.operation.name)

    def play(self, tensors: Mapping[int, Any]) -> Any:
        """Make the call on other tensors."""

        def fill(argument: Any) -> Any:
            return tensors[argument.tensor] if isinstance(argument, ArgumentPlace) else argument

        args, kwargs = keras.tree.map_structure(fill, self.arguments)
        return self.operation(*args, **kwargs)


@dataclass(frozen=True)
class ArgumentPlace:
    """The place of a tensor among a call's arguments."""

    tensor: int


@dataclass(frozen=True, eq=False)
class CallGraph:
    """A model as calls.

    Attributes:
        model: The model it was read from.
        calls: All calls, in an order that can be played.
        inputs: Tensor numbers of the model's inputs, in flat order.
        outputs: Tensor numbers of the model's outputs, in flat order; one that the model gives twice is there twice.
        labels: What Keras calls these outputs in `compile`.
        symbols: {tensor number: the symbolic tensor}.
    """

    model: Any
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    labels: tuple[str, ...]
    symbols: Mapping[int, Any]

    def tensor_names(self) -> dict[int, str]:
        """A name for every tensor: that of its layer, numbered where a layer makes several or is called again.

        Inputs too are called as their layers, as Keras does: a symbolic tensor's own name differs in every copy.
        """
        names = {tensor: str(maker_of(self.symbols[tensor]).name) for tensor in self.inputs}
        seen: dict[str, int] = dict.fromkeys(names.values(), 1)
        for call in self.calls:
            for tensor in call.makes:
                count = seen[call.name] = seen.get(call.name, 0) + 1
                names[tensor] = call.name if count == 1 else f"{call.name}:{count}"
        return names


def read_graph(model: Any) -> CallGraph:
    """The calls of a Sequential or Functional model.

    Raises:
        SplitError: The model is subclassed, or not built, so that its calls are not known.
    """
    functional = _functional(model)
    if functional is None:
        raise SplitError(_why_not(model))
    reader = _Reader()
    numbers = {id(tensor): reader.number(tensor) for tensor in functional.inputs}
    outputs = reader.read(functional, numbers)
    inputs = tuple(numbers[id(tensor)] for tensor in functional.inputs)
    labels = _output_labels(functional)
    for tensor, label in zip(outputs, labels, strict=True):
        if tensor in inputs:
            raise SplitError(
                f"the output {label!r} of the model {model.name!r} is one of its inputs, untouched, so no stage makes "
                "it; leave it out of the outputs, or pass it through keras.layers.Identity()"
            )
    return CallGraph(model, tuple(reader.calls), inputs, tuple(outputs), labels, reader.symbols)


def play(graph: CallGraph, calls: Sequence[Call], inputs: Sequence[int], outputs: Sequence[int], name: str) -> Any:
    """Some of a graph's calls as a Keras model of their own.

    Args:
        graph: The whole.
        calls: Which calls, in order.
        inputs: Tensor numbers that they read but do not make.
        outputs: Tensor numbers to give.
        name: The model's name.

    Returns:
        A Functional model that shares its layers with the whole.
    """
    symbols = {tensor: _input_like(graph.symbols[tensor]) for tensor in inputs}
    tensors = dict(symbols)
    for call in calls:
        results = keras.tree.flatten(call.play(tensors))
        tensors |= dict(zip(call.makes, results, strict=True))
    model = keras.Model([symbols[t] for t in inputs], [tensors[t] for t in outputs], name=name)
    run_in_order(model, order_of_names([call.name for call in calls]))
    return model


def _output_labels(functional: Any) -> tuple[str, ...]:
    """The outputs' names as Keras's `compile` knows them: the keys of a dict, else the layers' names; made unique."""
    structure = output_structure(functional)
    names = sorted(structure) if isinstance(structure, dict) else list(functional.output_names)
    if len(names) != len(functional.outputs):  # nested deeper than one level
        names = list(functional.output_names)
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        labels.append(name if count == 1 else f"{name}:{count}")
    return tuple(labels)


def _input_like(symbol: Any) -> Any:
    return keras.Input(batch_shape=tuple(symbol.shape), dtype=symbol.dtype)


class _Reader:
    """Collects calls while it walks through a model and the models inside it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.symbols: dict[int, Any] = {}

    def number(self, tensor: Any) -> int:
        self.symbols[len(self.symbols)] = tensor
        return len(self.symbols) - 1

    def read(self, functional: Any, numbers: dict[int, int]) -> list[int]:
        """Add the calls of one model whose inputs have these numbers; return the numbers of its outputs."""
        for node in nodes_in_order(functional):
            if not node.is_input:
                self._read_node(node, numbers)
        return [numbers[id(tensor)] for tensor in functional.outputs]

    def _read_node(self, node: Any, numbers: dict[int, int]) -> None:
        reads = tuple(numbers[id(tensor)] for tensor in node.input_tensors)
        inner = _functional(node.operation)
        if inner is not None and _is_plain_call(node):
            inside = {id(tensor): number for tensor, number in zip(inner.inputs, reads, strict=True)}
            found: Sequence[int] = self.read(inner, inside)
        else:
            found = [self.number(tensor) for tensor in node.outputs]
            arguments = (_slots(node.arguments.args, numbers), _slots(node.arguments.kwargs, numbers))
            self.calls.append(Call(node.operation, reads, tuple(found), arguments))
        numbers |= {id(tensor): number for tensor, number in zip(node.outputs, found, strict=True)}


def _is_plain_call(node: Any) -> bool:
    """Whether a nested model is called with tensors only, so that its inside can stand in its place."""
    options = [value for value in keras.tree.flatten(node.arguments.kwargs) if value is not None]
    inner = _functional(node.operation)
    return inner is not None and not options and len(node.input_tensors) == len(inner.inputs)


def _slots(arguments: Any, numbers: Mapping[int, int]) -> Any:
    def slot(argument: Any) -> Any:
        return ArgumentPlace(numbers[id(argument)]) if isinstance(argument, keras.KerasTensor) else argument

    return keras.tree.map_structure(slot, arguments)


def _functional(model: Any) -> Any | None:
    """The Functional inside a Sequential, a Functional itself, or None for anything else.

    Also None where the graph is not all that a call of the model does: it has a `call` of its own, or a penalty on its
    outputs.
    """
    if not isinstance(model, keras.Model) or overridden(model, CALLING) or model.activity_regularizer is not None:
        return None
    return graph_model(model) if model.built else None


def _why_not(model: Any) -> str:
    kind = type(model).__name__
    if not isinstance(model, keras.Model):
        return f"only a Keras model can be split, {received(model)}"
    if model.activity_regularizer is not None:
        return (
            f"the model {model.name!r} has an activity regulariser of its own, which no stage could apply; give it to "
            "the layer whose output it is for"
        )
    own = overridden(model, CALLING)
    if isinstance(model, keras.Sequential) and own:
        return (
            f"the Sequential model {model.name!r} ({kind}) has a {own[0]}() of its own, which its stages would ignore; "
            "write what it does as a layer and add that to a plain keras.Sequential"
        )
    if isinstance(model, keras.Sequential):
        return f"the Sequential model {model.name!r} is not built; begin it with keras.Input(shape)"
    return (
        f"the model {model.name!r} ({kind}) is subclassed: its call() is Python, so where it could be cut is not "
        "known. Write its parts as functions and give them as segments:\n"
        "    # my_parts.py\n"
        "    def bottom(): return keras.Sequential([keras.Input((32,)), keras.layers.Dense(64)])\n"
        "    def top(): return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])\n"
        "    # your script\n"
        "    Pipeline([Segment(my_parts.bottom), Segment(my_parts.top)])"
    )

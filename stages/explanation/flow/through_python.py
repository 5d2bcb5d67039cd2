"""Ways of a value through NumPy and Python, which no graph shows: where it went out and where it came back.

    tensor ─► .numpy() ─► (anything) ─► constant ─► operation ─► target

The going out is recorded (`stages.explanation.flow.conversions`), the coming back is a constant among many. Which one
it is, is found out in two ways:

1. *By change*, where the code can be run again: a variable is changed, and the first constant whose value is another
   one in the second run came from it. This is evidence, not a guess.
2. *By value*: a constant that was first seen after the conversion and holds the converted value; else, as a guess, any
   such constant that the user's code cannot have written down as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.explanation.flow.graph import PYTHON, FlowGraph, Node
from stages.explanation.flow.user_tapes import Source
from stages.tensorflow_internals import read_behind, stop_recording, write_behind

Again = Callable[[], tuple[FlowGraph, int]]
"""Runs the code again: what happened, and the target's number."""


def link_by_change(graph: FlowGraph, sources: Sequence[Source], target: int, again: Again) -> None:
    """Link, in the graph, what left TensorFlow with where it came back, for variables that seem not to be used.

    Args:
        graph: The first run.
        sources: Variables.
        target: The target's number.
        again: Runs the code again.
    """
    ancestors, _ = graph.ancestors([target])
    unused = [source for source in sources if source.value not in ancestors]
    if not unused or not _differences(graph, target, unused, again):
        return
    by_itself = set(_differences(graph, target, [], again))  # time, random numbers
    for source in unused:
        for value in _differences(graph, target, [source], again):
            if value in by_itself:
                continue
            after = graph.descendants([source.value])
            out = [node for node in graph.conversions(after) if node.index <= graph.leaves[value].index]
            graph.link(out[-1] if out else _unseen(graph, after), value)


def _unseen(graph: FlowGraph, after: set[int]) -> Node:
    """A conversion that nobody saw: behind the last operation that worked on the value."""
    last = [node for node in graph.nodes if not after.isdisjoint(node.outputs)]
    node = Node(len(graph.nodes), "conversion", "NumPy", last[-1].outputs if last else tuple(after), (graph.pseudo(),))
    if last:
        node.layer, node.stage, node.line = last[-1].layer, last[-1].stage, last[-1].line
    return graph.add(node)


def _differences(graph: FlowGraph, target: int, sources: Sequence[Source], again: Again) -> list[int]:
    """Constants on the way to the target that have another value if these variables have."""
    handles = [graph.values[source.value] for source in sources]
    before = [_read(source, handle) for source, handle in zip(sources, handles, strict=True)]
    random = np.random.default_rng(0)
    try:
        for handle, value in zip(handles, before, strict=True):
            noise = random.uniform(0.5, 1.5, value.shape) * (1.0 + np.abs(np.asarray(value.numpy(), np.float64)))
            _write(handle, tf.cast(value + tf.cast(noise, value.dtype), value.dtype))
        other, _ = again()
    finally:
        for handle, value in zip(handles, before, strict=True):
            _write(handle, value)
    ancestors, _ = graph.ancestors([target])
    found = []
    for ours, theirs in zip(graph.nodes, other.nodes, strict=False):
        if ours.operation != theirs.operation or len(ours.inputs) != len(theirs.inputs):
            break  # the code took another way: what comes after cannot be compared
        for a, b in zip(ours.inputs, theirs.inputs, strict=True):
            if a in ancestors and _is_constant(graph, a) and _is_constant(other, b) and not _same(graph, a, other, b):
                found.append(a)
    return list(dict.fromkeys(found))


def link_by_value(graph: FlowGraph, source: int, targets: Sequence[int]) -> None:
    """The same where the code cannot be run again. A link that is only a guess has `Node.guessed`."""
    ancestors, _ = graph.ancestors(targets)
    after = graph.descendants([source])
    if source in ancestors or not after.isdisjoint(targets):
        return
    candidates = {v: n for v, n in graph.leaves.items() if v in ancestors and _is_constant(graph, v)}
    guesses = []
    for node in list(graph.conversions(after)):
        for value, taken in candidates.items():
            if taken.index > node.index and value not in graph.makers:
                if any(_same(graph, value, graph, given) for given in node.inputs) or _is_result(graph, value, node):
                    graph.link(node, value)
                elif _may_be(graph.values[value], taken, node):
                    guesses.append((node, value))
    if guesses and not any(value in graph.makers for value in candidates):
        node, value = guesses[-1]
        node.guessed = True
        graph.link(node, value)


def _is_constant(graph: FlowGraph, value: int) -> bool:
    tensor = graph.values[value]
    floating = tensor is not None and tensor.dtype.is_floating
    return floating and not [node for node in graph.makers.get(value, []) if node.kind != "reentry"]


def _may_be(tensor: Any, node: Node, conversion: Node) -> bool:
    """Whether a constant may come from a conversion: it is no number that stands in the code, and of a fitting size."""
    if tensor.shape.rank:
        return conversion.operation not in PYTHON
    value = float(tensor)
    numbers = [float(one) for one in node.literals if isinstance(one, int | float)]
    literal = value in (0.0, 1.0) or any(np.float32(one) == np.float32(value) for one in numbers)
    return not literal and not node.layer


def _same(graph: FlowGraph, a: int, other: FlowGraph, b: int) -> bool:
    ours, theirs = graph.values[a], other.values[b]
    if ours is None or theirs is None or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return ours is theirs
    return bool(ours.numpy().tobytes() == theirs.numpy().tobytes())


def _is_result(graph: FlowGraph, value: int, conversion: Node) -> bool:
    """Whether a constant is what a conversion gave; numbers that are everywhere prove nothing."""
    tensor, result = graph.values[value], conversion.result
    if result is None or tensor is None or tuple(tensor.shape) != np.shape(result):
        return False
    ours = np.asarray(tensor.numpy())
    return bool((ours == np.asarray(result).astype(ours.dtype)).all()) and not np.isin(ours, (0.0, 1.0)).all()


def _read(source: Source, handle: Any) -> Any:
    with stop_recording():
        return tf.identity(read_behind(handle, source.given.dtype))


def _write(handle: Any, value: Any) -> None:
    with stop_recording():
        write_behind(handle, value)


__all__ = ["link_by_change", "link_by_value"]

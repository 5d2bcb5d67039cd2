"""Ways of a value through NumPy and Python, which no graph shows: where it went out and where it came back.

    tensor ─► .numpy() ─► (anything) ─► constant ─► operation ─► target

The going out is recorded (`stages.explanation.flow.conversions`), the coming back is a constant among many. Which one
it is, is found out in two ways:

1. *By change*, where the code can be run again: a variable is changed, and the first constant whose value is another
   one in the second run came from it. This is evidence, not a guess. And whether the target itself is another one then
   is the judge of every "no dependence".
2. *By value*: a constant that was first seen after the conversion and holds the converted value; else, as a guess, any
   such constant that the user's code cannot have written down as a number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from stages.explanation.flow.graph import PYTHON, FlowGraph, Node
from stages.explanation.flow.holders import takes_from_before
from stages.explanation.flow.user_tapes import Source
from stages.tensorflow_internals import read_behind, stop_recording, write_behind

_SIGNS = (1.0, -1.0)

Again = Callable[[], tuple[FlowGraph, int]]
"""Runs the code again: what happened, and the target's number."""


@dataclass(frozen=True)
class Rerun:
    """The outcome of a second run, in which a variable that seems not to be used had another value.

    Attributes:
        moved: Whether the target had another value, too.
        other_way: Whether the code took another way.
        why_not: Why nothing could be seen so; empty if it could.
    """

    moved: bool = False
    other_way: bool = False
    why_not: str = ""


def link_by_change(graph: FlowGraph, sources: Sequence[Source], target: int, again: Again) -> dict[int, Rerun]:
    """Judge variables that seem not to be used by running again, and link what left TensorFlow with where it came back.

    Args:
        graph: The first run.
        sources: Variables.
        target: The target's number.
        again: Runs the code again.

    Returns:
        {number of each variable that seems not to be used: what running again says}.
    """
    ancestors, _ = graph.ancestors([target])
    unused = [source for source in sources if source.value not in ancestors]
    if not unused:
        return {}
    if (taken := takes_from_before(graph)) is not None:
        where = f"{taken.operation}" + (f" at {taken.line}" if taken.line else "")
        why = f"the code was not run again to see, since {where} would take other values from what was made before"
        return {source.value: Rerun(why_not=why) for source in unused}
    try:
        if not any(_changed(run) for run in _both_ways(graph, target, unused, again)):
            return {source.value: Rerun() for source in unused}
        alone = _compared(graph, target, [], again)  # time, random numbers
        found = {}
        for source in unused:
            runs = _both_ways(graph, target, [source], again)
            for value in dict.fromkeys(value for run in runs for value in run.constants):
                if value in alone.constants:
                    continue
                after = graph.descendants([source.value])
                out = [node for node in graph.conversions(after) if node.index <= graph.leaves[value].index]
                graph.link(out[-1] if out else _unseen(graph, after), value)
            moved, other = any(run.moved for run in runs), any(run.other_way for run in runs)
            why = "the target is another one with every run, so running again shows nothing" if alone.moved else ""
            found[source.value] = Rerun(moved and not why, other, why)
        return found
    except Exception as error:  # the user's own code, with values of ours
        why = f"the code could not be run again to see: {type(error).__name__}"
        return {source.value: Rerun(why_not=why) for source in unused}


class _Compared(NamedTuple):
    """Two runs side by side: constants on the way to the target that differ, whether it does, and the way there."""

    constants: list[int]
    moved: bool
    other_way: bool


def _both_ways(graph: FlowGraph, target: int, sources: Sequence[Source], again: Again) -> list[_Compared]:
    """Runs with larger and with smaller values; one of the two may fail (a root of what is below 0)."""
    found, failed = [], None
    for sign in _SIGNS:
        try:
            found.append(_compared(graph, target, sources, again, sign))
        except Exception as error:
            failed = error
    if failed is not None and not found:
        raise failed
    return found


def _changed(run: _Compared) -> bool:
    return bool(run.constants) or run.moved


def _unseen(graph: FlowGraph, after: set[int]) -> Node:
    """A conversion that nobody saw: behind the last operation that worked on the value."""
    last = [node for node in graph.nodes if not after.isdisjoint(node.outputs)]
    node = Node(len(graph.nodes), "conversion", "NumPy", last[-1].outputs if last else tuple(after), (graph.pseudo(),))
    if last:
        node.layer, node.stage, node.line = last[-1].layer, last[-1].stage, last[-1].line
    return graph.add(node)


def _compared(graph: FlowGraph, target: int, sources: Sequence[Source], again: Again, sign: float = 1.0) -> _Compared:
    """Run again with other values of these variables."""
    handles = [graph.values[source.value] for source in sources]
    before = [_read(source, handle) for source, handle in zip(sources, handles, strict=True)]
    random = np.random.default_rng(0)
    try:
        for handle, value in zip(handles, before, strict=True):
            noise = sign * random.uniform(0.5, 1.5, value.shape) * (1.0 + np.abs(np.asarray(value.numpy(), np.float64)))
            _write(handle, tf.cast(value + tf.cast(noise, value.dtype), value.dtype))
        with warnings.catch_warnings(action="ignore"):
            other, number = again()
    finally:
        for handle, value in zip(handles, before, strict=True):
            _write(handle, value)
    ancestors, _ = graph.ancestors([target])
    found, other_way = [], sum(node.kind != "reentry" for node in graph.nodes) != len(other.nodes)
    for ours, theirs in zip(graph.nodes, other.nodes, strict=False):
        if ours.operation != theirs.operation or len(ours.inputs) != len(theirs.inputs):
            other_way = True
            break  # the code took another way: what comes after cannot be compared
        for a, b in zip(ours.inputs, theirs.inputs, strict=True):
            if a in ancestors and _is_constant(graph, a) and _is_constant(other, b) and not _same(graph, a, other, b):
                found.append(a)
    return _Compared(list(dict.fromkeys(found)), not _same(graph, target, other, number), other_way)


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
                elif not node.quiet and _may_be(graph.values[value], taken, node):
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
    if conversion.operation == "iter()":  # gives tensors, and a number of turns
        return False
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
    """Whether a constant is what a conversion gave, or has it in a list; numbers that are everywhere prove nothing."""
    tensor, result = graph.values[value], conversion.result
    if result is None or tensor is None:
        return False
    ours = np.asarray(tensor.numpy())
    theirs = np.asarray(result).astype(ours.dtype)
    if ours.ndim == 1 and theirs.ndim == 0:  # losses that were appended to a list
        return bool((ours == theirs).any()) and not np.isin(theirs, (0.0, 1.0))
    return ours.shape == theirs.shape and bool((ours == theirs).all()) and not np.isin(ours, (0.0, 1.0)).all()


def _read(source: Source, handle: Any) -> Any:
    with stop_recording():
        return tf.identity(read_behind(handle, source.given.dtype))


def _write(handle: Any, value: Any) -> None:
    with stop_recording():
        write_behind(handle, value)


__all__ = ["Rerun", "link_by_change", "link_by_value"]

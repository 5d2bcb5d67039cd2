"""Through which operations of a recorded graph TensorFlow sends a gradient, and why not through the others.

Whether an operation passes a gradient to one of its inputs is not written anywhere: a registered gradient may give None
for some inputs (`Floor` has one that always does). So it is asked: the operation's own gradient function is called with
ones, for those operations only that stand between a source and a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from stages.explanation.flow.graph import FlowGraph, Node, tensors_of
from stages.tensorflow_internals import gradients_of_operation, has_gradient, is_trainable, stop_recording

NEVER_ASKED = frozenset({"EagerPyFunc", "PartitionedCall", "StatefulPartitionedCall", "While", "If", "Case"})
"""Operations whose gradient function cannot be called apart from a tape; they pass a gradient."""

PASSES = ""


class Edges:
    """The gradient edges of a graph, as one tape sees them.

    Args:
        graph: The graph.
        tape: id of the user's tape; None: all that ran counts as recorded.
        stops: Whether recording that is switched off is an obstacle.
    """

    def __init__(self, graph: FlowGraph, tape: int | None = None, stops: bool = True) -> None:
        self.graph = graph
        self.tape = tape
        self._stops = stops
        self._asked: dict[Node, list[bool]] = {}

    def passes(self, node: Node, position: int) -> bool:
        """Whether a gradient comes back to an input of a node, given one at its outputs."""
        return self.obstacle(node, position) == PASSES

    def obstacle(self, node: Node, position: int) -> str:
        """What keeps a gradient from coming back to an input; empty if nothing does.

        Returns:
            One of ``write``, ``conversion``, ``numpy_function``, ``stopped``, ``outside`` (the tape was not open),
            ``source`` (the input itself cannot have a gradient), ``result`` (the output cannot), ``unregistered``,
            ``not differentiable``, ``overtaken``, ``none``, or nothing.
        """
        if node.kind in ("write", "conversion", "numpy_function"):
            return node.kind
        if node.kind == "reentry":
            return "conversion"
        if self.graph.overtaken(node):
            return "overtaken"
        if node.kind == "operation" and registration(node.operation) == "not differentiable":
            return "not differentiable"
        if self._stops and (node.stopped or self.tape in node.muted):
            return "stopped"
        if self.tape is not None and self.tape not in node.tapes:
            return "outside"
        if not self._trainable(node.inputs[position]):
            return "source"
        if not any(is_trainable(out) for out in tensors_of(self.graph, node.outputs)):
            return "result"
        if node.kind == "custom":
            return PASSES if self._ask(node)[position] else "none"
        if registration(node.operation) == "unregistered":
            return "unregistered"
        return PASSES if self._ask(node)[position] else "none"

    def reached(self, values: set[int], within: set[Node]) -> set[int]:
        """All values from which a gradient comes back to one of these, themselves included."""
        found, stack = set(values), list(values)
        while stack:
            for node, position in self.graph.users.get(stack.pop(), ()):
                if node in within and self.passes(node, position):
                    new = [value for value in node.outputs if value not in found and self._trainable(value)]
                    found.update(new)
                    stack += new
        return found

    def border(self, reached: set[int], targets: Sequence[int]) -> list[tuple[Node, str]]:
        """Where the flow ends: the last operations on the ways to the targets that depend on it, and what they do.

        What leaves the flow and comes into it again (the mean in a normalisation, say) blocks nothing.

        Args:
            reached: What `reached` gives.
            targets: Values that are not among these.
        """
        values, behind = self.graph.ancestors(targets, reached)
        found: dict[Node, str] = {}
        for node in behind:
            for position in (i for i, value in enumerate(node.inputs) if value in reached):
                why = self.obstacle(node, position)
                if why == PASSES and reached.isdisjoint(values.intersection(node.outputs)):
                    why = "result"  # it passes gradients, but not of the output that is on the way
                if why not in (PASSES, "overtaken"):
                    found.setdefault(node, why)
        return sorted(found.items(), key=lambda item: item[0].index)

    def _trainable(self, value: int) -> bool:
        tensor = self.graph.values[value]
        return tensor is not None and bool(is_trainable(tensor))

    def _ask(self, node: Node) -> list[bool]:
        if node not in self._asked:
            self._asked[node] = self._answer(node)
        return self._asked[node]

    def _answer(self, node: Node) -> list[bool]:
        """For each input whether the gradient function gives something for it; what cannot be asked passes."""
        yes = [True] * len(node.inputs)
        if node.operation in NEVER_ASKED:
            return yes
        outputs = tensors_of(self.graph, node.outputs)
        inputs = tensors_of(self.graph, node.inputs)
        ones = [tf.ones_like(out) if is_trainable(out) else None for out in outputs]
        try:
            with stop_recording():
                if node.kind == "custom":
                    found = node.backward(*ones)
                else:
                    found = gradients_of_operation(node.operation, node.attributes, inputs, outputs, ones)
        except Exception:
            return yes
        found = list(found) if isinstance(found, list | tuple) else [found]
        answers = [gradient is not None for gradient in found]
        return answers + [True] * (len(yes) - len(answers))


def registration(operation: str) -> str:
    """Whether TensorFlow knows a gradient of an operation: empty, ``unregistered`` or ``not differentiable``."""
    return {None: "unregistered", False: "not differentiable", True: PASSES}[has_gradient(operation)]


__all__ = ["PASSES", "Edges", "registration"]

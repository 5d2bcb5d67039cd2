"""The graph of one eager run: operations, the values between them, and writes to variables.

    x ─► [MatMul dense] ─► [Relu dense] ─► [AssignVariableOp memory] ─► (content of the variable) ─► [ReadVariableOp] ─►

A tape keeps only what it can differentiate, so it cannot say why a gradient is None. Here everything is kept: also what
has no gradient, what went through a variable, and where a value left TensorFlow for NumPy or Python.

Rules:

1. A value is a tensor, by identity, or a *pseudo value*: the content of a variable after an assignment, or what a
   conversion to NumPy or Python gave. Numbers are given in the order in which values are first seen.
2. A variable is its resource handle. An operation that reads it depends on the handle and on its last content.
3. Operations of which only the shape of the input matters (`Shape`, `ZerosLike` ...) depend on nothing.
4. All tensors are kept alive: an identity must not be used twice. A graph takes as much memory as a tape over the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPE_ONLY = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})
"""Operations whose result does not depend on the values they are given."""

LONGEST_CODE = 100
"""Characters of a source line that are shown."""

PYTHON = frozenset({"float()", "int()", "bool()", "complex()", "index", "format()"})
"""Conversions that give a number, in the words of `Node.operation`."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the user's own code.

    Attributes:
        file: The path.
        number: Counted from 1.
        function: The function it is in.
        code: Its text; empty where the source is not there.
    """

    file: str
    number: int
    function: str
    code: str = ""

    def __str__(self) -> str:
        code = self.code if len(self.code) <= LONGEST_CODE else self.code[: LONGEST_CODE - 3] + "..."
        return f"{Path(self.file).name}:{self.number}" + (f": {code}" if code else "")


@dataclass(slots=True, eq=False)
class Node:
    """One thing that happened to values.

    Attributes:
        index: Its number, in the order of execution.
        kind: ``operation``, ``custom`` (`tf.custom_gradient`, a function call), ``write`` (into a variable),
            ``numpy_function``, or ``conversion`` (a value left TensorFlow).
        operation: TensorFlow's name of the operation, or of the method that converted.
        inputs: Value numbers; for a read, the variable's content comes last.
        outputs: Value numbers.
        attributes: What the operation was given besides, as the tape keeps it.
        layer: Path of the Keras layer it ran in; empty outside of any.
        stage: The stage it ran in; empty where there are none.
        line: The user's line that it came from.
        tapes: The user's tapes (by id) that were recording.
        muted: Those that were open, but in their `stop_recording`.
        stopped: Whether recording was switched off for all tapes.
        stateful: Whether the layer says that it keeps a state.
        owner: For a write: who wrote, e.g. "metric mean".
        backward: For a custom gradient: its gradient function.
        literals: Constants that stand in the code of the user's function.
        result: For a conversion: the array or number that it gave, if it is known.
        guessed: For a conversion: whether it is only a guess where its value came back.
        quiet: For a conversion: whether TensorFlow or Keras made it for itself.
    """

    index: int
    kind: str
    operation: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: tuple[Any, ...] = ()
    layer: str = ""
    stage: str = ""
    line: Line | None = None
    tapes: frozenset[int] = frozenset()
    muted: frozenset[int] = frozenset()
    stopped: bool = False
    stateful: bool = False
    owner: str = ""
    backward: Any = None
    literals: tuple[Any, ...] = ()
    result: Any = None
    guessed: bool = False
    quiet: bool = False


@dataclass(eq=False)
class FlowGraph:
    """Nodes and values of one run."""

    nodes: list[Node] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    """The tensor of each value number; None for a pseudo value."""
    makers: dict[int, list[Node]] = field(default_factory=dict)
    """{value: nodes that gave it}; a custom gradient comes after the operation whose gradient it takes the place of."""
    users: dict[int, list[tuple[Node, int]]] = field(default_factory=dict)
    """{value: (node, which of its inputs)}."""
    leaves: dict[int, Node] = field(default_factory=dict)
    """{value that nothing made: the first node that took it}."""
    content: dict[int, int] = field(default_factory=dict)
    """{handle: the content that was written last}."""
    arrays: dict[int, tuple[int, Line | None]] = field(default_factory=dict)
    """{tensor that was made of a NumPy array or scalar: (how many nodes there were, where)}."""
    gradients: set[int] = field(default_factory=set)
    """What the user's tapes gave."""
    _numbers: dict[int, int] = field(default_factory=dict)

    def number(self, tensor: Any) -> int | None:
        """The number of a tensor; None if it was never seen."""
        return self._numbers.get(id(tensor))

    def seen(self, tensor: Any) -> int:
        """The number of a tensor, a new one if need be."""
        found = self._numbers.get(id(tensor))
        if found is None:
            found = self._numbers[id(tensor)] = len(self.values)
            self.values.append(tensor)
        return found

    def pseudo(self) -> int:
        """A new value that is no tensor."""
        self.values.append(None)
        return len(self.values) - 1

    def add(self, node: Node) -> Node:
        """Append a node."""
        self.nodes.append(node)
        for value in node.outputs:
            self.makers.setdefault(value, []).append(node)
        if node.operation not in SHAPE_ONLY:
            for position, value in enumerate(node.inputs):
                self.users.setdefault(value, []).append((node, position))
        for value in node.inputs:
            if value not in self.makers:
                self.leaves.setdefault(value, node)
        return node

    def link(self, node: Node, value: int) -> None:
        """Let a value that nothing made come from what a conversion gave."""
        back = Node(len(self.nodes), "reentry", "constant", node.outputs, (value,), layer=node.layer, line=node.line)
        self.add(back)

    def ancestors(self, values: Iterable[int], end: Set[int] = frozenset()) -> tuple[set[int], set[Node]]:
        """All values that these depend on, themselves included, and the nodes between; not beyond those of `end`."""
        found, nodes, stack = set(values), set(), list(values)
        while stack:
            for node in self.makers.get(stack.pop(), ()):
                nodes.add(node)
                for value in node.inputs if node.operation not in SHAPE_ONLY else ():
                    if value not in found and value not in end:
                        found.add(value)
                        stack.append(value)
        return found, nodes

    def descendants(self, values: Iterable[int], within: set[Node] | None = None) -> set[int]:
        """All values that depend on these, themselves included; by way of some nodes only."""
        found, stack = set(values), list(values)
        while stack:
            for node, _ in self.users.get(stack.pop(), ()):
                if within is None or node in within:
                    new = [value for value in node.outputs if value not in found]
                    found.update(new)
                    stack += new
        return found

    def conversions(self, values: set[int]) -> Iterator[Node]:
        """Where one of these values left TensorFlow."""
        return (n for n in self.nodes if n.kind == "conversion" and not values.isdisjoint(n.inputs))

    def overtaken(self, node: Node) -> bool:
        """Whether a custom gradient took the place of a node's own."""
        return any(self.makers[value][-1] is not node for value in node.outputs)


def tensors_of(graph: FlowGraph, values: Sequence[int]) -> list[Any]:
    """The tensors of some values, pseudo values left out."""
    return [tensor for value in values if (tensor := graph.values[value]) is not None]

"""One traced function cut into a forward and a backward part that hand the tape's intermediates over.

A compiled stage forwards microbatch 3 before it backwards microbatch 1, so forward and backward are two functions. A
tape over a compiled function does the same cut inside TensorFlow at several times the price of the call, and computing
the forward pass again costs a third more arithmetic. Here forward and backward are traced **together**, with the output
gradients (*seeds*) as placeholders, and the finished graph is cut once:

      inputs ──► forward operations ──► outputs
                        │ kept tensors (what the tape holds)
      seeds  ──► backward operations ──► gradients

Rules:

1. An operation belongs to the backward part exactly if it depends on a seed. Everything else is forward.
2. A *kept* tensor is a forward tensor that a backward operation, or a gradient, reads. Constants are copied.
3. Variables are captured by both parts, never kept; their *values* are kept, so that a backward uses the weights of
   its own forward.
4. Stateful forward operations (moving statistics, seed generators) run in the forward part only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from stages.tape.direct_calls import direct, portable, portable_dtype, unportable


@dataclass(frozen=True)
class Traced:
    """The symbolic tensors that the joint function leaves in one graph.

    Attributes:
        outputs: Of the forward part.
        seeds: Where the backward part begins.
        gradients: What it ends in; None where there is no gradient.
        inputs: How many of the gradients are of inputs, and come first; for a cut into halves.
    """

    outputs: Sequence[Any]
    seeds: Sequence[Any]
    gradients: Sequence[Any | None]
    inputs: int = 0


@dataclass(frozen=True)
class SplitFunctions:
    """The two halves, ready to call.

    Attributes:
        forward: inputs → outputs followed by the kept tensors.
        backward: kept tensors followed by the seeds → the gradients that exist, through `finish`.
        outputs: How many of forward's results are outputs.
        output_dtypes: Their dtypes (forward itself returns int64 for int32).
        kept: The symbolic kept tensors (dtype and static shape), for reports.
        seeds: How many seeds there are.
        source: The joint trace. It owns the functions inside loops and conditionals, which TensorFlow forgets with it,
            so whoever calls the halves must keep it.
    """

    forward: Callable[..., list[Any]]
    backward: Callable[..., list[Any]]
    outputs: int
    output_dtypes: tuple[Any, ...]
    kept: tuple[Any, ...]
    seeds: int
    source: Any


def depends_on(tensors: Sequence[Any | None], seeds: Sequence[Any]) -> tuple[frozenset[int] | None, ...]:
    """Which seeds each tensor of the graph being traced depends on; None for no tensor.

    A gradient of which every seed is missing does not exist, though the traced function would compute zeros.
    """
    after = [depending_on([seed.op]) for seed in seeds]
    return tuple(
        None if tensor is None else frozenset(i for i, names in enumerate(after) if tensor.op.name in names)
        for tensor in tensors
    )


def split_functions(
    joint: Callable[..., Traced],
    signature: Sequence[Any],
    finish: Callable[[Sequence[Any | None]], Sequence[Any]],
) -> SplitFunctions:
    """Trace `joint` and cut it.

    Args:
        joint: Takes one symbolic tensor per entry of `signature`; makes its own seed placeholders.
        signature: `tf.TensorSpec` of the inputs.
        finish: Called in the backward trace with the gradients (None where there is none), in the order of
            `Traced.gradients`; what it returns is what `backward` returns (it may accumulate into variables).

    Returns:
        The two functions.
    """
    graph = JointGraph(joint, signature)
    outputs, gradients = graph.traced.outputs, [g for g in graph.traced.gradients if g is not None]
    backward = graph.part(graph.backward - graph.seeds, gradients)
    kept = tuple(tensor for tensor in backward.reads if tensor.op.name not in graph.seeds)

    def finish_all(found: Sequence[Any]) -> list[Any]:
        each = iter(found)
        return list(finish([None if g is None else next(each) for g in graph.traced.gradients]))

    return SplitFunctions(
        forward=graph.forward_function(signature, kept),
        backward=graph.function(backward, [*kept, *graph.traced.seeds], gradients, finish_all),
        outputs=len(outputs),
        output_dtypes=tuple(output.dtype for output in outputs),
        kept=kept,
        seeds=len(graph.traced.seeds),
        source=graph.source,
    )


class GraphPart(NamedTuple):
    """Some operations of a graph, with what they take from the others.

    Attributes:
        names: The operations, with copies of the constants that they read.
        definition: Their nodes.
        reads: The tensors that come from elsewhere, and are neither constants nor variables.
    """

    names: frozenset[str]
    definition: Any
    reads: tuple[Any, ...]


class JointGraph:
    """One trace of forward and backward, parts of which become functions of their own.

    Args:
        joint: As `split_functions` takes it, like `signature`.

    Attributes:
        arguments: The symbolic inputs.
        traced: What `joint` returned.
        seeds: Names of the operations that begin the backward part.
        backward: Names of all operations that depend on a seed, these included (rule 1).
        source: The trace itself, which must live as long as its functions.
    """

    def __init__(self, joint: Callable[..., Traced], signature: Sequence[Any]) -> None:
        traced: list[Traced] = []
        arguments: list[Any] = []

        def scratch(*inputs: Any) -> list[Any]:
            arguments[:] = inputs
            traced[:] = [joint(*inputs)]
            return list(traced[0].outputs)

        # A function that makes variables when it is first called (a metric's) is traced twice; the last trace counts.
        source = tf.function(scratch, input_signature=tuple(signature), autograph=False).get_concrete_function()
        graph = arguments[0].graph
        self.arguments, self.traced, self.source = arguments, traced[0], (source, graph)
        self.operations = graph.get_operations()
        self.seeds = frozenset(tensor.op.name for tensor in self.traced.seeds)
        self.backward = depending_on([graph.get_operation_by_name(name) for name in self.seeds])
        self._resources = {internal.name: external for external, internal in graph.captures}
        self._outside = {tensor.op.name for tensor in arguments} | {name.split(":")[0] for name in self._resources}
        self._definition = graph.as_graph_def()

    @property
    def forward(self) -> set[str]:
        """Names of the operations that depend on no seed."""
        return {op.name for op in self.operations} - self.backward - self._outside

    def part(self, names: Collection[str], wanted: Sequence[Any]) -> GraphPart:
        """Some operations, by name, and what they and the tensors that are wanted of them read from elsewhere."""
        names = set(names) - self._outside
        constants: set[str] = set()
        reads: dict[str, Any] = {}
        for tensor in [*(t for op in self.operations if op.name in names for t in op.inputs), *wanted]:
            if tensor.op.name in names or tensor.name in self._resources:
                continue
            if tensor.op.type == "Const":
                constants.add(tensor.op.name)
            else:
                reads.setdefault(tensor.name, tensor)
        return GraphPart(
            frozenset(names | constants), _subgraph(self._definition, names | constants), tuple(reads.values())
        )

    def forward_function(self, signature: Sequence[Any], kept: Sequence[Any]) -> Callable[..., list[Any]]:
        """The forward part: inputs → outputs followed by what is kept."""
        wanted = [*self.traced.outputs, *kept]
        part = self.part(self.forward, wanted)

        def forward(*inputs: Any) -> list[Any]:
            given = dict(zip((tensor.name for tensor in self.arguments), inputs, strict=True))
            return [portable(tensor) for tensor in self._evaluate(part, given, wanted)]

        return direct(forward, signature)

    def function(
        self,
        part: GraphPart,
        takes: Sequence[Any],
        wanted: Sequence[Any],
        finish: Callable[[Sequence[Any]], Sequence[Any]],
        inputs_as_they_are: bool = False,
    ) -> Callable[..., list[Any]]:
        """A part as a function of its own.

        Args:
            part: Which operations; seeds are not among them.
            takes: Tensors of the joint graph that are given, as another part's function returned them; inputs as they
                are where there is no forward function that returned them.
            wanted: Tensors of the joint graph.
            finish: From these to what the function returns; called while it is traced.
            inputs_as_they_are: Whether inputs among `takes` come in their own dtype.
        """

        def run(*tensors: Any) -> list[Any]:
            given = {t.name: unportable(value, t.dtype) for t, value in zip(takes, tensors, strict=True)}
            return list(finish(self._evaluate(part, given, wanted)))

        own = {tensor.name for tensor in self.arguments} if inputs_as_they_are else set()
        dtypes = [t.dtype if t.name in own else portable_dtype(t.dtype) for t in takes]
        return direct(run, [tf.TensorSpec(t.shape, dtype) for t, dtype in zip(takes, dtypes, strict=True)])

    def _evaluate(self, part: GraphPart, given: dict[str, Any], wanted: Sequence[Any]) -> list[Any]:
        """Import a part into the graph being traced and return the wanted tensors of it."""
        capture = tf.compat.v1.get_default_graph().capture
        given = given | {name: capture(external) for name, external in self._resources.items()}
        read = {edge for node in part.definition.node for edge in node.input}
        mapping = {n: t for n, t in given.items() if n in read or n.removesuffix(":0") in read}
        inside = [tensor for tensor in wanted if tensor.op.name in part.names]
        found = iter(
            tf.graph_util.import_graph_def(
                part.definition, input_map=mapping, return_elements=[tensor.name for tensor in inside], name=""
            )
        )
        return [next(found) if tensor.op.name in part.names else given[tensor.name] for tensor in wanted]


def depending_on(operations: Sequence[Any]) -> set[str]:
    """Names of all operations that depend on one of these, themselves included (rule 1)."""
    found = {operation.name for operation in operations}
    stack = list(operations)
    while stack:
        for tensor in stack.pop().outputs:
            for op in tensor.consumers():
                if op.name not in found:
                    found.add(op.name)
                    stack.append(op)
    return found


def needed_for(tensors: Sequence[Any], among: Collection[str]) -> set[str]:
    """Names of the operations, among some, that these tensors are computed by."""
    stack = [tensor.op for tensor in tensors]
    found: set[str] = set()
    while stack:
        op = stack.pop()
        if op.name in among and op.name not in found:
            found.add(op.name)
            stack += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return found


def _subgraph(definition: Any, names: set[str]) -> Any:
    """The nodes of a GraphDef with these names, without control edges and colocation to the others."""
    part = tf.compat.v1.GraphDef()
    part.versions.CopyFrom(definition.versions)
    part.library.CopyFrom(definition.library)
    for node in definition.node:
        if node.name not in names:
            continue
        copy = part.node.add()
        copy.CopyFrom(node)
        edges = [edge for edge in node.input if not edge.startswith("^") or edge[1:] in names]
        del copy.input[:]
        copy.input.extend(edges)
        copy.attr.pop("_class", None)
    return part

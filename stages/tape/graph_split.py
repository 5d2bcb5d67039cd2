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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from stages.tape.direct_calls import direct, portable, portable_dtype, unportable


@dataclass(frozen=True)
class Traced:
    """The symbolic tensors that the joint function leaves in one graph."""

    outputs: Sequence[Any]
    seeds: Sequence[Any]
    gradients: Sequence[Any | None]


@dataclass(frozen=True)
class SplitFunctions:
    """The two halves, ready to call.

    Attributes:
        forward: inputs → outputs followed by the kept tensors.
        backward: kept tensors followed by the seeds → the gradients that exist, through `finish`.
        outputs: How many of forward's results are outputs.
        output_dtypes: Their dtypes (forward itself returns int64 for int32).
        kept: The symbolic kept tensors (dtype and static shape), for reports.
        source: The joint trace. It owns the functions inside loops and conditionals, which TensorFlow forgets with it,
            so whoever calls the halves must keep it.
    """

    forward: Callable[..., list[Any]]
    backward: Callable[..., list[Any]]
    outputs: int
    output_dtypes: tuple[Any, ...]
    kept: tuple[Any, ...]
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
    traced: list[Traced] = []
    arguments: list[Any] = []

    def scratch(*inputs: Any) -> list[Any]:
        arguments[:] = inputs
        traced[:] = [joint(*inputs)]
        return list(traced[0].outputs)

    # A function that makes variables when it is first called (a metric's) is traced twice; the last trace counts.
    source = tf.function(scratch, input_signature=tuple(signature), autograph=False).get_concrete_function()
    return _Cut(arguments[0].graph, arguments, traced[0], source).functions(signature, finish)


class _Cut:
    """The assignment of a graph's operations and tensors to the two halves."""

    def __init__(self, graph: Any, arguments: Sequence[Any], traced: Traced, source: Any) -> None:
        self.arguments, self.traced, self.source = arguments, traced, source
        self.resources = {internal.name: external for external, internal in graph.captures}
        outside = {tensor.op.name for tensor in arguments} | {name.split(":")[0] for name in self.resources}
        seeds = {tensor.op.name for tensor in traced.seeds}
        backward = depending_on([graph.get_operation_by_name(name) for name in seeds])
        constants: set[str] = set()
        kept: dict[str, Any] = {}
        readers = [tensor for op in graph.get_operations() if op.name in backward for tensor in op.inputs]
        for tensor in [*readers, *(g for g in traced.gradients if g is not None)]:
            if tensor.op.name in backward or tensor.name in self.resources:
                continue
            if tensor.op.type == "Const":
                constants.add(tensor.op.name)
            else:
                kept.setdefault(tensor.name, tensor)
        self.kept = tuple(kept.values())
        self.forward_names = {op.name for op in graph.get_operations()} - backward - outside
        self.backward_names = (backward - seeds) | constants
        definition = graph.as_graph_def()
        self.forward_graph = _subgraph(definition, self.forward_names)
        self.backward_graph = _subgraph(definition, self.backward_names)

    def functions(self, signature: Sequence[Any], finish: Callable[..., Sequence[Any]]) -> SplitFunctions:
        outputs, seeds = list(self.traced.outputs), list(self.traced.seeds)

        def forward(*inputs: Any) -> list[Any]:
            given = dict(zip((tensor.name for tensor in self.arguments), inputs, strict=True))
            wanted = [*outputs, *self.kept]
            return [portable(t) for t in self._evaluate(self.forward_graph, self.forward_names, given, wanted)]

        def backward(*tensors: Any) -> list[Any]:
            kept, given_seeds = tensors[: len(self.kept)], tensors[len(self.kept) :]
            given = {k.name: unportable(t, k.dtype) for k, t in zip(self.kept, kept, strict=True)}
            given |= dict(zip((seed.name for seed in seeds), given_seeds, strict=True))
            wanted = [gradient for gradient in self.traced.gradients if gradient is not None]
            found = iter(self._evaluate(self.backward_graph, self.backward_names, given, wanted))
            return list(finish([None if g is None else next(found) for g in self.traced.gradients]))

        specs = [tf.TensorSpec(t.shape, portable_dtype(t.dtype)) for t in self.kept]
        specs += [tf.TensorSpec(seed.shape, seed.dtype) for seed in seeds]
        return SplitFunctions(
            forward=direct(forward, signature),
            backward=direct(backward, specs),
            outputs=len(outputs),
            output_dtypes=tuple(output.dtype for output in outputs),
            kept=self.kept,
            source=(self.source, self.arguments[0].graph),
        )

    def _evaluate(self, definition: Any, names: set[str], given: dict[str, Any], wanted: Sequence[Any]) -> list[Any]:
        """Import a half into the graph being traced and return the wanted tensors of it."""
        capture = tf.compat.v1.get_default_graph().capture
        given = given | {name: capture(external) for name, external in self.resources.items()}
        read = {edge for node in definition.node for edge in node.input}
        mapping = {n: t for n, t in given.items() if n in read or n.removesuffix(":0") in read}
        inside = [tensor for tensor in wanted if tensor.op.name in names]
        found = iter(
            tf.graph_util.import_graph_def(
                definition, input_map=mapping, return_elements=[tensor.name for tensor in inside], name=""
            )
        )
        return [next(found) if tensor.op.name in names else given[tensor.name] for tensor in wanted]


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

"""The search for the place where a gradient becomes zero, or stops being finite.

Two questions of one run, both by going along the flow from a variable to the target:

- *Where does the gradient turn bad?* dL/d(every tensor on the way) is asked of the tape. An operation whose output has
  a good gradient and whose input has a bad one is where it happens: a ReLU that is nowhere positive, a root at 0.
- *Which value was the first that is not finite?* The first operation, in the order of execution, that gives an infinity
  or a NaN though all it was given is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.explanation.flow.graph import FlowGraph, Node
from stages.explanation.reasons import place
from stages.explanation.rows import CONNECTED, NOT_CONNECTED, NOT_FINITE, ZERO, Blocker
from stages.tape.accumulate import dense
from stages.tensorflow_internals import is_trainable

Differentiate = Callable[[list[Any]], Sequence[Any]]
"""Tensors -> dTarget/d(each), or None for each."""

_ZERO_ADVICE = {
    "dead unit": "no input of the activation is positive: look at the bias, the learning rate, the initialisation",
    "saturated": "the activation is saturated: its inputs are too large; scale them, or normalise",
    "second derivative": "nothing is wrong: another activation (softplus, swish, tanh) has a second derivative",
    "multiplied by zero": "the other factor is zero: look at masks, weights of losses, gates, and initial values",
    "py_function": "inside tf.py_function use tf operations only: NumPy in it has no gradient, and TensorFlow gives 0",
    "rounding": "the derivative of a step is 0: use a straight-through estimate",
    "custom gradient": "look at what its gradient function returns for this input",
    "zero": "look at the values that go into the operation",
}


def status_of(gradient: Any) -> tuple[str, float | None]:
    """The status of a gradient and its L2 norm."""
    if gradient is None:
        return NOT_CONNECTED, None
    values = _array(gradient)
    if not np.isfinite(values).all():
        return NOT_FINITE, float("nan")
    return (CONNECTED if values.any() else ZERO), float(np.linalg.norm(values.ravel()))


def where_zero(
    graph: FlowGraph, source: int, targets: Sequence[int], ask: Differentiate
) -> tuple[str, str, str, list[Blocker]]:
    """Where the gradient of a source becomes zero: reason, words, advice, places."""
    try:
        found = _turning(graph, source, targets, ask, lambda values: not values.any())
    except tf.errors.OpError:  # what is inside tf.py_function can be differentiated once only
        _, nodes = graph.ancestors(targets)
        found = [node for node in graph.nodes if node in nodes and node.operation == "EagerPyFunc"]
    if not found:
        why = "the gradient is zero already where it comes from: the target itself has derivative 0 here"
        return "zero", why, _ZERO_ADVICE["zero"], []
    reasons = [_zero_reason(graph, node) for node in found]
    name, why = reasons[0]
    places = [place(node, words if words != why else "") for node, (_, words) in zip(found, reasons, strict=True)]
    return name, why, _ZERO_ADVICE[name], places


def where_not_finite(
    graph: FlowGraph, source: int, targets: Sequence[int], ask: Differentiate
) -> tuple[str, str, str, list[Blocker]]:
    """Where the gradient of a source, or a value before it, stops being finite: reason, words, advice, places."""
    _, nodes = graph.ancestors(targets)
    first = _first_not_finite(graph, nodes)
    if first is not None:
        node, given = first
        if given:
            why = "a value that goes in is not finite: an input, a target, a weight"
            return "not finite value", why, "look at the data and the variables", [place(node, given)]
        why = "the first value that is not finite comes from this operation, of finite inputs"
        advice = "keep its input inside the domain: log and division need more than 0, exp less than 88"
        return "not finite value", why, advice, [place(node, _range(graph, node))]
    found = _turning(graph, source, targets, ask, lambda values: not np.isfinite(values).all())
    if not found:
        return "not finite gradient", "all values are finite, and the gradient at the target is not", "", []
    why = "all values are finite; the gradient stops being finite in the backward pass of this operation"
    advice = "its derivative has no finite value here: keep the input away from that point (add a small number inside)"
    return "not finite gradient", why, advice, [place(node, _range(graph, node)) for node in found]


def _turning(
    graph: FlowGraph, source: int, targets: Sequence[int], ask: Differentiate, bad: Callable[[Any], bool]
) -> list[Node]:
    """Nodes on the way with a good gradient at an output and a bad one at an input that comes from the source."""
    ancestors, nodes = graph.ancestors(targets)
    after = sorted(graph.descendants([source], nodes) & ancestors)
    tensors = {v: graph.values[v] for v in after if graph.values[v] is not None}
    tensors = {v: t for v, t in tensors.items() if t.dtype != tf.resource and is_trainable(t)}
    found = ask(list(tensors.values())) if tensors else []
    gradients = {v: _array(g) for v, g in zip(tensors, found, strict=True) if g is not None}
    turning: dict[Node, None] = {}
    seen, stack = {source}, [source]
    while stack:
        for node, _ in graph.users.get(stack.pop(), ()):
            outputs = [value for value in node.outputs if value in gradients]
            if node not in nodes or graph.overtaken(node) or not outputs:
                continue
            if any(not bad(gradients[value]) for value in outputs):
                turning[node] = None
                continue
            new = [value for value in outputs if value not in seen]
            seen.update(new)
            stack += new
    return sorted(turning, key=lambda node: node.index)


def _first_not_finite(graph: FlowGraph, nodes: set[Node]) -> tuple[Node, str] | None:
    """The node that made, or first took, a value that is not finite; in the second case what it took."""
    for node in sorted(nodes, key=lambda node: node.index):
        if node.kind != "operation" or all(_finite(graph, value) for value in node.outputs):
            continue
        taken = [value for value in node.inputs if not _finite(graph, value)]
        if not taken and node.operation == "ReadVariableOp":
            return node, "reads a variable that is not finite"
        return node, "takes a value that is not finite" if taken else ""
    return None


def _finite(graph: FlowGraph, value: int) -> bool:
    tensor = graph.values[value]
    if tensor is None or not tensor.dtype.is_floating:
        return True
    return bool(np.isfinite(_array(tensor)).all())


def _zero_reason(graph: FlowGraph, node: Node) -> tuple[str, str]:
    """A short name and words for a node behind which the gradient is zero."""
    inputs = [_array(t) for v in node.inputs if (t := graph.values[v]) is not None and t.dtype.is_floating]
    if node.operation in ("Relu", "Relu6", "Elu", "Selu", "LeakyRelu") and inputs:
        if (inputs[0] <= 0).all():
            return "dead unit", f"none of the {inputs[0].size} inputs is above 0, so its derivative is 0 everywhere"
        if node.operation == "Relu6" and ((inputs[0] <= 0) | (inputs[0] >= 6)).all():
            return "saturated", f"its inputs are {_span(inputs[0])}, and it is flat below 0 and above 6"
        return "dead unit", "the gradient is zero wherever the input is above 0"
    if node.operation in ("ReluGrad", "Relu6Grad", "LeakyReluGrad"):
        return "second derivative", "the second derivative of this activation is 0 everywhere, by mathematics"
    if node.operation in ("Sigmoid", "Tanh", "Softmax", "Erf"):
        return "saturated", f"its inputs are {_span(inputs[0])}, where its derivative is 0 in this precision"
    if node.operation in ("Mul", "MatMul", "BatchMatMulV2", "SelectV2", "Select", "Einsum", "Conv2D"):
        if any(not values.any() for values in inputs):
            return "multiplied by zero", "one of its factors is all zero"
        return "zero", "the gradient that comes to it is not zero, what it passes on is"
    if node.kind == "custom":
        return "custom gradient", "the gradient function of a tf.custom_gradient gives zeros"
    if node.operation == "EagerPyFunc":
        return "py_function", "the function inside tf.py_function has no gradient, and TensorFlow makes 0 of that"
    if node.operation in ("ReadVariableOp", "ResourceGather"):
        return "zero", "gradients from several uses cancel, or no row that is used has one"
    if node.operation == "Sign":
        return "rounding", "the derivative of a step is 0"
    return "zero", "the gradient that comes to it is not zero, what it passes on is"


def _range(graph: FlowGraph, node: Node) -> str:
    """What an operation was given, in words."""
    inputs = [_array(t) for v in node.inputs if (t := graph.values[v]) is not None and t.dtype.is_floating]
    return "; ".join(f"input {i} is {_span(values)}" for i, values in enumerate(inputs) if values.size)


def _span(values: Any) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _array(tensor: Any) -> Any:
    values = np.asarray(tf.convert_to_tensor(dense(tensor)).numpy())
    return values if values.dtype.kind == "c" else values.astype(np.float64)


__all__ = ["status_of", "where_not_finite", "where_zero"]

"""Reasons for a gradient that is None: from a recorded graph to a reason, the places, and advice.

    the value does not lead to the target          no dependence, made beside, NumPy or Python in between
    it does, and the tape does not follow it       trainable=False, variable or tensor not watched, replaced, too late
    it does, and the flow ends on the way          by an operation (border of the flow), outside the tape, stopped

The verdict (None or not) is always a real tape's. What is worked out here is only the reason; where graph and tape do
not agree, the reason is `unknown`, with what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from stages.explanation.flow.edges import Edges
from stages.explanation.flow.graph import PYTHON, FlowGraph, Node
from stages.explanation.flow.holders import holder_of
from stages.explanation.flow.user_tapes import GradientCall, Source, is_tracked
from stages.explanation.rows import Blocker
from stages.explanation.unproven import unfollowed
from stages.tensorflow_internals import is_trainable

ADVICE = {
    # the target does not depend on it
    "no dependence": "use what is computed from it in the target, or leave it out of the gradients that you ask for",
    "not followed": "give explain() a function: it runs it again with the variable changed, and so knows",
    "hidden way": "let the value stay a tensor on its way to the target: no tape can see what goes another way",
    "branch": "if it should learn, compute both ways and choose with tf.where, or weigh them with it",
    "second derivative": "nothing is wrong: leave it out of the gradients that you ask for",
    "made beside": "ask for the gradient of the tensor or variable that the target was computed from",
    # the tape does not follow it
    "integer source": "differentiate with respect to a floating tensor: give it a decimal point or cast it before",
    "trainable=False": "set trainable=True if it is to be trained, or do not ask for it",
    "variable not watched": "call tape.watch(variable) first, or leave watch_accessed_variables at True",
    "tensor not watched": "call tape.watch(tensor) before it is used; only variables are watched by themselves",
    "watched too late": "call tape.watch before the first operation that uses it",
    "replaced": "update the variable in place, variable.assign_sub(...), and keep its name for the variable",
    "another tape": "hand over: this tape gives dL/dOut of the activation (tape.watch it), the other one goes on with "
    "gradient(out, variables, output_gradients=dL/dOut); stages.Stage does both",
    "outside the tape": "compute it inside `with tf.GradientTape()`",
    "recording stopped": "move it out of tape.stop_recording()",
    # an operation ends the flow
    "assignment": "use the tensor itself; a variable that is written and read back has no gradient to what was written",
    "stateful layer": "give the state as an input and return it as an output (stages.Stage(..., states=), windows=)",
    "tf.data": "use the tensor itself: a data set gives values, and no gradient goes back through one",
    "queue": "use the tensor itself: no gradient goes back through a queue",
    "table": "use the tensor itself, or an Embedding or tf.gather of a variable: no gradient goes back through a table",
    "metric": "use a loss function: a metric keeps sums in variables, and what is read back has no gradient",
    "average": "use the value itself: a moving average is for evaluating, and what is read back has no gradient",
    "cast": "stay in floating point on the way to the target",
    "comparison": "use a smooth stand-in (sigmoid, softmax) in place of a hard threshold",
    "stop_gradient": "take stop_gradient away if this should learn",
    "rounding": "round only for reporting, or use a straight-through estimate: x + stop_gradient(round(x) - x)",
    "argmax": "use the scores (softmax) in the loss, and argmax only for reporting",
    "integer result": "stay in floating point on the way to the target",
    "NumPy": "do it with tf or keras.ops in place of NumPy",
    "Python": "keep it a tensor: float(), int() and if leave TensorFlow",
    "predict": "call the model, model(x, training=True): predict gives NumPy arrays",
    "numpy_function": "write it with tf operations, or give it a gradient with tf.custom_gradient",
    "py_function": "inside tf.py_function use tf operations only: NumPy in it has no gradient",
    "no registered gradient": "use other operations, or give the function a gradient with tf.custom_gradient",
    "not differentiable": "use another operation",
    "custom gradient": "its gradient function returns None for this input; return a tensor",
    "compiled": "take the loop over a data set out of the tf.function: in plain Python its gradient passes",
    "truncation": "raise truncate=, or leave it out: gradients of states go back through so many windows only",
    "unknown": "please report it, with the code",
}
"""Every reason for a gradient that is None, with what to do."""

_CAUTIOUS = ("comparison", "integer result", "unknown")
"""Among several obstacles these are named last: often they only choose or index."""
_SHAPES = ("Shape", "ShapeN", "Size", "Rank")
"""So are these operations, which give sizes for others."""

_BY_OPERATION = {
    **dict.fromkeys(("StopGradient", "PreventGradient"), "stop_gradient"),
    **dict.fromkeys(("Round", "Rint", "Floor", "Ceil", "FloorDiv", "Sign"), "rounding"),
    **dict.fromkeys(("ArgMax", "ArgMin"), "argmax"),
    **dict.fromkeys(("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual"), "comparison"),
    **dict.fromkeys(("LogicalAnd", "LogicalOr", "LogicalNot", "IsNan", "IsInf", "IsFinite"), "comparison"),
    "Cast": "cast",
    "EagerPyFunc": "py_function",
    "PyFunc": "numpy_function",
}

_BY_OBSTACLE = {
    "numpy_function": "numpy_function",
    "outside": "outside the tape",
    "stopped": "recording stopped",
    "source": "cast",
    "result": "integer result",
    "unregistered": "no registered gradient",
    "not differentiable": "not differentiable",
    "none": "not differentiable",
}


@dataclass(frozen=True)
class Finding:
    """A reason, in words, with the places."""

    reason: str
    why: str
    blockers: tuple[Blocker, ...] = ()
    certain: bool = True

    @property
    def advice(self) -> str:
        """What to do."""
        return ADVICE[self.reason]


class GradientWay:
    """The part of a graph that leads to the targets of a call of `tape.gradient`.

    Args:
        graph: What happened.
        asked: The call.
        targets: Numbers of its targets.
    """

    def __init__(self, graph: FlowGraph, asked: GradientCall, targets: Sequence[int]) -> None:
        self.graph, self.asked, self.targets = graph, asked, targets
        self.ancestors, self.nodes = graph.ancestors(targets)
        self.edges = Edges(graph, asked.tape)


def reason(way: GradientWay, source: Source) -> Finding:
    """Why a tape gave None for one of its sources."""
    graph, asked = way.graph, way.asked
    dtype = _dtype(source)
    if not is_trainable(dtype):
        why = f"it is of dtype {dtype.name}, and only floating and complex tensors have gradients"
        return Finding("integer source", why, _made(graph, source))
    if source.value not in way.ancestors:
        return _independent(way, source)
    followed = _followed(graph, asked, source)
    if followed is not None:
        return followed
    return _blocked(way, source)


def place(node: Node, what: str = "") -> Blocker:
    """A node as a blocker."""
    return Blocker(node.operation, node.layer, node.stage, "" if node.line is None else str(node.line), what)


def _independent(way: GradientWay, source: Source) -> Finding:
    """No recorded way leads from the source to the target: there is none, or it cannot be seen."""
    graph, ancestors = way.graph, way.ancestors
    makers = graph.makers.get(source.value, [])
    if makers and not source.variable:
        origin, _ = graph.ancestors([source.value])
        if not (origin & ancestors - {source.value}).isdisjoint(_roots(graph)):
            made = makers[0]
            why = "this tensor was made beside the way to the target: the target was computed from what it was made of"
            return Finding("made beside", why, (place(made, "made it"),))
    rerun = way.asked.reruns.get(source.value)
    doubts = tuple(unfollowed(graph, source.value, ancestors, way.nodes, way.asked))
    if rerun is not None and rerun.moved:
        return _moved(way, source, rerun.other_way, doubts)
    confirmed = rerun is not None and not rerun.why_not
    if not confirmed and (doubts or rerun is not None):
        why = f"no operation leads from it to the target; {'what can' if doubts else 'but that can'}not be followed"
        why += " is below" if doubts else ", and a second run proves nothing"
        why += "" if rerun is None else f" ({rerun.why_not})"
        return Finding("not followed", why, doubts, certain=False)
    again = ", and the target stays as it is when it is changed and the code run again" if confirmed else ""
    after = graph.descendants([source.value])
    ends = [node for node in graph.nodes if not after.isdisjoint(node.inputs) and ancestors.isdisjoint(node.outputs)]
    last = [node for node in ends if not any(value in graph.users for value in node.outputs)]
    if not graph.gradients.isdisjoint(ancestors) and ends:
        why = f"the gradient that the target is made of is the same whatever this is{again}"
        return Finding("second derivative", why)
    if not ends:
        why = f"the target does not depend on it: nothing was computed from it in this run{again}"
        return Finding("no dependence", why)
    why = "the target does not depend on it: it was used, but what was computed from it does not lead to the target"
    return Finding("no dependence", why + again, tuple(place(node, "leads nowhere") for node in last[-1:]))


def _moved(way: GradientWay, source: Source, other_way: bool, doubts: tuple[Blocker, ...]) -> Finding:
    """The target is another one when the source is changed and the code run again, and no operation leads there."""
    if other_way:
        after = way.graph.descendants([source.value])
        chosen = tuple(place(node, "decides") for node in way.graph.conversions(after))
        return Finding("branch", "it decides which way the code takes (if, a loop), and has no other way there", chosen)
    why = "the target is another one when it is changed and the code run again, but no recorded operation leads there"
    return Finding("hidden way", why, doubts)


def _roots(graph: FlowGraph) -> set[int]:
    """What was there before the run: variables and data; not single numbers, which much may be scaled by."""
    return {
        value
        for value, tensor in enumerate(graph.values)
        if value not in graph.makers and tensor is not None and (tensor.dtype == tf.resource or tensor.shape.rank)
    }


def _followed(graph: FlowGraph, asked: GradientCall, source: Source) -> Finding | None:
    """Why the tape does not follow the source; None if it does."""
    first = asked.watched.get(source.value)
    used = [node for node, _ in graph.users.get(source.value, ()) if asked.tape in node.tapes]
    if first is not None:
        if source.value in graph.makers or not used or first <= used[0].index:
            return None
        if any(node.index >= first for node in used):
            return None
        return Finding("watched too late", "tape.watch was called after it was used", (place(used[-1], "used it"),))
    if source.variable:
        if not used:
            return None  # whatever uses it is outside of the tape, and that is the reason
        if not source.trainable:
            why = "the variable has trainable=False, and a tape watches trainable variables only"
            return Finding("trainable=False", why)
        if not asked.accesses:
            why = (
                "the tape was made with watch_accessed_variables=False, and nobody called tape.watch for this variable"
            )
            return Finding("variable not watched", why)
        return None
    if is_tracked(graph, asked, source.value):
        return None
    makers = graph.makers.get(source.value, [])
    if not makers:
        return Finding("tensor not watched", "the tape was not told to watch this tensor")
    origin, before = graph.ancestors([source.value])
    handles = [graph.values[v] for v in origin if graph.values[v] is not None and graph.values[v].dtype == tf.resource]
    if (
        asked.tape not in makers[0].tapes
        and origin.isdisjoint(graph.gradients)
        and any(node.tapes - {asked.tape} for node in before)
    ):
        why = "this was computed under another tape, and this one was not told to watch it"
        return Finding("another tape", why, (place(makers[0], "made it"),))
    made = place(makers[0], "made it, outside of the tape" if asked.tape not in makers[0].tapes else "made it")
    if handles and asked.tape not in makers[0].tapes:
        why = "this is a tensor that was computed from a variable, not the variable; a tape does not watch it by itself"
        return Finding("replaced", why, (made,))
    why = "the tape was not told to watch this tensor, nor what it was computed from"
    return Finding("tensor not watched", why, (made,))


def _blocked(way: GradientWay, source: Source) -> Finding:
    """The flow ends on the way: at the border of what the source's gradient can reach."""
    graph = way.graph
    reached = way.edges.reached({source.value}, way.nodes)
    border = way.edges.border(reached, way.targets)
    if not reached.isdisjoint(way.targets):
        python = [node for node in graph.nodes if node in way.nodes and node.operation == "EagerPyFunc"]
        if python:
            return Finding("py_function", _WORDS["py_function"], tuple(place(node) for node in python))
        why = "the tape gives None, though every operation on some way to the target passes a gradient"
        return Finding("unknown", why, tuple(place(node, why) for node, why in border), certain=False)
    if border and all(why in ("stopped", "write") or (why == "outside" and not node.tapes) for node, why in border):
        everywhere = Edges(graph, stops=False)  # would it help if the tape had been there?
        found = everywhere.reached({source.value}, way.nodes)
        if found.isdisjoint(way.targets):
            border = everywhere.border(found, way.targets) or border
    behind = [(_behind_a_read(graph, node, why, way.nodes), why) for node, why in border]
    named = [(_reason_of(node, why), node) for node, why in behind]
    named.sort(key=lambda item: (item[1].operation in _SHAPES, item[0] in _CAUTIOUS, item[1].index))
    if not named:
        return Finding("unknown", "the way to the target could not be followed", certain=False)
    why = _words(*named[0])
    blockers = tuple(place(node, _what(name, node, graph)) for name, node in named)
    return Finding(named[0][0], why, blockers, certain=not named[0][1].guessed)


def _behind_a_read(graph: FlowGraph, node: Node, obstacle: str, nodes: set[Node]) -> Node:
    """What to name where a variable was read outside of the tape: the operation that it was read for."""
    if obstacle not in ("outside", "stopped") or node.operation != "ReadVariableOp":
        return node
    users = [user for value in node.outputs for user, _ in graph.users.get(value, ()) if user in nodes]
    return users[0] if users else node


def _reason_of(node: Node, obstacle: str) -> str:
    if holder_of(node.operation):
        return holder_of(node.operation)
    if obstacle == "outside" and node.tapes:
        return "another tape"
    if obstacle == "write":
        if node.owner.startswith(("metric", "average")):
            return node.owner.split()[0]
        return "stateful layer" if node.stateful else "assignment"
    if obstacle == "conversion":
        if node.operation.startswith("Model."):
            return "predict"
        return "Python" if node.operation in PYTHON else "NumPy"
    if node.kind == "custom":
        return "custom gradient"
    if obstacle in ("outside", "stopped", "numpy_function") and node.operation != "StopGradient":
        return _BY_OBSTACLE[obstacle]
    return _BY_OPERATION.get(node.operation, _BY_OBSTACLE.get(obstacle, "unknown"))


_WORDS = {
    "tf.data": "it goes into a data set of tf.data, and comes back as a value",
    "queue": "it is put into a queue, and taken out as a value",
    "table": "it is put into a table, and looked up as a value",
    "another tape": "it was computed under another tape than this one",
    "assignment": "what is computed from it is assigned to a variable, and only read back from there",
    "stateful layer": "it reaches the target only through the state that the layer keeps in a variable",
    "metric": "it reaches the target only through the sums that a metric keeps in variables",
    "average": "it goes into a moving average, which is kept in a variable, and only read back from there",
    "cast": "it is cast to a dtype that has no gradient",
    "comparison": "only the outcome of a comparison reaches the target",
    "stop_gradient": "stop_gradient is on every way to the target",
    "rounding": "rounding has no gradient",
    "argmax": "argmax gives a position, which has no gradient",
    "integer result": "the operation gives a dtype that has no gradient",
    "NumPy": "it left TensorFlow for NumPy, and the tape cannot see what was computed there",
    "Python": "it became a Python number, and the tape cannot see what was computed from that",
    "predict": "model.predict gives NumPy arrays, which no tape can see",
    "numpy_function": "tf.numpy_function has no gradient",
    "py_function": "the function inside tf.py_function has no gradient",
    "no registered gradient": (
        "TensorFlow has no gradient for the operation (a tape that has to go through it raises LookupError)"
    ),
    "not differentiable": "TensorFlow says that the operation has no gradient for this input",
    "custom gradient": "the gradient function of a tf.custom_gradient returns None",
    "outside the tape": "the operation ran while this tape was not recording",
    "recording stopped": "the operation ran while recording was switched off (tape.stop_recording)",
    "unknown": "the operation sends no gradient back",
}


def _words(reason: str, node: Node) -> str:
    return _WORDS[reason]


def _what(reason: str, node: Node, graph: FlowGraph) -> str:
    """What a blocker does, where its name does not say it."""
    given = [tensor.dtype for value in node.outputs if (tensor := graph.values[value]) is not None]
    dtypes = [dtype.name for dtype in given if not is_trainable(dtype)]
    if reason in ("cast", "integer result", "argmax", "comparison") and dtypes:
        return f"gives {dtypes[0]}"
    if node.kind == "write":
        return f"by {node.owner}" if node.owner else ""
    return "not differentiable for this input" if reason == "not differentiable" else ""


def _made(graph: FlowGraph, source: Source) -> tuple[Blocker, ...]:
    return tuple(place(node, "made it") for node in graph.makers.get(source.value, [])[:1])


def _dtype(source: Source) -> tf.DType:
    return tf.as_dtype(source.given.dtype)


__all__ = ["ADVICE", "Finding", "GradientWay", "place", "reason"]

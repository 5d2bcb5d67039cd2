"""Doubts about "no dependence" where no recorded way leads from a variable to the target.

A recording shows operations. It does not show what Python computes between them, so that is named: where the value left
TensorFlow, where arrays came in, and what gives values that nobody was seen to put in.
"""

from __future__ import annotations

import numpy as np

from stages.explanation.flow.graph import FlowGraph, Node
from stages.explanation.flow.holders import is_opaque
from stages.explanation.flow.user_tapes import GradientCall
from stages.explanation.rows import Blocker


def unfollowed(
    graph: FlowGraph, source: int, targets: set[int], nodes: set[Node], asked: GradientCall
) -> list[Blocker]:
    """Places that a value could have gone through unseen; none: what is recorded is all there is.

    Args:
        graph: What happened.
        source: The variable or tensor.
        targets: The targets, and all that they were computed from.
        nodes: The nodes between.
        asked: The call.
    """
    after = graph.descendants([source])
    last = max((node.index for node in nodes), default=len(graph.nodes))
    used = [node.index for node in graph.nodes if not after.isdisjoint(node.inputs)]
    found = [_place(node, "leaves TensorFlow") for node in graph.conversions(after) if node.index <= last]
    found += [
        _place(node, "gives what was not seen to go in")
        for node in sorted(nodes, key=lambda node: node.index)
        if is_opaque(graph, node)
    ]
    if used:
        for value, (when, line) in graph.arrays.items():
            if value in targets and when > used[0] and not _was_there(graph, value, asked):
                found.append(Blocker("NumPy array", line="" if line is None else str(line), what="comes in"))
    return list(dict.fromkeys(found))


def _place(node: Node, what: str) -> Blocker:
    return Blocker(node.operation, node.layer, node.stage, "" if node.line is None else str(node.line), what)


def _was_there(graph: FlowGraph, value: int, asked: GradientCall) -> bool:
    """Whether an array that came in, or what it is a part of, was there before the run."""
    ours = np.asarray(graph.values[value])
    for one in asked.known:
        same = one if one.dtype == ours.dtype or one.dtype.kind not in "fiub" else one.astype(ours.dtype)
        if ours.size and same.nbytes >= ours.nbytes and ours.tobytes() in same.tobytes():
            return True
    return False


__all__ = ["unfollowed"]

"""Iterators, queues, tables and files: what keeps values between operations, so that no tape sees the way through it.

    w ─► [TensorSliceDataset] ─► [MakeIterator] ─► (content of the iterator) ─► [IteratorGetNext] ─► target

What is put in becomes the content of the handle, as with a variable; what comes out depends on that. What was put in
before the recording, or by Python code inside of a data set, cannot be followed.
"""

from __future__ import annotations

import tensorflow as tf

from stages.explanation.flow.graph import FlowGraph, Node

_TABLE_PUTS = ("LookupTableInsert", "LookupTableImport", "LookupTableRemove", "InitializeTable")
_PUTS = ("MakeIterator", "QueueEnqueue", "StackPush", *_TABLE_PUTS)
_TAKES = ("IteratorGetNext", "QueueDequeue", "LookupTableFind", "LookupTableExport", "StackPop")
_READS_FILES = frozenset({"ReadFile", "RestoreV2", "Restore"})
_WRITES_FILES = frozenset({"WriteFile", "SaveV2", "Save", "SaveSlices"})
_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless", "numpy_function"})
_NOT_CLOSED = (b"PyFunc", b"ReadVariableOp", b"ResourceGather", b"LookupTableFind")


def handle_place(operation: str) -> int | None:
    """Which input of an operation that puts values somewhere is the handle; None: it does not."""
    if not operation.startswith(_PUTS):
        return None
    return 1 if operation.startswith("MakeIterator") else 0


def holder_of(operation: str) -> str:
    """``tf.data``, ``queue`` or ``table``: what an operation works on; empty: nothing of these."""
    if "Dataset" in operation or "Iterator" in operation:
        return "tf.data"
    if operation.startswith(("Queue", "Stack")):
        return "queue"
    return "table" if operation.startswith(("LookupTable", "InitializeTable")) else ""


def is_opaque(graph: FlowGraph, node: Node) -> bool:
    """Whether what a node gives may depend on values that the recording has not seen go in."""
    if node.operation in _PYTHON:
        return True
    if node.operation in _READS_FILES:
        return any(one.operation in _WRITES_FILES for one in graph.nodes if one.index < node.index)
    if not node.operation.startswith(_TAKES):
        return False
    handle = node.inputs[0]
    puts = [one for one in graph.nodes if one.kind == "write" and one.attributes[:1] == (handle,)]
    if not puts:
        return handle not in graph.makers or holder_of(node.operation) != "table"
    return any(one.operation.startswith("MakeIterator") and not _is_closed(graph, one) for one in puts)


def takes_from_before(graph: FlowGraph) -> Node | None:
    """A node that takes more out of a queue or iterator than was put in meanwhile: a second run would get other values.

    It may even wait for ever.
    """
    left: dict[int, int] = {}
    for node in graph.nodes:
        if node.kind == "write" and handle_place(node.operation) is not None:
            left[node.attributes[0]] = left.get(node.attributes[0], 0) + 1
        elif node.operation.startswith("QueueDequeue"):
            left[node.inputs[0]] = left.get(node.inputs[0], 0) - 1
            if left[node.inputs[0]] < 0:
                return node
        elif node.operation.startswith("IteratorGetNext") and node.inputs[0] not in left:
            return node
    return None


def _is_closed(graph: FlowGraph, made: Node) -> bool:
    """Whether the data set of an iterator runs no Python code and reads no variable but those it was seen to get."""
    data = graph.values[made.inputs[-1]]
    try:
        found = tf.raw_ops.DatasetToGraphV2(input_dataset=data, external_state_policy=1)
    except tf.errors.OpError:
        return False
    return not any(name in found.numpy() for name in _NOT_CLOSED)


__all__ = ["handle_place", "holder_of", "is_opaque", "takes_from_before"]

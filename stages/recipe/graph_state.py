"""Graphs of calls: nodes travel with the models that have them, and are wired anew.

A graph of calls belongs to a Functional model and not to its layers. The layers' own lists of nodes lead to every other
model that calls the layer; they stay behind, and are written anew for the models that travelled (`wire_calls`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from stages.recipe.attributes import fill
from stages.recipe.restoring import restoring


def state_of_node(node: Any) -> dict[str, Any]:
    """One call: its attributes, which of its operation's calls it is, which outputs say where they come from."""
    nodes = node.operation._inbound_nodes
    place = next((i for i, one in enumerate(nodes) if one is node), len(nodes))
    return {"state": dict(vars(node)), "place": place, "history": [_has_history(one) for one in node.outputs]}


def know_nodes(model: Any) -> None:
    """Write a model's keys of its calls, which are of one process."""
    from keras.src.ops.function import make_node_key

    nodes = [node for nodes in model._nodes_by_depth.values() for node in nodes]
    places = [next(i for i, one in enumerate(node.operation._inbound_nodes) if one is node) for node in nodes]
    vars(model)["_nodes"] = {make_node_key(n.operation, place) for n, place in zip(nodes, places, strict=True)}


def _has_history(symbol: Any) -> bool:
    return hasattr(symbol, "_keras_history")


def fill_node(node: Any, state: dict[str, Any]) -> None:
    """The inverse, but for `wire_calls`."""
    fill(node, state["state"])
    restoring().nodes.append((state["place"], node, state["history"]))


def state_of_symbol(symbol: Any) -> dict[str, Any]:
    """A symbolic tensor without the call that made it; `wire_calls` says that again where the call travels too."""
    state = dict(vars(symbol))
    state.pop("_keras_history", None)
    return state


def wire_calls(nodes: Iterable[tuple[int, Any, list[bool]]]) -> None:
    """Let operations and symbolic tensors know the calls that are here.

    Args:
        nodes: (which of its operation's calls it was, the node, which of its outputs say where they come from).
    """
    history = type(keras.Input((1,), name="sample")._keras_history)
    for _, node, known in sorted(nodes, key=lambda one: one[0]):
        calls = node.operation._inbound_nodes
        calls.append(node)
        for place, (symbol, there) in enumerate(zip(node.outputs, known, strict=True)):
            if there:
                symbol._keras_history = history(node.operation, len(calls) - 1, place)
    for _, node, _ in nodes:
        for symbol in node.arguments.keras_tensors:
            if not _has_history(symbol):  # the call that made it is of no model that is here
                symbol._keras_history = history(None, 0, 0)
            elif symbol._keras_history.operation is not None:
                symbol._keras_history.operation._outbound_nodes.append(node)


__all__ = ["fill_node", "know_nodes", "state_of_node", "state_of_symbol", "wire_calls"]

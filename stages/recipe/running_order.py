"""The order in which a Functional model runs its layers, kept where Keras would choose another.

Layers of equal depth may run in any order as far as their numbers go, with one exception: Keras's attention layers take
the mask off the tensor that they read, so whichever reader runs first finds it. Keras orders a model's layers by a
walk from its outputs; a copy, or a part with other outputs, may run them in another order and give other numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stages.errors import RecipeError
from stages.keras_internals import calls_of, is_functional, nodes_in_order, run_nodes_in_order

CallOrder = Sequence[Sequence[Any]]
"""(operation's name, which of its calls in the model, from 0) in the order of running."""


def running_order(model: Any) -> list[list[Any]] | None:
    """The order in which a Functional model makes its calls; None for other models."""
    if not is_functional(model):
        return None
    number = {id(node): [name, i] for name, some in _calls(model).items() for i, node in enumerate(some)}
    return [number[id(node)] for node in nodes_in_order(model) if not node.is_input]


def run_in_order(model: Any, order: CallOrder) -> None:
    """Let a Functional model make its calls in this order: one in which inputs exist before they are read.

    Args:
        model: The model, or a copy of it made from its configuration.
        order: What `running_order` said of it.

    Raises:
        RecipeError: It is the order of another model.
    """
    calls = _calls(model)
    if Counter(name for name, _ in order) != Counter({name: len(some) for name, some in calls.items()}):
        raise RecipeError(f"the order in which the model {model.name!r} runs its layers is that of another model")
    wanted = [node for node in nodes_in_order(model) if node.is_input] + [calls[name][i] for name, i in order]
    run_nodes_in_order(model, wanted)


def order_of_names(names: Sequence[str]) -> list[list[Any]]:
    """The order of calls that were made one after the other, by their operations' names."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append([name, seen[name]])
        seen[name] += 1
    return found


def _calls(model: Any) -> dict[str, list[Any]]:
    """{operation's name: its calls in the model, in the order in which they were made}."""
    calls: dict[str, list[Any]] = {}
    for node in nodes_in_order(model):
        if not node.is_input:
            calls.setdefault(node.operation.name, []).append(node)
    return {name: sorted(some, key=_place) for name, some in calls.items()}


def _place(node: Any) -> int:
    """Which of its operation's calls a node is."""
    return next(i for i, other in enumerate(calls_of(node.operation)) if other is node)

"""The place of an object in a nesting of objects, in words for an error message."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from stages.recipe.attributes import attributes_of

_ENOUGH = 200_000
"""Objects that are looked at before the search is given up."""
_DULL = ("_tracker", "_inbound_nodes", "_outbound_nodes", "_call_signature")


def where_is(wanted: Any, root: Any) -> str:
    """The layer and attribute that hold an object: ``"the layer 'dense' holds in its attribute 'file' "``.

    Args:
        wanted: The object.
        root: What it was reached from.

    Returns:
        Words that end with a space, or nothing if the object was not found again.
    """
    holder: dict[int, tuple[Any, str]] = {}
    alive = [root]  # so that no id is used twice
    waiting: deque[Any] = deque([root])
    seen = {id(root)}
    while waiting and len(seen) < _ENOUGH:
        here = waiting.popleft()
        if here is wanted:
            return _words(here, holder)
        for name, value in _inside(here):
            if id(value) not in seen:
                seen.add(id(value))
                alive.append(value)
                holder[id(value)] = (here, name)
                waiting.append(value)
    return ""


def _words(thing: Any, holder: Mapping[int, tuple[Any, str]]) -> str:
    """Up from an object to the first thing that has a name of its own."""
    attribute = ""
    while id(thing) in holder:
        thing, name = holder[id(thing)]
        attribute = name or attribute
        if (called := _name_of(thing)) is not None:
            return f"{called} holds in {attribute} " if attribute else f"{called} holds "
    return ""


def _name_of(thing: Any) -> str | None:
    kind = type(thing).__name__
    if isinstance(thing, keras.Model):
        return f"the model {thing.name!r}"
    if isinstance(thing, keras.Layer):
        return f"the layer {thing.name!r} ({kind})"
    if isinstance(thing, keras.Operation):
        return f"the operation {thing.name!r} ({kind})"
    if isinstance(thing, keras.losses.Loss):
        return f"the loss {thing.name!r} ({kind})"
    if isinstance(thing, keras.metrics.Metric):
        return f"the metric {thing.name!r} ({kind})"
    if isinstance(thing, keras.optimizers.Optimizer):
        return f"the optimizer {thing.name!r} ({kind})"
    if inspect.isfunction(thing):
        return f"the function {thing.__qualname__!r}"
    if inspect.isclass(thing):
        return f"the class {thing.__qualname__!r}"
    return None


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, and where."""
    if isinstance(thing, str | bytes | int | float | complex | bool | None):
        return
    if inspect.ismodule(thing):
        return
    if inspect.isfunction(thing):
        variables = inspect.getclosurevars(thing)
        for place, found in (("its closure", variables.nonlocals), ("its module", variables.globals)):
            yield from ((f"{place} as {name!r}", value) for name, value in found.items())
        return
    if inspect.ismethod(thing):
        yield "", thing.__self__
        yield "", thing.__func__
        return
    if isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            yield "", key
            yield "", value
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in list(thing):
            yield "", value
    if inspect.isclass(thing) and thing.__module__ != "__main__":
        return
    for name, value in attributes_of(thing).items():
        if name not in _DULL:
            yield f"its attribute {name!r}", value


__all__ = ["where_is"]

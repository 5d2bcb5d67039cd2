"""An object as its class and its attributes: what every way of taking one apart stands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import keras

FLOATS = ("float16", "bfloat16", "float32", "float64")

Reduced = tuple[Any, ...]
"""As `pickle` takes an object apart: function, arguments, state, list items, dict items, what sets the state."""


class Writing(Protocol):
    """One copy that is being written.

    Attributes:
        floats: The dtype that every floating dtype becomes; None: they stay.
        unbuilt: {id of an optimizer: attributes to set}, for optimizers of which the copy is to be built anew.
    """

    floats: str | None
    unbuilt: Mapping[int, Mapping[str, Any]]


def blank(kind: type) -> Any:
    """A new object of a class, with nothing of its own but what Keras puts around every layer's methods."""
    if issubclass(kind, keras.Layer):
        return keras.Layer.__new__(kind)
    return object.__new__(kind)


def fill(thing: Any, state: Any) -> None:
    """Give an object its attributes as they were, past every `__setattr__` that would track or convert them."""
    slots: Mapping[str, Any] | None = None
    if isinstance(state, tuple):  # as `copyreg` gives the state of a class with __slots__
        state, slots = state
    if state:
        vars(thing).update(state)
    for name, value in (slots or {}).items():
        object.__setattr__(thing, name, value)


def forget(thing: Any, names: Iterable[str]) -> None:
    """Take attributes from an object, past every `__delattr__` that would untrack them."""
    for name in names:
        del vars(thing)[name]


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object has in its own attributes; {} of one without any."""
    return dict(getattr(thing, "__dict__", {}))


def in_floats(state: dict[str, Any], floats: str | None) -> dict[str, Any]:
    """A state in which every floating dtype that has a name is `floats`."""
    if floats is None:
        return state
    named = {name for name, value in state.items() if "dtype" in name and isinstance(value, str) and value in FLOATS}
    return state | dict.fromkeys(named, floats)


__all__ = ["FLOATS", "Reduced", "Writing", "attributes_of", "blank", "fill", "forget", "in_floats"]

"""Classes of Keras that have no public name, found through objects that have one."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import keras


class Kinds(NamedTuple):
    """Classes of Keras that have no public name, found through an object that has one."""

    saveable: Any
    optimizer: type
    tracker: type
    node: type
    tracked: tuple[type, ...]


@cache
def kinds() -> Kinds:
    """The classes; not made at import, since that would make objects in a process that is to be forked."""
    layer = keras.Layer(name="sample")
    layer.some = [[], {}, set()]
    symbol = keras.Input((1,), name="sample")
    return Kinds(
        next(kind for kind in keras.Layer.__mro__ if kind.__name__ == "KerasSaveable"),
        next(kind for kind in keras.optimizers.Optimizer.__mro__ if kind.__name__ == "BaseOptimizer"),
        type(layer._tracker),
        type(symbol._keras_history.operation._inbound_nodes[0]),
        (type(layer.some), *(kind for kind in _tracked_kinds(type(layer.some)))),
    )


def _tracked_kinds(tracked_list: type) -> list[type]:
    """Keras's own dict and set, which live beside its own list."""
    module = inspect.getmodule(tracked_list)
    names = ("TrackedDict", "TrackedOrderedDict", "TrackedSet")
    return [getattr(module, name) for name in names if hasattr(module, name)]


@cache
def samples() -> tuple[Any, ...]:
    """A layer, a metric and an optimizer: one of each kind that has a tracker."""
    return (
        keras.Layer(name="sample"),
        keras.metrics.Mean(name="sample"),
        keras.optimizers.SGD(name="sample"),
    )


__all__ = ["Kinds", "kinds", "samples"]

"""Attributes of metrics that are no variables, set aside and put back: what a look at a metric must leave as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from stages.recipe.attributes import attributes_of, fill, forget


class HeldAttributes:
    """The attributes of metrics that are no variables, as they are now: counts in Python, lists of what was seen.

    Args:
        metrics: Each once. Of private attributes nothing is held: they are Keras's own.
    """

    def __init__(self, metrics: Iterable[Any]) -> None:
        self._held = [(one, len(one.variables), {k: (v, _content(v)) for k, v in _plain(one)}) for one in metrics]

    def put_back(self) -> None:
        """Give the metrics their attributes back; those that made variables meanwhile begin anew by themselves."""
        for one, variables, held in self._held:
            if len(one.variables) != variables:
                continue
            forget(one, {name for name, _ in _plain(one)} - set(held))
            fill(one, {name: value for name, (value, _) in held.items()})
            for value, content in held.values():
                _refill(value, content)


_PLAIN = (type(None), bool, int, float, complex, str, tuple, list, dict, set, np.generic, np.ndarray, tf.Tensor)


def _plain(thing: Any) -> list[tuple[str, Any]]:
    return [
        (name, value) for name, value in attributes_of(thing).items() if name[0] != "_" and isinstance(value, _PLAIN)
    ]


def _content(value: Any) -> Any:
    """A copy of what can be changed in place."""
    if isinstance(value, np.ndarray):
        return value.copy()
    kind = next((kind for kind in (list, dict, set) if isinstance(value, kind)), None)
    return None if kind is None else kind(value)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = content
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, dict | set):
        value.clear()
        value.update(content)


__all__ = ["HeldAttributes"]

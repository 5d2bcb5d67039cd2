"""The losses of a copy that is made from a configuration, by layer and attribute.

A checkpoint has no code, so a model in it is Keras's configuration, which leaves things out. Both objects are walked
through at the same time, attribute by attribute; values of variables are not looked at, they are saved as arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.keras_internals import has_layers, layers_of
from stages.recipe.attributes import attributes_of
from stages.recipe.keras_state import state_of

_OF_ONE_OBJECT = {
    *("name", "_name", "_path", "_lock", "_auto_name", "_build_shapes_dict", "built", "_built", "seed", "_called"),
}
"""Attributes that say nothing of what an object does: names, identities, whether it was built or called yet."""
_DEPTH = 12
Difference = tuple[str, Any, Any]
"""Path of attributes, what the first has there, what the second has."""


def lost(ours: Any, copy: Any) -> list[str]:
    """What a copy of a model has otherwise, one phrase for each layer and attribute; empty: nothing.

    Args:
        ours: The user's model, built; or a loss or metric.
        copy: One of the same architecture.
    """
    found = []
    if not has_layers(ours):
        apart = _apart(state_of(ours), state_of(copy), "", set(), 0)
        return [f"{path!r} of {type(ours).__name__}, {_said(x)}, would become {_said(y)}" for path, x, y in apart]
    pairs = zip(layers_of(ours), layers_of(copy), strict=False)
    seen: set[tuple[int, int]] = {(id(a), id(b)) for a, b in pairs}
    for a, b in zip(layers_of(ours), layers_of(copy), strict=False):
        for path, x, y in _apart(state_of(a), state_of(b), "", seen, 0):
            found.append(f"{path!r} of the layer {a.name!r} ({type(a).__name__}), {_said(x)}, would become {_said(y)}")
    if len(layers_of(ours)) != len(layers_of(copy)):
        found.append(f"the model has {len(layers_of(ours))} layers, it would have {len(layers_of(copy))}")
    return found


def _apart(a: Any, b: Any, path: str, seen: set[tuple[int, int]], depth: int) -> Iterator[Difference]:
    if a is b or (id(a), id(b)) in seen or depth > _DEPTH:
        return
    seen.add((id(a), id(b)))
    if isinstance(a, keras.Variable) and isinstance(b, keras.Variable):
        for name in ("trainable", "regularizer", "constraint"):
            yield from _apart(getattr(a, name), getattr(b, name), f"{path}.{name}", seen, depth + 1)
        return
    if isinstance(a, FunctionType | MethodType | partial):
        if not _same_function(a, b):
            yield path, a, b
        return
    if isinstance(a, _TABLES) and isinstance(b, _TABLES):
        if _content(a) != _content(b):
            yield path, a, b
        return
    if _is_array(a) and _is_array(b):
        if not np.array_equal(_array(a), _array(b)):
            yield path, a, b
        return
    if not any(isinstance(a, kind) and isinstance(b, kind) for kind in (type(a), Mapping, list | tuple)):
        yield path, a, b
        return
    if isinstance(a, Mapping):
        yield from _entries(a, b, path, seen, depth)
    elif isinstance(a, set | frozenset):
        if len(a) != len(b) or (all(isinstance(one, str | int) for one in a) and a != b):
            yield path, a, b
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield path, a, b
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _apart(x, y, f"{path}[{i}]", seen, depth + 1)
    elif isinstance(a, bool | int | float | complex | str | bytes | np.dtype | tf.DType | tf.TensorShape):
        if a != b and not (a != a and b != b):
            yield path, a, b
    elif not tf.is_tensor(a) and not isinstance(a, _LOOKED_AT_ELSEWHERE):
        yield from _entries(attributes_of(a), attributes_of(b), path, seen, depth)


_LOOKED_AT_ELSEWHERE = (keras.Layer, keras.KerasTensor, tf.Variable, keras.random.SeedGenerator, type)


def _entries(a: Mapping[Any, Any], b: Mapping[Any, Any], path: str, seen: set[tuple[int, int]], depth: int) -> Any:
    for name, value in a.items():
        if name in _OF_ONE_OBJECT or (isinstance(name, str) and _is_inner(name)):
            continue
        below = f"{path}.{name}" if path else str(name)
        if name not in b:
            if value is not None or not str(name).startswith("_"):  # a private None: kept from a call, and let go again
                yield below, value, None
        else:
            yield from _apart(value, b[name], below, seen, depth + 1)


def _is_inner(name: str) -> bool:
    """Whether an attribute is Keras's or TensorFlow's own book-keeping of objects, which are looked at one by one."""
    return name.startswith(("_self_", "_obj_reference", "_keras_")) or name in _BOOKS


_BOOKS = {
    *("_tracker", "_tracked", "_layers", "_metrics", "_seed_generators", "_trainable_variables"),
    *("_non_trainable_variables", "_losses", "_loss_ids", "_losses_override", "_parent_path", "_auto_config"),
    *("_inbound_nodes", "_outbound_nodes", "_nodes", "_nodes_by_depth", "_operations", "_operations_by_name"),
    *("_operations_by_depth", "_functional", "_inputs", "_outputs", "_inputs_struct", "_outputs_struct"),
    *("_call_signature", "_call_context_args", "input_spec", "_input_spec"),
}


def _same_function(a: Any, b: Any) -> bool:
    """Whether two functions are the same code; what they close over and keep is not looked at."""
    if isinstance(a, partial) and isinstance(b, partial):
        return _same_function(a.func, b.func) and a.args == b.args and a.keywords == b.keywords
    code = getattr(a, "__code__", None)
    return code is not None and code is getattr(b, "__code__", None)


_TABLES = (tf.lookup.StaticHashTable, tf.lookup.experimental.MutableHashTable)


def _content(table: Any) -> Any:
    try:
        keys, values = table.export()
    except tf.errors.FailedPreconditionError:  # nothing was put in
        return {}
    return dict(zip(keys.numpy().tolist(), values.numpy().tolist(), strict=True))


def _is_array(thing: Any) -> bool:
    if tf.is_tensor(thing):
        return hasattr(thing, "numpy") and thing.dtype not in (tf.resource, tf.variant)
    return isinstance(thing, np.ndarray | np.generic)


def _array(thing: Any) -> Any:
    return np.asarray(thing.numpy() if hasattr(thing, "numpy") else thing)


def _said(thing: Any) -> str:
    if isinstance(thing, FunctionType | MethodType):
        return f"the function {thing.__module__}.{thing.__qualname__}"
    text = repr(thing)
    return text if len(text) <= 40 else f"a {type(thing).__name__}"


__all__ = ["lost"]

"""Conversions of tensors to NumPy or Python, noted while a recorder is open.

    tensor.numpy(), float(tensor), if tensor:, np.array(tensor), np.mean(tensor), model.predict(x), tf.numpy_function

A tape cannot see what is computed from there on, and nothing tells it that it came from a tensor. A conversion is
the user's if it is the user's own code, a NumPy function or Keras's `convert_to_numpy` that asks for it; those that
TensorFlow and Keras make for themselves (`get_weights`, `save_weights`) are `Node.quiet`. NumPy's ufuncs
(`np.sqrt(tensor)`) take the memory of a tensor without calling anything, so they are seen only where their result comes
back: where an array becomes a tensor (`FlowGraph.arrays`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.explanation.flow.recorder import Recorder, user_line
from stages.keras_internals import predictions
from stages.tensorflow_internals import (
    CONVERSIONS,
    FROM_NUMPY,
    ITERATION,
    NUMPY_DISPATCH,
    NUMPY_FUNCTIONS,
    PY_FUNCTION,
    EagerTensor,
    numpy_itself,
)

_TRANSPARENT = frozenset({*(name for _, name in CONVERSIONS), "convert_to_numpy", "_numpy", "numpy_text"})
_NUMPY = np.__file__.rpartition("/")[0]


def watch_conversions(recorder: Recorder) -> None:
    """See conversions until the recorder closes."""
    for place in CONVERSIONS:
        recorder.replace_while_open(*place, partial(_method, recorder, place[1]))
    recorder.replace_while_open(*ITERATION, partial(_method, recorder, ITERATION[1]))
    for place in NUMPY_FUNCTIONS:
        recorder.replace_while_open(*place, partial(_function, recorder, place[1]))
    recorder.replace_while_open(*NUMPY_DISPATCH, lambda _: _dispatched(recorder))
    recorder.replace_while_open(*PY_FUNCTION, partial(_numpy_function, recorder))
    recorder.replace_while_open(*FROM_NUMPY, partial(_from_numpy, recorder))
    for place in predictions():
        recorder.replace_while_open(*place, partial(_predict, recorder, place[1]))


def _asked_by_user(place: str) -> bool:
    """Whether a function may stand between the user's line and a conversion."""
    file, _, name = place.rpartition(":")
    return file.startswith(_NUMPY) or name in _TRANSPARENT


def _converted(recorder: Recorder, name: str, tensors: list[Any], convert: Callable[[], Any]) -> Any:
    """Convert, and record it if it is the user's doing."""
    node, seen = None, recorder.graph.seen
    quiet = user_line(_asked_by_user)[0] is None
    if recorder.here and tensors and not (quiet and recorder.predicting):
        node = recorder.node("conversion", name, map(seen, tensors), [recorder.graph.pseudo()], quiet=quiet)
    with recorder.pause():
        result = convert()
    if node is not None and isinstance(result, np.ndarray | np.generic | float | int):
        node.result = result
    return result


def _method(recorder: Recorder, name: str, original: Any) -> Any:
    def convert(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return _converted(recorder, _said(name), [tensor], lambda: original(tensor, *args, **kwargs))

    return convert


def _function(recorder: Recorder, name: str, original: Any) -> Any:
    def convert(*args: Any, **kwargs: Any) -> Any:
        if recorder.here and args:
            given = args[0] if isinstance(args[0], list | tuple) else args[:1]
            tensors = [_tensor(one) for one in given if _is_tensor(one)]
            return _converted(recorder, f"np.{name}", tensors, lambda: original(*args, **kwargs))
        return original(*args, **kwargs)

    return convert


def _dispatched(recorder: Recorder) -> Any:
    """NumPy's own hook for functions that are given foreign arrays (NEP 18)."""

    def convert(_: Any, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given = [one for one in tf.nest.flatten([args, kwargs]) if _is_tensor(one)]
        name = f"np.{function.__name__}"
        return _converted(recorder, name, given, lambda: numpy_itself(function)(*args, **kwargs))

    return convert


def _numpy_function(recorder: Recorder, original: Any) -> Any:
    def call(function: Any, inp: Any, Tout: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
        if not recorder.here:
            return original(function, inp, Tout, *args, **kwargs)
        given = [tf.convert_to_tensor(one) for one in inp]
        with recorder.pause():
            result = original(function, given, Tout, *args, **kwargs)
        seen = recorder.graph.seen
        outputs = [one for one in tf.nest.flatten(result) if tf.is_tensor(one)]
        recorder.node("numpy_function", "numpy_function", map(seen, given), map(seen, outputs))
        return result

    return call


def _from_numpy(recorder: Recorder, original: Any) -> Any:
    def convert(value: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(value, *args, **kwargs)
        one = value[0] if isinstance(value, list | tuple) and value else value
        if recorder.here and isinstance(one, np.ndarray | np.generic):
            recorder.note_array(result)
        return result

    return convert


def _predict(recorder: Recorder, name: str, original: Any) -> Any:
    def predict(model: Any, *args: Any, **kwargs: Any) -> Any:
        start, recorder.predicting = len(recorder.graph.nodes), True
        try:
            result = original(model, *args, **kwargs)
        finally:
            recorder.predicting = False
        if recorder.here:
            inside = recorder.graph.nodes[start:]
            given = dict.fromkeys(value for node in inside for value in node.outputs)
            layer = "/".join(part for part in (recorder.layer_path(), model.name) if part)
            recorder.node("conversion", f"Model.{name}", given, [recorder.graph.pseudo()], layer=layer)
        return result

    return predict


def _said(name: str) -> str:
    """How the user wrote it."""
    words = {
        "__float__": "float()",
        "__int__": "int()",
        "__bool__": "bool()",
        "__index__": "index",
        "numpy": ".numpy()",
    }
    words |= {"__complex__": "complex()", "__format__": "format()", "__array__": "np.array", "__iter__": "iter()"}
    return words.get(name, name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, EagerTensor | tf.Variable | keras.Variable)


def _tensor(value: Any) -> Any:
    return value if isinstance(value, EagerTensor) else tf.convert_to_tensor(value)


__all__ = ["watch_conversions"]

"""States of a training's callbacks, read for a checkpoint and given to those of the program that goes on.

A callback of the user's says it by itself, with two methods, or keeps nothing but plain data in its attributes:

    def state(self):                  plain data: numbers, text, lists, dicts, arrays
        return {"losses": self.losses}

    def go_on_from(self, state):      called behind `on_train_begin` of a training that goes on
        self.losses = state["losses"]

One that keeps anything else is refused by name before training starts.

The folder of a run may be another's. What it says replaces no method of a callback and no text that its constructor was
given, which may be where it writes.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from pipeline.errors import CheckpointError, CompileError
from pipeline.saving.plain_state import NotPlainError, taken_apart
from stages.keras_training_internals import callback_attributes, counts_of_tensorboard, set_callback_attributes

_COMPARES = {"less": keras.ops.less, "greater": keras.ops.greater, "np.less": np.less, "np.greater": np.greater}
"""What callbacks that monitor a value compare with; they choose it late, and change ``min_delta`` when they do."""
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType, partial)

_SAID = "state()"


class CallbackStates:
    """The callbacks of one `fit`, and what they know.

    Args:
        callbacks: All of them that may know anything, in order; before `on_train_begin`.

    Raises:
        CompileError: One of them keeps what no checkpoint can hold, or itself restores a training.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = [one for one in callbacks if not isinstance(one, keras.callbacks.ProgbarLogger)]
        for one in self._callbacks:
            if isinstance(one, keras.callbacks.BackupAndRestore):
                raise CompileError(
                    "BackupAndRestore and PipelineCheckpoint(every=...) both go on with a training; leave the first out"
                )
            _read(one)
            if isinstance(one, keras.callbacks.LambdaCallback):
                warnings.warn(
                    "what the functions of a LambdaCallback keep elsewhere is in no checkpoint; a callback class keeps "
                    "it in attributes, which are",
                    stacklevel=2,
                )
        self._given = [_attributes(one) for one in self._callbacks]
        self._begun: list[dict[str, Any]] = []
        self._appends: dict[int, bool] = {}

    def train_begins(self) -> None:
        """Note what `on_train_begin` left; call it behind those of all callbacks."""
        self._begun = [_attributes(one) for one in self._callbacks]

    def read(self) -> list[dict[str, Any]]:
        """What each knows now, plain data: its class, its state, and which attributes training has not changed.

        Raises:
            CompileError: One of them has changed text that its constructor was given.
        """
        found = []
        for one, given, begun in zip(self._callbacks, self._given, self._begun, strict=True):
            state, places = _read(one), _texts_given(one, given)
            for name in places & set(begun):
                if not same_bits(state.get(name), begun[name]):
                    raise CompileError(
                        f"the callback {type(one).__name__} has changed {name}, text that its constructor was given "
                        "and that no folder may change, so training could not go on exactly; let it keep what changes "
                        "in another attribute, or give it the methods state() and go_on_from(state)"
                    )
            constant = [
                name
                for name in state
                if name in begun and (name in places or same_bits(state[name], given.get(name), begun[name]))
            ]
            found.append({"class": type(one).__name__, "state": state, "constant": constant})
        return found

    def check(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Refuse callbacks that are not those of the training that was saved.

        Raises:
            CheckpointError: Others, or in another order.
        """
        before, now = [one["class"] for one in saved], [type(one).__name__ for one in self._callbacks]
        if before != now:
            raise CheckpointError(
                f"the training was saved with the callbacks {before}, and this fit has {now}; to go on exactly it "
                "needs the same ones in the same order"
            )

    def before_train_begins(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Make files ready that callbacks open where a training begins."""
        for one, was in zip(self._callbacks, saved, strict=True):
            if isinstance(one, keras.callbacks.CSVLogger):
                self._appends[id(one)] = one.append
                _cut_log(one, was["state"])

    def go_on_from(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Give every callback what it knew; where an attribute is another one now by the user's will, say so.

        Raises:
            CheckpointError: The folder would change more of a callback than what it may know.
        """
        for one, given, was in zip(self._callbacks, self._given, saved, strict=True):
            _check_names(one, given, was)
        for one, was in zip(self._callbacks, saved, strict=True):
            state, constant = was["state"], set(was["constant"])
            if isinstance(one, keras.callbacks.CSVLogger):
                one.append, one.keys = self._appends.get(id(one), one.append), state["keys"]
            elif _speaks(one):
                one.go_on_from(state[_SAID])
            else:
                now = _attributes(one)
                for name, value in state.items():
                    if name not in constant:
                        value = _COMPARES.get(value, value) if name == "monitor_op" else value
                        set_callback_attributes(one, {name: value})
                    elif name in now and not same_bits(value, now[name]):
                        warnings.warn(
                            f"{type(one).__name__}.{name} was {value!r:.60} in the training that was saved, and is "
                            f"{now[name]!r:.60} now, which holds from here on",
                            stacklevel=2,
                        )


def _speaks(callback: Any) -> bool:
    """Whether a callback has the two methods, and Keras has no such ones."""
    return callable(getattr(callback, "state", None)) and callable(getattr(callback, "go_on_from", None))


def _texts_given(callback: Any, given: Mapping[str, Any]) -> set[str]:
    """Which attributes are text, or have some in them, and are called as an argument of the constructor."""
    made = [inspect.getattr_static(kind, "__init__") for kind in type(callback).__mro__]
    named = {name for one in made if isinstance(one, types.FunctionType) for name in inspect.signature(one).parameters}
    return {name for name, value in given.items() if name in named and _has_text(value)}


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_text(one) for one in value.values())
    return isinstance(value, str | bytes) or (isinstance(value, list | tuple | set) and any(map(_has_text, value)))


def _check_names(callback: Any, given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse what a training does not save of a callback: methods, and where it writes.

    Raises:
        CheckpointError: There is such a thing.
    """
    if _speaks(callback) or isinstance(callback, keras.callbacks.CSVLogger):
        return
    places, now, known = _texts_given(callback, given), callback_attributes(callback), _attributes(callback)
    counts_only = isinstance(callback, keras.callbacks.TensorBoard)
    for name, value in saved["state"].items():
        if name in saved["constant"] or (name == "monitor_op" and isinstance(value, str) and value in _COMPARES):
            continue
        of_class = inspect.getattr_static(type(callback), name, None)
        code = isinstance(now.get(name), _CODE) or callable(of_class) or hasattr(of_class, "__get__")
        of_keras = of_class is None and hasattr(callback, name) and name not in now
        if name in places or code or of_keras or (counts_only and name not in known):
            raise CheckpointError(
                f"the saved training would set {name} of the callback {type(callback).__name__} to {value!r:.60}, "
                "which no training saves: the folder was changed by others, or the callback's class is another one now"
            )


def _read(callback: Any) -> dict[str, Any]:
    """What a callback knows, as `go_on_from` takes it.

    Raises:
        CompileError: It keeps what no checkpoint can hold.
    """
    if isinstance(callback, keras.callbacks.CSVLogger):
        size = Path(callback.filename).stat().st_size if callback.csv_file and Path(callback.filename).exists() else 0
        return {"size": size, "keys": None if callback.keys is None else list(callback.keys)}
    found = {_SAID: callback.state()} if _speaks(callback) else _attributes(callback)
    for name, value in found.items():
        try:
            taken_apart(value, [])
        except (NotPlainError, RecursionError) as error:
            raise CompileError(
                f"the callback {type(callback).__name__} keeps {name}, of the type {error}, which no checkpoint can "
                "hold, so training could not go on exactly; give it the methods state(), which returns plain data "
                "(numbers, text, lists, dicts, arrays), and go_on_from(state)"
            ) from None
    return found


def _attributes(callback: Any) -> dict[str, Any]:
    """A callback's attributes that are its own, code left out."""
    if _speaks(callback) or isinstance(callback, keras.callbacks.CSVLogger):
        return {}
    own = callback_attributes(callback)
    if isinstance(callback, keras.callbacks.TensorBoard):
        return {name: own[name] for name in counts_of_tensorboard(callback)}
    own |= {name: label for name in own for label, compare in _COMPARES.items() if own[name] is compare}
    return {name: _copied(value) for name, value in own.items() if not isinstance(value, _CODE)}


def _copied(value: Any) -> Any:
    """A copy of lists, sets, dicts and arrays, which change in their place; others themselves."""
    if type(value) is dict:
        return {key: _copied(one) for key, one in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copied(one) for one in value)
    return value.copy() if isinstance(value, np.ndarray) else value


def same_bits(value: Any, *others: Any) -> bool:
    """Whether plain data are equal to the last bit."""
    own: list[Any] = []
    plain = taken_apart(value, own)
    for other in others:
        arrays: list[Any] = []
        try:
            if taken_apart(other, arrays) != plain or list(map(_bits, arrays)) != list(map(_bits, own)):
                return False
        except NotPlainError:
            return False
    return True


def _bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()


def _cut_log(logger: Any, state: Mapping[str, Any]) -> None:
    """Take off a CSV file what was written behind the state that training goes on from, and let it be appended to.

    Raises:
        CheckpointError: It is shorter than it was.
    """
    path = Path(logger.filename)
    size = path.stat().st_size if path.exists() else 0
    if size < state["size"]:
        raise CheckpointError(
            f"{path} had {state['size']} bytes when the training was saved and has {size} now; to go on exactly "
            "CSVLogger needs its file"
        )
    if state["size"]:
        with path.open("r+b") as file:
            file.truncate(state["size"])
        logger.append = True


__all__ = ["CallbackStates", "same_bits"]

"""Plain attributes of the user's objects, remembered and compared: numbers, words, switches, functions.

Of a variable these are its regulariser and its constraint, with the numbers of both. Of a function they are what it
finds in its closure and among its module's globals: a loss written as a function has its factors there. Of an object
of the user's own class they are also short lists of such, and private ones, unless a call of the object writes them.
"""

from __future__ import annotations

import dis
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.keras_training_internals import wrapped_function

_PLAIN = (bool, int, float, str, type(None))
_BOOKKEEPING = ("built",)
"""Attributes by which Keras notes what became of an object: a model that is called builds its layers."""
_BYTES = 1 << 16
"""Arrays up to this size are compared bit for bit; larger ones, and those of objects, by a checksum, and only where
all is compared."""
_REPLACED = (FunctionType, BuiltinFunctionType, partial, keras.regularizers.Regularizer, keras.constraints.Constraint)
"""Of these another object is another value."""
_ENTRIES = 64
"""Lists up to this length are compared, entry for entry; one that is empty is there to be filled."""
_NOT_OWN = ("keras", "stages", "tensorflow")
"""Packages whose classes are not the user's."""
_CALLS = ("call", "__call__", "build", "compute_output_shape", "compute_mask", "update_state", "result", "reset_state")
"""What a private name is written in by an object itself, which keeps a count or a note there."""


class Attributes:
    """The plain attributes of some objects at one moment.

    Args:
        objects: (what it is called, object).
    """

    def __init__(self, objects: Iterable[tuple[str, Any]]) -> None:
        self._all: list[tuple[Callable[[], Any], Any, str]] = []
        self._names: list[tuple[str, dict[str, Any], frozenset[str]]] = []
        for label, thing in objects:
            held = getattr(thing, "__dict__", {})
            if not isinstance(thing, FunctionType | keras.Variable):
                self._names.append((label, held, frozenset(held)))
            for name, read, value in _readings(thing):
                self._all.append((read, value, f"{label} got {name}="))
        self._next = 0

    def moved(self) -> dict[int, str]:
        """{place of an attribute that is not what it was: in words}."""
        found = {}
        for place, (read, value, words) in enumerate(self._all):
            now = type(value).of(read()) if isinstance(value, _Bits | _Sum | _Few) else read()
            if now is not value and (type(now) is not type(value) or now != value) and not _both_nan(now, value):
                found[place] = _words(read, value, words)
        return found

    def changed(self, most: int | None) -> str | None:
        """The first attribute that is not what it was, in words; None if there is none.

        Args:
            most: How many are compared, going on where the last call ended; None: all.
        """
        count = len(self._all)
        many = count if most is None else min(most, count)
        for _ in range(many):
            self._next = (self._next + 1) % count
            read, value, words = self._all[self._next]
            if isinstance(value, _Sum) and most is not None:
                continue
            now = read()
            if isinstance(value, _Bits | _Sum | _Few):
                if value != type(value).of(now):
                    return _words(read, value, words)
            elif now is not value and (type(now) is not type(value) or now != value) and not _both_nan(now, value):
                return _words(read, value, words)
        return self._new() if most is None else None

    def _new(self) -> str | None:
        """The first attribute that was not there: one that the class has a value of, perhaps."""
        for label, held, names in self._names:
            if len(held) == len(names):
                continue
            for name in held.keys() - names:
                if name[0] != "_" and name not in _BOOKKEEPING and isinstance(held[name], _PLAIN + _REPLACED):
                    return f"{label} got {name}={held[name]!r} (it had none of its own)"
        return None


def _words(read: Callable[[], Any], value: Any, words: str) -> str:
    """What became of an attribute."""
    if isinstance(value, _Few):
        return f"{words}{read()!r}, another list than it was"
    return (
        f"{words}other values in its array"
        if isinstance(value, _Bits | _Sum)
        else f"{words}{read()!r} (it was {value!r})"
    )


def plain(thing: Any) -> dict[str, Any]:
    """{name: value} of an object's plain attributes that are not private."""
    held: dict[str, Any] = getattr(thing, "__dict__", {})
    return {
        name: value
        for name, value in held.items()
        if name[0] != "_" and name not in _BOOKKEEPING and isinstance(value, _PLAIN)
    }


def settings_within(thing: Any) -> dict[str, Any]:
    """{name: value} of all that is plain about an object, to be compared with the same of later."""
    return {name: value for name, _, value in _readings(thing)}


def _readings(thing: Any) -> Iterable[tuple[str, Callable[[], Any], Any]]:
    """(name, how to read it again, value) of what is plain about an object."""
    if isinstance(thing, FunctionType):
        yield from _of_function(thing)
        return
    if isinstance(thing, partial):
        yield from _readings(thing.func)
        for place, argument in enumerate(thing.args):
            yield from _of_value(f"argument {place}", partial(thing.args.__getitem__, place), argument)
        for name, argument in thing.keywords.items():
            yield from _of_value(name, partial(thing.keywords.get, name), argument)
        return
    if isinstance(thing, keras.Variable):
        for name in ("regularizer", "constraint"):
            value = getattr(thing, name)
            yield name, partial(getattr, thing, name), value
            yield from _inside(name, value)
        return
    if isinstance(thing, keras.Layer):
        yield "dtype_policy", lambda: thing.dtype_policy.name, thing.dtype_policy.name
    held = getattr(thing, "__dict__", {})
    private = _private_names(thing.__class__)
    listing = _is_own(type(thing)) or isinstance(thing, keras.optimizers.schedules.LearningRateSchedule)
    for name, value in held.items():
        if name in private if name[0] == "_" else name not in _BOOKKEEPING:
            read = partial(held.get, name)
            if isinstance(value, _REPLACED):
                yield name, read, value
            if isinstance(value, keras.regularizers.Regularizer | keras.constraints.Constraint):
                yield from _inside(name, value)
            elif listing and isinstance(value, list | tuple | Mapping):
                if value and len(few := _Few.of(value)) == len(value):
                    yield name, read, few
            else:
                yield from _of_value(name, read, value)
    function = wrapped_function(thing)
    if function is not None:
        yield from _readings(function)


def _inside(name: str, thing: Any) -> Iterable[tuple[str, Callable[[], Any], Any]]:
    """What is plain about a regulariser or a constraint: its numbers."""
    for inner, read, value in _readings(thing):
        yield f"{name}.{inner}", read, value
    held = getattr(thing, "__dict__", {})
    for inner, value in held.items():
        if isinstance(value, tf.Tensor) and hasattr(value, "numpy"):  # Keras keeps some numbers so
            yield f"{name}.{inner}", partial(held.get, inner), _Bits.of(value)


def _is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in (*_NOT_OWN, "builtins")


@lru_cache(maxsize=256)
def _private_names(kind: type) -> frozenset[str]:
    """Private names that the user's classes speak of, but for those that a call writes."""
    spoken: set[str] = set()
    written: set[str] = set()
    for one in kind.__mro__:
        if not _is_own(one):
            continue
        for name, function in getattr(one, "__dict__", {}).items():
            if isinstance(function, FunctionType):
                spoken.update(function.__code__.co_names)
                if name in _CALLS:
                    steps = dis.get_instructions(function.__code__)
                    written.update(step.argval for step in steps if step.opname == "STORE_ATTR")
    return frozenset(name for name in spoken - written if name[0] == "_")


def _of_function(function: FunctionType) -> Iterable[tuple[str, Callable[[], Any], Any]]:
    if function.__module__.split(".")[0] == "keras":
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from _of_value(name, partial(_contents, cell), _contents(cell))
    module = function.__globals__
    for name in function.__code__.co_names:
        if name in module:
            yield from _of_value(name, partial(module.get, name), module[name])


def _of_value(name: str, read: Callable[[], Any], value: Any) -> Iterable[tuple[str, Callable[[], Any], Any]]:
    """The reading of one value, if it is plain, or an array that is not large."""
    if isinstance(value, _PLAIN):
        yield name, read, value
    elif isinstance(value, np.ndarray):
        yield name, read, (_Bits if value.nbytes <= _BYTES and not value.dtype.hasobject else _Sum).of(value)


class _Bits(bytes):
    """The bits of an array."""

    @classmethod
    def of(cls, array: Any) -> _Bits:
        return cls(np.asarray(array).tobytes())


class _Few(tuple[Any, ...]):
    """The entries of a short list, tuple or dict of plain values, each with its type; empty for any other."""

    __slots__ = ()

    @classmethod
    def of(cls, entries: Any) -> _Few:
        if not isinstance(entries, list | tuple | Mapping) or len(entries) > _ENTRIES:
            return cls()
        pairs = entries.items() if isinstance(entries, Mapping) else enumerate(entries)
        found = [(key, type(value), value) for key, value in pairs]
        return cls(found) if all(isinstance(value, _PLAIN) for *_, value in found) else cls()


class _Sum(int):
    """A checksum of an array's bits; where they are addresses (text of any length, objects), of what is there."""

    @classmethod
    def of(cls, array: Any) -> _Sum:
        array = np.ascontiguousarray(array)
        if not array.dtype.hasobject:
            return cls(zlib.crc32(array.view(np.uint8).data))
        if array.dtype.kind not in "OT":  # records with objects among their fields: not compared
            return cls(0)
        held = [each if isinstance(each, (*_PLAIN, bytes)) else id(each) for each in array.ravel().tolist()]
        return cls(zlib.crc32(repr(held).encode("utf-8", "surrogatepass")))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled as yet
        return None


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and a != a and b != b


__all__ = ["Attributes", "plain", "settings_within"]

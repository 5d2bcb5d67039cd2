"""Copies of a user's objects for this process's own workers: by their state, whatever it is.

    model, losses, metrics, optimizer ── pack ─► bytes ── launch pipe ─► unpack ── the same, in a worker

Keras's configurations say how an object was made, not what it is; see `stages.recipe.keras_state`. Functions and
classes that another process can import travel by name. Those it cannot (lambdas, closures, whatever a main script, a
notebook or a module without a file defines) travel as code.

Rules:

1. Bytes of `pack` are code. They go from a process to its own child, through memory that only the two have, or stay in
   the process. They are never written to a file, sent through a socket or taken from anybody else; the house test
   allows serialisers that can carry code in this file alone, and `docs/security.md` says who may call it.
2. What cannot be copied is refused in one sentence that names the layer and the attribute. Nothing is left out.
3. Objects that are shared inside of what is packed together are shared in the copy.
"""

from __future__ import annotations

import importlib.machinery
import io
import pickle
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import cloudpickle

from stages.errors import RecipeError
from stages.recipe.attributes import fill
from stages.recipe.graph_state import wire_calls
from stages.recipe.keras_state import reduce_keras
from stages.recipe.restoring import kept_object, restoring_begun
from stages.recipe.tensorflow_state import CopyRefusedError, reduce_tensorflow
from stages.recipe.where import where_is

_NONE: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Packed:
    """Objects as bytes.

    Attributes:
        data: For `unpack`.
        variables: The variables whose values are in it, in the order of `Unpacked.variables`.
    """

    data: bytes
    variables: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Objects from bytes.

    Attributes:
        thing: What was packed.
        variables: The copies of `Packed.variables`.
    """

    thing: Any
    variables: tuple[Any, ...]


def pack(
    thing: Any,
    what: str,
    *,
    without_values: Collection[Any] = (),
    foreign: Mapping[int, str] = _NONE,
    unbuilt: Collection[tuple[Any, Mapping[str, Any]]] = (),
    floats: str | None = None,
    keep: Sequence[Any] = (),
) -> Packed:
    """Objects as bytes for another process.

    Args:
        thing: The object, or a nesting of several that may share parts.
        what: How to call it in an error message, for example ``"the loss"``.
        without_values: Keras variables whose values follow on another way; the copies hold zeros.
        foreign: {id of a variable: where it belongs}, for variables that must not be copied.
        unbuilt: Optimizers whose copies are to be as before `build`, with attributes to set in the copies.
        floats: The dtype that every floating dtype becomes; None: they stay.
        keep: Objects that are not copied; only `unpack` in this process, which must be given them, knows them.

    Raises:
        RecipeError: Something in it cannot be copied: a file, a generator, a thread.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, without_values, foreign, unbuilt, floats, keep)
    try:
        pickler.dump(thing)
    except RecursionError as error:
        raise RecipeError(
            f"{what} is nested too deeply to be copied into a worker; give Segment(build=...) a function that makes it"
        ) from error
    except Exception as error:  # whatever an object's own way of being written raised
        raise RecipeError(_sentence(thing, what, pickler.last, error)) from error
    finally:
        pickler.forget()
    return Packed(buffer.getvalue(), tuple(pickler.variables))


def unpack(data: bytes, kept: Sequence[Any] = ()) -> Unpacked:
    """The objects that `pack` of this process, or of the process that started it, wrote.

    Args:
        data: The bytes.
        kept: In the same process: what `pack` was told to keep.

    Raises:
        RecipeError: A module that it names cannot be imported here.
    """
    with restoring_begun(kept) as copy:
        try:
            thing = pickle.loads(data)
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f"the worker cannot import what the model uses ({error}); it must be importable from the folder the "
                "program was started in, or from an installed package"
            ) from error
        wire_calls(copy.nodes)
        copy.finish()
        return Unpacked(thing, tuple(copy.variables[number] for number in sorted(copy.variables)))


def copied(thing: Any, what: str, *, keep: Sequence[Any] = (), floats: str | None = None, unbuilt: Any = ()) -> Any:
    """A copy in this process.

    Args:
        thing: The object, or a nesting of several.
        what: How to call it in an error message.
        keep: Objects that the copy shares with the original: variables, seed generators.
        floats: As `pack` takes it, like `unbuilt`.
    """
    return unpack(pack(thing, what, keep=keep, floats=floats, unbuilt=unbuilt).data, keep).thing


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes Keras and TensorFlow objects by their state, the rest as cloudpickle does.

    Attributes:
        last: The object that was looked at last; when writing fails, it is the one that cannot be written.
        variables: Variables whose values were written.
    """

    def __init__(
        self,
        file: io.BytesIO,
        without_values: Collection[Any],
        foreign: Mapping[int, str],
        unbuilt: Collection[tuple[Any, Mapping[str, Any]]],
        floats: str | None,
        keep: Sequence[Any],
    ) -> None:
        super().__init__(file, protocol=5)
        self._kept = {id(one): number for number, one in enumerate(keep)}
        self.unbuilt = {id(optimizer): attributes for optimizer, attributes in unbuilt}
        self.floats = floats
        self.last: Any = None
        self.variables: list[Any] = []
        self._valueless = {id(variable) for variable in without_values}
        self._foreign = foreign
        self._by_value: list[ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        """How to write one object."""
        self.last = obj
        if isinstance(obj, type | FunctionType):
            self._carry_code(obj)
            return super().reducer_override(obj)
        if (number := self._kept.get(id(obj))) is not None:
            return kept_object, (number,)
        found = reduce_tensorflow(obj, self) or reduce_keras(obj, self) or _reduce_guarded(obj)
        return super().reducer_override(obj) if found is None else found

    def number(self, variable: Any) -> int | None:
        """The number under which a variable's value is written; None: its value is not."""
        if (home := self._foreign.get(id(variable))) is not None:
            raise CopyRefusedError(f"a variable of {home}, which is in another process")
        if id(variable) in self._valueless:
            return None
        self.variables.append(variable)
        return len(self.variables) - 1

    def _carry_code(self, thing: Any) -> None:
        """Let a class or function travel as code if another process could not import its module."""
        module = sys.modules.get(getattr(thing, "__module__", None) or "")
        if module is None or module.__name__ == "__main__" or _importable(module.__name__):
            return
        if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self._by_value.append(module)

    def forget(self) -> None:
        """Leave cloudpickle's table of modules as it was."""
        for module in self._by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _reduce_guarded(thing: Any) -> tuple[Any, ...] | None:
    """An object whose class answers for any attribute: its state is written past that."""
    kind: Any = type(thing)
    own_way = kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
    if not hasattr(kind, "__getattr__") or own_way or hasattr(kind, "__setstate__"):
        return None
    found = thing.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    if len(found) < 3:
        return None
    return (*found, *[None] * (5 - len(found)), fill)


@lru_cache(maxsize=4096)
def _importable(name: str) -> bool:
    """Whether a fresh process with the same `sys.path` finds a module that is loaded here.

    A module that was made by hand (``exec``, a notebook, a plug-in system) is in `sys.modules` under a name that no
    search finds. What a package makes while it is imported counts as found with the package.
    """
    top, *inner = name.split(".")
    if top in sys.stdlib_module_names or top == "__mp_main__" or _found(top, None) is None:
        return top in sys.stdlib_module_names
    for depth in range(1, len(inner) + 1):
        package = sys.modules.get(".".join([top, *inner[: depth - 1]]))
        module = sys.modules.get(".".join([top, *inner[:depth]]))
        path = getattr(package, "__path__", None)
        if _found(".".join([top, *inner[:depth]]), path) is None:
            return getattr(module, "__spec__", None) is None and not hasattr(module, "__file__")
    return True


def _found(name: str, path: Any) -> Any:
    finders: list[Any] = [importlib.machinery.PathFinder]
    finders += [one for one in sys.meta_path if getattr(one, "__module__", "").startswith("__editable__")]
    return next((spec for one in finders if (spec := one.find_spec(name, path)) is not None), None)


def _sentence(thing: Any, what: str, culprit: Any, error: Exception) -> str:
    why = str(error) if isinstance(error, CopyRefusedError) else f"{_called(culprit)} ({error})"
    return (
        f"{what} cannot be copied into a worker: {where_is(culprit, thing)}{why}; make it where it is used, or let the "
        "worker make the model: Segment(build=a_function_that_makes_it)"
    )


def _called(thing: Any) -> str:
    kind = type(thing)
    return f"an object of the class {kind.__qualname__}"


__all__ = ["Packed", "Unpacked", "copied", "pack", "unpack"]

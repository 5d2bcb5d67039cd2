"""Describe a model, loss, metric or optimizer as plain data, and make it again in another process.

A worker is a fresh process: it gets recipes, not objects. A recipe is JSON: Keras's own configuration for Keras
objects, ``module:name`` for functions. It reaches a worker from its own parent at launch, never over a wire; nothing is
pickled and no code is carried, so whatever a recipe names must be importable by the worker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stages.errors import RecipeError
from stages.forgotten import forgotten, restore

Recipe = Any
"""JSON: None, bool, number, string, list or dict."""


def function_name(function: Callable[..., Any], what: str) -> str:
    """The importable ``module:name`` of a function.

    Raises:
        RecipeError: A lambda, a nested function or one that lives in ``__main__``: a worker could not import it.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if module is None or name is None:
        raise RecipeError(
            f"{what} must be a function that a worker can import, received {function!r}; "
            "put a plain `def` into a module and pass that function"
        )
    if "<" in name:
        kind = "a lambda" if "<lambda>" in name else "defined inside another function"
        raise RecipeError(
            f"{what} must be a function that a worker can import, received {module}.{name}, which is {kind}; "
            "write it as a `def` at the top of a module and pass that function"
        )
    if module == "__main__":
        raise RecipeError(
            f"{what} must be a function that a worker can import, received {name!r} from the main script or notebook; "
            f"move it into a module of its own, for example my_parts.py, and `from my_parts import {name}`"
        )
    return f"{module}:{name}"


def import_function(reference: str) -> Callable[..., Any]:
    """The function that ``module:name`` names.

    Raises:
        RecipeError: The module cannot be imported or has no such function.
    """
    module, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the worker cannot import {reference!r} ({error}); it must be importable from the folder the program was "
            "started in, or from an installed package"
        ) from error
    if not callable(found):
        raise RecipeError(f"{reference!r} names {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]


def describe(thing: Any, what: str) -> Recipe:
    """A recipe of a Keras object, an importable function, or plain data (returned as it is).

    Args:
        thing: The object.
        what: How to call it in an error message, for example ``"the loss"``.

    Raises:
        RecipeError: It cannot be made again elsewhere.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {"dict": {str(key): describe(value, f"{what}[{key!r}]") for key, value in thing.items()}}
    if isinstance(thing, list | tuple):
        return {"list": [describe(value, f"{what}[{i}]") for i, value in enumerate(thing)]}
    import keras

    if callable(thing) and not hasattr(thing, "get_config"):
        if getattr(thing, "__module__", "").split(".")[0] == "keras":
            return {"keras": keras.saving.serialize_keras_object(thing), "modules": []}
        return {"function": function_name(thing, what)}
    if not hasattr(thing, "get_config"):
        raise RecipeError(f"{what} must be a Keras object, its name or a function, received {type(thing).__name__}")
    try:
        config = keras.saving.serialize_keras_object(thing)
    except Exception as error:
        raise RecipeError(
            f"{what} ({type(thing).__name__}) cannot be described for another process: {error}; "
            "give the class a get_config(), or pass a Segment with an importable builder"
        ) from error
    recipe = {"keras": config, "modules": sorted(set(_foreign_modules(config, what)))}
    if found := forgotten(thing, config, what):
        recipe["forgotten"] = found
    return recipe


def create(recipe: Recipe) -> Any:
    """Make the object that a recipe describes."""
    if not isinstance(recipe, dict):
        return recipe
    if "dict" in recipe:
        return {key: create(value) for key, value in recipe["dict"].items()}
    if "list" in recipe:
        return [create(value) for value in recipe["list"]]
    if "function" in recipe:
        return import_function(recipe["function"])
    import keras

    for module in recipe["modules"]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RecipeError(
                f"the worker cannot import {module!r}, where a custom class of the model lives: {error}"
            ) from error
    found = keras.saving.deserialize_keras_object(recipe["keras"])
    restore(found, recipe.get("forgotten", {}))
    return found


def _foreign_modules(config: Any, what: str) -> Iterator[str]:
    """Modules outside Keras that a configuration's classes live in."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from _foreign_modules(item, what)
    elif isinstance(config, dict):
        name = config.get("class_name")
        if name == "__lambda__":
            raise RecipeError(
                f"{what} contains a lambda, which cannot be sent to a worker without sending code; use a named "
                "function in a module, or a small Layer subclass"
            )
        if name is not None and "module" in config and "config" in config:
            module = _home_of(config, what)
            if module.split(".")[0] != "keras":
                yield module
        for item in config.values():
            yield from _foreign_modules(item, what)


def _home_of(config: Mapping[str, Any], what: str) -> str:
    """The module to import before Keras can make what a configuration describes.

    Keras writes a class's module, None for the main script, and for a function only the name it is registered under.
    """
    import keras

    kind, name, module = "class", config["class_name"], config["module"] or "__main__"
    if module == "builtins":
        kind, name = "function", config["config"]
        module = getattr(keras.saving.get_registered_object(name), "__module__", None)
        if module is None:
            raise RecipeError(
                f"{what} uses the function {name!r}, which a worker can only find if it is registered: write "
                "@keras.saving.register_keras_serializable() above its `def`, in a module that can be imported"
            )
    if module == "__main__":
        raise RecipeError(
            f"{what} uses the {kind} {name!r} from the main script or notebook, which a worker cannot import; "
            f"move it into a module of its own, for example my_layers.py, and `from my_layers import {name}`"
        )
    return str(module)

"""Describe a model, loss, metric or optimizer as plain data, and make it again in another process.

A checkpoint has recipes, not objects. A recipe is JSON: Keras's own configuration for Keras objects, ``module:name``
for functions. Nothing is pickled and no code is carried, so whatever a recipe names must be importable by who reads it.
(Workers get copies by value instead, see `stages.recipe.by_value`.)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from stages.errors import RecipeError
from stages.recipe import custom_objects
from stages.recipe.keras_omissions import forgotten, restore_omitted
from stages.recipe.running_order import run_in_order, running_order

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
            f"{what} must be a function that another process can import, received {function!r}; "
            "put a plain `def` into a module and pass that function"
        )
    if "<" in name:
        kind = "a lambda" if "<lambda>" in name else "defined inside another function"
        raise RecipeError(
            f"{what} must be a function that another process can import, received {module}.{name}, which is {kind}; "
            "write it as a `def` at the top of a module and pass that function"
        )
    if module == "__main__":
        raise RecipeError(
            f"{what} must be a function that another process can import, received {name!r} from the main script or "
            f"notebook; move it into a module of its own, for example my_parts.py, and `from my_parts import {name}`"
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
            return {"keras": keras.saving.serialize_keras_object(thing), "custom": {}}
        return {"function": function_name(thing, what)}
    if not hasattr(thing, "get_config"):
        raise RecipeError(f"{what} must be a Keras object, its name or a function, received {type(thing).__name__}")
    try:
        with warnings.catch_warnings():  # Keras would write a lambda as its code, in several forms
            warnings.filterwarnings("error", "(?s).*includes a `lambda`")
            config = keras.saving.serialize_keras_object(thing)
    except UserWarning:
        raise RecipeError(custom_objects.of_a_lambda(what)) from None
    except Exception as error:
        raise RecipeError(
            f"{what} ({type(thing).__name__}) cannot be described for another process: {error}; "
            "give the class a get_config(), or pass a Segment with an importable builder"
        ) from error
    if isinstance(config, dict):
        config.pop("compile_config", None)  # what a model was compiled with is no part of it; a pipeline has its own
    recipe = {"keras": config, "custom": custom_objects.homes(config, what)}
    if found := forgotten(thing, config):
        recipe["forgotten"] = found
    if (order := running_order(thing)) is not None:
        recipe["order"] = order
    return recipe


def described(thing: Any, what: str) -> Recipe:
    """A recipe for a file, which has no code: of what cannot be made again without code, only why.

    Returns:
        What `describe` gives; or ``{"own": why}``, and whoever reads the file must bring the object.
    """
    try:
        return describe(thing, what)
    except RecipeError as error:
        return {"own": str(error)}


def why_own(recipe: Recipe) -> str | None:
    """Why a recipe is none, as `described` said; None: it is one."""
    return recipe.get("own") if isinstance(recipe, dict) else None


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

    found = keras.saving.deserialize_keras_object(recipe["keras"], custom_objects=custom_objects.find(recipe["custom"]))
    restore_omitted(found, recipe.get("forgotten", {}))
    if "order" in recipe:
        run_in_order(found, recipe["order"])
    return found

"""Custom classes and functions inside a Keras configuration: where they live, and how another process finds them.

Keras finds an object by the name it is registered under, once its module is imported. A class that is not registered it
finds nowhere, although the configuration says its module. So both are looked up here and handed to Keras.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from stages.errors import RecipeError

__all__ = ["find", "homes", "of_a_lambda"]

_MOVED = {
    "stages.ragged": "stages.layers.ragged.steps",
    "stages.initial_states": "stages.layers.initial_states",
}
"""{module that a checkpoint of version 0.1 names: where its classes are now}."""


def of_a_lambda(what: str) -> str:
    """Why there is no recipe of something with a lambda."""
    return (
        f"{what} contains a lambda, which cannot be described without its code; use a named function in a module, or a "
        "small Layer subclass"
    )


def homes(config: Any, what: str) -> dict[str, str]:
    """Where a configuration's custom objects live.

    Args:
        config: What `keras.saving.serialize_keras_object` returned.
        what: How to call it in an error message.

    Returns:
        {registered name: "module:name"}; the registered name of an unregistered class is its plain name.

    Raises:
        RecipeError: Another process could not find one: a lambda, something in the main script or inside a function,
            a function that is not registered, two classes of one name.
    """
    found: dict[str, str] = {}
    for registered, home in _objects(config, what):
        if found.setdefault(registered, home) != home:
            raise RecipeError(
                f"{what} uses two classes called {registered!r} ({found[registered]} and {home}); register them under "
                'packages of their own: @keras.saving.register_keras_serializable("my_package")'
            )
    return found


def find(homes: Mapping[str, str]) -> dict[str, Any]:
    """Import what `homes` named; return what Keras does not find by itself afterwards, as its `custom_objects`.

    Raises:
        RecipeError: A module cannot be imported here, or no longer has the class.
    """
    import keras

    custom = {}
    for registered, home in homes.items():
        module, _, name = home.partition(":")
        try:
            place = importlib.import_module(_MOVED.get(module, module))
            if keras.saving.get_registered_object(registered) is None:
                custom[registered] = getattr(place, name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f"the worker cannot import {name!r} from {module!r}, which the model uses: {error}"
            ) from error
    return custom


def _objects(config: Any, what: str) -> Iterator[tuple[str, str]]:
    """Registered name and home of every custom object in a configuration."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from _objects(item, what)
    elif isinstance(config, Mapping):
        if config.get("class_name") == "__lambda__":
            raise RecipeError(of_a_lambda(what))
        if {"class_name", "module", "config"} <= config.keys():
            yield from _described(config, what)
        for item in config.values():
            yield from _objects(item, what)


def _described(config: Mapping[str, Any], what: str) -> Iterator[tuple[str, str]]:
    """The custom object that one entry describes, if it is one.

    Keras writes a class's module, None for the main script, and for a function only the name it is registered under.
    """
    if config["module"] == "builtins":
        if config["class_name"] == "function":
            yield _function(config["config"], what)
        return
    name, module = config["class_name"], config["module"] or "__main__"
    if module.split(".")[0] == "keras":
        return
    _check_importable(module, name, "class", what)
    if not hasattr(sys.modules.get(module), name):
        raise RecipeError(
            f"{what} uses the class {name!r} of the module {module!r}, which is not at its top, so a worker cannot "
            "import it; write it there"
        )
    yield config.get("registered_name") or name, f"{module}:{name}"


def _function(registered: str, what: str) -> tuple[str, str]:
    import keras

    found = keras.saving.get_registered_object(registered)
    if found is None:
        raise RecipeError(
            f"{what} uses the function {registered!r}, which a worker can only find if it is registered: write "
            "@keras.saving.register_keras_serializable() above its `def`, in a module that can be imported"
        )
    _check_importable(found.__module__, found.__name__, "function", what)
    return registered, f"{found.__module__}:{found.__name__}"


def _check_importable(module: str, name: str, kind: str, what: str) -> None:
    if module == "__main__":
        raise RecipeError(
            f"{what} uses the {kind} {name!r} from the main script or notebook, which a worker cannot import; "
            f"move it into a module of its own, for example my_layers.py, and `from my_layers import {name}`"
        )

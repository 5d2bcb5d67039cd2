"""Names of a package that are imported when first used, so that one part of it never loads what only another needs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

__all__ = ["load"]


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """The object that a package exports under a name; for the package's `__getattr__`.

    Python takes an AttributeError of `__getattr__` as "there is no such name", and ``from package import name`` then
    says ``cannot import name``, whatever the error was about: an old Keras without some function, a half-installed
    TensorFlow. So one that is raised while the home is imported becomes an ImportError that says so.

    Args:
        package: The package's name.
        homes: {exported name: the module that has it}.
        name: What was asked for.

    Raises:
        AttributeError: The package exports no such name.
        ImportError: Its home cannot be imported; an ImportError raised inside is passed on as it is, an AttributeError
            is the cause.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
    try:
        return getattr(importlib.import_module(homes[name]), name)
    except AttributeError as error:
        raise ImportError(
            f"{package}.{name} cannot be imported, since importing {homes[name]} raised AttributeError: {error}",
            name=homes[name],
        ) from error

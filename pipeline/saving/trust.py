"""Code that a checkpoint names: run only if it is Keras's, ours, this program's own, or the user says so.

A recipe names classes and functions by their modules. To make an object of one, its module is imported and it is
called, by a builder's recipe even with arguments from the file: ``os:system`` and a command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from pipeline.errors import CheckpointError

_TRUSTED = {"keras", "stages"}
_BUILDER = "builder"


def check_code(recipes: Sequence[Any], trust: bool | Sequence[str]) -> None:
    """Refuse recipes that would run code which nobody asked for.

    Classes and functions are this program's own if it has imported their module; those of Python itself never are.
    Builders are called with what the file says, so they are never run unasked.

    Args:
        recipes: JSON.
        trust: True, or names of modules (or of packages, for all that is in them) whose code may be run.

    Raises:
        CheckpointError: They name other code; says which, and how to allow it.
    """
    if trust is True:
        return
    allowed = {trust} if isinstance(trust, str) else set(trust or ())
    refused = {}
    for kind, module, name in _named(recipes):
        parts = module.split(".")
        if allowed & {".".join(parts[:n]) for n in range(1, len(parts) + 1)}:
            continue
        own = module in sys.modules and not _is_pythons(module)
        if kind == _BUILDER or not (own or parts[0] in _TRUSTED) or _leads_elsewhere(module, name):
            refused[f"{module}:{name}"] = module
    if refused:
        shown = ", ".join(f"{name!r:.100}" for name in list(refused)[:5])
        modules = ", ".join(f"{module!r:.100}" for module in sorted(set(refused.values()))[:5])
        raise CheckpointError(
            f"loading this checkpoint would run {shown}. If that is your code, or that of somebody you trust, say "
            f"Pipeline.load(path, trust=[{modules}])"
        )


def _is_pythons(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _leads_elsewhere(module: str, name: str) -> bool:
    """Whether a name steps from its module into another one, or is something of Python itself under another name."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
        if isinstance(found, ModuleType):
            return True
    return _is_pythons(str(getattr(found, "__module__", None) or ""))


def _named(recipes: Sequence[Any]) -> Iterator[tuple[str, str, str]]:
    """(kind, module, name) of everything that recipes name, at any depth."""
    waiting = list(recipes)
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        if not isinstance(one, Mapping):
            continue
        waiting += one.values()
        for key, kind in (("build", _BUILDER), ("function", "function")):
            if isinstance(one.get(key), str) and ":" in one[key]:
                yield kind, *_parts(one[key])
        if isinstance(one.get("custom"), Mapping):
            for home in one["custom"].values():
                yield "class", *_parts(str(home))
        if isinstance(one.get("module"), str) and "class_name" in one:
            yield "class", one["module"], str(one["class_name"])


def _parts(reference: str) -> tuple[str, str]:
    module, _, name = reference.partition(":")
    return module, name


__all__ = ["check_code"]

"""Names of variables in what users read: paths, told apart where two are equal."""

from __future__ import annotations

from collections.abc import Sequence


def unique_names(paths: Sequence[str]) -> list[str]:
    """Variables' paths, with ``#2`` and so on behind repeated ones."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        count = seen[path] = seen.get(path, 0) + 1
        names.append(path if count == 1 else f"{path}#{count}")
    return names


__all__ = ["unique_names"]

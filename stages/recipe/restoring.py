"""The end of making a copy, once all its objects are there: identities to learn, graphs of calls to wire.

Objects refer to one another in circles, so an object may be asked for before it is whole. Whatever needs whole objects
waits here until the last one has come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Restoring:
    """One copy in the making.

    Attributes:
        nodes: Calls of graphs, as `stages.recipe.graph_state.wire_calls` takes them.
        variables: The variables that came with their values, by their number.
        kept: Objects of this process that are not copied.
    """

    def __init__(self, kept: Sequence[Any]) -> None:
        self.kept = kept
        self.nodes: list[tuple[int, Any, list[bool]]] = []
        self.variables: dict[int, Any] = {}
        self._later: list[Callable[[], None]] = []

    def later(self, act: Callable[[], None]) -> None:
        """Do something when all objects are there."""
        self._later.append(act)

    def finish(self) -> None:
        """Do it."""
        for act in self._later:
            act()


_here = threading.local()


@contextmanager
def restoring_begun(kept: Sequence[Any]) -> Iterator[Restoring]:
    """Objects that are made meanwhile in this thread are of one copy."""
    before = getattr(_here, "copy", None)
    _here.copy = Restoring(kept)
    try:
        yield _here.copy
    finally:
        _here.copy = before


def restoring() -> Restoring:
    """The copy in the making in this thread."""
    found: Restoring | None = getattr(_here, "copy", None)
    if found is None:
        raise RuntimeError("objects of a copy are made by stages.recipe.by_value.unpack only")
    return found


def kept_object(number: int) -> Any:
    """One of the objects that are not copied."""
    return restoring().kept[number]

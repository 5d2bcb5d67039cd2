"""Trackers and tracked lists: how a Keras object knows what its attributes hold, by kind.

A tracker knows objects by identities, which are of one process; they are written anew where the copy is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from stages.recipe.attributes import Reduced, fill
from stages.recipe.keras_kinds import samples
from stages.recipe.restoring import restoring


@cache
def _tests() -> dict[Any, tuple[int, str]]:
    """The code of Keras's own tests of what a tracker looks for: {code: (sample, store)}."""
    return {
        test.__code__: (number, store)
        for number, sample in enumerate(samples())
        for store, (test, _) in sample._tracker.config.items()
    }


def state_of_tracker(tracker: Any) -> dict[str, Any]:
    """A tracker's attributes; Keras's own tests of what it looks for as their places."""
    state = dict(vars(tracker))
    state["config"] = {
        store: (_tests().get(getattr(test, "__code__", None), test), found)
        for store, (test, found) in tracker.config.items()
    }
    state["stored_ids"] = None  # of one process
    return state


def fill_tracker(tracker: Any, state: dict[str, Any]) -> None:
    """The inverse."""
    fill(tracker, state)
    tracker.config = {
        store: (samples()[test[0]]._tracker.config[test[1]][0] if isinstance(test, tuple) else test, found)
        for store, (test, found) in state["config"].items()
    }
    tracker.stored_ids = {}
    restoring().later(lambda: _know_stored(tracker))


def _know_stored(tracker: Any) -> None:
    tracker.stored_ids = {store: {id(one) for one in found} for store, (_, found) in tracker.config.items()}


def reduce_tracked(collection: Any) -> Reduced:
    """Keras's own list, dict or set: filled before it knows its tracker, so that nothing is tracked again."""
    kind, state = type(collection), dict(vars(collection))
    if isinstance(collection, list):
        return kind, (), state, iter(list(collection)), None, fill
    if isinstance(collection, Mapping):
        return kind, (), state, None, iter(list(collection.items())), fill
    return kind, (), (state, list(collection)), None, None, _fill_set


def _fill_set(collection: set[Any], state: tuple[dict[str, Any], list[Any]]) -> None:
    own, items = state
    set.update(collection, items)
    fill(collection, own)


__all__ = ["fill_tracker", "reduce_tracked", "state_of_tracker"]

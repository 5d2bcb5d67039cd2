"""Faults on the way between two stages, or from the driver: what arrives is not what was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from tests.faults.frames import Envelope, cast_to_bfloat16, flip_a_bit
from tests.faults.live import ACTIVATION, DRIVER, Live, arriving, on_the_wire
from tests.faults.places import Place
from transport.message import Key, Message

Fetch = Callable[[Key], Message]
Context = AbstractContextManager[None]
SOURCES = (ACTIVATION, "target", "sample_weight")
"""The kinds of messages that the driver feeds."""


def _sender(place: Place) -> int:
    """The stage at the other end; without an edge the driver."""
    edge = place.edge
    return DRIVER if edge is None else edge.producer + edge.consumer - place.stage


def _is_it(place: Place, key: Key) -> bool:
    """Whether a message is the one that the fault is about."""
    if key.source != _sender(place) or key.stage != place.stage:
        return False
    return key.kind in SOURCES if place.edge is None else (key.kind, key.tensor) == (place.what, place.edge.tensor)


def _changed(change: Callable[[Key, Fetch], Message]) -> Callable[[Live, Place], Context]:
    """A fault that changes what arrives at a place."""

    def inject(live: Live, place: Place) -> Context:
        return arriving(live, place.stage, lambda key, fetch: change(key, fetch) if _is_it(place, key) else fetch(key))

    return inject


def _dropped(key: Key, fetch: Fetch) -> Message:
    message = fetch(key)
    return replace(message, array=None) if key.microbatch == 1 else message


def _doubled(key: Key, fetch: Fetch) -> Message:
    message = fetch(key)
    return replace(message, array=message.array * 2) if key.microbatch == 1 else message


def _lost(key: Key, fetch: Fetch) -> Message:
    return replace(fetch(key), array=None)


def _swapped(key: Key, fetch: Fetch) -> Message:
    """The first two microbatches, which have as many samples, are taken for each other."""
    return fetch(key._replace(microbatch={0: 1, 1: 0}.get(key.microbatch, key.microbatch)))


def _swapped_rows(key: Key, fetch: Fetch) -> Message:
    """The same in a whole batch: its first three samples and the next three."""
    message = fetch(key)
    order = [3, 4, 5, 0, 1, 2, *range(6, len(message.array))]
    return replace(message, array=np.ascontiguousarray(message.array[order]))


def _transposed(key: Key, fetch: Fetch) -> Message:
    message = fetch(key)
    return replace(message, array=np.ascontiguousarray(message.array.swapaxes(1, 2)))


def _unmarked(key: Key, fetch: Fetch) -> Message:
    return replace(fetch(key), value=None)


dropped, doubled, lost = _changed(_dropped), _changed(_doubled), _changed(_lost)
swapped, swapped_rows, transposed = _changed(_swapped), _changed(_swapped_rows), _changed(_transposed)


def unmasked(live: Live, place: Place) -> Context:
    """The activation arrives without the mark that says that a mask comes with it."""
    return _changed(_unmarked)(live, replace(place, what=ACTIVATION))


@contextmanager
def previous(live: Live, place: Place) -> Iterator[None]:
    """Whatever arrives is what came under the same name in the step before."""
    before: dict[Key, Any] = {}

    def remember(key: Key, fetch: Fetch) -> Message:
        message = fetch(key)
        before[key._replace(step=0)] = message.array
        return message

    def repeat(key: Key, fetch: Fetch) -> Message:
        return replace(fetch(key), array=before[key._replace(step=0)])

    with _changed(remember)(live, place):
        live.other_step()
    with _changed(repeat)(live, place):
        yield


def _framed(change: Callable[[Any], None], microbatch: int | None) -> Callable[[Live, Place], Context]:
    """A fault that changes the bytes of a message, of one microbatch or of all."""

    def inject(live: Live, place: Place) -> Context:
        def changed(envelope: Envelope, raw: Any) -> None:
            place_of = Key(envelope.kind, 0, envelope.stage, envelope.source, envelope.tensor)
            if _is_it(place, place_of) and microbatch in (None, envelope.microbatch):
                change(raw)

        return on_the_wire(live, _sender(place), place.stage, changed)

    return inject


flipped = _framed(flip_a_bit, 0)
narrowed = _framed(cast_to_bfloat16, None)

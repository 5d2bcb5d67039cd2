"""The whole of a running pipeline as one Keras model with the values that its workers hold."""

from __future__ import annotations

from pipeline.model.merge import Merged, merge
from pipeline.runtime.session import Session


def merged(session: Session) -> Merged:
    """One Keras model of all stages, with their present values; the user's own models stay as they are."""
    setup = session.setup
    return merge(setup.segments, setup.wires, setup.original, session.values.read("model"))

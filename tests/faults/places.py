"""Where in a running pipeline a fault makes sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tests.faults.live import ACTIVATION, GRADIENT, MASK, SHARED, Edge, Live
from tests.models import Spread


@dataclass(frozen=True)
class Place:
    """In a stage, or on an edge.

    Attributes:
        stage: Where it happens; on an edge where it arrives.
        edge: On the way of which tensor; None: in the stage.
        what: The kind of message.
        named: Whether the edge itself must be named, not only the stage: what arrives is not what was sent.
    """

    stage: int
    edge: Edge | None = None
    what: str = ""
    named: bool = True

    def text(self, names: Sequence[str]) -> str:
        """For the matrix."""
        if self.edge is None:
            return names[self.stage]
        producer, consumer = names[self.edge.producer], names[self.edge.consumer]
        way = f"{producer} ← {consumer}" if self.what == GRADIENT else f"{producer} → {consumer}"
        return f"{way}, {self.what.replace('_', ' ')} {self.edge.tensor}"


Places = Callable[[Live], list[Place]]


def _stages(holds: Callable[[Any], bool]) -> Places:
    return lambda live: [Place(i) for i, hosted in live.hosted.items() if holds(hosted)]


def _has(hosted: Any, kind: type) -> bool:
    return any(isinstance(layer, kind) for layer in hosted.stage.model._flatten_layers())


def _has_own_losses(hosted: Any) -> bool:
    model = hosted.stage.model
    active = any(getattr(layer, "activity_regularizer", None) is not None for layer in model._flatten_layers())
    return bool(hosted.stage._part.regularised) or active or _has(hosted, Spread)


def _recomputes(hosted: Any) -> bool:
    """Compiled, a stage that gives nothing to others goes forward and backward in one function."""
    return bool(hosted.spec.recompute) and (hosted.spec.run_eagerly or any(to for _, to in hosted.spec.outputs))


trained = _stages(lambda hosted: bool(hosted.stage.trainable_variables))
"""Stages with variables to train."""
heads = _stages(lambda hosted: bool(hosted.heads))
"""Stages with a loss."""
own_losses = _stages(_has_own_losses)
"""Stages with regularisers or added losses."""
dropouts_recomputed = _stages(lambda hosted: _recomputes(hosted) and _has(hosted, keras.layers.Dropout))
"""Stages that draw a mask and compute their forward pass again."""
normalised = _stages(lambda hosted: _has(hosted, keras.layers.BatchNormalization))
"""Stages with statistics."""
given_to_stages = _stages(lambda hosted: bool(hosted.heads) or any(source < 0 for _, source in hosted.spec.inputs))
"""Stages that get inputs or targets from the driver."""
masked_heads = _stages(lambda hosted: bool(hosted.heads) and bool(hosted.prediction_masks))
"""Stages whose loss has masked predictions."""
tied_owners = _stages(lambda hosted: any(tie.stages[0] == hosted.spec.index for tie in hosted.ties))
"""Stages that sum a shared variable's gradients."""
tied_copies = _stages(lambda hosted: any(tie.stages[0] != hosted.spec.index for tie in hosted.ties))
"""Stages that get the sum."""
square = _stages(lambda hosted: any(is_square(hosted, name) for name, to in hosted.spec.outputs if to))
"""Stages that give a tensor which transposed has the same shape."""
joins = _stages(lambda hosted: any(len(consumers) > 1 for _, consumers in hosted.spec.outputs))
"""Stages that sum the gradients of several consumers."""


def is_square(hosted: Any, name: str) -> bool:
    """Whether a stage's output has the same shape when its first two axes behind the batch are exchanged."""
    place = [one for one, _ in hosted.spec.outputs].index(name)
    shape = hosted.stage.model.outputs[place].shape
    return len(shape) > 2 and shape[1] == shape[2]


def activations(live: Live) -> list[Place]:
    """Every activation at every cut."""
    return [Place(edge.consumer, edge, ACTIVATION) for edge in live.edges]


def gradients(live: Live) -> list[Place]:
    """Every dL/dOut at every cut."""
    return [Place(edge.producer, edge, GRADIENT) for edge in live.edges]


def handed_back(live: Live) -> list[Place]:
    """Every dL/dOut where it is computed."""
    return [Place(edge.consumer, edge, GRADIENT, named=False) for edge in live.edges]


def masks(live: Live) -> list[Place]:
    """Every mask at every cut."""
    return [Place(edge.consumer, edge, MASK) for edge in live.edges if edge.masked]


def shared(live: Live) -> list[Place]:
    """Gradients of tied variables on their way to the owner, and their sums on the way back."""
    found = []
    for i, hosted in live.hosted.items():
        for tie in hosted.ties:
            owner = tie.stages[0]
            if i != owner:
                found += [Place(owner, Edge(i, owner, tie.name), SHARED), Place(i, Edge(owner, i, tie.name), SHARED)]
    return found


def handed_on(live: Live) -> list[Place]:
    """Activations and gradients."""
    return [*activations(live), *gradients(live)]


def floats_in_frames(live: Live) -> list[Place]:
    """All floats that travel between stages."""
    return [*handed_on(live), *shared(live)]


def all_in_frames(live: Live) -> list[Place]:
    """All that travels between stages."""
    return [*floats_in_frames(live), *masks(live)]


def square_edges(live: Live) -> list[Place]:
    """Activations and gradients that have the same shape when they are transposed."""
    return [place for place in handed_on(live) if is_square(live.hosted[place.edge.producer], place.edge.tensor)]


def skipping(live: Live) -> list[Place]:
    """Gradients on edges that pass over a stage."""
    return [place for place in gradients(live) if place.edge is not None and place.edge.skips]

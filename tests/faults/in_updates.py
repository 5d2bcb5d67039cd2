"""Faults in a stage's update, which leave gradients right; only steps beside a Keras optimizer find them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tests.faults.cases import CLIP, OLD_RATE
from tests.faults.live import Live, applying
from tests.faults.places import Place

Context = AbstractContextManager[None]


def clipped_by_itself(live: Live, place: Place) -> Context:
    """The stage clips by the norm of its own gradients."""

    def around(apply: Any, optimizer: Any, scale: Any = None, divisor: Any = None) -> None:
        norm = np.sqrt(sum(live.hosted[place.stage].squared_norms().values()))
        assert norm > CLIP
        apply(optimizer, float(CLIP / norm), divisor)

    return applying(live, place.stage, around)


def applied_twice(live: Live, place: Place) -> Context:
    """The same gradients are applied again."""
    stage = live.hosted[place.stage].stage

    def around(apply: Any, optimizer: Any, scale: Any = None, divisor: Any = None) -> None:
        gradients = [None if g is None else np.array(g) for g in stage.accumulated()]
        apply(optimizer, scale, divisor)
        factor = 1.0 if scale is None else scale
        pairs = [(g * factor, v) for g, v in zip(gradients, stage.trainable_variables, strict=True) if g is not None]
        optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])

    return applying(live, place.stage, around)


def old_rate(live: Live, place: Place) -> Context:
    """The stage does not hear of the new learning rate."""

    def around(apply: Any, optimizer: Any, *rest: Any) -> None:
        optimizer.learning_rate = OLD_RATE
        apply(optimizer, *rest)

    return applying(live, place.stage, around)

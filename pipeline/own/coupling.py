"""Layers that couple the samples of a batch, found by value: the own model on some samples, alone and among others.

    the first microbatch alone   against   the same samples in one call with all others

BatchNormalization in training is left out, as it is told of by itself (`pipeline.runtime.meaning`), and so is what
layers draw. Only where the outputs differ is the layer looked for: each is called again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from pipeline.batch.step import Batch
from pipeline.compare.tolerance import TRIES, Tolerance
from pipeline.distance import distance
from pipeline.own.layer_calls import JoinedCall, LayerCall, by_layer, nothing_drawn, recorded_calls
from pipeline.own.model import OwnResult
from stages.keras_internals import layers_of

OwnRun = Callable[[Batch, int | None], OwnResult]
"""The own model on a batch, its variables as they are, or each changed by one rounding drawn from a seed."""
THE_MODEL = "an operation between layers"


def coupling(run: OwnRun, batch: Batch, training: bool, precision: float, known: Collection[str]) -> str:
    """The first layer that gives samples something else when others are with them; "" if none does.

    Args:
        run: OwnRuns the own model.
        batch: Some samples in several microbatches.
        training: Whether layers run as in training.
        precision: eps of what the model computes in.
        known: Names of layers that are told of already.

    Returns:
        The layer's name in quotes, or `THE_MODEL`.
    """
    rows = batch.sizes[0]
    together = replace(batch, sizes=(sum(batch.sizes),), targets={}, sample_weights={})
    alone = _first(together, rows)

    def apart(a: OwnResult, b: OwnResult) -> float:
        pairs = [(array[:rows], b.outputs[name][:rows]) for name, array in a.outputs.items()]
        return max((distance(x, y) for x, y in pairs), default=0.0)

    with nothing_drawn():
        theirs, plain = run(together, None), Tolerance.elsewhere(precision).relative
        by = apart(run(alone, None), theirs)
        if not by > plain or apart(run(together, None), theirs):
            return ""
        changes: list[float] = []
        while by > Tolerance.elsewhere(precision, changes).relative:
            if len(changes) == TRIES:
                return _named(run, batch, training, plain, known)
            changes.append(apart(run(together, len(changes)), theirs))
    return ""


def _named(run: OwnRun, batch: Batch, training: bool, plain: float, known: Collection[str]) -> str:
    """The first layer that couples its samples when it is called by itself."""
    with recorded_calls(adding=False) as calls:
        run(replace(batch, targets={}, sample_weights={}), None)
    found: dict[str, float] = {}
    for some in by_layer(calls, len(batch.sizes)):
        if _holds_any(some[0].layer, known):
            continue
        try:
            by = _coupled(some, training)
        except Exception:  # it cannot be called with other numbers of samples, or not outside of its model
            continue
        if by > MUCH:
            return repr(some[0].layer.name)
        if by > plain:
            found.setdefault(repr(some[0].layer.name), by)
    if found:
        return max(found, key=found.__getitem__)
    return "" if known else THE_MODEL


MUCH = 1e-4
"""What no layer by itself makes of rounding."""


def _coupled(calls: Sequence[LayerCall], training: bool) -> float:
    """How far a layer's outputs for the first samples are from those among all others."""
    layer, joined = calls[0].layer, JoinedCall(calls)

    def outputs(end: int) -> list[Any]:
        args, kwargs = joined.arguments(0, end)
        return list(keras.tree.flatten(layer(*args, **{"training": training, **kwargs})))

    rows = joined.sizes[0]
    pairs = zip(outputs(rows), outputs(joined.total), strict=True)
    return max((distance(alone, np.asarray(among)[:rows]) for alone, among in pairs), default=0.0)


def _holds_any(layer: Any, names: Collection[str]) -> bool:
    return any(one.name in names for one in layers_of(layer))


def _first(batch: Batch, rows: int) -> Batch:
    return replace(batch, inputs={name: array[:rows] for name, array in batch.inputs.items()}, sizes=(rows,))


__all__ = ["THE_MODEL", "coupling"]

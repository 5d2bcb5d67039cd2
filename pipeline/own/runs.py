"""Runs of the user's own model on the first samples of a batch, each from the values that the workers have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.batch.step import Batch
from pipeline.model.merge import StageValues
from pipeline.own.layer_calls import LayerCall, recorded_calls
from pipeline.own.model import OwnModel, OwnResult

Array = np.ndarray[Any, Any]


class OwnRuns:
    """Runs of the own model, each from the values that the workers have.

    Args:
        own: The user's own model and loss.
        values: Of its variables.
        few: Some samples, in microbatches.
        training: Whether layers run as in training.
    """

    def __init__(self, own: OwnModel, values: StageValues, few: Batch, training: bool) -> None:
        self.own, self.values, self.few, self.training = own, values, few, training

    def __call__(self, batch: Batch | None = None, seed: int | None = None) -> OwnResult:
        """One run, of `few` where no other batch is given; with a seed, every variable is changed by one rounding."""
        self.own.assign(self.values)
        if seed is not None:
            self.own.disturb(seed)
        return self.own.run(self.few if batch is None else batch, self.training)

    def first(self, batch: Batch) -> tuple[OwnResult, list[LayerCall]]:
        """The first run, and the calls in which losses were added; `few` becomes what the model can be called with."""
        for few in (self.few, first_of(batch, tuple(batch.sizes[: len(self.few.sizes)]))):
            self.few = few
            try:
                with recorded_calls(adding=True) as calls:
                    return self(), calls
            except Exception as error:  # a model may want microbatches of a certain size
                failed = error
        raise failed


def first_of(batch: Batch, sizes: tuple[int, ...]) -> Batch:
    """The first samples of a batch, in microbatches of these sizes."""

    def first(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array[: sum(sizes)] for name, array in arrays.items()}

    return replace(
        batch,
        inputs=first(batch.inputs),
        targets=first(batch.targets),
        sample_weights=first(batch.sample_weights),
        sizes=sizes,
    )


__all__ = ["OwnRuns", "first_of"]

"""Keras's own files (``.keras``, ``.weights.h5``) of a pipeline: the joined model with its optimizer's state.

What Keras's callbacks write and read through "the model" is what they would write for the unsplit model: a file opens
with `keras.models.load_model`, compiled, and training continues from it, here or in plain Keras.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from pipeline.merging import Merged
from pipeline.state import Place, Slots, described_slots
from stages.recipes import create
from stages.snapshot import optimizer_slots, read

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline


def save(pipe: Pipeline, path: Path, overwrite: bool, **options: Any) -> None:
    """Write the trained model as a ``.keras`` file, compiled like the pipeline."""
    _trained(pipe).model.save(path, overwrite=overwrite, **options)


def save_weights(pipe: Pipeline, path: Path, overwrite: bool) -> None:
    """Write weights and optimizer state as a ``.weights.h5`` file."""
    _trained(pipe).model.save_weights(path, overwrite=overwrite)


def load_weights(pipe: Pipeline, path: Path, **options: Any) -> None:
    """Read a ``.weights.h5`` file into the stages; the optimizer's state too where the file has it."""
    driver = pipe._running()
    with h5py.File(path) as file:
        compiled = "optimizer" in file and len(file["optimizer"].get("vars", ())) > 0
    merged = _trained(pipe) if compiled and pipe.optimizer is not None else pipe._merged()
    merged.model.load_weights(path, **options)
    driver.set("model", merged.values())
    optimizer = merged.model.optimizer
    if optimizer is not None:
        places = _slot_places(merged)
        values = read(optimizer.variables)
        slots = Slots.of((place, name, value) for (place, name), value in zip(places, values, strict=True))
        driver.set("optimizer", slots.for_stages(described_slots(driver.descriptions)))
        assert pipe._compiled is not None
        pipe._compiled.go_on_from(slots.shared, rate=True)


def _trained(pipe: Pipeline) -> Merged:
    """The joined model, compiled like the pipeline, its optimizer as far as the pipeline's stages are."""
    merged = pipe._merged()
    if pipe._compiled is None:
        return merged
    merged.model.compile(**{name: create(recipe) for name, recipe in pipe._compiled.recipe().items()})
    if merged.model.optimizer is not None:
        merged.model.optimizer.build(merged.model.trainable_variables)
        values = pipe._session.slots().ordered(_slot_places(merged))
        for variable, value in zip(merged.model.optimizer.variables, values, strict=True):
            variable.assign(value)
        if pipe._compiled.constant_rate:
            merged.model.optimizer.learning_rate = float(pipe.optimizer.learning_rate)
    return merged


def _slot_places(merged: Merged) -> list[tuple[Place | None, str]]:
    """What each variable of the joined model's optimizer belongs to, by stage."""
    at = {id(v): (i, k) for i, part in enumerate(merged.trainable) for k, v in enumerate(part)}
    trainable = merged.model.trainable_variables
    slots = optimizer_slots(merged.model.optimizer, trainable)
    return [(at[id(trainable[slot.variable])] if slot.variable >= 0 else None, slot.name) for slot in slots]

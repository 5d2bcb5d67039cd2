"""Keras's own files (``.keras``, ``.weights.h5``) of a pipeline: the joined model with its optimizer's state.

What Keras's callbacks write and read through "the model" is what they would write for the unsplit model: a file opens
with `keras.models.load_model`, compiled, and training continues from it, here or in plain Keras. Only where each stage
has an optimizer of its own, which no Keras model has, the file holds the model and its weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import h5py
import keras

from pipeline.compiled.loss_scaling import LossScaling, unscaled
from pipeline.compiled.optimizer_slots import OptimizerSlots, Place, StartValues, described_slots
from pipeline.cutting.splitter import Cut
from pipeline.errors import CheckpointError
from pipeline.model.merge import Merged
from pipeline.runtime.session import Session
from pipeline.saving.merged import merged as merged_of
from pipeline.saving.own_objects import warn_of_what_a_keras_file_leaves_out
from stages.worker.snapshot import optimizer_slots, read

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

_TOLD: WeakSet[Session] = WeakSet()
"""Whose files were told of."""


def save(pipe: Pipeline, path: Path, overwrite: bool, **options: Any) -> None:
    """Write the trained model as a ``.keras`` file, compiled like the pipeline; what it leaves out is told once."""
    model, compiled = _trained(pipe).model, pipe.session.workers.compiled
    model.save(path, overwrite=overwrite, **options)
    if pipe.session not in _TOLD:
        _TOLD.add(pipe.session)
        warn_of_what_a_keras_file_leaves_out(model, [] if compiled is None else compiled.judges, path)


def load(
    kind: type[Pipeline], path: Path, stages: int | None, at: Sequence[Cut] | None, options: Mapping[str, Any]
) -> Pipeline:
    """Cut the model of a ``.keras`` file and go on from its values; see `Pipeline.load`."""
    if stages is None and at is None:
        raise CheckpointError(
            f"{path} holds one Keras model: say into how many stages to cut it (stages=2), or at=[...]"
        )
    reading = {name: options[name] for name in ("custom_objects", "compile", "safe_mode") if name in options}
    model = keras.models.load_model(path, **reading)
    pipe = kind.split(model, stages, at, **{name: value for name, value in options.items() if name not in reading})
    parts = [segment.model for segment in pipe.segments]
    state = StartValues({i: read(part.variables) for i, part in enumerate(parts)})
    if not model.compiled:
        pipe.session.workers.start_from(state)
        return pipe
    given = keras.saving.deserialize_keras_object(model.get_compile_config())
    names = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics", "run_eagerly", "steps_per_execution")
    pipe.compile(**{name: given[name] for name in names if name in given}, auto_scale_loss=False)
    compiled, optimizer = pipe.session.workers.needs_compile("load"), model.optimizer
    if optimizer is not None and optimizer.built:
        merged = Merged(
            model, tuple(tuple(p.variables) for p in parts), tuple(tuple(p.trainable_variables) for p in parts)
        )
        state.slots = _slots(merged)
        compiled.build_optimizers()
        compiled.go_on_from(state.slots, rate=True)
        if compiled.loss_scaling is not None:
            compiled.loss_scaling.go_on_from(LossScaling(optimizer).state())
    pipe.session.workers.start_from(state)
    return pipe


def save_weights(pipe: Pipeline, path: Path, overwrite: bool, **options: Any) -> None:
    """Write weights and, of one optimizer for all stages, its state as a ``.weights.h5`` file."""
    _trained(pipe).model.save_weights(path, overwrite=overwrite, **options)


def load_weights(pipe: Pipeline, path: Path, **options: Any) -> None:
    """Read a ``.weights.h5`` file into the stages; the optimizer's state too where the file has it."""
    driver = pipe.session.workers.driver()
    with h5py.File(path) as file:
        trained = "optimizer" in file and len(file["optimizer"].get("vars", ())) > 0
    merged = _trained(pipe) if trained and pipe.optimizer is not None else merged_of(pipe.session)
    merged.model.load_weights(path, **options)
    driver.set("model", merged.values())
    optimizer, compiled = getattr(merged.model, "optimizer", None), pipe.session.workers.compiled
    if optimizer is not None and compiled is not None:
        slots = _slots(merged)
        driver.set("optimizer", slots.for_stages(described_slots(driver.descriptions)))
        compiled.go_on_from(slots, rate=True)
        if compiled.loss_scaling is not None:
            compiled.loss_scaling.go_on_from(LossScaling(optimizer).state())


def _trained(pipe: Pipeline) -> Merged:
    """The joined model, compiled like the pipeline, its optimizer as far as the pipeline's stages are.

    Not compiled where each stage has an optimizer of its own.
    """
    pipe.session.workers.needs_the_trainable_set("a Keras file")
    merged, compiled = merged_of(pipe.session), pipe.session.workers.compiled
    if compiled is None or not compiled.one_optimizer:
        return merged
    merged.model.compile(**compiled.copies(), auto_scale_loss=False)  # the optimizer scales already, where it should
    optimizer = merged.model.optimizer
    if optimizer is not None:
        optimizer.build(merged.model.trainable_variables)
        values = pipe.session.values.slots().ordered(_slot_places(merged))
        for variable, value in zip(unscaled(optimizer).variables, values, strict=True):
            variable.assign(value)
        if compiled.constant_rate:
            optimizer.learning_rate = float(pipe.optimizer.learning_rate)
        if compiled.loss_scaling is not None:
            LossScaling(optimizer).go_on_from(compiled.loss_scaling.state())
    return merged


def _slots(merged: Merged) -> OptimizerSlots:
    """The values of the joined model's optimizer by what they belong to."""
    places, values = _slot_places(merged), read(unscaled(merged.model.optimizer).variables)
    return OptimizerSlots.of((place, name, value) for (place, name), value in zip(places, values, strict=True))


def _slot_places(merged: Merged) -> list[tuple[Place, str]]:
    """What each variable of the joined model's (inner) optimizer belongs to, by stage."""
    at = {id(v): (i, k) for i, part in enumerate(merged.trainable) for k, v in enumerate(part)}
    trainable = merged.model.trainable_variables
    slots = optimizer_slots(unscaled(merged.model.optimizer), trainable)
    return [(at[id(trainable[slot.variable])] if slot.variable >= 0 else (0, -1), slot.name) for slot in slots]

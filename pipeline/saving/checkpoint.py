"""Checkpoints: everything needed to continue between two sequences as if never stopped, also over other cuts.

    run/step-100/
        manifest.json    recipes of the segments, what compile was given, names and digests
        stage-0.npz      the stage's variables (weights, statistics, seed states) and optimizer slots
        stage-1.npz ...

Rules:

1. A checkpoint is whole or not there, and nothing else is touched (`pipeline.saving.folder`).
2. Arrays are raw numbers; no pickle is written or read, and no code. Recipes are Keras's configurations; other code
   than Keras's runs only if the user says so (`pipeline.saving.trust`). What a configuration leaves out is named on
   saving, and must be brought on loading (`pipeline.saving.own_objects`).
3. Optimizer slots are kept by the variable they belong to, so that other cuts can take them over.
4. States that one batch leaves for the next are not in it, neither those of `keep_state` nor those of layers with
   ``stateful=True``, as with `model.save`; but where it is the state of a training that is to go on
   (`pipeline.saving.going_on`), with all that its next step needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipeline.compiled.optimizer_slots import OptimizerSlots, StartValues
from pipeline.cutting.splitter import Cut, Split, split_model
from pipeline.errors import CheckpointError
from pipeline.model.merge import merge
from pipeline.model.shared_variables import groups, share
from pipeline.model.wiring import wire
from pipeline.runtime.options import as_given
from pipeline.saving.folder import FORMAT, MANIFEST, PROGRESS, new_file, real_place, stage_file, writing
from pipeline.saving.going_on import Resumed
from pipeline.saving.own_objects import (
    Own,
    check_brought,
    model_recipe,
    own_parts,
    warn_of_what_is_not_in_it,
    write_values,
)
from pipeline.saving.plain_state import put_together, taken_apart
from pipeline.saving.reading import MANIFEST_BYTES, damage_told, read_arrays, read_manifest
from pipeline.saving.trust import check_code
from stages.errors import RecipeError
from stages.recipe.describe import create
from stages.recipe.optimizer_state import leave_undecayed
from stages.recipe.segment import Segment
from stages.worker import snapshot

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

CHECKPOINT_VERSION = 2
_ENTRIES = {"original", "stage_of", "segments", "options", "compile", "loss_scaling", "undecayed", "outputs", "shared"}
_ENTRIES |= {"stages"}
BETWEEN_STEPS = ("metrics", "besides", "layer states", "kept states")
"""What one step leaves for the next beside weights and slots, as `HostedStage.variables` calls it, or `Get`."""


@dataclass(frozen=True, eq=False)
class Content:
    """The content of a checkpoint, read from the workers and still to be written.

    Attributes:
        manifest: As JSON, but for the files' digests and dtypes.
        files: {file: its arrays by name}.
    """

    manifest: dict[str, Any]
    files: dict[str, dict[str, np.ndarray[Any, Any]]]


def save(pipe: Pipeline, path: Path, overwrite: bool) -> None:
    """Write a checkpoint of a pipeline; see `Pipeline.save`."""
    target = real_place(path, overwrite)
    content = read_content(pipe)
    write_content(content, target)
    warn_of_what_is_not_in_it(content.manifest, path)


def read_content(pipe: Pipeline, progress: Any = None, recipes: dict[str, Any] | None = None) -> Content:
    """All that a checkpoint holds of a pipeline as it is now.

    Args:
        pipe: The pipeline.
        progress: How far training is, plain data; with it also what one step leaves for the next (`BETWEEN_STEPS`).
        recipes: Those of the models, which a first call leaves here for the next ones.
    """
    driver = pipe.session.workers.driver()
    pipe.session.workers.needs_the_trainable_set("save")
    groups = ["model", "optimizer", *([] if progress is None else BETWEEN_STEPS)]
    values = {group: pipe.session.values.read(group) for group in groups}
    files = {
        stage_file(i): {f"{group}/{k}": value for group in groups for k, value in enumerate(values[group][i])}
        for i in range(len(pipe.names))
    }
    stages = [
        {
            "name": name,
            "file": stage_file(i),
            "variables": [variable.plain() for variable in driver.descriptions[i].variables],
            "slots": [list(slot) for slot in driver.descriptions[i].slots],
        }
        for i, name in enumerate(pipe.names)
    ]
    manifest = _manifest(pipe, stages, {} if recipes is None else recipes)
    if progress is not None:
        arrays: list[np.ndarray[Any, Any]] = []
        manifest["progress"] = {"file": PROGRESS, "value": taken_apart(progress, arrays)}
        files[PROGRESS] = {str(k): array for k, array in enumerate(arrays)}
    return Content(manifest, files)


def write_content(content: Content, target: Path) -> None:
    """Write a checkpoint in one go; `target` as `real_place` gives it."""
    with writing(target) as place:
        described = [*content.manifest["stages"], *filter(None, [content.manifest.get("progress")])]
        for entry in described:
            arrays = content.files[entry["file"]]
            entry["sha256"] = _write_arrays(place / entry["file"], arrays)
            entry["dtypes"] = {key: value.dtype.name for key, value in arrays.items()}
        text = json.dumps(content.manifest, indent=1)
        if len(text) > MANIFEST_BYTES:  # it is ASCII
            raise CheckpointError(
                f"{target} was not saved: its {MANIFEST} would have {len(text) >> 20} MiB, and no more than "
                f"{MANIFEST_BYTES >> 20} are read back; what callbacks keep in lists of numbers is smaller in arrays"
            )
        _write_text(place / MANIFEST, text)


def _manifest(pipe: Pipeline, stages: list[dict[str, Any]], recipes: dict[str, Any]) -> dict[str, Any]:
    compiled, split = pipe.session.workers.compiled, pipe.session.setup.split
    if not recipes:
        recipes["original"] = None if split is None else model_recipe(split.model)
        recipes["segments"] = [None if split is not None else _segment_recipe(s) for s in pipe.segments]
    return {
        "format": FORMAT,
        "version": CHECKPOINT_VERSION,
        "original": recipes["original"],
        "stage_of": None if split is None else list(split.stage_of),
        "segments": [
            {"recipe": recipe, "inputs": s.inputs, "outputs": s.outputs, "states": s.states}
            for s, recipe in zip(pipe.segments, recipes["segments"], strict=True)
        ],
        "options": pipe.session.setup.options.saved(),
        "compile": None if compiled is None else compiled.recipe(),
        "loss_scaling": None if compiled is None or compiled.loss_scaling is None else compiled.loss_scaling.state(),
        "undecayed": [] if compiled is None else [_undecayed(pipe, i) for i in range(len(pipe.segments))],
        "shared": [] if split is not None else groups(pipe.segments),
        "outputs": None if split is not None else [name for name, _ in pipe.wires.outputs],
        "stages": stages,
    }


def _segment_recipe(segment: Segment) -> Any:
    if segment.model is not None:
        return {"model": model_recipe(segment.model)}
    try:
        return segment.recipe()
    except RecipeError as error:
        return {"own": str(error)}


def load(
    kind: type[Pipeline],
    path: Path,
    stages: int | None,
    at: Sequence[Cut] | None,
    options: Mapping[str, Any],
    own: Own,
    trust: bool | Sequence[str],
    going_on: bool = False,
) -> Pipeline:
    """Make a pipeline from a checkpoint; see `Pipeline.load`, and, for one that is going on, `Pipeline.resume`."""
    manifest = read_manifest(path, CHECKPOINT_VERSION, _ENTRIES | ({"progress"} if going_on else set()))
    with damage_told(path):
        check_brought(manifest, own)
        models = [] if own.model is not None else [manifest["original"], manifest["segments"]]
        rest = [recipe for name, recipe in (manifest["compile"] or {}).items() if name not in own.given]
        check_code([*models, *rest], trust)
        arrays = [read_arrays(path, entry) for entry in manifest["stages"]]
        pipe = _loaded(kind, manifest, arrays, (stages, at), options, own, going_on)
        if going_on:
            entry = manifest["progress"]
            found = read_arrays(path, entry)
            progress = put_together(entry["value"], [found[str(k)] for k in range(len(found))])
            between, begins = (
                {group: {i: _part(values, group) for i, values in enumerate(arrays)} for group in groups}
                for groups in (BETWEEN_STEPS, ("model", "optimizer"))
            )
            compiled = pipe.session.workers.needs_compile("resume")
            pipe.session.workers.resumed = Resumed(path, progress, between, begins, compiled, compiled.rates())
        return pipe


def _loaded(
    kind: type[Pipeline],
    manifest: Mapping[str, Any],
    arrays: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    cuts: tuple[int | None, Sequence[Cut] | None],
    options: Mapping[str, Any],
    own: Own,
    going_on: bool,
) -> Pipeline:
    stages, at = cuts
    saved = as_given(manifest["options"])
    parts = _saved_parts(manifest) if own.model is None else own_parts(own.model, manifest)
    state = StartValues(
        {i: _part(values, "model") for i, values in enumerate(arrays)},
        OptimizerSlots.of_stages(
            {
                i: [snapshot.OptimizerSlot(*slot) for slot in entry["slots"]]
                for i, entry in enumerate(manifest["stages"])
            },
            {i: _part(values, "optimizer") for i, values in enumerate(arrays)},
        ),
    )
    if going_on:
        state.layer_states = {i: _part(values, "layer states") for i, values in enumerate(arrays)}
        state.kept_states = {i: _part(values, "kept states") for i, values in enumerate(arrays)}
    if own.model is not None:
        write_values(parts.segments if isinstance(parts, Split) else parts, state.model)
    undecayed = _variables(parts, manifest["undecayed"])
    if stages is not None or at is not None:
        saved.pop("recompute")  # it was one value per stage
        if "dict" in ((manifest["compile"] or {}).get("optimizer") or {}):
            raise CheckpointError(
                "each stage has an optimizer of its own; such a checkpoint loads with its own cuts only"
            )
        parts, state, undecayed = _recut(parts, state, stages, at, undecayed, {**saved, **options})
    if not isinstance(parts, Split):
        saved["outputs"] = manifest["outputs"]
    pipe = kind(parts, **{**saved, **options})
    compiled = None if manifest["compile"] is None else own.compiled(manifest["compile"])
    training = {"compile": compiled, "loss_scaling": manifest["loss_scaling"], "undecayed": undecayed}
    _go_on(pipe, state, training)
    return pipe


def _go_on(pipe: Pipeline, state: StartValues, training: Mapping[str, Any]) -> None:
    """Let a new pipeline go on from saved values, compiled as the saved one was."""
    if training["compile"] is None:
        pipe.session.workers.start_from(StartValues(state.model))
        return
    arguments = training["compile"]
    if training["undecayed"]:
        leave_undecayed(arguments["optimizer"], training["undecayed"])
    pipe.compile(**arguments, auto_scale_loss=False)  # an optimizer that scales the loss was saved as one
    pipe.session.workers.start_from(state)
    compiled = pipe.session.workers.needs_compile("load")
    if pipe.optimizer is not None and state.slots is not None:
        compiled.build_optimizers()
        compiled.go_on_from(state.slots)
    if compiled.loss_scaling is not None and training["loss_scaling"] is not None:
        compiled.loss_scaling.go_on_from(training["loss_scaling"])


def _undecayed(pipe: Pipeline, stage: int) -> list[int]:
    """Places of a stage's variables that its optimizer was told, as objects, to leave undecayed."""
    model, compiled = pipe.segments[stage].model, pipe.session.workers.compiled
    return [] if model is None or compiled is None else compiled.undecayed(stage, model.trainable_variables)


def _variables(parts: Split | list[Segment], places: Sequence[Sequence[int]]) -> list[Any]:
    """The variable objects at these places of each stage."""
    segments = parts.segments if isinstance(parts, Split) else parts
    return [segment.model.trainable_variables[k] for segment, some in zip(segments, places, strict=False) for k in some]


def _recut(
    parts: Split | list[Segment],
    state: StartValues,
    stages: int | None,
    at: Sequence[Cut] | None,
    undecayed: Sequence[Any],
    options: Mapping[str, Any],
) -> tuple[Split, StartValues, list[Any]]:
    """The whole model with the saved values, cut elsewhere; the variables to leave undecayed, as they are there."""
    assert state.slots is not None
    segments = parts.segments if isinstance(parts, Split) else parts
    parts_before = [[] if segment.model is None else segment.model.trainable_variables for segment in segments]
    if isinstance(parts, Split):
        model, old = parts.model, [segment.model.trainable_variables for segment in parts.segments]
        for i, segment in enumerate(parts.segments):
            snapshot.write(segment.model.variables, state.model[i], f"stage {i} of the checkpoint")
    else:
        merged = merge(parts, wire(parts), None, state.model)
        model, old = merged.model, list(merged.trainable)
    split = split_model(model, stages, at, options=options)
    new = [segment.model for segment in split.segments]
    values = {i: snapshot.read(part.variables) for i, part in enumerate(new)}
    twins = {id(a): b for before, after in zip(parts_before, old, strict=True) for a, b in zip(before, after)}  # noqa: B905
    moved = state.slots.moved(old, [part.trainable_variables for part in new])
    return split, StartValues(values, moved), [twins[id(variable)] for variable in undecayed]


def _saved_parts(manifest: Mapping[str, Any]) -> Split | list[Segment]:
    """The segments as they were saved."""
    if manifest["original"] is not None:
        model = create(manifest["original"])
        if not isinstance(model, keras.Model):
            raise CheckpointError(f"the checkpoint is damaged: its model is of the type {type(model).__name__}")
        return split_model(model, stage_of=manifest["stage_of"], options=manifest["options"])
    found = []
    for entry, stage in zip(manifest["segments"], manifest["stages"], strict=True):
        names = {label: tuple(entry[label]) for label in ("inputs", "outputs", "states")} | {"name": stage["name"]}
        recipe = entry["recipe"]
        if "model" in recipe:
            found.append(Segment(model=create(recipe["model"]), **names))
        else:
            found.append(Segment(build=recipe["build"], kwargs=recipe["kwargs"], **names))
    share([segment.model for segment in found], manifest["shared"])
    return found


def _part(values: Mapping[str, np.ndarray[Any, Any]], what: str) -> list[np.ndarray[Any, Any]]:
    count = sum(1 for key in values if key.startswith(f"{what}/"))
    return [values[f"{what}/{k}"] for k in range(count)]


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Write arrays as raw bytes of a known dtype (bfloat16 has none in NumPy's files); return the file's SHA-256."""
    raw = {key: value if value.dtype.isbuiltin == 1 else _as_integers(value) for key, value in arrays.items()}
    with new_file(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        np.savez(file, **raw)  # type: ignore[arg-type]
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def _as_integers(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode())

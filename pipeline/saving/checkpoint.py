"""Checkpoints: everything needed to continue as if never stopped, also over other cuts.

    run/step-100/
        manifest.json    recipes of the segments, what compile was given, names and digests
        stage-0.npz      the stage's variables (weights, statistics, seed states) and optimizer slots
        stage-1.npz ...

Rules:

1. A checkpoint is whole or not there: it is written under another name beside its place, flushed, and then renamed.
2. Arrays are raw numbers; no pickle is written or read, and no code. Recipes are Keras's configurations: load only
   checkpoints from people you trust, as with any Keras file. What a configuration leaves out is named when it is saved,
   and must be brought when it is loaded (`pipeline.saving.own_objects`).
3. Optimizer slots are kept by the variable they belong to, so that other cuts can take them over.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compiled.optimizer_slots import OptimizerSlots, StartValues
from pipeline.cutting.splitter import Cut, Split, split_model
from pipeline.errors import CheckpointError
from pipeline.model.merge import merge
from pipeline.model.shared_variables import groups, share
from pipeline.model.wiring import wire
from pipeline.saving.own_objects import (
    Own,
    check_brought,
    model_recipe,
    own_parts,
    warn_of_what_is_not_in_it,
    write_values,
)
from stages.errors import RecipeError
from stages.recipe.describe import create
from stages.recipe.segment import Segment
from stages.worker import snapshot
from stages.worker.hosted_stage import leave_undecayed

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

FORMAT = "tapeline checkpoint"
CHECKPOINT_VERSION = 2
_ENTRIES = {"original", "stage_of", "segments", "options", "compile", "loss_scaling", "undecayed", "outputs", "shared"}
_ENTRIES |= {"stages"}


def save(pipe: Pipeline, path: Path, overwrite: bool) -> None:
    """Write a checkpoint of a pipeline; see `Pipeline.save`."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; pass overwrite=True to replace it, or choose another name")
    if path.exists() and not (path / "manifest.json").exists():
        raise CheckpointError(f"{path} exists and is no checkpoint; choose another name")
    driver = pipe.session.workers.driver()
    pipe.session.workers.needs_the_trainable_set("save")
    model, optimizer = pipe.session.values.read("model"), pipe.session.values.read("optimizer")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        stages = []
        for i, name in enumerate(pipe.names):
            description = driver.descriptions[i]
            arrays = {f"model/{k}": value for k, value in enumerate(model[i])}
            arrays |= {f"optimizer/{k}": value for k, value in enumerate(optimizer[i])}
            digest = _write_arrays(place / f"stage-{i}.npz", arrays)
            stages.append(
                {
                    "name": name,
                    "file": f"stage-{i}.npz",
                    "sha256": digest,
                    "dtypes": {key: value.dtype.name for key, value in arrays.items()},
                    "variables": [variable.plain() for variable in description.variables],
                    "slots": [list(slot) for slot in description.slots],
                }
            )
        manifest = _manifest(pipe, stages)
        _write_text(place / "manifest.json", json.dumps(manifest, indent=1))
        _replace(place, path)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    warn_of_what_is_not_in_it(manifest, path)


def _manifest(pipe: Pipeline, stages: list[dict[str, Any]]) -> dict[str, Any]:
    compiled, split = pipe.session.workers.compiled, pipe.session.setup.split
    return {
        "format": FORMAT,
        "version": CHECKPOINT_VERSION,
        "original": None if split is None else model_recipe(split.model),
        "stage_of": None if split is None else list(split.stage_of),
        "segments": [
            {
                "recipe": None if split is not None else _segment_recipe(s),
                "inputs": s.inputs,
                "outputs": s.outputs,
                "states": s.states,
            }
            for s in pipe.segments
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
) -> Pipeline:
    """Make a pipeline from a checkpoint; see `Pipeline.load`."""
    manifest = _read_manifest(path)
    check_brought(manifest, own)
    arrays = [_read_arrays(path, entry) for entry in manifest["stages"]]
    saved = {name: value for name, value in manifest["options"].items() if value is not None}
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
        return split_model(create(manifest["original"]), stage_of=manifest["stage_of"], options=manifest["options"])
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
    with path.open("wb") as file:
        np.savez(file, **raw)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return _digest(path)


def _as_integers(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace(place: Path, path: Path) -> None:
    """Put a finished folder in its place. One that is there already is exchanged in one go, then removed (rule 1)."""
    if not path.exists():
        place.rename(path)
    elif _exchange(place, path):
        shutil.rmtree(place, ignore_errors=True)
    else:  # a file system without exchange: for a moment only the older one's other name is there
        aside = path.with_name(f".{path.name}-replaced-{os.getpid()}")
        path.rename(aside)
        place.rename(path)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux: renameat2 with RENAME_EXCHANGE); False where that does not exist."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint at {path} (no manifest.json)") from error
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: {error}") from error
    said = manifest if isinstance(manifest, dict) else {}
    if said.get("format") != FORMAT or said.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} is not a checkpoint of version {CHECKPOINT_VERSION}: it says {said.get('format')!r} version "
            f"{said.get('version')!r}"
        )
    missing = _ENTRIES - set(said)
    if missing:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: it lacks {', '.join(sorted(missing))}")
    return said


def _read_arrays(path: Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    file = path / str(entry["file"])
    if not file.exists():
        raise CheckpointError(f"the checkpoint {path} is not whole: {file.name} is missing")
    if _digest(file) != entry["sha256"]:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: the content of {file.name} changed after it was saved"
        )
    with np.load(file, allow_pickle=False) as arrays:
        return {key: _typed(arrays[key], entry["dtypes"][key]) for key in arrays.files}


def _typed(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if array.dtype.name == dtype:
        return array
    import ml_dtypes

    return array.view(np.dtype(getattr(ml_dtypes, dtype)))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

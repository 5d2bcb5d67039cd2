"""Checkpoints: everything needed to continue as if never stopped, also over other cuts.

    run/step-100/
        manifest.json    recipes of the segments, what compile was given, names and digests
        stage-0.npz      the stage's variables (weights, statistics, seed states) and optimizer slots
        stage-1.npz ...

Rules:

1. A checkpoint is whole or not there: it is written under another name beside its place, flushed, and then renamed.
2. Arrays are raw numbers; no pickle is written or read. Recipes are Keras's configurations: load only checkpoints from
   people you trust, as with any Keras file.
3. Optimizer slots are kept by the variable they belong to, so that other cuts can take them over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import CheckpointError
from pipeline.splitter import split_model
from stages.recipes import create, describe
from stages.segment import Segment
from stages.snapshot import Slot

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

FORMAT = "tapeline checkpoint"
VERSION = 1
Arrays = Mapping[int, Sequence[np.ndarray[Any, Any]]]


@dataclass
class State:
    """Values that fresh workers start from: for each stage its model's and its optimizer's variables, in order.

    `slots` holds optimizer values by what they belong to, for stages whose optimizers are not built yet.
    """

    model: dict[int, list[np.ndarray[Any, Any]]] = field(default_factory=dict)
    optimizer: dict[int, list[np.ndarray[Any, Any]]] = field(default_factory=dict)
    slots: Slots | None = None

    def optimizer_for(self, descriptions: Mapping[int, Mapping[str, Any]]) -> dict[int, list[np.ndarray[Any, Any]]]:
        """The optimizer values in the order of workers that describe themselves so."""
        if self.slots is None:
            return self.optimizer
        return {i: self.slots.ordered(i, description["slots"]) for i, description in descriptions.items()}


@dataclass
class Slots:
    """Optimizer values by variable and slot name.

    Attributes:
        of_variable: {(stage, index of its trainable variable): {slot name: value}}.
        shared: {name: value} of the optimizer's own (iterations, learning rate), equal in every stage.
    """

    of_variable: dict[tuple[int, int], dict[str, np.ndarray[Any, Any]]]
    shared: dict[str, np.ndarray[Any, Any]]

    def ordered(self, stage: int, wanted: Sequence[Sequence[Any]]) -> list[np.ndarray[Any, Any]]:
        """The values for a stage's optimizer variables.

        Raises:
            CheckpointError: A slot is missing, as when another optimizer was saved.
        """
        found = []
        for variable, name in wanted:
            source = self.shared if variable < 0 else self.of_variable.get((stage, variable), {})
            if name not in source:
                raise CheckpointError(
                    f"the checkpoint has no optimizer slot {name!r} for stage {stage}: "
                    "it was saved with another optimizer"
                )
            found.append(source[name])
        return found


def save(pipe: Pipeline, path: Path, overwrite: bool) -> None:
    """Write a checkpoint of a pipeline; see `Pipeline.save`."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; pass overwrite=True to replace it, or choose another name")
    if path.exists() and not (path / "manifest.json").exists():
        raise CheckpointError(f"{path} exists and is no checkpoint; choose another name")
    driver = pipe._running()
    model, optimizer = pipe._values("model"), pipe._values("optimizer")
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
                    "variables": description["variables"],
                    "slots": description["slots"],
                }
            )
        _write_text(place / "manifest.json", json.dumps(_manifest(pipe, stages), indent=1))
        _replace(place, path)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _manifest(pipe: Pipeline, stages: list[dict[str, Any]]) -> dict[str, Any]:
    compiled = pipe._compiled
    return {
        "format": FORMAT,
        "version": VERSION,
        "original": None if pipe._original is None else describe(pipe._original, "the model"),
        "cuts": None if pipe._original is None else pipe._cuts,
        "segments": [
            {"recipe": None if pipe._original is not None else s.recipe(), "inputs": s.inputs, "outputs": s.outputs}
            for s in pipe.segments
        ],
        "options": {
            "microbatches": pipe.microbatches,
            "schedule": pipe.schedule if isinstance(pipe.schedule, str) else None,
            "recompute": list(pipe.recompute),
        },
        "compile": None if compiled is None else compiled.recipe(),
        "stages": stages,
    }


def load(
    kind: type[Pipeline], path: Path, stages: int | None, at: Sequence[str] | None, options: Mapping[str, Any]
) -> Pipeline:
    """Make a pipeline from a checkpoint; see `Pipeline.load`."""
    manifest = _read_manifest(path)
    arrays = [_read_arrays(path, entry) for entry in manifest["stages"]]
    saved = {name: value for name, value in manifest["options"].items() if value is not None}
    model = None if manifest["original"] is None else create(manifest["original"])
    recut = stages is not None or at is not None
    segments = _segments(manifest, model)
    model_values = {i: _part(values, "model") for i, values in enumerate(arrays)}
    slots = _slots(manifest, arrays)
    if recut:
        saved.pop("recompute")
        if model is None:
            model = _joined(segments, model_values)
            _assign(_part_models(model, segments), model_values)
        else:
            _assign([segment.model for segment in segments], model_values)
        old = segments
        segments = split_model(model, stages, at)
        slots = _moved(slots, [s.model for s in old] if manifest["original"] else _part_models(model, old), segments)
        model_values = {i: [v.value.numpy() for v in s.model.variables] for i, s in enumerate(segments)}
    pipe = kind(segments, **{**saved, **options})
    pipe._original = model
    pipe._pending = State(model=model_values, slots=slots)
    if manifest["compile"] is not None:
        pipe.compile(**{name: create(recipe) for name, recipe in manifest["compile"].items()})
        if pipe.optimizer is not None and "iteration" in slots.shared:
            pipe.optimizer.iterations.assign(slots.shared["iteration"])
            if pipe._compiled is not None and pipe._compiled.constant_rate:
                pipe.optimizer.learning_rate = float(slots.shared["learning_rate"])
    return pipe


def _segments(manifest: Mapping[str, Any], model: Any) -> list[Segment]:
    """The segments as they were saved."""
    if model is not None:
        return split_model(model, at=manifest["cuts"])
    found = []
    for entry, stage in zip(manifest["segments"], manifest["stages"], strict=True):
        names = {"inputs": tuple(entry["inputs"]), "outputs": tuple(entry["outputs"]), "name": stage["name"]}
        recipe = entry["recipe"]
        if "model" in recipe:
            found.append(Segment(model=create(recipe["model"]), **names))
        else:
            found.append(Segment(build=recipe["build"], kwargs=recipe["kwargs"], **names))
    return found


def _joined(segments: Sequence[Segment], values: Arrays) -> Any:
    from pipeline.merging import merge
    from pipeline.wiring import wire

    return merge(segments, wire(segments), None, values)


def _part_models(joined: Any, segments: Sequence[Segment]) -> list[Any]:
    """The models inside a joined model, in the order of the segments: its layers that are models."""
    import keras

    return [layer for layer in joined.layers if isinstance(layer, keras.Model)][: len(segments)]


def _assign(models: Sequence[Any], values: Arrays) -> None:
    for i, model in enumerate(models):
        for variable, value in zip(model.variables, values[i], strict=True):
            variable.assign(value)


def _slots(manifest: Mapping[str, Any], arrays: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> Slots:
    found = Slots({}, {})
    for i, (entry, values) in enumerate(zip(manifest["stages"], arrays, strict=True)):
        for k, slot in enumerate(Slot(*slot) for slot in entry["slots"]):
            value = values[f"optimizer/{k}"]
            if slot.variable < 0:
                found.shared[slot.name] = value
            else:
                found.of_variable.setdefault((i, slot.variable), {})[slot.name] = value
    return found


def _moved(slots: Slots, old: Sequence[Any], new: Sequence[Segment]) -> Slots:
    """Slots under the places that their variables have in other cuts of the same layers."""
    by_variable = {
        id(variable): slots.of_variable.get((i, k), {})
        for i, model in enumerate(old)
        for k, variable in enumerate(model.trainable_variables)
    }
    moved = {
        (i, k): by_variable[id(variable)]
        for i, segment in enumerate(new)
        for k, variable in enumerate(segment.model.trainable_variables)
    }
    return Slots(moved, slots.shared)


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
    """Put a finished folder in its place; an older one is moved aside first and removed last."""
    aside = None
    if path.exists():
        aside = path.with_name(f".{path.name}-replaced-{os.getpid()}")
        path.rename(aside)
    place.rename(path)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path} (no manifest.json)") from error
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged: {error}") from error
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is not a checkpoint of version {VERSION}: it says {manifest.get('format')!r} version "
            f"{manifest.get('version')!r}"
        )
    return manifest


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

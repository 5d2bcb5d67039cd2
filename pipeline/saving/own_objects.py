"""Objects that a checkpoint cannot hold, since it has no code: named on saving, brought by the user on loading.

save: model ─► configuration ─► a copy ── compared with the model ─► what the copy has otherwise, as words
load: Pipeline.load(path, model=my_model, loss=my_loss) ── values go into the user's own objects
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from pipeline.cutting.splitter import Split, split_model
from pipeline.errors import CheckpointError
from stages.errors import HandoffError
from stages.keras_internals import has_layers, layers_of
from stages.put_back import random_numbers_put_back
from stages.recipe.describe import Recipe, create, described, why_own
from stages.recipe.differences import lost
from stages.recipe.segment import Segment
from stages.worker import snapshot

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Own:
    """The user's own objects for a checkpoint that is loaded; each None: as it was saved.

    Attributes:
        model: The model that was split; or one model or Segment for each stage.
        given: {argument of `Pipeline.compile`: object}, of those that were given.
    """

    model: Any
    given: Mapping[str, Any]

    def compiled(self, saved: Mapping[str, Recipe]) -> dict[str, Any]:
        """The arguments of `Pipeline.compile`: given, else as they were saved."""
        return {**{name: create(one) for name, one in saved.items() if name not in self.given}, **self.given}


COMPILE = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics")
"""What may be given in place of what was saved."""


def model_recipe(model: Any) -> Recipe:
    """A recipe of a model with what it leaves out under ``lost``; or ``{"own": why}``, as `described` says it."""
    recipe = described(model, f"the model {model.name!r}")
    if why_own(recipe) is not None:
        return recipe
    with random_numbers_put_back():
        try:
            copy = create(json.loads(json.dumps(recipe)))  # as it comes out of the file; Keras empties what it is given
        except Exception as error:  # whatever a constructor makes of its configuration
            lines = [line for line in str(error).splitlines() if line.startswith("Exception encountered")]
            why = lines[-1].partition(": ")[2] if lines else f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return {"own": f"the model {model.name!r} cannot be made again from its configuration ({why})"}
        found = lost(model, copy)
    return {**recipe, "lost": found} if found else recipe


def warn_of_what_is_not_in_it(manifest: Mapping[str, Any], path: Any, how: str = "load") -> None:
    """Tell once, when a checkpoint is saved, what whoever loads it must bring, to `Pipeline.load` or another method."""
    needed = dict(_needed(manifest))
    if needed:
        brought = ", ".join(f"{name}=..." for name in needed)
        warnings.warn(
            f"a checkpoint has no code, so this one is loaded with your own objects: Pipeline.{how}({str(path)!r}, "
            f"{brought}). {'. '.join(needed.values())}",
            stacklevel=4,
        )


def warn_of_what_a_keras_file_leaves_out(model: Any, judges: Any, path: Any) -> None:
    """Tell, when a ``.keras`` file is saved, what whoever loads it will find otherwise: so it is in Keras.

    Args:
        model: As it was saved.
        judges: Losses and metrics that it is compiled with, nested.
        path: The file.
    """
    with random_numbers_put_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _lost(model, lambda classes: keras.models.load_model(path, classes, compile=False))
        for one in keras.tree.flatten(judges):
            if isinstance(one, keras.losses.Loss | keras.metrics.Metric):
                found += _lost(one, partial(_by_configuration, one))
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        warnings.warn(
            f"{path} has configurations and weights only, as Keras's files have: {'; '.join(found[:_SHOWN])}{more}. A "
            "checkpoint, pipe.save(folder), comes back with them in your own model: Pipeline.load(folder, model=...)",
            stacklevel=4,
        )


def _lost(thing: Any, remade: Callable[[dict[str, Any]], Any]) -> list[str]:
    """What becomes of a model, loss or metric; nothing where Keras itself refuses to make it again."""
    classes = {type(one).__name__: type(one) for one in (layers_of(thing) if has_layers(thing) else [thing])}
    try:
        copy = remade(classes)
    except Exception:  # whatever a constructor makes of its configuration; whoever loads the file is told
        return []
    return lost(thing, copy)


def _by_configuration(thing: Any, classes: dict[str, Any]) -> Any:
    config = keras.saving.serialize_keras_object(thing)
    return keras.saving.deserialize_keras_object(config, custom_objects=classes)


def check_brought(manifest: Mapping[str, Any], own: Own) -> None:
    """Refuse to make from a configuration what would be another object than the one that was saved.

    Raises:
        CheckpointError: Something must be given.
    """
    brought = {"model"} if own.model is not None else set()
    missing = {name: why for name, why in _needed(manifest) if name not in brought | set(own.given)}
    if missing:
        raise CheckpointError(
            f"the checkpoint needs your own objects: Pipeline.load(path, "
            f"{', '.join(f'{name}=...' for name in missing)}). {'. '.join(missing.values())}"
        )


def _needed(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(argument of `Pipeline.load`, why it is needed)."""
    models = [manifest["original"], *((entry["recipe"] or {}).get("model") for entry in manifest["segments"])]
    builders = [entry["recipe"] for entry in manifest["segments"]]
    for recipe in (*models, *builders):
        if (why := why_own(recipe)) is not None:
            yield "model", why
        elif isinstance(recipe, dict) and recipe.get("lost"):
            found = recipe["lost"]
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            yield "model", f"the model's configuration leaves out: {'; '.join(found[:_SHOWN])}{more}"
    for name, recipe in (manifest["compile"] or {}).items():
        if (why := why_own(recipe)) is not None:
            yield name, why


def own_parts(model: Any, manifest: Mapping[str, Any]) -> Split | list[Segment]:
    """The user's own model, or models, cut as the saved ones were.

    Raises:
        CheckpointError: Another kind or number of models than was saved.
    """
    if manifest["original"] is not None:
        if not isinstance(model, keras.Model):
            raise CheckpointError(f"model= takes the Keras model that was split, received {type(model).__name__}")
        try:
            return split_model(model, stage_of=manifest["stage_of"], options=manifest["options"])
        except (IndexError, ValueError) as error:
            raise CheckpointError(f"the given model {model.name!r} is not the one that was saved: {error}") from error
    given = list(model) if isinstance(model, Sequence) else [model]
    if len(given) != len(manifest["segments"]):
        raise CheckpointError(
            f"model= takes one model for each of the {len(manifest['segments'])} stages, received {len(given)}"
        )
    found = []
    for part, entry, stage in zip(given, manifest["segments"], manifest["stages"], strict=True):
        segment = Segment.of(part)
        names = {label: tuple(entry[label]) for label in ("inputs", "outputs", "states")} | {"name": stage["name"]}
        found.append(Segment(build=segment.build, kwargs=segment.kwargs, model=segment.model, **names))
    return found


def write_values(segments: Sequence[Segment], values: Mapping[int, Sequence[np.ndarray[Any, Any]]]) -> None:
    """Give the user's own models the saved values.

    Raises:
        CheckpointError: They have other variables.
    """
    for i, segment in enumerate(segments):
        if segment.model is not None:
            try:
                snapshot.write(segment.model.variables, values[i], f"stage {i}")
            except HandoffError as error:
                raise CheckpointError(
                    f"the given model {segment.model.name!r} is not the one that was saved: {error}"
                ) from error


__all__ = [
    "COMPILE",
    "Own",
    "check_brought",
    "model_recipe",
    "own_parts",
    "warn_of_what_a_keras_file_leaves_out",
    "warn_of_what_is_not_in_it",
    "write_values",
]

"""The choice of a file's kind by its name's ending: a checkpoint of the pipeline, or one of Keras's own files.

`save`, `save_weights`, `load_weights` and `merge_trained` (as `merge`) are methods of `pipeline.pipeline.Pipeline`, and
`pipe` is the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cutting.splitter import Cut
from pipeline.errors import CheckpointError
from pipeline.saving import keras_files
from pipeline.saving.folder import MANIFEST
from pipeline.saving.merged import merged
from pipeline.saving.own_objects import COMPILE, Own
from pipeline.saving.run_folder import states

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

_WEIGHTS = ".weights.h5"
_MODELS = (".keras", ".h5")
_OF_THE_MACHINE = ("transport", "threads", "recovery", "check_first_batch")
"""Options that no checkpoint keeps."""


def save(pipe: Pipeline, filepath: str | Path, overwrite: bool = True, **options: Any) -> None:
    """Write a checkpoint, a whole Keras model (``.keras``), or its weights (``.weights.h5``), by the name's ending.

    A checkpoint, a folder, has all that is needed to go on. It is written beside its place under another name and then
    renamed, so that it is whole or not there. A ``.keras`` file is what Keras would save of the merged model.

    Args:
        filepath: Where.
        overwrite: Replace what is there.
        **options: Of a Keras file: as `keras.Model.save` takes them.

    Raises:
        CheckpointError: Something is at `filepath` and `overwrite` is False; or options for a checkpoint.
    """
    path = Path(filepath)
    if path.name.endswith(_WEIGHTS):
        keras_files.save_weights(pipe, path, overwrite, **options)
    elif path.suffix in _MODELS:
        keras_files.save(pipe, path, overwrite, **options)
    elif any(value is not None for value in options.values()):
        raise CheckpointError(
            f"{path.name} becomes a checkpoint, which takes no options, received {', '.join(options)}; a Keras file's "
            "name ends with .keras"
        )
    else:
        from pipeline.saving import checkpoint  # what only files take is imported with the first

        checkpoint.save(pipe, path, overwrite)


def save_weights(pipe: Pipeline, filepath: str | Path, overwrite: bool = True, **options: Any) -> None:
    """Weights, and the optimizer's state, as `keras.Model.save_weights`.

    Args:
        filepath: A name that ends in ``.weights.h5``.
        overwrite: Replace what is there; False: ask, as Keras does.
        **options: As Keras takes them.

    Raises:
        ValueError: Keras's, for another ending.
    """
    keras_files.save_weights(pipe, Path(filepath), overwrite, **options)


def load_weights(pipe: Pipeline, filepath: str | Path, skip_mismatch: bool = False, **options: Any) -> None:
    """Weights, and the optimizer's state where the file has it, as `keras.Model.load_weights`.

    Args:
        filepath: A ``.weights.h5`` file of this architecture.
        skip_mismatch: Leave layers as they are whose weights have another number or shape; Keras warns of each.
        **options: As Keras takes them.

    Raises:
        ValueError: Keras's: it does not fit, or another ending. FileNotFoundError where there is none.
    """
    pipe.session.values.ahead = True
    keras_files.load_weights(pipe, Path(filepath), skip_mismatch=skip_mismatch, **options)


def load(
    kind: type[Pipeline],
    /,
    filepath: str | Path,
    stages: int | None = None,
    at: Sequence[Cut] | None = None,
    *,
    model: Any = None,
    trust: bool | Sequence[str] = (),
    **options: Any,
) -> Pipeline:
    """A pipeline that continues from a checkpoint or a ``.keras`` file, optimizer included.

    Args:
        filepath: What `save` or `keras.Model.save` wrote.
        stages: Cut the model into this many stages; default: the cuts of the checkpoint (a Keras file has none).
        at: Or: names of the layers behind which to cut.
        model: Your own model (or one per stage), which gets the saved values: what a configuration leaves out, and
            classes of a main script or notebook, are in no checkpoint. Such a one says so when it is saved.
        trust: Modules whose code may be run to make what the checkpoint names, beside Keras's and what this program has
            imported; True: all. Builders, which get arguments from the file, run only if their module is named.
        **options: As for `Pipeline`; default: as saved. Also `optimizer`, `loss`, `loss_weights`, `metrics` and
            `weighted_metrics`, your own in place of the saved ones. For a Keras file also `custom_objects`,
            `compile` and `safe_mode`, as `keras.models.load_model` takes them.

    Raises:
        CheckpointError: Nothing is there, it is not whole, it needs your own objects, or it would run other code.
    """
    path = Path(filepath)
    if path.name.endswith(_WEIGHTS):
        raise CheckpointError(f"{path.name} holds weights and no model; make the pipeline, then pipe.load_weights(...)")
    own = Own(model, {name: options[name] for name in COMPILE if name in options})
    options = {name: value for name, value in options.items() if name not in COMPILE}
    if path.suffix in _MODELS and (own.model is not None or own.given):
        raise CheckpointError(
            f"{path.name} is Keras's file and opens as Keras opens it; give your classes as custom_objects=, or cut "
            f"your own model after model.load_weights({path.name!r})"
        )
    if path.suffix in _MODELS:
        pipe = keras_files.load(kind, path, stages, at, options)
    else:
        from pipeline.saving import checkpoint

        pipe = checkpoint.load(kind, path, stages, at, options, own, trust)
    pipe.session.workers.loaded_from = path.name
    return pipe


def resume(
    kind: type[Pipeline],
    /,
    directory: str | Path,
    begin: Callable[[], Pipeline] | None = None,
    *,
    model: Any = None,
    trust: bool | Sequence[str] = (),
    **options: Any,
) -> Pipeline:
    """A pipeline whose next `fit` goes on where a training that was stopped or killed had saved itself last.

    The same `fit` as then, with the same data and callbacks, trains from the next batch on as if never stopped:
    weights, optimizer, seeds, statistics, metrics, logs, history, callbacks and random numbers are those of a training
    without the stop, bit for bit. The batches trained before are drawn once more and compared; where they are not the
    same, it refuses to go on. See docs/faults.md for what is exact, refused and named.

    Args:
        directory: What `pipeline.PipelineCheckpoint(directory, every=...)` wrote; or one state in it.
        begin: Makes and compiles the pipeline where nothing was saved as yet, so that one program does for the first
            start and all later ones; None: that is an error.
        model: As for `load`, like `trust`.
        **options: Your own `optimizer`, `loss`, `loss_weights`, `metrics` or `weighted_metrics` in place of the saved
            ones, as for `load`; and what no checkpoint keeps: `transport`, `threads`, `recovery` and
            `check_first_batch`, as for `Pipeline`.

    Raises:
        CheckpointError: Nothing is there, it is not whole, it needs your own objects, or it would run other code.

    Example:
        >>> with Pipeline.resume("run", begin=make_and_compile) as pipe:
        ...     pipe.fit(x, y, epochs=20, callbacks=[PipelineCheckpoint("run", every=100)])
    """
    if unknown := set(options) - {*COMPILE, *_OF_THE_MACHINE}:
        raise CheckpointError(
            f"a training goes on under the options that it was begun with; resume takes {', '.join(COMPILE)}, "
            f"{', '.join(_OF_THE_MACHINE)}, received {', '.join(sorted(unknown))}"
        )
    folder = Path(directory)
    found = [folder] if (folder / MANIFEST).is_file() else states(folder)
    if not found:
        if begin is not None:
            return begin()
        raise CheckpointError(
            f"no training has saved itself in {folder}; pass begin=, a function that makes and compiles the pipeline, "
            "to begin there, and give fit a PipelineCheckpoint(..., every=...)"
        )
    from pipeline.saving import checkpoint

    own = Own(model, {name: options.pop(name) for name in COMPILE if name in options})
    pipe = checkpoint.load(kind, found[-1], None, None, options, own, trust, going_on=True)
    pipe.session.workers.loaded_from = found[-1].name
    return pipe


def merge_trained(pipe: Pipeline) -> Any:
    """One ordinary Keras model with the trained weights; the original architecture if it was split from one."""
    pipe.changes.look(closely=not pipe.session.values.ahead)
    return merged(pipe.session).model

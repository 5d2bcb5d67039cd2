"""The choice of a file's kind by its name's ending: a checkpoint of the pipeline, or one of Keras's own files.

`save`, `save_weights` and `load_weights` are methods of `pipeline.pipeline.Pipeline`, and `pipe` the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cutting.splitter import Cut
from pipeline.errors import CheckpointError
from pipeline.saving import checkpoint, keras_files

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline

_WEIGHTS = ".weights.h5"
_MODELS = (".keras", ".h5")


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
        checkpoint.save(pipe, path, overwrite)


def save_weights(pipe: Pipeline, filepath: str | Path, overwrite: bool = True, **options: Any) -> None:
    """Weights, and the optimizer's state, as `keras.Model.save_weights` (``.weights.h5``)."""
    keras_files.save_weights(pipe, Path(filepath), overwrite, **options)


def load_weights(pipe: Pipeline, filepath: str | Path, skip_mismatch: bool = False, **options: Any) -> None:
    """Weights, and the optimizer's state where the file has it, as `keras.Model.load_weights`."""
    pipe.session.values.ahead = True
    keras_files.load_weights(pipe, Path(filepath), skip_mismatch=skip_mismatch, **options)


def load(
    kind: type[Pipeline], path: Path, stages: int | None, at: Sequence[Cut] | None, options: Mapping[str, Any]
) -> Pipeline:
    """See `Pipeline.load`."""
    if path.name.endswith(_WEIGHTS):
        raise CheckpointError(f"{path.name} holds weights and no model; make the pipeline, then pipe.load_weights(...)")
    how = keras_files.load if path.suffix in _MODELS else checkpoint.load
    pipe = how(kind, path, stages, at, options)
    pipe.session.workers.loaded_from = path.name
    return pipe

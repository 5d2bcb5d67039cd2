"""Keras callbacks around a pipeline: those that cannot work are refused before training starts.

A callback sees the pipeline as a Keras model without layers: weights, saving, metrics, learning rate and
`stop_training` work. What reaches into layers or into the optimizer's own variables would see nothing, silently.
Callbacks of this project may be `StepWatcher`s, which see more than Keras shows: the batch, before its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import keras

from pipeline.errors import CompileError
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from stages.keras_training_internals import profiles
from stages.worker.orders import Service


class PipelineCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Keras's ModelCheckpoint, writing checkpoints of the pipeline (see `Pipeline.save`).

    Args:
        filepath: A folder's name, with Keras's fields: ``"run/epoch-{epoch:02d}"``.
        **options: As for `keras.callbacks.ModelCheckpoint`: ``monitor``, ``save_best_only``, ``mode``, ``save_freq``.

    Example:
        >>> pipe.fit(x, y, callbacks=[PipelineCheckpoint("run/best", monitor="val_loss", save_best_only=True)])
        >>> pipe = Pipeline.load("run/best")
    """

    def __init__(self, filepath: Any, **options: Any) -> None:
        if options.get("save_weights_only"):
            raise CompileError("a checkpoint of a pipeline holds everything; for weights use ModelCheckpoint")
        super().__init__(f"{filepath}.keras", **options)  # Keras takes no other ending
        self.filepath = str(filepath)


def watchers_among(callbacks: Any) -> tuple[StepWatcher, ...]:
    """The step watchers among what Keras takes as callbacks, in order."""
    return tuple(callback for callback in _flat(callbacks) if isinstance(callback, StepWatcher))


class Finalize(keras.callbacks.Callback):  # type: ignore[misc]
    """Weights become their moving averages where Keras does it: after the last epoch, before other callbacks end."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def on_train_end(self, logs: Any = None) -> None:
        """Let every stage's optimizer overwrite its variables."""
        self._session.workers.driver().call(Service.FINALIZE)


def prepared(callbacks: Any, session: Session, finalize: bool, more: Sequence[StepWatcher] = ()) -> Any:
    """The callbacks to give to Keras.

    Args:
        callbacks: What the user gave: None, one, a list, or a CallbackList.
        session: The pipeline's.
        finalize: Whether the optimizer keeps moving averages that replace the weights at the end.
        more: Watchers that go first.

    Raises:
        CompileError: One of them cannot work on a pipeline.
    """
    flat = _flat(callbacks)
    for callback in flat:
        for kind, cannot in _CANNOT.items():
            if isinstance(callback, kind) and (why := cannot(callback)):
                raise CompileError(f"the callback {type(callback).__name__} cannot work on a pipeline: {why}")
    first = [*([Finalize(session)] if finalize else []), *more]
    last = [callback for callback in flat if isinstance(callback, StepWatcher) and callback.goes_last]
    if not (first or last):
        return callbacks
    ordered = [*first, *(callback for callback in flat if callback not in last), *last]
    if hasattr(callbacks, "callbacks"):
        callbacks.callbacks[:] = ordered
        return callbacks
    return ordered


def _flat(callbacks: Any) -> list[Any]:
    """One, some in lists of lists, or a CallbackList, as a list."""
    given = getattr(callbacks, "callbacks", callbacks)
    return [] if given is None else list(keras.tree.flatten(given))


def _tensorboard(callback: Any) -> str:
    if find_spec("tensorboard") is None:
        return "the package tensorboard, which writes its files, is not installed (pip install tensorboard)"
    for name in ("histogram_freq", "embeddings_freq"):
        if getattr(callback, name, 0):
            return f"{name} reads layers, which live in the workers; leave it at 0, scalars are written all the same"
    if profiles(callback):
        return "profile_batch would trace this process, where nothing is computed; see Pipeline.timeline(x, y)"
    return ""


_CANNOT: dict[type, Callable[[Any], str]] = {
    keras.callbacks.TensorBoard: _tensorboard,
    keras.callbacks.SwapEMAWeights: lambda _: (
        "it swaps variables of the optimizer, which are the workers'. With use_ema=True the weights become their "
        "averages at the end of fit, as in Keras"
    ),
}
if hasattr(keras.callbacks, "OrbaxCheckpoint"):  # older Keras has none
    _CANNOT[keras.callbacks.OrbaxCheckpoint] = lambda _: (
        "it reads the layers' variables itself, and they are the workers'. Use pipeline.PipelineCheckpoint"
    )

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
from pipeline.saying import is_whole
from stages.keras_training_internals import profiles
from stages.worker.orders import Service


class PipelineCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Keras's ModelCheckpoint, writing checkpoints of the pipeline (see `Pipeline.save`), or a training's own state.

    Args:
        filepath: A folder's name, with Keras's fields: ``"run/epoch-{epoch:02d}"``. With `every`: the folder of the
            run, which nothing else is written to.
        every: Save, every so many training steps, all from which `Pipeline.resume` goes on at the very next batch: each
            a checkpoint ``<filepath>/step-...``. The values are read between two steps; files are written beside the
            training, whole or not at all. At the end of `fit` the finished training is saved.
        keep: With `every`: how many of these to keep, the latest.
        **options: Without `every`, as for `keras.callbacks.ModelCheckpoint`: ``monitor``, ``save_best_only``, ``mode``,
            ``save_freq``.

    Raises:
        CompileError: The arguments do not fit together.

    Example:
        >>> pipe.fit(x, y, callbacks=[PipelineCheckpoint("run/best", monitor="val_loss", save_best_only=True)])
        >>> pipe = Pipeline.load("run/best")
        >>> pipe.fit(x, y, epochs=20, callbacks=[PipelineCheckpoint("run", every=100)])  # killed
        >>> pipe = Pipeline.resume("run")
        >>> pipe.fit(x, y, epochs=20, callbacks=[PipelineCheckpoint("run", every=100)])  # goes on
    """

    def __init__(self, filepath: Any, every: int | None = None, keep: int = 2, **options: Any) -> None:
        if options.get("save_weights_only"):
            raise CompileError("a checkpoint of a pipeline holds everything; for weights use ModelCheckpoint")
        if every is not None and (options or not is_whole(every) or not is_whole(keep)):
            raise CompileError(
                "PipelineCheckpoint(folder, every=100, keep=2) takes whole numbers, at least 1, and no options of "
                f"ModelCheckpoint beside them; received every={every!r}, keep={keep!r}"
                + "".join(f", {name}={value!r}" for name, value in options.items())
            )
        super().__init__(f"{filepath}.keras", **options)  # Keras takes no other ending
        self.filepath = str(filepath)
        self.every, self.keep = every, keep

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """As Keras's, where Keras says when to save."""
        if self.every is None:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """As Keras's, where Keras says when to save."""
        if self.every is None:
            super().on_epoch_end(epoch, logs)


def watchers_among(callbacks: Any) -> tuple[StepWatcher, ...]:
    """The step watchers among what Keras takes as callbacks, in order."""
    return tuple(callback for callback in flat(callbacks) if isinstance(callback, StepWatcher))


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
    given = flat(callbacks)
    for callback in given:
        for kind, cannot in _CANNOT.items():
            if isinstance(callback, kind) and (why := cannot(callback)):
                raise CompileError(f"the callback {type(callback).__name__} cannot work on a pipeline: {why}")
    first = [*([Finalize(session)] if finalize else []), *more]
    last = [callback for callback in given if isinstance(callback, StepWatcher) and callback.goes_last]
    if not (first or last):
        return callbacks
    ordered = [*first, *(callback for callback in given if callback not in last), *last]
    if hasattr(callbacks, "callbacks"):
        callbacks.callbacks[:] = ordered
        return callbacks
    return ordered


def saves_or_goes_on(session: Session, callbacks: Any) -> bool:
    """Whether a `fit` with these callbacks is a `pipeline.training.fit_run.FitRun`."""
    return session.workers.resumed is not None or any(
        isinstance(one, PipelineCheckpoint) and one.every for one in flat(callbacks)
    )


def flat(callbacks: Any) -> list[Any]:
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

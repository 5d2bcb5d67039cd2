"""A Keras callback that sees more than Keras shows: the batch before its step, and what the step gave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from pipeline.batch.step import StepResult
    from pipeline.runtime.session import Session

__all__ = ["StepWatcher"]


class StepWatcher(keras.callbacks.Callback):  # type: ignore[misc]
    """A callback that is shown every batch of `fit` before it is trained on, and what its step gave.

    Keras tells callbacks a batch's number and its logs; the batch itself only `Trainer.train_step` has.

    Attributes:
        step: Training steps begun so far, over all `fit`s of this callback.
        arrived: When the batch that is looked at was there, before any watcher looked; seconds, monotonic.
        traces: Whether the step that is about to run is to be traced; asked after `before_step`.
        goes_last: Whether Keras calls it after all other callbacks.
    """

    traces: bool = False
    goes_last: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.arrived = 0.0
        self._epoch = self._batch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note where in training this is."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note where in training this is."""
        self._batch = batch

    @property
    def place(self) -> str:
        """Where in training this is, in words; epochs as Keras's progress bar counts them."""
        return f"step {self.step} (epoch {self._epoch + 1}, batch {self._batch + 1})"

    def before_step(self, session: Session, data: tuple[Any, Any, Any]) -> str:
        """Look at the running pipeline and at (x, y, sample_weight), which it is about to be trained on.

        Returns:
            What the step should note of tensors at the cuts, as `StepRunner.train` takes it; "": nothing.
        """
        self.step += 1
        return ""

    def after_step(self, session: Session, result: StepResult) -> None:
        """Look at what the step gave."""

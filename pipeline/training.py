"""Keras's own training loop around the hand-off.

`fit`, `evaluate` and `predict` are Keras's: epochs, data adapters, shuffling, validation, callbacks, history and the
progress bar come from a Keras model without layers whose steps are steps of the pipeline. What Keras asks of "the
model" in a callback (weights, saving, the learning rate) is answered by the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline


class Trainer(keras.Model):  # type: ignore[misc]
    """The Keras side of a pipeline: what callbacks know as ``self.model``.

    Args:
        pipe: The pipeline that does the work.
        optimizer: The optimizer whose learning rate callbacks read and set, or None.
    """

    def __init__(self, pipe: Pipeline, optimizer: Any) -> None:
        super().__init__(name="pipeline")
        self.built = True
        self.pipe = pipe
        self._total = np.float32(0.0)
        self._samples = np.float32(0.0)
        self.compile(optimizer=optimizer, run_eagerly=True)

    def call(self, x: Any) -> Any:
        """One forward pass through the workers, in inference mode."""
        return self.pipe.predict_on_batch(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One batch: forward, backward, update."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        result, size = self.pipe.train_step(x, y, sample_weight)
        if self.optimizer is not None:
            self.optimizer.iterations.assign_add(1)
        return self.count(result.loss, size, result.metrics)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One batch: loss and metrics."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        result, size = self.pipe.test_step(x, y, sample_weight)
        return self.count(result.loss, size, result.metrics)

    def predict_step(self, data: Any) -> Any:
        """One batch: outputs."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return keras.tree.map_structure(tf.convert_to_tensor, self.pipe.predict_on_batch(x))

    def count(self, loss: float | None, size: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The logs after one more batch: the mean loss over samples since the last reset, then the metrics."""
        self._total = np.float32(self._total + np.float32(loss or 0.0) * np.float32(size))
        self._samples = np.float32(self._samples + size)
        return {"loss": float(self._total / self._samples), **metrics}

    def reset_metrics(self) -> None:
        """Start counting anew, here and in the workers."""
        self._total = self._samples = np.float32(0.0)
        self.pipe.reset_metrics()

    def get_metrics_result(self) -> dict[str, Any]:
        """Nothing: every step returns its logs whole."""
        return {}

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """The pipeline's weights."""
        return self.pipe.get_weights()

    def set_weights(self, weights: Any) -> None:
        """Set the pipeline's weights."""
        self.pipe.set_weights(weights)

    def save(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """A Keras file (``.keras``, the merged model) or a checkpoint of the pipeline (any other name)."""
        path = Path(filepath)
        if path.suffix in (".keras", ".h5"):
            self.pipe.merge().save(path, overwrite=overwrite, **kwargs)
        else:
            self.pipe.save(path, overwrite=overwrite)

    def save_weights(self, filepath: Any, overwrite: bool = True) -> None:
        """The merged model's weights (``.weights.h5``)."""
        self.pipe.merge().save_weights(filepath, overwrite=overwrite)

    def load_weights(self, filepath: Any, **kwargs: Any) -> None:
        """Weights of the merged model (``.weights.h5``) into the stages."""
        model = self.pipe.merge()
        model.load_weights(filepath, **kwargs)
        self.pipe.set_weights(model.get_weights())

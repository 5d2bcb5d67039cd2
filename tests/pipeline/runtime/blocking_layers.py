"""Layers that keep a gradient from going back, one for each way in which users do it; importable by workers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers


class Stop(layers.Layer):
    def call(self, x: Any) -> Any:
        return tf.stop_gradient(x)


class Hard(layers.Layer):
    """A threshold: 0 or 1."""

    def call(self, x: Any) -> Any:
        return tf.cast(x > 0.0, tf.float32)


class Grades(layers.Layer):
    """Whole numbers."""

    def call(self, x: Any) -> Any:
        return tf.round(x * 3.0)


class Classes(layers.Layer):
    """The number of the largest, as an integer."""

    def call(self, x: Any) -> Any:
        return tf.argmax(x, axis=-1)


class ByNumPy(layers.Layer):
    def call(self, x: Any) -> Any:
        if isinstance(x, keras.KerasTensor) or not hasattr(x, "numpy"):
            return x
        return tf.constant(np.tanh(x.numpy()))


class ByNumPyFunction(layers.Layer):
    def call(self, x: Any) -> Any:
        out = tf.numpy_function(np.tanh, [x], tf.float32)
        out.set_shape(x.shape)
        return out


class Memory(layers.Layer):
    """Remembers the mean of what it saw in a variable, and gives that."""

    def build(self, shape: Any) -> None:
        self.kept = self.add_weight(shape=(shape[-1],), trainable=False, initializer="zeros", name="kept")

    def call(self, x: Any) -> Any:
        self.kept.assign(keras.ops.mean(x, axis=0))
        return keras.ops.zeros_like(x) + self.kept


class Unfinished(layers.Layer):
    """Divides by its own length, which may be 0."""

    def call(self, x: Any) -> Any:
        return x / tf.sqrt(tf.reduce_sum(x * x, axis=-1, keepdims=True))


class Greedy(layers.Layer):
    """Has a weight that it does not use."""

    def build(self, shape: Any) -> None:
        self.used = self.add_weight(shape=(shape[-1],), initializer="ones", name="used")
        self.spare = self.add_weight(shape=(shape[-1],), initializer="ones", name="spare")

    def call(self, x: Any) -> Any:
        return x * self.used

"""Small models around one layer that is to blame."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers


def around(layer: Any, *, shape: tuple[int, ...] = (3,), wide: int = 4) -> Any:
    """A model with a layer in the middle: what is before it should learn from what is behind it."""
    return keras.Sequential(
        [keras.Input(shape), layers.Dense(wide, name="before"), layer, layers.Dense(2, name="behind")], name="net"
    )


class PyFunction(layers.Layer):
    """The tangent, by NumPy inside of `tf.py_function`."""

    def call(self, x: Any) -> Any:
        out = tf.py_function(lambda t: np.tanh(t.numpy()), [x], tf.float32)
        out.set_shape(x.shape)
        return out

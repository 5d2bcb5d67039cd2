"""Defences of activations: layers that change what is sent on, the last of the stage that has the inputs.

For noise there is Keras's own `GaussianNoise`; clip before it, so that its size means something for every row.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from pipeline.parties.defences.ranges import positive, whole


@keras.saving.register_keras_serializable(package="tapeline")
class ClippedActivation(keras.layers.Layer):  # type: ignore[misc]
    """Shorten each sample's activations to at most a norm; the gradient is that of the shortening.

    Args:
        norm: The largest L2 norm of a sample.
        **arguments: Keras's own.

    Raises:
        SplitError: The norm is no positive number.
    """

    def __init__(self, norm: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = positive("ClippedActivation", "norm", norm)

    def call(self, inputs: Any) -> Any:
        """The inputs (n, ...), shortened."""
        rows = tf.reshape(tf.cast(inputs, tf.float32), (tf.shape(inputs)[0], -1))  # squares of half precision overflow
        return tf.cast(tf.reshape(tf.clip_by_norm(rows, self.norm, axes=[1]), tf.shape(inputs)), inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {**super().get_config(), "norm": self.norm}


@keras.saving.register_keras_serializable(package="tapeline")
class QuantisedActivation(keras.layers.Layer):  # type: ignore[misc]
    """Round activations to 2^bits values between two bounds; gradients pass as if nothing had been rounded.

    In half precision to as many of them as it can tell apart.

    Args:
        bits: 1 to 16.
        low: The lowest value; what is below becomes it, and gets no gradient.
        high: The highest value, likewise.
        **arguments: Keras's own.

    Raises:
        SplitError: The bits are out of their range, or `low` is not below `high`.
    """

    def __init__(self, bits: int, low: float = -1.0, high: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.bits = whole("QuantisedActivation", "bits", bits, most=16)
        positive("QuantisedActivation", "high - low", high - low)
        self.low, self.high = float(low), float(high)

    def call(self, inputs: Any) -> Any:
        """The inputs (n, ...), rounded."""
        step = (self.high - self.low) / (2**self.bits - 1)
        inside = tf.clip_by_value(tf.cast(inputs, tf.float32), self.low, self.high)
        rounded = inside + tf.stop_gradient(self.low + step * tf.round((inside - self.low) / step) - inside)
        return tf.cast(rounded, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {**super().get_config(), "bits": self.bits, "low": self.low, "high": self.high}


@keras.saving.register_keras_serializable(package="tapeline")
class TopActivation(keras.layers.Layer):  # type: ignore[misc]
    """Keep each sample's k largest activations by size, zeros in place of the others, which get no gradient either.

    What is left out is not made up for later: there is no memory of errors.

    Args:
        k: How many.
        **arguments: Keras's own.

    Raises:
        SplitError: `k` is no whole number of at least 1.
    """

    def __init__(self, k: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.k = whole("TopActivation", "k", k)

    def call(self, inputs: Any) -> Any:
        """The inputs (n, ...), all but `k` of each sample being 0."""
        rows = tf.reshape(inputs, (tf.shape(inputs)[0], -1))
        places = tf.math.top_k(tf.abs(rows), tf.minimum(self.k, tf.shape(rows)[1])).indices
        kept = tf.reduce_sum(tf.one_hot(places, tf.shape(rows)[1], dtype=rows.dtype), axis=1)
        return tf.reshape(rows * kept, tf.shape(inputs))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {**super().get_config(), "k": self.k}

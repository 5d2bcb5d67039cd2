"""Defences of gradients: layers that hand activations on as they are, and change dL/dz on its way back.

Put one behind the cut, as the first layer of the stage that has the labels.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from pipeline.parties.defences.ranges import positive


class GradientDefence(keras.layers.Layer):  # type: ignore[misc]
    """The base: an identity whose gradient is changed.

    Args:
        seed: Of what is drawn.
        **arguments: Keras's own.
    """

    def __init__(self, seed: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.supports_masking = True
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def changed(self, gradient: Any, seed: Any) -> Any:
        """What is sent back in place of a gradient (n, ...), of the same shape and dtype.

        Args:
            gradient: dL/dz.
            seed: Two integers, another pair in every call.
        """
        raise NotImplementedError

    def call(self, inputs: Any) -> Any:
        """The inputs (n, ...)."""
        seed = tf.cast(self.seed_generator.next(), tf.int32)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def defended(tensor: Any) -> Any:
            return tf.identity(tensor), lambda gradient: self.changed(gradient, seed)

        return defended(inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Keras's own, and the seed."""
        return {**super().get_config(), "seed": self.seed}


@keras.saving.register_keras_serializable(package="tapeline")
class NoisyGradient(GradientDefence):
    """Add independent normal noise to every element of the gradient.

    Args:
        stddev: Its standard deviation, in the gradient's own unit: dL/dz, of a mean over the microbatch's samples.
        seed: Of the noise.
        **arguments: Keras's own.

    Raises:
        SplitError: The deviation is no positive number.
    """

    def __init__(self, stddev: float, seed: int | None = None, **arguments: Any) -> None:
        super().__init__(seed, **arguments)
        self.stddev = positive("NoisyGradient", "stddev", stddev)

    def changed(self, gradient: Any, seed: Any) -> Any:
        """See the class."""
        noise = tf.random.stateless_normal(tf.shape(gradient), seed, dtype=tf.float32)
        return gradient + tf.cast(self.stddev * noise, gradient.dtype)

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {**super().get_config(), "stddev": self.stddev}


@keras.saving.register_keras_serializable(package="tapeline")
class MaxNormGradient(GradientDefence):
    """Stretch or turn each row along itself, so that all rows of a microbatch have the same norm in the mean.

    g_i becomes g_i (1 + s_i n_i) with s_i² = max_j |g_j|² / |g_i|² - 1 and one standard normal n_i for each row, so
    that E|g_i|² is the largest of all rows, and norms no longer tell the rarer class. Rows near the largest keep their
    own direction: look at the cosine beside the norm. A row of zeros stays one.

    Source: Li et al., "Label leakage and protection in two-party split learning", 2022.
    """

    def changed(self, gradient: Any, seed: Any) -> Any:
        """See the class."""
        wide = tf.cast(gradient, tf.float32)
        rows = tf.reshape(wide, (tf.shape(wide)[0], -1))
        squares = tf.reduce_sum(rows * rows, axis=1)
        largest = tf.reduce_max(squares)
        stretch = tf.sqrt(tf.maximum(tf.math.divide_no_nan(largest, squares) - 1.0, 0.0))
        drawn = tf.random.stateless_normal(tf.shape(squares), seed, dtype=tf.float32)
        return tf.cast(tf.reshape(rows * (1.0 + stretch * drawn)[:, None], tf.shape(wide)), gradient.dtype)


@keras.saving.register_keras_serializable(package="tapeline")
class ClippedGradient(GradientDefence):
    """Shorten each row of the gradient to at most a norm; what noise is added to afterwards has a known reach then.

    Args:
        norm: The largest L2 norm of a row, in the gradient's own unit.
        **arguments: Keras's own.

    Raises:
        SplitError: The norm is no positive number.
    """

    def __init__(self, norm: float, **arguments: Any) -> None:
        super().__init__(arguments.pop("seed", None), **arguments)
        self.norm = positive("ClippedGradient", "norm", norm)

    def changed(self, gradient: Any, seed: Any) -> Any:
        """See the class."""
        wide = tf.cast(gradient, tf.float32)
        rows = tf.reshape(wide, (tf.shape(wide)[0], -1))
        return tf.cast(tf.reshape(tf.clip_by_norm(rows, self.norm, axes=[1]), tf.shape(wide)), gradient.dtype)

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {**super().get_config(), "norm": self.norm}

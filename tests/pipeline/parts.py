"""What a user's own module would hold: builders, a layer, a loss, a metric; workers import it."""

import os

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tapeline_tests")
class Scale(keras.layers.Layer):
    """A registered layer with one weight and an argument."""

    def __init__(self, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones", name="gain")

    def call(self, x):
        return x * self.gain * self.factor

    def get_config(self):
        return super().get_config() | {"factor": self.factor}


@keras.saving.register_keras_serializable("tapeline_tests")
class Counted(keras.layers.Layer):
    """Counts its calls in a plain number."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


class Shift(keras.layers.Layer):
    """A layer that nobody registered."""

    def build(self, shape):
        self.offset = self.add_weight(shape=(shape[-1],), initializer="zeros", name="offset")

    def call(self, x):
        return x + self.offset


class Quartic(keras.losses.Loss):
    """A loss class with an argument."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, y_true, y_pred):
        return self.scale * keras.ops.mean((y_true - y_pred) ** 4, axis=-1)

    def get_config(self):
        return super().get_config() | {"scale": self.scale}


class Largest(keras.metrics.Metric):
    """The largest prediction so far: a metric with state of its own."""

    def __init__(self, name="largest", **kwargs):
        super().__init__(name=name, **kwargs)
        self.value = self.add_variable(shape=(), initializer=keras.initializers.Constant(-1e9), name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self):
        return self.value


def absolute_cube(y_true, y_pred):
    """A loss or metric as a function."""
    return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)


def bottom(units=5, rate=0.0):
    """Where a pipeline begins."""
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(units, activation="tanh", name="b1"), keras.layers.Dropout(rate)],
        name="bottom",
    )


def top(units=5):
    """Where it ends."""
    return keras.Sequential([keras.Input((units,)), keras.layers.Dense(1, name="t1")], name="top")


def pid_layer():
    """A model that tells the process it was built in."""
    model = bottom()
    model.layers[0].bias.assign([float(os.getpid())] * 5)
    return model


def not_built():
    """A mistake: no input, so no weights."""
    return keras.Sequential([keras.layers.Dense(3)])


def not_a_model():
    """A mistake."""
    return 7


def threads_of_the_process():
    """A model whose kernel and bias say how many threads TensorFlow has in the process that builds it."""
    threading = tf.config.threading
    within, between = (
        keras.initializers.Constant(float(count()))
        for count in (threading.get_intra_op_parallelism_threads, threading.get_inter_op_parallelism_threads)
    )
    dense = keras.layers.Dense(1, kernel_initializer=within, bias_initializer=between)
    return keras.Sequential([keras.Input((1,)), dense])

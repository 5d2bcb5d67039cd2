"""Recognition of text in images, written as its users write it: CTC by `add_loss` in a layer that takes the labels."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each
from tests.programs.test_vision import digits

SIZE, SAMPLES = 8, 24


@functools.cache
class CTCLayer(layers.Layer):
    def __init__(self, name=None):
        super().__init__(name=name)

    def call(self, y_true, y_pred):
        n, steps, letters = ops.shape(y_pred)[0], ops.shape(y_pred)[1], ops.shape(y_true)[1]
        lengths = ops.ones((n,), "int32")
        loss = ops.ctc_loss(ops.cast(y_true, "int32"), ops.log(y_pred + 1e-7), lengths * letters, lengths * steps, 10)
        self.add_loss(ops.mean(loss))
        return y_pred


def text_recognition():
    image = keras.Input(shape=(3 * SIZE, SIZE, 1), name="image")
    labels = layers.Input(name="label", shape=(3,))
    x = layers.Conv2D(4, 3, activation="relu", kernel_initializer="he_normal", padding="same", name="Conv1")(image)
    x = layers.MaxPooling2D((2, 2), name="pool1")(x)
    x = layers.Reshape(target_shape=(12, 16), name="reshape")(x)
    x = layers.Dense(8, activation="relu", name="dense1")(x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.0))(x)
    x = layers.Dense(11, activation="softmax", name="dense2")(x)
    return keras.Model(inputs=[image, labels], outputs=CTCLayer(name="ctc_loss")(labels, x), name="ocr")


def only_an_optimizer():
    return {"optimizer": keras.optimizers.Adam()}


def fit_strips():
    """Three digits beside each other, time along the strip; the label is an input."""
    images, classes = digits()
    strips = np.concatenate([np.transpose(images[k::3], (0, 2, 1, 3)) for k in range(3)], axis=1) / 16
    labels = np.stack([classes[k::3] for k in range(3)], axis=1)
    data = tf.data.Dataset.from_tensor_slices({"image": strips, "label": labels.astype("float32")})
    return {"x": data.batch(4), "shuffle": False}


def strips_to_read():
    x = next(iter(fit_strips()["x"]))
    return {"image": x["image"], "label": x["label"]}


PROGRAMS = {
    "text recognition": Program(text_recognition, only_an_optimizer, fit_strips, inputs=strips_to_read, rounding=5e-5)
}


@each(PROGRAMS)
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS)
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

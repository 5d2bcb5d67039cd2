"""Programs that learn from images: transformers, mixers, segments, super-resolution, reading, fine-tuning."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each

SIZE, SAMPLES = 8, 24


@functools.cache
def digits():
    """Images (24, 8, 8, 1) of 0 to 16 and their classes."""
    images, classes = load_digits(return_X_y=True)
    return images[:SAMPLES].reshape(-1, SIZE, SIZE, 1).astype("float32"), classes[:SAMPLES]


# -- a vision transformer: patches, learned positions, attention -------------------------------------------------


class Patches(layers.Layer):
    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def call(self, images):
        n, height, width, channels = ops.shape(images)
        patches = ops.image.extract_patches(images, size=self.patch_size)
        count = (height // self.patch_size) * (width // self.patch_size)
        return ops.reshape(patches, (n, count, self.patch_size * self.patch_size * channels))


class PatchEncoder(layers.Layer):
    def __init__(self, num_patches, projection_dim):
        super().__init__()
        self.num_patches = num_patches
        self.projection = layers.Dense(units=projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def call(self, patch):
        positions = ops.expand_dims(ops.arange(start=0, stop=self.num_patches, step=1), axis=0)
        return self.projection(patch) + self.position_embedding(positions)


def mlp(x, hidden_units, dropout_rate):
    for units in hidden_units:
        x = layers.Dense(units, activation=keras.activations.gelu)(x)
        x = layers.Dropout(dropout_rate)(x)
    return x


def vision_transformer():
    inputs = keras.Input(shape=(SIZE, SIZE, 1))
    encoded = PatchEncoder(16, 8)(Patches(2)(layers.Rescaling(1 / 16)(inputs)))
    for _ in range(2):
        x1 = layers.LayerNormalization(epsilon=1e-6)(encoded)
        attention = layers.MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.1)(x1, x1)
        x2 = layers.Add()([attention, encoded])
        x3 = mlp(layers.LayerNormalization(epsilon=1e-6)(x2), [16, 8], 0.1)
        encoded = layers.Add()([x3, x2])
    representation = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(encoded))
    features = mlp(layers.Dropout(0.5)(representation), [16], 0.5)
    return keras.Model(inputs, layers.Dense(10)(features))


def adam_of_the_transformer():
    return {
        "optimizer": keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(5, name="top-5-accuracy"),
        ],
    }


def fit_with_validation():
    x, y = digits()
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    return {"x": x, "y": y, "batch_size": 12, "epochs": 2, "validation_split": 0.25, "callbacks": [stopping]}


# -- a convolution mixer, from tf.data ---------------------------------------------------------------------------


def activation_block(x):
    return layers.BatchNormalization()(layers.Activation("gelu")(x))


def conv_mixer():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Rescaling(scale=1.0 / 16)(inputs)
    x = activation_block(layers.Conv2D(8, kernel_size=2, strides=2)(x))
    for _ in range(2):
        x0 = x
        x = layers.DepthwiseConv2D(kernel_size=3, padding="same")(x)
        x = layers.Add()([activation_block(x), x0])
        x = activation_block(layers.Conv2D(8, kernel_size=1)(x))
    x = layers.GlobalAvgPool2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def image_pipeline():
    x, y = digits()
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES, seed=3).batch(8).prefetch(2)
    return {"x": data, "epochs": 1, "shuffle": False, "validation_data": data}


# -- an MLP-mixer ------------------------------------------------------------------------------------------------


class MLPMixerLayer(layers.Layer):
    def __init__(self, num_patches, hidden_units, dropout_rate):
        super().__init__()
        self.mlp1 = keras.Sequential(
            [
                layers.Dense(units=num_patches, activation="gelu"),
                layers.Dense(units=num_patches),
                layers.Dropout(rate=dropout_rate),
            ]
        )
        self.mlp2 = keras.Sequential(
            [layers.Dense(units=hidden_units, activation="gelu"), layers.Dense(units=hidden_units)]
        )
        self.normalize = layers.LayerNormalization(epsilon=1e-6)

    def build(self, input_shape):
        self.built = True

    def call(self, inputs):
        x = self.normalize(inputs)
        x_channels = ops.transpose(x, axes=(0, 2, 1))
        mlp1_outputs = ops.transpose(self.mlp1(x_channels), axes=(0, 2, 1))
        x = mlp1_outputs + inputs
        return x + self.mlp2(self.normalize(x))


def mlp_mixer():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Dense(8)(Patches(2)(layers.Rescaling(1 / 16)(inputs)))
    x = keras.Sequential([MLPMixerLayer(16, 8, 0.2) for _ in range(3)])(x)
    x = layers.Dropout(rate=0.2)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def sgd_with_logits():
    return {
        "optimizer": keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10), momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["acc"],
    }


def fit_digits():
    x, y = digits()
    return {"x": x, "y": y, "batch_size": 8}


# -- a U-Net for segmentation with a loss of its own --------------------------------------------------------------


def unet():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    skip = x
    x = layers.SeparableConv2D(8, 3, padding="same")(layers.Activation("relu")(x))
    x = layers.MaxPooling2D(3, strides=2, padding="same")(layers.BatchNormalization()(x))
    x = layers.add([x, layers.Conv2D(8, 1, strides=2, padding="same")(skip)])
    x = layers.Conv2DTranspose(8, 3, padding="same")(layers.Activation("relu")(x))
    x = layers.UpSampling2D(2)(layers.BatchNormalization()(x))
    x = layers.Concatenate()([x, skip])
    x = layers.UpSampling2D(2)(layers.Conv2D(4, 3, padding="same", activation="relu")(x))
    return keras.Model(inputs, layers.Conv2D(1, 3, activation="sigmoid", padding="same")(x))


def dice_and_crossentropy(y_true, y_pred):
    """(n,): one value an image."""
    y_true = ops.cast(y_true, y_pred.dtype)
    both = ops.sum(y_true * y_pred, axis=(1, 2, 3))
    total = ops.sum(y_true, axis=(1, 2, 3)) + ops.sum(y_pred, axis=(1, 2, 3))
    crossentropy = ops.mean(keras.losses.binary_crossentropy(y_true, y_pred), axis=(1, 2))
    return 1 - (2 * both + 1) / (total + 1) + crossentropy


def segmentation():
    return {
        "optimizer": keras.optimizers.RMSprop(1e-3),
        "loss": dice_and_crossentropy,
        "metrics": [keras.metrics.BinaryIoU(target_class_ids=[1], threshold=0.5, name="iou")],
    }


def fit_masks():
    x, _ = digits()
    return {"x": x, "y": (x > 8).astype("uint8"), "batch_size": 8}


# -- super-resolution by sub-pixel convolution ---------------------------------------------------------------------


class DepthToSpace(layers.Layer):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return tf.nn.depth_to_space(x, self.factor)


def super_resolution(upscale_factor=2, channels=1):
    conv_args = {"activation": "relu", "kernel_initializer": "orthogonal", "padding": "same"}
    inputs = keras.Input(shape=(None, None, channels))
    x = layers.Conv2D(8, 5, **conv_args)(inputs)
    x = layers.Conv2D(4, 3, **conv_args)(x)
    x = layers.Conv2D(channels * (upscale_factor**2), 3, **conv_args)(x)
    return keras.Model(inputs, DepthToSpace(upscale_factor)(x))


class PSNRCallback(keras.callbacks.Callback):
    """Looks at a prediction of the model before each epoch, and counts the loss while it trains."""

    def __init__(self):
        super().__init__()
        self.psnr = []

    def on_epoch_begin(self, epoch, logs=None):
        self.psnr = []
        self.model.predict(self.small(), verbose=0)

    def small(self):
        return halved(digits()[0][:2] / 16)

    def on_train_batch_end(self, batch, logs=None):
        self.psnr.append(10 * np.log10(1 / logs["loss"]))

    def on_epoch_end(self, epoch, logs=None):
        logs["psnr"] = float(np.mean(self.psnr))


def halved(images):
    return images.reshape(-1, SIZE // 2, 2, SIZE // 2, 2, 1).mean((2, 4))


def super_resolving():
    return {"optimizer": keras.optimizers.Adam(learning_rate=0.001), "loss": keras.losses.MeanSquaredError()}


def fit_small_and_large():
    images = digits()[0] / 16
    return {"x": halved(images), "y": images, "batch_size": 8, "epochs": 2, "callbacks": [PSNRCallback()]}


# -- fine-tuning: a frozen base in inference mode, augmentation in front ------------------------------------------


def fine_tuning():
    base_inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False)(base_inputs)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    base = keras.Model(base_inputs, layers.Conv2D(8, 3, activation="relu")(x), name="base")
    base.trainable = False
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.RandomFlip("horizontal", seed=1)(inputs)
    x = layers.Rescaling(scale=1 / 8, offset=-1)(layers.Concatenate()([x, x, x]))
    x = base(x, training=False)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1)(x))


def even_or_odd():
    return {
        "optimizer": keras.optimizers.Adam(),
        "loss": keras.losses.BinaryCrossentropy(from_logits=True),
        "metrics": [keras.metrics.BinaryAccuracy()],
    }


def fit_parity():
    x, y = digits()
    return {"x": x, "y": y % 2, "batch_size": 8, "class_weight": {0: 1.0, 1: 2.5}}


# -- attention-based multiple-instance learning: a bag of images as a list of inputs -------------------------------


class MILAttentionLayer(layers.Layer):
    def __init__(self, weight_params_dim, kernel_initializer="glorot_uniform", use_gated=False, **kwargs):
        super().__init__(**kwargs)
        self.weight_params_dim = weight_params_dim
        self.use_gated = use_gated
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.v_regularizer = keras.regularizers.get("l2")

    def build(self, input_shape):
        size = input_shape[0][1]
        self.v = self.add_weight(
            shape=(size, self.weight_params_dim),
            initializer=self.kernel_initializer,
            name="v",
            regularizer=self.v_regularizer,
        )
        self.w = self.add_weight(shape=(self.weight_params_dim, 1), initializer=self.kernel_initializer, name="w")
        self.u = self.add_weight(shape=(size, self.weight_params_dim), initializer=self.kernel_initializer, name="u")

    def call(self, inputs):
        instances = [self.score(instance) for instance in inputs]
        alpha = ops.softmax(ops.stack(instances), axis=0)
        return [alpha[i] for i in range(alpha.shape[0])]

    def score(self, instance):
        gate = ops.sigmoid(ops.dot(instance, self.u)) if self.use_gated else 1.0
        return ops.dot(ops.tanh(ops.dot(instance, self.v)) * gate, self.w)


def bags_of_images():
    inputs, embeddings = [], []
    shared_1 = layers.Dense(8, activation="relu")
    shared_2 = layers.Dense(6, activation="relu")
    for _ in range(3):
        one = layers.Input((SIZE, SIZE, 1))
        inputs.append(one)
        embeddings.append(shared_2(shared_1(layers.Flatten()(one))))
    alpha = MILAttentionLayer(8, use_gated=True, name="alpha")(embeddings)
    weighted = [layers.multiply([alpha[i], embeddings[i]]) for i in range(3)]
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.concatenate(weighted, axis=1)))


def bags():
    return {
        "optimizer": keras.optimizers.SGD(0.05, momentum=0.9),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
    }


def fit_bags():
    """Positive where a bag of three holds a zero."""
    images, classes = digits()
    x = [images[k::3] / 16 for k in range(3)]
    y = np.any([classes[k::3] == 0 for k in range(3)], axis=0).astype("int32")
    weights = {0: 0.7, 1: 1.6}
    best = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.2, patience=0, min_delta=1.0)
    return {"x": x, "y": y, "batch_size": 4, "epochs": 2, "class_weight": weights, "callbacks": [best]}


# Keras's own ReduceLROnPlateau reads the learning rate in a way that NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROGRAMS = {
    "vision transformer": Program(
        vision_transformer,
        adam_of_the_transformer,
        fit_with_validation,
        cuts={"stages": 3},
        microbatches=1,
        zeros=("key/bias",),
    ),
    "convolution mixer": Program(conv_mixer, bags, image_pipeline, inputs=lambda: digits()[0], microbatches=1),
    "mlp mixer": Program(mlp_mixer, sgd_with_logits, fit_digits, cuts={"stages": 3}, microbatches=1),
    "u-net": Program(unet, segmentation, fit_masks, cuts={"stages": 3}, microbatches=1),
    "super-resolution": Program(super_resolution, super_resolving, fit_small_and_large, cuts={"stages": 3}),
    "fine-tuning": Program(fine_tuning, even_or_odd, fit_parity, cuts={"at": ["base"]}, microbatches=1),
    "bags of images": Program(bags_of_images, bags, fit_bags, sums_apart=True),
}


@each(PROGRAMS, check=["fine-tuning"], gate=["bags of images", "super-resolution", "vision transformer"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["bags of images", "fine-tuning"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

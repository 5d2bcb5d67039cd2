"""Programs that learn to make: autoencoders of every kind, a denoiser with noise levels, adversaries by hand."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

from stages import Stage
from tests.programs.program import SEED, Program, assert_compiled_is_keras, assert_eager_is_keras, each

SIZE, SAMPLES = 8, 16


@functools.cache
def images():
    """(16, 8, 8, 1) from 0 to 1."""
    return load_digits().images[:SAMPLES, ..., None].astype("float32") / 16


# -- a variational autoencoder: sampling, and the divergence by add_loss --------------------------------------------


class Sampling(layers.Layer):
    """A point near the mean, and how far the distribution is from the normal one."""

    def __init__(self, beta=0.1, **kwargs):
        super().__init__(**kwargs)
        self.beta = beta
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        z_mean, z_log_var = inputs
        divergence = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
        self.add_loss(self.beta * ops.mean(ops.sum(divergence, axis=1)))
        epsilon = keras.random.normal(shape=ops.shape(z_mean), seed=self.seed_generator)
        return z_mean + ops.exp(0.5 * z_log_var) * epsilon


def variational_autoencoder():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = layers.Dense(8, activation="relu", name="encoder")(layers.Flatten()(x))
    z = Sampling()([layers.Dense(2, name="z_mean")(x), layers.Dense(2, name="z_log_var")(x)])
    x = layers.Reshape((4, 4, 2))(layers.Dense(32, activation="relu", name="decoder")(z))
    x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
    return keras.Model(inputs, layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x))


def reconstructing():
    return {"optimizer": keras.optimizers.Adam(), "loss": summed_crossentropy}


def summed_crossentropy(data, reconstruction):
    return ops.sum(keras.losses.binary_crossentropy(data, reconstruction), axis=(1, 2))


def fit_itself():
    return {"x": images(), "y": images(), "batch_size": 6, "epochs": 1}


# -- a denoising autoencoder, noise from tf.data --------------------------------------------------------------------


def denoising_autoencoder():
    inputs = layers.Input(shape=(SIZE, SIZE, 1))
    x = layers.GaussianNoise(0.0)(inputs)
    x = layers.Conv2D(4, 3, activation="relu", padding="same")(x)
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Conv2D(4, 3, activation="relu", padding="same")(x)
    x = layers.Conv2DTranspose(4, 3, strides=2, activation="relu", padding="same")(x)
    return keras.Model(inputs, layers.Conv2D(1, 3, activation="sigmoid", padding="same")(x))


def accumulating():
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=2, use_ema=True, ema_momentum=0.9)
    return {"optimizer": optimizer, "loss": "binary_crossentropy", "metrics": ["mse"]}


def noise(image):
    noisy = image + 0.4 * tf.random.stateless_normal(tf.shape(image), seed=(1, 2))
    return tf.clip_by_value(noisy, 0.0, 1.0), image


def fit_noise():
    return {"x": tf.data.Dataset.from_tensor_slices(images()).batch(4).map(noise), "shuffle": False}


# -- a quantised autoencoder: codes, a straight-through gradient, two commitments by add_loss -----------------------


class VectorQuantizer(layers.Layer):
    def __init__(self, num_embeddings, embedding_dim, beta=0.25, **kwargs):
        super().__init__(**kwargs)
        self.embedding_dim, self.num_embeddings, self.beta = embedding_dim, num_embeddings, beta
        initial = keras.random.uniform((embedding_dim, num_embeddings), -1, 1)
        self.embeddings = self.add_weight(shape=initial.shape, initializer="zeros", name="embeddings")
        self.embeddings.assign(initial)

    def call(self, x):
        flattened = ops.reshape(x, [-1, self.embedding_dim])
        encodings = ops.one_hot(self.codes_of(flattened), self.num_embeddings)
        quantized = ops.reshape(ops.matmul(encodings, ops.transpose(self.embeddings)), ops.shape(x))
        commitment = ops.mean((ops.stop_gradient(quantized) - x) ** 2)
        codebook = ops.mean((quantized - ops.stop_gradient(x)) ** 2)
        self.add_loss(self.beta * commitment + codebook)
        return x + ops.stop_gradient(quantized - x)

    def codes_of(self, flattened):
        similarity = ops.matmul(flattened, self.embeddings)
        distances = ops.sum(flattened**2, 1, keepdims=True) + ops.sum(self.embeddings**2, 0) - 2 * similarity
        return ops.argmin(distances, axis=1)


def quantised_autoencoder():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = layers.Conv2D(3, 1, padding="same", name="codes")(x)
    x = VectorQuantizer(6, 3, name="quantizer")(x)
    x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same", name="first")(x)
    return keras.Model(inputs, layers.Conv2DTranspose(1, 3, padding="same")(x))


def squares():
    return {"optimizer": keras.optimizers.SGD(0.5, clipnorm=1.0), "loss": "mse"}


# -- a denoiser that is told how much noise there is ----------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
def sinusoidal_embedding(x):
    frequencies = ops.exp(ops.linspace(0.0, 3.0, 4))
    angular = ops.cast(2.0 * np.pi * frequencies, "float32")
    return ops.concatenate([ops.sin(angular * x), ops.cos(angular * x)], axis=3)


def residual_block(width):
    def apply(x):
        residual = x if x.shape[3] == width else layers.Conv2D(width, kernel_size=1)(x)
        x = layers.GroupNormalization(groups=2, center=False, scale=False)(x)
        x = layers.Conv2D(width, kernel_size=3, padding="same", activation="swish")(x)
        return layers.Add()([layers.Conv2D(width, kernel_size=3, padding="same")(x), residual])

    return apply


def denoiser():
    noisy_images = keras.Input(shape=(SIZE, SIZE, 1))
    noise_variances = keras.Input(shape=(1, 1, 1))
    e = layers.Lambda(sinusoidal_embedding, output_shape=(1, 1, 8))(noise_variances)
    e = layers.UpSampling2D(size=SIZE, interpolation="nearest")(e)
    x = layers.Concatenate()([layers.Conv2D(4, kernel_size=1)(noisy_images), e])
    skips = []
    for width in (4, 6):
        x = residual_block(width)(x)
        skips.append(x)
        x = layers.AveragePooling2D(pool_size=2)(x)
    x = residual_block(8)(x)
    for width in (6, 4):
        x = layers.UpSampling2D(size=2, interpolation="bilinear")(x)
        x = residual_block(width)(layers.Concatenate()([x, skips.pop()]))
    x = layers.Conv2D(1, kernel_size=1, kernel_initializer="zeros")(x)
    return keras.Model([noisy_images, noise_variances], x, name="residual_unet")


def absolute():
    optimizer = keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return {"optimizer": optimizer, "loss": keras.losses.MeanAbsoluteError()}


def fit_noise_levels():
    random = np.random.default_rng(1)
    levels = random.uniform(0.1, 0.9, (SAMPLES, 1, 1, 1)).astype("float32")
    drawn = random.normal(size=images().shape).astype("float32")
    return {"x": [images() + levels * drawn, levels**2], "y": drawn, "batch_size": 8}


PROGRAMS = {
    "variational autoencoder": Program(
        variational_autoencoder, reconstructing, fit_itself, cuts={"at": ["encoder", "decoder"]}, microbatches=1
    ),
    "denoising autoencoder": Program(denoising_autoencoder, accumulating, fit_noise, inputs=images, rounding=1e-4),
    "quantised autoencoder": Program(quantised_autoencoder, squares, fit_itself, cuts={"at": ["codes", "first"]}),
    "denoiser": Program(denoiser, absolute, fit_noise_levels, cuts={"stages": 3}),
}


@each(PROGRAMS, check=["variational autoencoder"], gate=["quantised autoencoder", "denoising autoencoder", "denoiser"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["variational autoencoder", "quantised autoencoder", "denoising autoencoder"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)


# -- adversaries by hand: two stages, each trained in its turn ------------------------------------------------------


def adversaries():
    keras.utils.set_random_seed(SEED)
    generator = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(16),
            layers.LeakyReLU(0.2),
            layers.Dense(64, "sigmoid"),
            layers.Reshape((8, 8, 1)),
        ]
    )
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, strides=2),
            layers.LeakyReLU(0.2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    return generator, discriminator, keras.optimizers.Adam(3e-3), keras.optimizers.Adam(1e-3)


def noise_and_images(step):
    noise = np.random.default_rng(step).normal(size=(4, 3)).astype("float32")
    return tf.constant(noise), tf.constant(images()[4 * step : 4 * step + 4])


def gradient(loss, targets, logits):
    """dL/dlogits."""
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = loss(targets, logits)
    return tape.gradient(value, logits)


def test_adversaries_by_hand_are_two_tapes():
    """Each of a generator and a discriminator moves in its own step only, to the bit as under Keras's tapes."""
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    generator, discriminator, g_optimizer, d_optimizer = adversaries()
    for step in range(3):
        noise, real = noise_and_images(step)
        with tf.GradientTape() as tape:
            logits = discriminator(tf.concat([generator(noise), real], 0))
            value = loss(tf.concat([tf.zeros((4, 1)), tf.ones((4, 1))], 0), logits)
        weights = discriminator.trainable_weights
        d_optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            value = loss(tf.ones((4, 1)), discriminator(generator(noise)))
        weights = generator.trainable_weights
        g_optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
    expected = [*generator.get_weights(), *discriminator.get_weights()]

    generator, discriminator, g_optimizer, d_optimizer = adversaries()
    making, judging = Stage(generator), Stage(discriminator)
    for step in range(3):
        noise, real = noise_and_images(step)
        logits = judging.forward(tf.concat([generator(noise), real], 0))
        judging.backward(gradient(loss, tf.concat([tf.zeros((4, 1)), tf.ones((4, 1))], 0), logits))
        judging.apply(d_optimizer)
        logits = judging.forward(making.forward(noise))
        making.backward(judging.backward(gradient(loss, tf.ones((4, 1)), logits)))
        judging.zero_gradients()  # its turn was before
        making.apply(g_optimizer)
    found = [*generator.get_weights(), *discriminator.get_weights()]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)

"""Masks cross cuts: into recurrent layers, attention, the loss and the metrics, and weigh microbatches rightly.

A mask rides on a tensor as a hidden attribute. Lost at a cut, the loss still falls and every gradient is wrong.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from stages import Stage
from tests.levels import in_turn

layers = keras.layers
STEPS, WORDS, CLASSES = 7, 11, 4


def recurrent() -> keras.Model:
    """A tagger whose padding mask reaches the loss."""
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            layers.Embedding(WORDS, 6, mask_zero=True, name="words"),
            layers.GRU(5, return_sequences=True, name="lower"),
            layers.LSTM(6, return_sequences=True, name="upper"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def attention() -> keras.Model:
    """A tagger with masked attention, and one mask for a skip connection."""
    words = keras.Input((STEPS,), dtype="int32")
    embedded = layers.Embedding(WORDS, 8, mask_zero=True, name="words")(words)
    attended = layers.MultiHeadAttention(2, 4, name="lower")(embedded, embedded)
    joined = layers.LayerNormalization(name="upper")(layers.Add()([embedded, attended]))
    return keras.Model(words, layers.Dense(CLASSES, activation="softmax")(joined))


def padded_batch(samples: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Words with very unequal padding, so that unweighted microbatches would be far off."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, WORDS, (samples, STEPS))
    for row, length in enumerate(np.linspace(1, STEPS, samples).astype(int)):
        x[row, length:] = 0
    return x.astype("int32"), rng.integers(0, CLASSES, (samples, STEPS))


def one_tape(model: keras.Model, x, y, loss) -> list[np.ndarray]:
    """Gradients of the whole batch, unsplit."""
    with tf.GradientTape() as tape:
        value = loss(y, model(x, training=True))
    found = tape.gradient(value, [v.value for v in model.trainable_variables])
    return [np.array(tf.convert_to_tensor(g)) for g in found]


class BesideTheMean(keras.losses.Loss):
    """Each word's error beside the mean error of the whole batch, which couples the samples."""

    def call(self, y_true, y_pred):
        errors = keras.losses.sparse_categorical_crossentropy(y_true, y_pred)
        return errors / keras.ops.mean(errors)


def test_a_loss_over_the_whole_batch_sees_the_masks_of_all_microbatches():
    keras.utils.set_random_seed(0)
    model, (x, y), loss = recurrent(), padded_batch(), BesideTheMean()
    expected = one_tape(model, x, y, loss)
    largest = max(np.abs(g).max() for g in expected)
    with Pipeline.split(
        model, at=["words", "lower"], microbatches=3, schedule="gpipe", transport="inproc", check_first_batch=False
    ) as pipe:
        pipe.compile("sgd", loss, run_eagerly=True)
        found = list(pipe.gradients(x, y).values())
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6 * largest


@pytest.mark.parametrize("build", [recurrent, attention])
@pytest.mark.parametrize("schedule", in_turn(["1f1b", "gpipe"], 1, 1))
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_masked_loss_over_microbatches_equals_the_whole_batch(build, schedule, eager):
    keras.utils.set_random_seed(0)
    model = build()
    x, y = padded_batch()
    loss = keras.losses.SparseCategoricalCrossentropy()
    expected = one_tape(model, x, y, loss)
    largest = max(np.abs(g).max() for g in expected)
    with Pipeline.split(model, at=["words", "lower"], microbatches=3, schedule=schedule, transport="inproc") as pipe:
        pipe.compile("sgd", loss, run_eagerly=eager)
        found = list(pipe.gradients(x, y).values())
        pipe.verify(x, y).raise_if_failed()
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6 * largest


@pytest.mark.gate
def test_several_stages_a_worker_look_for_masks_by_a_plan_of_their_own():
    """Batches of 4 and of 3 microbatches, in turn: training, evaluation and prediction are Keras's."""
    keras.utils.set_random_seed(0)
    model, plain = recurrent(), recurrent()
    plain.set_weights(model.get_weights())
    x, y = padded_batch(27)
    arguments = {"batch_size": 24, "verbose": 0}
    plain.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with Pipeline.split(
        model, at=["words", "lower", "upper"], microbatches=4, schedule="interleaved", transport="inproc"
    ) as pipe:
        pipe.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
        for _ in range(2):
            np.testing.assert_allclose(pipe.predict(x, **arguments), plain.predict(x, **arguments), rtol=1e-5)
            ours, theirs = (
                one.fit(x, y, shuffle=False, epochs=2, validation_data=(x, y), **arguments).history
                for one in (pipe, plain)
            )
            for name, values in theirs.items():
                assert ours[name] == pytest.approx(values, rel=1e-5)
            assert pipe.evaluate(x, y, **arguments) == pytest.approx(plain.evaluate(x, y, **arguments), rel=1e-5)


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_masked_metrics_and_evaluation_equal_keras(eager):
    keras.utils.set_random_seed(0)
    model = recurrent()
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = padded_batch()
    expected = model.test_on_batch(x, y)
    with Pipeline.split(model, at=["words", "lower"], microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=eager)
        assert pipe.test_on_batch(x, y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.gate
def test_masks_cross_processes():
    keras.utils.set_random_seed(0)
    x, y = padded_batch()
    with Pipeline.split(recurrent(), stages=3, microbatches=3, transport="ipc") as pipe:
        pipe.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
        pipe.verify(x, y).raise_if_failed()


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2))
def test_stages_in_the_hand_pass_masks_on(eager):
    keras.utils.set_random_seed(0)
    model = recurrent()
    x, y = padded_batch()
    loss = keras.losses.SparseCategoricalCrossentropy()
    expected = one_tape(model, x, y, loss)
    inputs = keras.Input((STEPS,), dtype="int32"), keras.Input((STEPS, 6))
    parts = [keras.Sequential([inputs[0], *model.layers[:1]]), keras.Sequential([inputs[1], *model.layers[1:]])]
    bottom, top = Stage(parts[0], run_eagerly=eager), Stage(parts[1], loss=loss, run_eagerly=eager)
    top.forward_loss(bottom.forward(x), y)
    bottom.backward(top.backward())
    found = [*bottom.gradients().values(), *top.gradients().values()]
    largest = max(np.abs(g).max() for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6 * largest

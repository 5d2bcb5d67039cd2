"""Defences do what their formulas say, hide what they are for, and are part of what one tape and Keras compute."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import DataError, Pipeline
from pipeline.parties.defences.of_activations import ClippedActivation, QuantisedActivation, TopActivation
from pipeline.parties.defences.of_gradients import ClippedGradient, MaxNormGradient, NoisyGradient
from pipeline.parties.defences.of_labels import chance_kept, randomised_response
from pipeline.parties.leakage.labels import gradient_leaks
from tests.levels import in_turn

RANDOM = np.random.default_rng(0)
G = RANDOM.normal(size=(12, 5)).astype("float32") * RANDOM.uniform(0.1, 3, (12, 1)).astype("float32")
Z = RANDOM.normal(size=(12, 5)).astype("float32")


def passed(layer, z=Z, g=G):
    """The output of a layer and the gradient that it hands back."""
    z = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        out = layer(z)
    return out.numpy(), tape.gradient(out, z, output_gradients=tf.constant(g)).numpy()


@pytest.mark.parametrize("layer", [NoisyGradient(0.3, seed=1), MaxNormGradient(seed=1), ClippedGradient(0.5)])
def test_defences_of_gradients_leave_activations_as_they_are(layer):
    assert passed(layer)[0].tobytes() == Z.tobytes()


def test_noise_has_its_size_is_new_in_every_call_and_the_same_again_under_its_seed():
    large = np.zeros((2000, 5), "float32")
    layer, again = NoisyGradient(0.3, seed=1), NoisyGradient(0.3, seed=1)
    first, second = passed(layer, large, large)[1], passed(layer, large, large)[1]
    assert np.std(first) == pytest.approx(0.3, rel=0.03) and abs(np.mean(first)) < 0.01
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert passed(again, large, large)[1].tobytes() == first.tobytes()


def test_every_row_has_the_largest_norm_in_the_mean():
    layer, times = MaxNormGradient(seed=2), 3000
    draws = passed(layer, np.tile(Z, (times, 1)), np.tile(G, (times, 1)))[1].reshape(times, *G.shape)
    mean = np.mean(np.sum(draws**2, axis=2), axis=0)
    assert mean == pytest.approx(np.full(12, np.max(np.sum(G**2, axis=1))), rel=0.15)
    largest = np.argmax(np.sum(G**2, axis=1))
    assert np.all(draws[:, largest] == G[largest])
    lines = np.abs(np.sum(draws * G, axis=2)) / np.linalg.norm(draws, axis=2) / np.linalg.norm(G, axis=1)
    assert np.allclose(lines, 1.0, atol=1e-4)
    assert np.all(passed(layer, Z, np.zeros_like(G))[1] == 0.0)


def test_norms_no_longer_tell_the_rarer_class():
    labels = np.arange(200) % 4 == 0
    gradients = ((0.2 - labels)[:, None] * RANDOM.normal(size=8)).astype("float32")
    assert gradient_leaks(gradients, labels)["norm"] == 1.0
    hidden = passed(MaxNormGradient(seed=3), gradients, gradients)[1]
    assert gradient_leaks(hidden, labels)["norm"] < 0.8


def test_rows_are_shortened_to_a_norm_and_no_further():
    sizes = np.linalg.norm(G, axis=1, keepdims=True)
    assert passed(ClippedGradient(1.0))[1] == pytest.approx(G * np.minimum(1.0, 1.0 / sizes), rel=1e-6)
    norms = np.linalg.norm(Z, axis=1, keepdims=True)
    assert passed(ClippedActivation(1.5))[0] == pytest.approx(Z * np.minimum(1.0, 1.5 / norms), rel=1e-6)


def test_activations_are_rounded_and_gradients_pass_inside_the_bounds():
    out, back = passed(QuantisedActivation(3, -1.0, 1.0))
    assert set(np.round((out.ravel() + 1) / (2 / 7), 4)) <= set(range(8))
    assert np.max(np.abs(out - np.clip(Z, -1, 1))) <= 1 / 7 + 1e-6
    assert np.all(back == np.where(np.abs(Z) <= 1, G, 0))


def test_half_precision_neither_overflows_nor_vanishes():
    large = np.full((2, 16), 100.0, "float16")  # a norm of 400, whose square is infinite there
    assert np.allclose(passed(ClippedActivation(4.0, dtype="float16"), large, large)[0], 1.0, atol=1e-2)
    out = passed(QuantisedActivation(16, dtype="float16"), Z.astype("float16"), G.astype("float16"))[0]
    assert np.max(np.abs(out - np.clip(Z, -1, 1))) < 1e-3


def test_the_largest_are_kept_by_size():
    out, back = passed(TopActivation(2))
    kept = np.argsort(-np.abs(Z), axis=1)[:, :2]
    expected = np.zeros_like(Z)
    np.put_along_axis(expected, kept, np.take_along_axis(Z, kept, 1), 1)
    assert np.all(out == expected) and np.all(back == np.where(expected != 0, G, 0))
    assert np.all(passed(TopActivation(9))[0] == Z)


@pytest.mark.parametrize(("epsilon", "classes", "chance"), [(1.0, 2, 0.7311), (1.0, 10, 0.2320)])
def test_labels_are_kept_with_the_published_chance_and_told_by_many_draws(epsilon, classes, chance):
    assert chance_kept(epsilon, classes) == pytest.approx(chance, abs=5e-5)
    true = RANDOM.integers(0, classes, 20_000)
    drawn = randomised_response(true, epsilon, classes, seed=1)
    assert np.mean(drawn == true) == pytest.approx(chance, abs=0.01)
    others = np.bincount((drawn - true) % classes, minlength=classes)[1:] / len(true)
    assert others == pytest.approx(np.full(classes - 1, (1 - chance) / (classes - 1)), abs=0.01)
    assert np.all(randomised_response(true, epsilon, classes, seed=1) == drawn)
    if classes == 2:
        votes = sum(randomised_response(true, epsilon, 2, seed=k) for k in range(5)) > 2
        assert np.mean(votes == true) == pytest.approx(0.88, abs=0.01)
    with pytest.raises(DataError, match="not one-hot"):
        randomised_response(np.eye(classes)[true[:4]], epsilon, classes, seed=1)
    with pytest.raises(DataError, match="whole numbers from 0 to"):
        randomised_response(true + 0.5, epsilon, classes, seed=1)


X = RANDOM.normal(size=(24, 6)).astype("float32")
Y = (X[:, :1] > 0).astype("float32")


def guarded():
    """All of them: the activations' at the end of the first stage, the gradients' at the begin of the next."""
    keras.utils.set_random_seed(0)
    before = [
        keras.layers.Dense(8, "tanh"),
        ClippedActivation(1.2),
        QuantisedActivation(4),
        TopActivation(6, name="cut"),
    ]
    behind = [
        NoisyGradient(1e-3, seed=1),
        MaxNormGradient(seed=2),
        ClippedGradient(0.05),
        keras.layers.Dense(1, "sigmoid"),
    ]
    return keras.Sequential([keras.Input((6,)), *before, *behind])


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_training_with_defences_is_that_of_keras_and_can_be_verified(eager):
    own, model = guarded(), guarded()
    own.compile(keras.optimizers.SGD(0.5), "binary_crossentropy", run_eagerly=eager)
    own.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    with Pipeline.split(model, at=["cut"], microbatches=1, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.5), "binary_crossentropy", run_eagerly=eager)
        pipe.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        trained = pipe.get_weights()
        pipe.verify(X[:8], Y[:8]).raise_if_failed()
    for ours, theirs in zip(trained, own.get_weights(), strict=True):
        assert ours.tobytes() == theirs.tobytes() if eager else np.allclose(ours, theirs, atol=1e-6)
    assert keras.Sequential.from_config(own.get_config()).get_config() == own.get_config()


def test_defences_in_microbatches_are_one_tape():
    with Pipeline.split(guarded(), at=["cut"], microbatches=3, transport="inproc") as pipe:
        pipe.compile("sgd", "binary_crossentropy", run_eagerly=True)
        pipe.verify(X, Y).raise_if_failed()


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoisyGradient(0.0),
        lambda: ClippedGradient(float("inf")),
        lambda: QuantisedActivation(17),
        lambda: QuantisedActivation(2, 1.0, 1.0),
        lambda: TopActivation(0),
        lambda: randomised_response([0, 1], -1.0, 2, 0),
    ],
)
def test_arguments_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match=r"positive number, received|whole number of at least 1, received"):
        make()

"""Steps of more microbatches than a message's value may have entries: trained, timed and verified like any other."""

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from transport.limits import DEFAULT_LIMITS

X = np.random.default_rng(0).normal(size=(DEFAULT_LIMITS.max_count + 5, 2)).astype("float32")
Y = X[:, :1]


def made(microbatches):
    """Two stages, to be closed."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(2, name="below"), keras.layers.Dense(1, name="above")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    pipe = Pipeline.split(model, at=["below"], microbatches=microbatches, transport="inproc")
    pipe.compile(keras.optimizers.SGD(0.1), "mean_squared_error")
    return pipe


def trained_by_hand(weights, x, y):
    """The second layer's kernel after a step of mean squared error at rate 0.1."""
    lower, lower_bias, upper, upper_bias = weights
    hidden = x @ lower + lower_bias
    error = hidden @ upper + upper_bias - y
    return upper - 0.1 * 2 * hidden.T @ error / len(x)


@pytest.mark.soak
def test_a_step_of_thousands_of_microbatches_can_be_timed_and_training_goes_on():
    count = len(X) - 1  # one microbatch has two samples
    with made(count) as pipe:
        before = pipe.get_weights()
        timeline = pipe.timeline(X, Y, repeats=1)
        assert len(timeline.spans) == 2 * 2 * count
        assert len(timeline.events.transits) >= 2 * count
        for was, now in zip(before, pipe.get_weights(), strict=True):
            np.testing.assert_array_equal(was, now)
        pipe.train_on_batch(X, Y)
        np.testing.assert_allclose(pipe.get_weights()[2], trained_by_hand(before, X, Y), rtol=1e-4)


@pytest.mark.soak
def test_what_a_verification_sees_may_be_more_than_a_message_may_have_entries():
    count = DEFAULT_LIMITS.max_count // 5  # each is seen at both ends of both ways, in six words
    x, y = X[:count], Y[:count]
    with made(count) as pipe:
        before = pipe.get_weights()
        assert pipe.verify(x, y).ok
        pipe.train_on_batch(x, y)
        np.testing.assert_allclose(pipe.get_weights()[2], trained_by_hand(before, x, y), rtol=1e-4)

"""Keras's float type is the pipeline's: under float64 nothing is rounded to float32 on the way.

The judge is plain Keras on the whole batch. Microbatches of 3, 2 and 2 samples weigh 3/7 and 2/7, numbers that float32
and float64 round differently; so do a regulariser's share and the factor of a clipping by the global norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest

from pipeline import Pipeline

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 4)), RNG.normal(size=(7, 1))


@pytest.fixture
def wide() -> Iterator[None]:
    """Keras makes float64 of what says nothing else, as with "floatx": "float64" in keras.json."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def build() -> keras.Model:
    keras.utils.set_random_seed(1)
    regularised = keras.layers.Dense(3, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.3))
    return keras.Sequential([keras.Input((4,)), regularised, keras.layers.Dense(1)])


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.gate)])
def test_training_in_float64_is_plain_keras_to_the_last_digits(wide: None, eager: bool) -> None:
    plain, model = build(), build()
    plain.compile(keras.optimizers.Adam(global_clipnorm=0.1), "mean_squared_error", run_eagerly=eager)
    history = plain.fit(X, Y, batch_size=7, epochs=3, shuffle=False, verbose=0).history["loss"]
    with Pipeline.split(model, stages=2, microbatches=3, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(global_clipnorm=0.1), "mean_squared_error", run_eagerly=eager)
        ours = pipe.fit(X, Y, batch_size=7, epochs=3, shuffle=False, verbose=0).history["loss"]
        pipe.verify(X, Y).raise_if_failed()
    assert np.allclose(ours, history, rtol=1e-14, atol=0)
    for mine, theirs in zip(model.weights, plain.weights, strict=True):
        assert mine.dtype == "float64"
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=0, atol=1e-14)

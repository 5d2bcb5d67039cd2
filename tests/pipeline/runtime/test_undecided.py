"""A step whose update never came leaves nothing in the next one."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.verify.gradients import named_gradients

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = X[:, :1] ** 2


def test_gradients_of_a_step_that_failed_before_its_update_are_not_added_to_the_next() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)])
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
        session = pipe.session
        batch = session.steps.batch(X, Y, None, session.workers.needs_compile("a test").judged)
        expected = named_gradients(session, batch)

        def failing(driver: object) -> None:
            raise RuntimeError("before the update")

        with pytest.raises(RuntimeError, match="before the update"):
            session.steps.step(batch, look=failing)
        found = named_gradients(session, batch)
        assert list(found) == list(expected)
        for name, gradient in expected.items():
            np.testing.assert_array_equal(found[name], gradient)

"""Variables are named as in the user's own model, so that they can be laid beside those of the user's own tape."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = X[:, :2] ** 2


def nested() -> keras.Model:
    """A model inside a model inside a model."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="same")], name="inner")
    folder = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="same"), inner], name="folder")
    return keras.Sequential([keras.Input((4,)), folder, keras.layers.LayerNormalization(), keras.layers.Dense(2)])


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return nested()


@pytest.fixture(scope="module")
def pipe(model):
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
        yield pipe


def test_gradients_lie_beside_those_of_ones_own_tape(model, pipe) -> None:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.mean_squared_error(Y, model(X, training=True)))
    own = dict(
        zip(
            [v.path for v in model.trainable_variables],
            tape.gradient(loss, [v.value for v in model.trainable_variables]),
            strict=True,
        )
    )
    assert {"inner/same/kernel", "folder/same/kernel"} <= set(own)  # each a layer called "same"
    ours = {key.partition("/")[2]: value for key, value in pipe.gradients(X, Y).items()}
    assert set(ours) == set(own)
    for path, gradient in own.items():
        np.testing.assert_array_equal(ours[path], gradient.numpy(), err_msg=path)


def test_reports_and_explanations_name_them_so_too(model, pipe) -> None:
    paths = {v.path for v in model.trainable_variables}
    rows = [row for row in pipe.verify(X, Y).rows if row.check == "tape" and row.kind == "gradient"]
    assert {row.name.partition("/")[2] for row in rows} == paths
    assert {row.name.partition("/")[2] for row in pipe.explain(X, Y).rows} == paths


def test_equal_paths_stay_apart() -> None:
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="same")], name="folder")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="same"), inner], name="folder")
    model = keras.Sequential([keras.Input((4,)), model])
    assert len({v.path for v in model.trainable_variables}) == 2
    with Pipeline([model], microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
        found = pipe.gradients(X, X)
    paths = ["folder/same/kernel", "folder/same/bias"]
    assert list(found) == [f"stage0/{path}{again}" for again in ("", "#2") for path in paths]

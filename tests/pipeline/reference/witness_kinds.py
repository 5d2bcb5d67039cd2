"""Small pipelines of every kind that the witnesses are asked about, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from pipeline import Pipeline
from tests.models import Spread

layers = keras.layers


def _batch(classes: int | None = 3, samples: int = 5, width: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(samples, width)).astype("float32")
    return x, rng.integers(0, classes, samples) if classes else rng.normal(size=(samples, 2)).astype("float32")


def _split(model: Any, at: list[str], loss: Any, microbatches: int = 2, **options: Any) -> Pipeline:
    pipe = Pipeline.split(model, at=at, microbatches=microbatches, transport="inproc")
    pipe.compile("sgd", loss, run_eagerly=True, **options)
    return pipe


def dense() -> tuple[Pipeline, Any, Any, Any]:
    """A chain with a regulariser, softmax and sample weights."""
    x = keras.Input((4,))
    h = layers.Dense(5, "tanh", kernel_regularizer="l2")(x)
    h = layers.Dense(4, "gelu", name="middle")(h)
    model = keras.Model(x, layers.Dense(3, "softmax")(h))
    return _split(model, ["middle"], "sparse_categorical_crossentropy"), *_batch(), np.float32([1, 0.2, 2, 1, 3])


def convolution() -> tuple[Pipeline, Any, Any, Any]:
    """Convolution and BatchNormalization in training mode."""
    x = keras.Input((5, 5, 2))
    h = layers.Conv2D(2, 3, use_bias=False)(x)
    h = layers.ReLU(name="act")(layers.BatchNormalization(name="normal")(h))
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(h)))
    rng = np.random.default_rng(1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return _split(model, ["act"], loss), rng.normal(size=(5, 5, 5, 2)).astype("float32"), rng.integers(0, 3, 5), None


def masked() -> tuple[Pipeline, Any, Any, Any]:
    """An embedding whose mask crosses the cut, to an LSTM and to a loss over time."""
    x = keras.Input((3,), dtype="int32")
    h = layers.Dense(3, "tanh", name="cut")(layers.Embedding(7, 3, mask_zero=True)(x))
    h = layers.LSTM(2, return_sequences=True)(h)
    model = keras.Model(x, layers.Dense(1)(h))
    tokens = np.array([[1, 2, 0], [3, 4, 5], [1, 0, 0]], "int32")
    target = np.random.default_rng(1).normal(size=(3, 3, 1)).astype("float32")
    return _split(model, ["cut"], "mse"), tokens, target, None


def skips() -> tuple[Pipeline, Any, Any, Any]:
    """Three stages, an output with two consumers, a stage with two inputs."""
    x = keras.Input((4,))
    low = layers.Dense(4, "tanh", name="low")(x)
    high = layers.Dense(4, "tanh", name="high")(low)
    model = keras.Model(x, layers.Dense(3, "softmax")(layers.Add()([low, high])))
    return _split(model, ["low", "high"], "sparse_categorical_crossentropy"), *_batch(), None


def outputs() -> tuple[Pipeline, Any, Any, Any]:
    """Two outputs of two stages with their losses, weights and sample weights."""
    x = keras.Input((4,))
    low = layers.Dense(4, "tanh", name="low")(x)
    model = keras.Model(
        x, {"a": layers.Dense(3, name="a")(low), "b": layers.Dense(2, name="b")(layers.Dense(4, "tanh")(low))}
    )
    losses = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    pipe = _split(model, ["low"], losses, loss_weights={"a": 0.5, "b": 2.0})
    (x_, a), (_, b) = _batch(), _batch(None)
    return pipe, x_, [a, b], None


def variational() -> tuple[Pipeline, Any, Any, Any]:
    """A layer that adds a loss of its own, and an activity regulariser."""
    x = keras.Input((4,))
    h = Spread(0.3)(layers.Dense(4, "tanh", activity_regularizer="l2")(x))
    h = layers.Dense(4, "tanh", name="middle")(h)
    return _split(keras.Model(x, layers.Dense(2)(h)), ["middle"], "mse"), *_batch(None), None


def tied() -> tuple[Pipeline, Any, Any, Any]:
    """One regularised layer in two stages."""
    x = keras.Input((4,))
    twice = layers.Dense(4, "tanh", kernel_regularizer="l2", name="twice")
    h = layers.Dense(4, "tanh", name="middle")(twice(x))
    return _split(keras.Model(x, layers.Dense(2)(twice(h))), ["middle"], "mse"), *_batch(None), None


def dropout() -> tuple[Pipeline, Any, Any, Any]:
    """Random layers in both stages."""
    x = keras.Input((4,))
    h = layers.Dropout(0.4, seed=3, name="drop")(layers.Dense(6, "tanh")(x))
    h = layers.GaussianNoise(0.2, seed=4)(layers.Dense(6, "tanh", name="middle")(h))
    return _split(keras.Model(x, layers.Dense(2)(h)), ["middle"], "mse"), *_batch(None), None


def windows(truncate: int | None = None) -> tuple[Pipeline, Any, Any, Any]:
    """Passes through time: states cross windows, in both stages."""
    model = keras.Sequential(
        [
            keras.Input((3, 2), name="x"),
            layers.SimpleRNN(3, return_sequences=True, kernel_regularizer="l2", name="low"),
            layers.Dense(2, activation="tanh", name="between"),
            layers.SimpleRNN(2, return_sequences=True, name="high"),
            layers.Dense(1, name="out"),
        ]
    )
    pipe = Pipeline.split(model, at=["between"], microbatches=2, windows=2, truncate=truncate, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    rng = np.random.default_rng(1)
    return pipe, rng.normal(size=(3, 3, 2)).astype("float32"), rng.normal(size=(3, 3, 1)).astype("float32"), None


def truncated() -> tuple[Pipeline, Any, Any, Any]:
    """The same, where a state's gradient stays in its window."""
    return windows(truncate=1)


def coupled() -> tuple[Pipeline, Any, Any, Any]:
    """A loss that needs the whole batch at once."""
    x = keras.Input((4,))
    h = layers.Dense(4, "tanh", name="middle")(x)
    model = keras.Model(x, layers.Dense(2, "sigmoid")(h))
    pipe = Pipeline.split(model, at=["middle"], microbatches=2, schedule="gpipe", transport="inproc")
    pipe.compile("sgd", keras.losses.Dice(), run_eagerly=True)
    x_, y = _batch(None)
    return pipe, x_, (y > 0).astype("float32"), None


KINDS: dict[str, Callable[[], tuple[Pipeline, Any, Any, Any]]] = {
    kind.__name__: kind
    for kind in (
        dense,
        convolution,
        masked,
        skips,
        outputs,
        variational,
        tied,
        dropout,
        windows,
        truncated,
        coupled,
    )
}
"""Each gives a pipeline in threads, x, y and sample weights."""


def made(kind: str) -> tuple[Pipeline, Any, Any, Any]:
    """A pipeline of a kind, the same each time."""
    keras.utils.set_random_seed(2)
    return KINDS[kind]()

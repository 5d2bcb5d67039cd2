"""The zoo of stacks that exactness is tested on: five small segment models each, regrouped into 1, 2, 3 or 5 stages.

A stack is small, since what is tested is which numbers cross a cut, not how many; but it has the layer that its name
says on both sides of at least one cut. Everything here is importable, so that a worker process can build it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

layers = keras.layers

BLOCKS = 5
CLASSES = 3


@dataclass(frozen=True)
class Stack:
    """A model in five parts and data for it.

    Attributes:
        name: What it is about.
        blocks: Builds the five parts, with weights that depend on `keras.utils.set_random_seed` alone.
        shape: Of one sample.
        vocabulary: For integer inputs: how many different ones; 0 for floats.
    """

    name: str
    blocks: Callable[[], list[Any]]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 1) -> list[Any]:
        """The five parts, new and the same for the same seed."""
        keras.utils.set_random_seed(seed)
        blocks = self.blocks()
        assert len(blocks) == BLOCKS
        return blocks

    def data(self, samples: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """x (samples, *shape) and class numbers (samples,)."""
        rng = np.random.default_rng(seed)
        if self.vocabulary:
            x = rng.integers(0, self.vocabulary, (samples, *self.shape)).astype("int32")
        else:
            x = rng.normal(size=(samples, *self.shape)).astype("float32")
        return x, rng.integers(0, CLASSES, samples).astype("int32")


def cross_entropy() -> Any:
    """The loss of every stack."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def part(shape: Sequence[int | None], *inside: Any, dtype: str = "float32") -> Any:
    """A built chain of layers."""
    return keras.Sequential([keras.Input(tuple(shape), dtype=dtype), *inside])


def grouped(blocks: Sequence[Any], stages: int) -> list[Any]:
    """The same layers in fewer models, as evenly as `np.array_split` does it.

    Args:
        blocks: What `Stack.build` gave.
        stages: 1 to `len(blocks)`.
    """
    groups = []
    for numbers in np.array_split(np.arange(len(blocks)), stages):
        chosen = [blocks[i] for i in numbers]
        first = chosen[0].inputs[0]
        start = keras.Input(batch_shape=tuple(first.shape), dtype=first.dtype)
        groups.append(chosen[0] if len(chosen) == 1 else keras.Sequential([start, *chosen]))
    return groups


def _attend(steps: int, width: int) -> Any:
    """Residual attention of a sequence to itself."""
    x = keras.Input((steps, width))
    return keras.Model(x, x + layers.MultiHeadAttention(2, 4)(x, x))


def _dense() -> list[Any]:
    return [
        part((6,), layers.Dense(8, "relu")),
        part((8,), layers.Dense(8, "tanh")),
        part((8,), layers.Dense(8, "gelu")),
        part((8,), layers.Dense(8, "sigmoid")),
        part((8,), layers.Dense(CLASSES)),
    ]


def _convolution() -> list[Any]:
    return [
        part((8, 8, 2), layers.Conv2D(4, 3, activation="relu")),
        part((6, 6, 4), layers.MaxPooling2D(2)),
        part((3, 3, 4), layers.Conv2D(4, 3, padding="same", activation="tanh")),
        part((3, 3, 4), layers.AveragePooling2D(2), layers.Flatten()),
        part((4,), layers.Dense(CLASSES)),
    ]


def _batch_normalization() -> list[Any]:
    return [
        part((6, 6, 2), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(momentum=0.9)),
        part((4, 4, 4), layers.ReLU()),
        part((4, 4, 4), layers.Flatten(), layers.Dense(8, use_bias=False)),
        part((8,), layers.BatchNormalization(momentum=0.8), layers.ReLU()),
        part((8,), layers.Dense(CLASSES)),
    ]


def _dropout() -> list[Any]:
    return [
        part((6,), layers.Dense(8, "relu"), layers.Dropout(0.5)),
        part((8,), layers.Dropout(0.2)),
        part((8,), layers.Dense(8, "tanh"), layers.Dropout(0.3)),
        part((8,), layers.Dense(8, "relu")),
        part((8,), layers.Dropout(0.4), layers.Dense(CLASSES)),
    ]


def _layer_normalization() -> list[Any]:
    return [
        part((6,), layers.Dense(8, "relu"), layers.LayerNormalization()),
        part((8,), layers.Dense(8, "gelu")),
        part((8,), layers.LayerNormalization()),
        part((8,), layers.Dense(8, "tanh")),
        part((8,), layers.LayerNormalization(), layers.Dense(CLASSES)),
    ]


def _lstm() -> list[Any]:
    return [
        part((2, 3), layers.LSTM(4, return_sequences=True)),
        part((2, 4), layers.Dense(4, "tanh")),
        part((2, 4), layers.LSTM(4)),
        part((4,), layers.Dense(4, "relu")),
        part((4,), layers.Dense(CLASSES)),
    ]


def _gru() -> list[Any]:
    return [
        part((2, 3), layers.Dense(4, "tanh")),
        part((2, 4), layers.GRU(4, return_sequences=True)),
        part((2, 4), layers.Dense(4, "relu")),
        part((2, 4), layers.GRU(4, dropout=0.2)),
        part((4,), layers.Dense(CLASSES)),
    ]


def _attention() -> list[Any]:
    return [
        part((5,), layers.Embedding(11, 8), dtype="int32"),
        _attend(5, 8),
        part((5, 8), layers.Dense(8, "gelu")),
        _attend(5, 8),
        part((5, 8), layers.GlobalAveragePooling1D(), layers.Dense(CLASSES)),
    ]


STACKS = (
    Stack("dense", _dense, (6,)),
    Stack("convolution", _convolution, (8, 8, 2)),
    Stack("batch-normalization", _batch_normalization, (6, 6, 2)),
    Stack("dropout", _dropout, (6,)),
    Stack("layer-normalization", _layer_normalization, (6,)),
    Stack("lstm", _lstm, (2, 3)),
    Stack("gru", _gru, (2, 3)),
    Stack("attention", _attention, (5,), vocabulary=11),
)


def stack(name: str) -> Stack:
    """The stack of that name."""
    return next(found for found in STACKS if found.name == name)


@keras.saving.register_keras_serializable("tapeline_tests")
class Spread(layers.Layer):
    """Passes its input on and adds `rate` times the mean square of it to the model's losses, as a VAE adds its KL."""

    def __init__(self, rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: Any) -> Any:
        self.add_loss(self.rate * tf.reduce_mean(tf.square(inputs)))
        return inputs

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable("tapeline_tests")
class Unused(layers.Layer):
    """A dense layer with a second weight that no output depends on."""

    def build(self, shape: Any) -> None:
        self.idle = self.add_weight(shape=(2,), initializer="ones", name="idle")
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, inputs: Any) -> Any:
        return tf.matmul(inputs, self.kernel)

"""The three models that faults are injected into, cut into stages, with data for them.

Between them they have what a hand-off can get wrong: statistics, dropout in stages that recompute, regularisers, masks,
skip edges, tied weights, sample weights, several inputs and outputs, own losses, square activations, clipping by a
global norm. They are small: a matrix verifies hundreds of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from pipeline import Pipeline
from tests.models import Spread

layers = keras.layers
MICROBATCHES = 3
SAMPLES = 8
"""So microbatches are unequal, and the first two are alike."""
SCHEDULES = ("gpipe", "1f1b")
RATE = 0.05
"""The learning rate at which a verification begins; before, it was `OLD_RATE`."""
OLD_RATE = 0.02
CLIP = 0.01
"""Below the norm of every stage's gradients, so that clipping acts wherever it is decided."""


@dataclass(frozen=True)
class Case:
    """A model, its cuts, its data and its objective.

    Attributes:
        name: In the matrix.
        build: Makes the model, the same each time; ``build(quiet=True)`` makes it without what keeps a batch from being
            the sum of its microbatches: statistics and random numbers.
        at: Where it is cut.
        recompute: One value per stage.
        data: (seed) to x, y and sample weights.
        loss: As `Pipeline.compile` takes it, like the other two.
        optimizer: Makes the optimizer.
        options: Further arguments of `compile`.
        lacks: Faults that cannot be here.
    """

    name: str
    build: Callable[..., Any]
    at: Sequence[Any]
    recompute: tuple[bool, ...]
    data: Callable[[int], tuple[Any, Any, Any]]
    loss: Callable[[], Any]
    optimizer: Callable[[], Any]
    options: Mapping[str, Any]
    lacks: frozenset[str] = frozenset()

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.at) + 1

    def pipeline(self, schedule: str, eager: bool = True, transport: str = "inproc", quiet: bool = False) -> Pipeline:
        """A pipeline of this case; its workers are not started yet."""
        keras.utils.set_random_seed(1)
        pipe = Pipeline.split(
            self.build(quiet),
            at=self.at,
            microbatches=MICROBATCHES,
            schedule=schedule,
            transport=transport,
            recompute=self.recompute,
            threads=1,
        )
        pipe.compile(self.optimizer(), self.loss(), run_eagerly=eager, **self.options)
        return pipe


def noise(quiet: bool, name: str, rate: float, seed: int) -> Any:
    return layers.Activation("linear", name=name) if quiet else layers.Dropout(rate, seed=seed, name=name)


def normalisation(quiet: bool, name: str) -> Any:
    return layers.LayerNormalization(name=name) if quiet else layers.BatchNormalization(epsilon=0.1, name=name)


def convolutional(quiet: bool = False) -> Any:
    """Statistics in two stages, dropout in two that recompute, a skip edge over the middle, 6 x 6 feature maps."""
    x = keras.Input((6, 6, 2), name="image")
    h = layers.Conv2D(3, 3, padding="same", kernel_regularizer="l2", name="low")(x)
    a = normalisation(quiet, "low_norm")(h)
    h = layers.Conv2D(3, 3, padding="same", activation="tanh", name="middle")(a)
    h = noise(quiet, "middle_drop", 0.3, 3)(h)
    b = normalisation(quiet, "middle_norm")(h)
    h = layers.Add(name="join")([a, b])
    h = layers.Flatten(name="flat")(h)
    h = noise(quiet, "top_drop", 0.2, 4)(h)
    return keras.Model(x, layers.Dense(3, kernel_regularizer="l1", name="top")(h))


def images(seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SAMPLES, 6, 6, 2)).astype("float32")
    return x, rng.integers(0, 3, SAMPLES), weights(rng)


WORDS, WIDTH, LENGTH = 7, 3, 3


@keras.saving.register_keras_serializable("tapeline_tests")
class Likeness(layers.Layer):
    """Logits from an embedding's own table; keeps the mask, which Keras's own layer for this does not."""

    def __init__(self, embedding: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding, self.supports_masking = embedding, True

    def build(self, shape: Any) -> None:
        self.built = True

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "embedding": keras.saving.serialize_keras_object(self.embedding)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Likeness:
        return cls(keras.saving.deserialize_keras_object(config.pop("embedding")), **config)


def recurrent(quiet: bool = False) -> Any:
    """A mask over all cuts to the loss, a skip edge, an output tied to the embedding, dropout, 3 x 3 activations."""
    tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
    start = keras.initializers.RandomNormal(stddev=1.0, seed=7)
    words = layers.Embedding(WORDS, WIDTH, mask_zero=True, embeddings_initializer=start, name="words")
    e = layers.Activation("tanh", name="low")(words(tokens))
    h = layers.SimpleRNN(WIDTH, return_sequences=True, kernel_regularizer="l2", name="middle")(e)
    h = noise(quiet, "middle_drop", 0.3, 5)(h)
    h = layers.Add(name="join")([e, h])
    h = layers.Dense(WIDTH, activation="tanh", kernel_regularizer="l2", name="turn")(h)
    return keras.Model(tokens, Likeness(words, name="likeness")(h))


def sentences(seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.integers(1, WORDS, (SAMPLES, LENGTH)).astype("int32")
    for row, length in zip(x, rng.integers(1, LENGTH + 1, SAMPLES), strict=True):
        row[length:] = 0
    return x, rng.integers(0, WORDS, (SAMPLES, LENGTH)), weights(rng, LENGTH)


def branched(quiet: bool = False) -> Any:
    """Two inputs, two outputs in two stages, own losses, a skip edge over two stages, 4 x 4 activations."""
    floats, number = keras.Input((6,), name="floats"), keras.Input((), dtype="int32", name="number")
    a = layers.Dense(16, activation="tanh", name="low_dense")(floats)
    a = layers.Add(name="low_add")([a, layers.Embedding(5, 16, name="low_number")(number)])
    a = layers.Reshape((4, 4), name="low")(Spread(0.3, name="low_spread")(a))
    b = layers.Dense(4, activation="tanh", kernel_regularizer="l2", name="second_dense")(a)
    b = noise(quiet, "second", 0.3, 6)(b)
    aux = layers.Dense(1, name="aux")(layers.Flatten(name="aux_flat")(b))
    c = normalisation(quiet, "third_norm")(b)
    c = layers.Dense(4, activation="gelu", name="third")(c)
    h = layers.Concatenate(name="join")([a, c])
    h = layers.Flatten(name="flat")(h)
    main = layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1), name="main")(h)
    return keras.Model([floats, number], {"main": main, "aux": aux})


def rows(seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(SAMPLES, 6)).astype("float32"), rng.integers(0, 5, SAMPLES).astype("int32")]
    y = {"main": rng.integers(0, 3, SAMPLES), "aux": rng.normal(size=(SAMPLES, 1)).astype("float32")}
    return x, y, {"main": weights(rng), "aux": weights(rng)}


def weights(rng: Any, *steps: int) -> Any:
    return rng.uniform(0.2, 2.0, (SAMPLES, *steps)).astype("float32")


def classes(**options: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


CASES = {
    case.name: case
    for case in (
        Case(
            name="convolutional",
            build=convolutional,
            at=["low_norm", "middle_norm"],
            recompute=(False, True, True),
            data=images,
            loss=classes,
            optimizer=lambda: keras.optimizers.Adam(OLD_RATE, global_clipnorm=CLIP),
            options={"metrics": ["accuracy"]},
            lacks=frozenset({"tied-weight gradient not summed", "mask lost at a cut"}),
        ),
        Case(
            name="recurrent",
            build=recurrent,
            at=["low", "middle_drop"],
            recompute=(False, True, False),
            data=sentences,
            loss=lambda: classes(reduction="mean_with_sample_weight"),
            optimizer=lambda: keras.optimizers.SGD(OLD_RATE, momentum=0.9, global_clipnorm=CLIP),
            options={"weighted_metrics": ["accuracy"]},
            lacks=frozenset({"BatchNormalization updated twice"}),
        ),
        Case(
            name="branched",
            build=branched,
            at=["low", ["second", "aux"], "third"],
            recompute=(False, True, False, False),
            data=rows,
            loss=lambda: {"main": classes(), "aux": "mse"},
            optimizer=lambda: keras.optimizers.AdamW(OLD_RATE, weight_decay=0.01, global_clipnorm=CLIP),
            options={"loss_weights": {"main": 1.0, "aux": 0.5}, "metrics": {"aux": ["mae"]}},
            lacks=frozenset({"tied-weight gradient not summed", "mask lost at a cut"}),
        ),
    )
}

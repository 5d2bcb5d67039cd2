"""Small models with one layer each whose meaning a cut could change, and their layers; workers import them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

layers = keras.layers
ops = keras.ops

SAMPLES = 8


@keras.saving.register_keras_serializable("tapeline_tests")
class Sampling(layers.Layer):
    """Draws from a normal distribution given its mean and log-variance, and adds the KL term to the model's losses."""

    def __init__(self, seed: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, inputs: Any, training: bool = False) -> Any:
        mean, log_variance = inputs
        kl = -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=-1)
        self.add_loss(0.1 * ops.mean(kl))
        if not training:
            return mean
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.generator)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}


@keras.saving.register_keras_serializable("tapeline_tests")
class Kinds(layers.Layer):
    """A tensor beside what it is made into: whole numbers, truth values, or numbers of another precision."""

    def __init__(self, to: tuple[str, ...] = ("int32", "bool"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.to = tuple(to)

    def call(self, inputs: Any) -> Any:
        return [inputs, *(inputs > 0 if kind == "bool" else ops.cast(4 * inputs, kind) for kind in self.to)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "to": list(self.to)}


@keras.saving.register_keras_serializable("tapeline_tests")
class Choose(layers.Layer):
    """A float tensor where a bool tensor is true and half of it elsewhere, plus an embedding of an int tensor."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = layers.Embedding(9, 3)

    def build(self, shapes: Any) -> None:
        self.table.build(shapes[1])

    def call(self, inputs: Any) -> Any:
        values, numbers, yes = inputs
        rows = self.table(ops.clip(numbers, -4, 4) + 4)
        return ops.where(yes, values, 0.5 * values) + ops.mean(rows, axis=1)[:, :1]


@keras.saving.register_keras_serializable("tapeline_tests")
class Counting(layers.Layer):
    """Counts how often Python runs it: once a trace in compiled mode."""

    runs = 0

    def call(self, inputs: Any) -> Any:
        Counting.runs += 1
        return inputs * 2.0


@dataclass(frozen=True)
class Same:
    """A model, where to cut it, and data for it.

    Attributes:
        build: Makes the model, the same one for the same Keras seed.
        at: Cuts.
        shape: Of one sample; None with several inputs.
        changes: Whether a call changes variables: statistics, random states.
        whole: Whether the whole batch under one tape means the same: nothing random, no batch statistics, no half
            precision.
        rounding: How far compiled gradients may be from eager ones, as a part of the largest: fused operations do not
            round what is between them to half precision.
        bits: Whether the tape over the uncut model sums in the same order, so that eager gradients have equal bits.
        loss: Makes the loss, a mean over samples.
    """

    build: Callable[[], Any]
    at: tuple[Any, ...]
    shape: tuple[int, ...] = (6,)
    changes: bool = False
    whole: bool = True
    rounding: float = 1e-6
    bits: bool = True
    loss: Callable[[], Any] = keras.losses.MeanSquaredError

    def data(self, samples: int = SAMPLES) -> tuple[Any, Any]:
        """x (samples, *shape) and y like the output."""
        rng = np.random.default_rng(7)
        outputs = keras.tree.flatten(self.build().outputs)
        y = rng.normal(size=(samples, *outputs[0].shape[1:])).astype("float32")
        return rng.normal(size=(samples, *self.shape)).astype("float32"), y


def chain(shape: tuple[int, ...], *inside: Any) -> Any:
    """A Sequential model of named layers."""
    return keras.Sequential([keras.Input(shape), *inside])


def frozen() -> Any:
    """The first layer, one inside a stage and all of the third stage's layers are frozen."""
    dense = layers.Dense
    model = chain((6,), *(dense(6, "tanh", name=name) for name in "abcdef"), dense(2, name="end"))
    for name in "acef":
        model.get_layer(name).trainable = False
    return model


def autoencoder() -> Any:
    """A variational autoencoder with its KL term in the first of three stages."""
    x = keras.Input((6,), name="x")
    h = layers.Dense(5, "tanh", name="encode")(x)
    mean, log_variance = layers.Dense(3, name="mean")(h), layers.Dense(3, name="log_variance")(h)
    z = Sampling(name="z")([mean, log_variance])
    h = layers.Dense(5, "tanh", name="decode")(z)
    return keras.Model(x, layers.Dense(6, name="end")(h))


def image(*random: Callable[[], Any]) -> Callable[[], Any]:
    """A convolution, then layers under test on images, each between two cuts, then a classifier."""

    def build() -> Any:
        found: list[Any] = [layers.Conv2D(3, 3, padding="same", activation="tanh", name="low")]
        for i, make in enumerate(random):
            layer = make()
            layer.name = f"tested{i}"
            found += [layer, layers.Conv2D(3, 3, padding="same", activation="tanh", name=f"after{i}")]
        return chain((6, 6, 2), *found, layers.Flatten(), layers.Dense(2, name="end"))

    return build


def vector(*tested: Callable[[], Any]) -> Callable[[], Any]:
    """The same with dense layers."""

    def build() -> Any:
        found: list[Any] = [layers.Dense(6, "tanh", name="low")]
        for i, make in enumerate(tested):
            layer = make()
            layer.name = f"tested{i}"
            found += [layer, layers.Dense(6, "tanh", name=f"after{i}")]
        return chain((6,), *found, layers.Dense(2, name="end"))

    return build


def series() -> Any:
    """Whole feature series dropped."""
    return chain(
        (4, 3),
        layers.Conv1D(5, 2, padding="same", activation="tanh", name="low"),
        layers.SpatialDropout1D(0.4, name="tested0"),
        layers.Conv1D(5, 2, padding="same", activation="tanh", name="after0"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(2, name="end"),
    )


def kinds() -> Any:
    """A float, an int32 and a bool tensor cross the first cut; all three cross the second one too."""
    x = keras.Input((6,), name="x")
    values, numbers, yes = Kinds(name="kinds")(layers.Dense(6, name="low")(x))
    h = layers.Dense(6, "tanh", name="middle")(values)
    return keras.Model(x, layers.Dense(2, name="end")(Choose(name="choose")([h, numbers, yes])))


def precisions() -> Any:
    """float32, float16 and bfloat16 tensors cross the cut, and gradients of each come back."""
    x = keras.Input((6,), name="x")
    values, half, brain = Kinds(("float16", "bfloat16"), name="kinds", autocast=False)(layers.Dense(6, name="low")(x))
    a = layers.Dense(4, "tanh", name="a")(values)
    b = layers.Dense(4, "tanh", dtype="mixed_float16", name="b")(half)
    c = layers.Dense(4, "tanh", dtype="mixed_bfloat16", name="c")(brain)
    joined = layers.Concatenate(name="joined", dtype="float32")([a, b, c])
    return keras.Model(x, layers.Dense(2, name="end")(joined))


def stopped(where: str) -> Callable[[], Any]:
    """`stop_gradient` at a cut: on the tensor that crosses last, just before it, just behind it, or on one of two."""

    def build() -> Any:
        x = keras.Input((6,), name="x")
        below = layers.Dense(5, "tanh", name="below")(x)
        side = layers.Dense(5, "tanh", name="side")(x)
        if where == "before":
            below = layers.Dense(5, "tanh", name="cut")(ops.stop_gradient(below))
        elif where == "at":
            below = layers.Identity(name="cut")(ops.stop_gradient(below))
        elif where == "behind":
            below = ops.stop_gradient(layers.Identity(name="cut")(below))
        else:
            below = layers.Identity(name="cut")(below)
            side = ops.stop_gradient(side)
        h = layers.Add(name="join")([layers.Dense(4, "tanh", name="above")(below), layers.Dense(4, name="over")(side)])
        return keras.Model(x, layers.Dense(2, name="end")(h))

    return build


IMAGE, TWO, THREE = (6, 6, 2), ("low", "tested0"), ("low", "tested0", "tested1")
CASES: dict[str, Same] = {
    "frozen": Same(frozen, ("a", "d", "f")),
    "autoencoder": Same(autoencoder, ("z", "decode"), changes=True, whole=False),
    "BatchNormalization": Same(
        image(layers.BatchNormalization, lambda: layers.BatchNormalization(momentum=0.5)),
        THREE,
        IMAGE,
        changes=True,
        whole=False,
    ),
    "GroupNormalization": Same(image(lambda: layers.GroupNormalization(3)), TWO, IMAGE),
    "SpectralNormalization": Same(
        vector(lambda: layers.SpectralNormalization(layers.Dense(6), power_iterations=2)),
        TWO,
        changes=True,
        whole=False,
    ),
    "Dropout": Same(vector(lambda: layers.Dropout(0.4), lambda: layers.Dropout(0.2)), THREE, changes=True, whole=False),
    "SpatialDropout1D": Same(series, TWO, (4, 3), changes=True, whole=False),
    "Gaussian": Same(
        vector(
            lambda: layers.GaussianNoise(0.3), lambda: layers.GaussianDropout(0.3), lambda: layers.AlphaDropout(0.3)
        ),
        ("low", "tested0", "after1"),
        changes=True,
        whole=False,
    ),
    "images": Same(
        image(
            lambda: layers.SpatialDropout2D(0.4),
            layers.RandomFlip,
            lambda: layers.RandomRotation(0.2),
            lambda: layers.RandomTranslation(0.2, 0.2),
        ),
        ("tested0", "after1", "tested3"),
        IMAGE,
        changes=True,
        whole=False,
    ),
    "integers and booleans": Same(kinds, ("kinds", "middle")),
    "float16 and bfloat16": Same(precisions, ("kinds",), bits=False, whole=False, rounding=2**-8),
    **{
        f"stop_gradient {where}": Same(stopped(where), (["cut", "side"],))
        for where in ("before", "at", "behind", "one")
    },
}

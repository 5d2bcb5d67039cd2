"""Embeddings train as under Keras on the whole batch: an optimizer gets the rows that one tape would give it.

Keras's Adam squares rows before it adds up those of one place, so that a sum made too early is another update, by half
of it and more, and not a rounding.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED

layers = keras.layers
SAMPLES, STEPS, WORDS = 12, 5, 6


class Positions(layers.Layer):
    """Adds a learned vector per time step, looked up once for all samples."""

    def build(self, shape: Any) -> None:
        self.table = layers.Embedding(shape[1], shape[2])
        self.table.build((shape[1],))

    def call(self, x: Any) -> Any:
        return x + self.table(keras.ops.arange(keras.ops.shape(x)[1]))


def words_and_positions() -> Any:
    inputs = keras.Input((STEPS,), dtype="int32")
    x = Positions(name="positions")(layers.Embedding(WORDS, 3, name="words")(inputs))
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(4, "tanh", name="cut")(layers.Flatten()(x))))


def one_table_in_two_stages() -> Any:
    """The second use follows what the first one gave, so that a cut lies between them."""
    one, other = keras.Input((STEPS,), dtype="int32", name="one"), keras.Input((STEPS,), dtype="int32", name="other")
    table = layers.Embedding(WORDS, 3, name="words")
    x = layers.Dense(3, "tanh", name="cut")(layers.GlobalAveragePooling1D()(table(one)))
    x = layers.Add()([layers.GlobalAveragePooling1D()(table(other)), x])
    return keras.Model([one, other], layers.Dense(1)(x))


def rows_beside_a_dense_gradient() -> Any:
    """A regulariser's gradient is dense, and so is the sum."""
    inputs = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(WORDS, 3, embeddings_regularizer="l2", name="words")(inputs)
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(4, "tanh", name="cut")(layers.Flatten()(x))))


def batch(inputs: int) -> tuple[Any, Any]:
    """Every word several times."""
    random = np.random.default_rng(3)
    x = [random.integers(0, WORDS, (SAMPLES, STEPS)).astype("int32") for _ in range(inputs)]
    return x[0] if inputs == 1 else x, random.normal(size=(SAMPLES, 1)).astype("float32")


def trained(build: Any, at: list[str] | None, run_eagerly: bool = True, **options: Any) -> tuple[Any, Any]:
    """The weights before and after three steps of Adam, by Keras (at=None) or by a pipeline."""
    keras.utils.set_random_seed(SEED)
    model = build()
    before, (x, y) = model.get_weights(), batch(len(model.inputs))
    one = model if at is None else Pipeline.split(model, at=at, transport="inproc", **options)
    one.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=run_eagerly)
    for _ in range(3):
        one.train_on_batch(x, y)
    after = one.get_weights()
    if at is not None:
        one.close()
    return before, after


MODELS = [words_and_positions, one_table_in_two_stages, rows_beside_a_dense_gradient]


@pytest.mark.parametrize("build", in_turn(list(MODELS), 2, 3))
def test_one_microbatch_has_the_bits_of_keras(build: Any) -> None:
    for ours, theirs in zip(trained(build, ["cut"], microbatches=1)[1], trained(build, None)[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


RECOMPUTED = {"microbatches": 5, "recompute": True, "schedule": "gpipe"}


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(
    ("run_eagerly", "options"),
    [
        pytest.param(True, {"microbatches": 5}, id="eager", marks=pytest.mark.gate),
        pytest.param(True, RECOMPUTED, id="eager, recomputed", marks=pytest.mark.gate),
        pytest.param(False, {"microbatches": 1}, id="compiled", marks=pytest.mark.gate),
        pytest.param(False, {"microbatches": 5}, id="compiled, microbatches"),
        pytest.param(False, RECOMPUTED, id="compiled, recomputed", marks=pytest.mark.gate),
    ],
)
def test_any_microbatches_are_the_whole_batch_of_keras(build: Any, run_eagerly: bool, options: Any) -> None:
    """Within rounding, eager and compiled."""
    (before, expected), (_, found) = trained(build, None), trained(build, ["cut"], run_eagerly, **options)
    change = max(np.abs(a - b).max() for a, b in zip(before, expected, strict=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * change


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2))
@pytest.mark.parametrize("build", in_turn(list(MODELS), 2, 3))
def test_verification_gives_its_own_optimizer_the_same_rows(build: Any, run_eagerly: bool) -> None:
    keras.utils.set_random_seed(SEED)
    model = build()
    with Pipeline.split(model, at=["cut"], microbatches=3, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=run_eagerly)
        pipe.verify(*batch(len(model.inputs)), checks=["tape", "steps"], steps=2).raise_if_failed()

"""The whole batch under one natural tape is the pipeline, finds wrong weights of microbatches, or is refused."""

from __future__ import annotations

from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from pipeline.reference.one_tape.single_tape import SingleTape
from pipeline.reference.witness.results import WitnessGradients
from pipeline.reference.witness.whole_batch import batch_at_once
from pipeline.verify.by_witnesses import by_gradients
from pipeline.verify.tape import Observed
from stages.loss.head import Head
from tests.pipeline.reference.witnessing import NEAR, Case, bits, by_tape, case, case_of

layers = keras.layers
REFUSED = {"convolution": "layer 'normal'", "dropout": "layer 'drop'", "truncated": "truncated"}
MADE = [kind for kind in NEAR if kind not in REFUSED]


@cache
def found(kind: str) -> WitnessGradients:
    return batch_at_once(case(kind).stages, case(kind).batch)


def outcome(kind: str, step: Observed):
    one = case(kind)
    return by_gradients("batch", step, found(kind), one.names, one.yardstick)


@pytest.mark.parametrize("kind", MADE)
def test_the_whole_batch_is_the_pipeline_and_leaves_no_trace(kind: str) -> None:
    one = case(kind)
    before = bits(one.stages)
    found(kind)
    assert bits(one.stages) == before
    said = outcome(kind, one.step)
    assert said.refusal == ""
    assert [judged.row for judged in said.judged if not judged.row.ok] == []
    assert len(said.judged) == 1 + len(one.names.variables)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_whole_batch_is_refused_with_its_layer(kind: str) -> None:
    one = case(kind)
    before = bits(one.stages)
    assert REFUSED[kind] in found(kind).refusal
    assert bits(one.stages) == before
    assert outcome(kind, one.step).judged == ()


def weights_by_size(self, sizes, targets, sample_weights, masks=None):
    return tuple(size / sum(sizes) for size in sizes)


def weights_alike(self, sizes, targets, sample_weights, masks=None):
    return (1 / len(sizes),) * len(sizes)


@pytest.mark.parametrize(
    ("kind", "rule"), [("masked", weights_by_size), ("masked", weights_alike), ("dense", weights_alike)]
)
def test_a_wrong_weight_of_microbatches_is_found_though_one_tape_shares_it(kind, rule, monkeypatch) -> None:
    one = case(kind)
    expected = found(kind)
    monkeypatch.setattr(Head, "weights", rule)
    wrong = by_tape(one.stages, one.batch)
    assert SingleTape(one.stages).weights(one.batch) is not None
    said = by_gradients("batch", wrong, expected, one.names, one.yardstick)
    assert any(not judged.row.ok for judged in said.judged if judged.row.kind == "gradient")
    assert not said.judged[0].row.ok  # the loss


@keras.saving.register_keras_serializable("tapeline_tests")
class Centred(layers.Layer):
    """Subtracts the mean over the batch: looks across samples, and keeps no statistics."""

    def call(self, x):
        return x - tf.reduce_mean(x, axis=0)


@keras.saving.register_keras_serializable("tapeline_tests")
class Summed(layers.Layer):
    """Adds a loss that is a sum over samples."""

    def call(self, x):
        self.add_loss(tf.reduce_sum(tf.square(x)))
        return x


def with_layer(layer) -> Case:
    keras.utils.set_random_seed(2)
    x = keras.Input((3,))
    h = layers.Dense(3, name="last")(layer(layers.Dense(3, name="middle")(layers.Dense(3)(x))))
    pipe = Pipeline.split(keras.Model(x, h), at=["middle"], microbatches=2, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    return case_of(pipe, *(rng.normal(size=(5, 3)).astype("float32") for _ in range(2)))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Centred(name="centred"), "stage 'stage1', layer 'centred' looks across the samples"),
        (Summed(name="summed"), "stage 'stage1', layer 'summed' adds a loss that is no mean over samples"),
        (layers.BatchNormalization(momentum=1.0, name="still"), "layer 'still'"),
        (layers.Dropout(0.5, name="drop"), "layer 'drop' draws numbers"),
        (layers.SpectralNormalization(layers.Dense(3, name="inner"), name="spectral"), "layer 'spectral'"),
    ],
    ids=["centred", "summed", "still", "dropout", "spectral"],
)
def test_a_layer_that_couples_samples_is_refused_by_name(layer, why) -> None:
    one = with_layer(layer)
    before = bits(one.stages)
    assert why in batch_at_once(one.stages, one.batch).refusal
    assert bits(one.stages) == before


@pytest.mark.parametrize(
    "layer",
    [layers.BatchNormalization(trainable=False, name="frozen"), layers.Dropout(0.0), layers.LayerNormalization()],
    ids=["frozen", "no dropout", "per sample"],
)
def test_a_layer_that_does_not_is_not(layer) -> None:
    one = with_layer(layer)
    said = by_gradients("batch", one.step, batch_at_once(one.stages, one.batch), one.names, one.yardstick)
    assert said.refusal == ""
    assert all(judged.row.ok for judged in said.judged)

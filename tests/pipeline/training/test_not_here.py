"""Names of a Keras model that a pipeline cannot have are refused in a sentence, read or set, and so are empty data."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import DataError, NotInPipelineError, Pipeline
from tests.pipeline.reference.twins import assert_same_arrays, classes, classifier

pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras says so as well

X, Y = classes(8)


@pytest.fixture(scope="module")
def pipe():
    with Pipeline.split(classifier(), stages=2, microbatches=1, transport="inproc") as running:
        running.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
        yield running


def test_every_public_name_of_a_keras_model_is_there_or_refused(pipe) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for name in {name for name in [*dir(model), *vars(model)] if not name.startswith("_")}:
        try:
            getattr(pipe, name)
        except NotInPipelineError as error:
            assert repr(name) in str(error) and "\n" not in str(error)
    assert not hasattr(pipe, "layers") and not hasattr(pipe, "nothing")
    with pytest.raises(AttributeError, match="'Pipeline' object has no attribute 'fti'"):
        _ = pipe.fti


@pytest.mark.parametrize("name", ["trainable", "run_eagerly", "optimizer", "stop_training", "name", "metrics_names"])
def test_setting_what_nobody_reads_is_refused(pipe, name: str) -> None:
    with pytest.raises(NotInPipelineError, match=f"setting pipe.{name} would change nothing"):
        setattr(pipe, name, False)


def test_what_it_was_made_with_stays(pipe) -> None:
    """Every option, also one that is not kept as an attribute: Python would take it, and nobody would read it."""
    for name in [*inspect.signature(Pipeline.__init__).parameters, "wires"]:
        if name == "self":
            continue
        before = pipe.__dict__.get(name)
        with pytest.raises(NotInPipelineError, match=f"setting pipe.{name} would change nothing.*make another"):
            setattr(pipe, name, 4)
        assert pipe.__dict__.get(name) is before
    pipe.remark = "one's own"
    assert pipe.remark == "one's own"


def test_what_is_said_is_true_of_reading_and_of_setting(pipe) -> None:
    for name, reading, setting in [
        ("loss", "what compile\\(\\) was given", "compile again"),
        ("compiled", "pipe.optimizer is None before compile", "call compile"),
        ("stop_training", "self.model.stop_training", "self.model.stop_training = True"),
        ("train_function", "train_on_batch", "make another pipeline"),
        ("name", "ask your own model", "make another pipeline"),
    ]:
        with pytest.raises(NotInPipelineError, match=reading) as read:
            getattr(pipe, name)
        assert "compile again" not in str(read.value)
        with pytest.raises(NotInPipelineError, match=setting):
            setattr(pipe, name, None)


@pytest.mark.parametrize(
    "data",
    [(X[:0], Y[:0]), (tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).take(0),)],
    ids=["no samples", "no batch"],
)
def test_data_without_a_batch_are_refused(pipe, data) -> None:
    """Keras stumbles over a metric that was not built; here the logs would have been empty."""
    before = pipe.get_weights()
    with pytest.raises(DataError, match=r"the data gave no batch.*nothing was trained"):
        pipe.fit(*data, verbose=0, shuffle=False)
    with pytest.raises(DataError, match=r"the data gave no batch.*nothing to evaluate"):
        pipe.evaluate(*data, verbose=0)
    with pytest.raises(DataError, match=r"the data gave no batch.*nothing was trained"):
        pipe.fit(*data, validation_data=(X, Y), verbose=0, shuffle=False)
    assert_same_arrays(pipe.get_weights(), before)
    with pytest.raises(DataError, match=r"the data gave no batch.*nothing to predict"):
        pipe.predict(data[0], verbose=0)
    with pytest.raises(DataError, match=r"the data gave no batch.*nothing to evaluate"):
        pipe.fit(X, Y, validation_data=data if len(data) > 1 else data[0], verbose=0, shuffle=False)
    assert any((a != b).any() for a, b in zip(before, pipe.get_weights(), strict=True))  # the last one's training
    assert pipe.fit(X, Y, epochs=0, verbose=0).epoch == []


@pytest.mark.parametrize(
    "call",
    [lambda pipe: pipe.train_on_batch(X[:0], Y[:0]), lambda pipe: pipe.fit(_one_by_one(), verbose=0, shuffle=False)],
    ids=["an empty batch", "a data set that was not batched"],
)
def test_what_is_no_batch_is_refused_in_words(call) -> None:
    with Pipeline.split(classifier(), stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
        before = pipe.get_weights()
        with pytest.raises(DataError, match=r"x has no samples|must have the shape \('n', 6\)"):
            call(pipe)
        assert_same_arrays(pipe.get_weights(), before)


def _one_by_one() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y.astype(np.int32)))

"""Arrays reach the inputs that Keras would give them to, by key, by name or by order; what Keras refuses is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import DataError, Pipeline
from pipeline.errors import SplitError
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED, assert_same_arrays

layers = keras.layers
X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


def difference(structure: Any) -> Any:
    """A model that tells its inputs apart; `structure` makes its nesting of inputs."""
    first, second = keras.Input((4,), name="first"), keras.Input((4,), name="second")
    x = layers.Subtract()([layers.Dense(4, name="cut")(first), second])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of keys that are no names
        return keras.Model(structure(first, second), layers.Dense(1)(x))


STRUCTURES = {
    "list": lambda first, second: [first, second],
    "dict": lambda first, second: {"first": first, "second": second},
    "keys are the other's names": lambda first, second: {"second": first, "first": second},
    "keys not in order": lambda first, second: {"z": first, "a": second},
}


@pytest.fixture(params=STRUCTURES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Any]]:
    """(the nesting of inputs, a Keras model, a pipeline of the same)."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(SEED)
        models.append(difference(STRUCTURES[request.param]))
    with Pipeline.split(models[1], at=["cut"], microbatches=1, transport="inproc") as pipe:
        pipe.compile(loss="mse", run_eagerly=True)
        yield request.param, models[0], pipe


TAKES = {
    "list": {"list", "tuple", "by name", "by name, more", "by name, more behind"},
    "dict": {"list", "tuple", "by name", "by name, more behind"},
    "keys are the other's names": {"by name", "by name, more behind"},
    "keys not in order": {"by key", "by key, more behind"},
}


def test_arrays_reach_their_inputs_as_in_keras(pair: tuple[str, Any, Any]) -> None:
    """What is taken gives Keras's predictions, other keys are left out as there, and of all the rest Keras at least
    warns, and it is refused."""
    kind, model, pipe = pair
    given: dict[str, Any] = {
        "list": [X, 2 * X],
        "tuple": (X, 2 * X),
        "by name": {"first": X, "second": 2 * X},
        "by name, more": {"first": X, "second": 2 * X, "a third": X},
        "by key": {"z": X, "a": 2 * X},
        "by name, more behind": {"first": X, "second": 2 * X, "third": X},
        "by key, more": {"z": X, "a": 2 * X, "m": 3 * X},
        "by key, more behind": {"zz": X, "z": X, "a": 2 * X},
        "one": [X],
        "one is missing": {"first": X, "other": X},
    }
    for name, x in given.items():
        tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        if name in TAKES[kind]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a list for a dict
                expected = np.asarray(model(tensors))
            told = kind != "list" and name.endswith("more behind")  # as Keras does
            with pytest.warns(UserWarning, match="has .* besides; left out") if told else nullcontext():
                assert_same_arrays([pipe.predict_on_batch(x)], [expected])
        else:
            with pytest.raises((ValueError, UserWarning)):
                model(tensors)
            with pytest.raises(DataError, match=r"the pipeline takes 2 input\(s\) \("):
                pipe.predict_on_batch(x)


def test_an_input_of_one_number_a_sample_may_come_as_a_column() -> None:
    inputs = keras.Input(())
    model = keras.Model(inputs, layers.Dense(1)(layers.Reshape((1,))(inputs)))
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(loss="mse", run_eagerly=True)
        for x in (X[:, 0], X[:, :1]):
            assert_same_arrays([pipe.predict_on_batch(x)], [np.asarray(model(keras.ops.convert_to_tensor(x)))])
        with pytest.raises(DataError, match=r"must have the shape \('n',\) .* received \(6, 4\)"):
            pipe.predict_on_batch(X)


def test_a_list_of_one_output_is_that_output() -> None:
    inputs = keras.Input((4,))
    model = keras.Model([inputs], [layers.Dense(1)(layers.Dense(3, name="cut")(inputs))])
    with Pipeline.split(model, at=["cut"], microbatches=1, transport="inproc") as pipe:
        pipe.compile(loss="mse", metrics=["mae"], run_eagerly=True)
        for found in (pipe.predict(X, verbose=0), pipe.predict([X], verbose=0), pipe.predict_on_batch(X)):
            assert_same_arrays([found], [np.asarray(model([X]))])
        y, weight = X[:, :1], X[:, 1] ** 2
        assert pipe.test_on_batch([X], [y], [weight]) == pipe.test_on_batch(X, y, weight)
        assert pipe.evaluate([X], [y], verbose=0) == pipe.evaluate(X, y, verbose=0)


def reshaped(x: Any) -> Any:
    return keras.ops.reshape(layers.Dense(4, name="cut")(x), (6, 2, 2))


def remembering(x: Any) -> Any:
    return layers.SimpleRNN(3, stateful=True, name="cut")(layers.Reshape((2, 2))(x))


@pytest.mark.filterwarnings("ignore:the layer .* is stateful")
@pytest.mark.parametrize("middle", [reshaped, remembering])
def test_a_number_of_samples_that_a_layer_counts_on_cannot_be_cut_into_microbatches(middle: Any) -> None:
    inputs = keras.Input(batch_shape=(6, 4), name="six")
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(middle(inputs))))
    with pytest.raises(
        SplitError, match=r"'six' takes batches of 6 samples .* keras\.Input\(\(4,\)\), or microbatches=1"
    ):
        Pipeline.split(model, at=["cut"], microbatches=3)
    with Pipeline.split(model, at=["cut"], microbatches=1, transport="inproc") as pipe:
        pipe.compile(loss="mse", run_eagerly=True)
        with pytest.raises(DataError, match=r"takes batches of 6 samples only .* received 3"):
            pipe.predict_on_batch(X[:3])
        if middle is reshaped:
            assert_same_arrays([pipe.predict_on_batch(X)], [np.asarray(model(X))])


@pytest.mark.parametrize("eager", in_turn([False, True], 1, 2))
def test_another_number_of_samples_than_an_input_says_is_taken_as_by_keras(eager: bool) -> None:
    """Where no layer counts on it: a smaller last batch, and microbatches."""
    inputs = keras.Input(batch_shape=(4, 4))
    x = layers.BatchNormalization()(layers.Dense(6, name="cut")(inputs))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(layers.Reshape((2, 3))(x))))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    with Pipeline.split(model, at=["cut"], microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        pipe.fit(X, X[:, :1], batch_size=4, shuffle=False, verbose=0)
        pipe.verify(X[:3], X[:3, :1]).raise_if_failed()
        ours = [pipe.predict(X, batch_size=4, verbose=0), *pipe.get_weights()]
    twin.compile("sgd", "mse", run_eagerly=eager)
    twin.fit(X, X[:, :1], batch_size=4, shuffle=False, verbose=0)
    for found, right in zip(ours, [twin.predict(X, batch_size=4, verbose=0), *twin.get_weights()], strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)
    low = keras.Sequential([keras.Input(batch_shape=(6, 4)), layers.Dense(3)])
    with Pipeline([low, keras.Sequential([keras.Input((3,)), layers.Dense(1)])], 4, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        pipe.verify(X, X[:, :1]).raise_if_failed()


def test_text_is_refused_with_where_to_turn_it_into_numbers() -> None:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Dense(1)])
    words, y = np.array([["a", "b"]] * 4), np.zeros((4, 1), "float32")
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        ways = [
            lambda: pipe.fit(words, y, verbose=0),
            lambda: pipe.evaluate(words, y, verbose=0),
            lambda: pipe.predict(words, verbose=0),
            lambda: pipe.train_on_batch(words, y),
            lambda: pipe.predict_on_batch(keras.ops.convert_to_tensor(words)),
        ]
        for way in ways:
            with pytest.raises(DataError, match=r"text is turned into numbers .* with tf.data: data.map\("):
                way()

"""`merge` gives an ordinary Keras model; `get_weights` and `set_weights` have Keras's order."""

import keras
import numpy as np
import pytest

from pipeline import DataError, Pipeline, Segment
from tests.levels import in_turn
from tests.pipeline import parts
from tests.pipeline.reference.twins import assert_same_arrays, classes, classifier, numbers

X, Y = classes(12)
XN, YN = numbers(12)
INPROC = {"transport": "inproc"}


def residual():
    """A Functional model whose layers are not listed in the order in which a cut takes them; with a nested model."""
    inputs = keras.Input((6,), name="in")
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5, name="i1"), keras.layers.Dense(5, name="i2")])
    late = keras.layers.Dense(5, name="late")
    early = keras.layers.Dense(5, name="early")(inputs)
    y = keras.layers.BatchNormalization(name="norm")(inner(early))
    y = keras.layers.Add(name="add")([y, early])
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="out")(late(y)), name="residual")


@pytest.mark.parametrize("transport", in_turn(["inproc", "ipc"], 1, 2))
@pytest.mark.parametrize("build", [classifier, residual])
def test_a_split_model_comes_back_with_its_architecture_and_the_trained_weights(build, transport):
    original = build()
    before = original.get_weights()
    with Pipeline.split(original, stages=3, microbatches=2, transport=transport) as pipe:
        pipe.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
        pipe.fit(X, Y, batch_size=6, verbose=0)
        merged = pipe.merge()
        assert type(merged) is type(original) and merged.name == original.name
        assert merged.get_config() == original.get_config()
        assert [w.name for w in merged.weights] == [w.name for w in original.weights]
        assert_same_arrays(merged.get_weights(), pipe.get_weights())
        np.testing.assert_allclose(merged.predict(X, verbose=0), pipe.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
        assert_same_arrays(original.get_weights(), pipe.get_weights())
        assert not any(np.array_equal(a, b) for a, b in zip(merged.get_weights(), before, strict=True) if a.size > 5)


def test_a_merged_model_is_its_own():
    with Pipeline.split(classifier(), stages=2, **INPROC) as pipe:
        weights = pipe.get_weights()
        merged = pipe.merge()
        merged.set_weights([w + 1 for w in merged.get_weights()])
        assert_same_arrays(pipe.get_weights(), weights)
        merged.compile("sgd", "sparse_categorical_crossentropy")
        merged.fit(X, Y, verbose=0)


@pytest.mark.parametrize("build", [classifier, residual])
@pytest.mark.parametrize("stages", [1, 3])
def test_weights_have_the_order_of_keras_both_ways(build, stages):
    original = build()
    with Pipeline.split(original, stages=stages, **INPROC) as pipe:
        assert_same_arrays(pipe.get_weights(), original.get_weights())
        new = [np.random.default_rng(i).random(w.shape).astype("float32") for i, w in enumerate(original.get_weights())]
        pipe.set_weights(new)
        original.set_weights(new)
        assert_same_arrays(pipe.get_weights(), new)
        np.testing.assert_allclose(pipe.predict(X, verbose=0), original.predict(X, verbose=0), rtol=1e-5)


def test_weights_that_do_not_fit_change_nothing():
    with Pipeline.split(classifier(), stages=2, **INPROC) as pipe:
        before = pipe.get_weights()
        with pytest.raises(DataError, match="expects 8 array"):
            pipe.set_weights(before[:-1])
        with pytest.raises(DataError, match=r"'a/kernel'|a/kernel.*\(6, 8\), received \(8, 6\)"):
            pipe.set_weights([before[0].T, *before[1:]])
        with pytest.raises(DataError, match="received"):
            pipe.set_weights([w + 1 for w in before[:-1]] + [before[-1][:2]])
        assert_same_arrays(pipe.get_weights(), before)


@pytest.mark.parametrize("built", [True, False], ids=["models", "builders"])
def test_segments_become_models_inside_one_model(built):
    segments = [parts.bottom(), parts.top()] if built else [Segment(parts.bottom, name="low"), Segment(parts.top)]
    with Pipeline(segments, **INPROC) as pipe:
        pipe.compile("adam", "mse", run_eagerly=True)
        pipe.fit(XN, YN, verbose=0)
        merged = pipe.merge()
        assert [layer.name for layer in merged.layers if isinstance(layer, keras.Model)] == list(pipe.names)
        assert_same_arrays(merged.get_weights(), pipe.get_weights())
        np.testing.assert_allclose(merged.predict(XN, verbose=0), pipe.predict(XN, verbose=0), rtol=1e-5, atol=1e-6)


def test_two_bottoms_into_one_top():
    def dense(units, inputs, name):
        taken = [keras.Input((size,)) for size in inputs]
        joined = keras.layers.Concatenate()(taken) if len(taken) > 1 else taken[0]
        return keras.Model(taken if len(taken) > 1 else taken[0], keras.layers.Dense(units, name=name)(joined))

    segments = [
        Segment(model=dense(4, [6], "l"), inputs=("a",), outputs=("ha",), name="left"),
        Segment(model=dense(3, [2], "r"), inputs=("b",), outputs=("hb",), name="right"),
        Segment(model=dense(1, [4, 3], "t"), inputs=("ha", "hb"), outputs=("y",), name="top"),
    ]
    data = {"a": XN, "b": XN[:, :2]}
    with Pipeline(segments, microbatches=2, **INPROC) as pipe:
        pipe.compile("adam", "mse", run_eagerly=True)
        pipe.fit(data, YN, batch_size=6, verbose=0)
        merged = pipe.merge()
        assert [tensor.name for tensor in merged.inputs] == ["a", "b"]
        np.testing.assert_allclose(
            merged.predict([data["a"], data["b"]], verbose=0), pipe.predict(data, verbose=0), rtol=1e-5
        )
        np.testing.assert_allclose(pipe.predict([data["a"], data["b"]], verbose=0), pipe.predict(data, verbose=0))
        assert pipe.verify(data, YN).ok

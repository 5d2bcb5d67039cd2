"""Cuts: where they are, what crosses them, what the parts compute, and which are refused."""

import keras
import numpy as np
import pytest

from pipeline import Pipeline, SplitError
from pipeline.cutting.splitter import split_model
from pipeline.model.call_graph import read_graph
from tests.pipeline.reference.twins import assert_same_arrays, classifier, regressor


def chain(layers=6, units=4):
    return keras.Sequential(
        [keras.Input((units,)), *(keras.layers.Dense(units, name=f"d{i}") for i in range(layers))], name="chain"
    )


def nested():
    block = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="n1"), keras.layers.Dense(4, name="n2")])
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="first"), block, keras.layers.ReLU()])


def skips():
    x = keras.Input((4,), name="x")
    a = keras.layers.Dense(4, name="a")(x)
    b = keras.layers.Dense(4, name="b")(a)
    c = keras.ops.tanh(b) * 2.0
    d = keras.layers.Add(name="d")([c, a])
    return keras.Model(x, keras.layers.Dense(2, name="e")(d))


def two_inputs():
    """The second input is used first, the outputs of the last stage are listed in the other order."""
    first, second = keras.Input((3,), name="first"), keras.Input((4,), name="second")
    low = keras.layers.Dense(3, name="low")(second)
    both = keras.layers.Add(name="both")([low, first])
    return keras.Model([first, second], keras.layers.Dense(2, name="top")(both))


def layers_of(split):
    return [
        [layer.name for layer in segment.model.operations if not isinstance(layer, keras.layers.InputLayer)]
        for segment in split.segments
    ]


def inputs_of(model):
    """Names of the input layers, in the model's order."""
    return [tensor._keras_history.operation.name for tensor in model.inputs]


@pytest.mark.parametrize(
    ("at", "parts"),
    [
        (["d0"], [["d0"], ["d1", "d2", "d3", "d4", "d5"]]),
        (["d1", "d3"], [["d0", "d1"], ["d2", "d3"], ["d4", "d5"]]),
        ("d4", [["d0", "d1", "d2", "d3", "d4"], ["d5"]]),
        ([], [["d0", "d1", "d2", "d3", "d4", "d5"]]),
    ],
    ids=str,
)
def test_named_cuts_lie_behind_their_layers(at, parts):
    assert layers_of(split_model(chain(), at=at)) == parts


@pytest.mark.parametrize("stages", range(1, 7))
def test_even_cuts_spread_equal_layers_evenly(stages):
    sizes = [len(part) for part in layers_of(split_model(chain(), stages))]
    assert len(sizes) == stages and sum(sizes) == 6
    assert max(sizes) == -(-6 // stages)


def test_even_cuts_weigh_parameters():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            *(keras.layers.Dense(4, name=f"s{i}") for i in range(4)),
            keras.layers.Dense(400, name="big"),
        ]
    )
    assert layers_of(split_model(model, 2)) == [["s0", "s1", "s2", "s3"], ["big"]]


@pytest.mark.parametrize("build", [chain, nested, skips, classifier, two_inputs])
def test_parts_played_one_after_the_other_are_the_model(build):
    """Over every single cut, and over all cuts at once."""
    model = build()
    names = inputs_of(model)
    data = [
        np.random.default_rng(i).normal(size=(3, *t.shape[1:])).astype("float32") for i, t in enumerate(model.inputs)
    ]
    expected = model(data if len(data) > 1 else data[0])
    calls = len(read_graph(model).calls)
    for cuts in [*((i,) for i in range(1, calls)), tuple(range(1, calls))]:
        split = split_model(model, cuts=cuts)
        assert list(split.stage_of) == [sum(i >= cut for cut in cuts) for i in range(calls)]
        assert list(split.inputs) == names
        tensors = {name: keras.ops.convert_to_tensor(array) for name, array in zip(names, data, strict=True)}
        for segment in split.segments:
            outputs = segment.model([tensors[name] for name in segment.inputs])
            tensors |= dict(zip(segment.outputs, keras.tree.flatten(outputs), strict=True))
        assert_same_arrays([np.asarray(tensors[segment.outputs[-1]])], [np.asarray(expected)])


def test_segments_share_the_layers_of_the_model():
    model = nested()
    split = split_model(model, 3)
    found = [variable for segment in split.segments for variable in segment.model.variables]
    assert {id(variable) for variable in found} == {id(variable) for variable in model.variables}
    first, second = layers_of(split_model(model, at=["n1"]))
    assert first == ["first", "n1"] and second[0] == "n2" and len(second) == 2


def test_what_is_alive_at_a_cut_goes_to_everyone_who_reads_it():
    split = split_model(skips(), at=["a", "b"])
    assert [segment.outputs for segment in split.segments[:2]] == [("a",), ("b",)]
    assert split.segments[1].inputs == ("a",)
    assert set(split.segments[2].inputs) == {"a", "b"}


def test_inputs_are_taken_in_the_order_of_the_model():
    model = two_inputs()
    data = [np.ones((4, 3), "float32"), np.full((4, 4), 2, "float32")]
    with Pipeline.split(model, at=["low"], transport="inproc") as pipe:
        assert pipe.wires.inputs == ("first", "second")
        expected = model.predict(data, verbose=0)
        np.testing.assert_allclose(pipe.predict(data, verbose=0), expected, rtol=1e-6)
        by_name = {"second": data[1], "first": data[0]}
        np.testing.assert_allclose(pipe.predict(by_name, verbose=0), expected, rtol=1e-6)
        pipe.compile("sgd", "mse", run_eagerly=True)
        assert pipe.verify(data, np.ones((4, 2), "float32")).ok


class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(2)

    def call(self, x):
        return self.inner(x)


class OwnCall(keras.Model):
    """Functional by construction, with a call() of its own."""

    def call(self, x, training=None):
        return 2 * super().call(x, training=training)


def own_call():
    x = keras.Input((4,))
    return OwnCall(x, keras.layers.Dense(2)(x))


def shared(layer=None):
    layer = layer or keras.layers.BatchNormalization(name="shared")
    x = keras.Input((4,))
    return keras.Model(x, layer(keras.layers.ReLU(name="between")(layer(x))))


@pytest.mark.parametrize(
    ("build", "arguments", "match"),
    [
        (chain, {}, "say either"),
        (chain, {"stages": 2, "at": ["d1"]}, "say either"),
        (chain, {"stages": 7}, "has 6 layer.*at most 6"),
        (chain, {"stages": 0}, "at least 1, received 0"),
        (chain, {"stages": True}, "received True"),
        (chain, {"stages": 2.0}, "received 2.0"),
        (chain, {"at": ["d9"]}, "no layer 'd9'.*nearest are 'd5'"),
        (chain, {"at": ["d3", "d1"]}, r"in the model's order: at=\['d1', 'd3'\]"),
        (chain, {"at": ["d1", "d1"]}, r"once each.*at=\['d1'\]"),
        (chain, {"at": ["d5"]}, "behind the last layer 'd5' leaves an empty stage"),
        (shared, {"at": ["between"]}, "'shared' is used in the stages 0 and 1"),
        (Sub, {"stages": 2}, r"(?s)\(Sub\) is subclassed.*Segment\(my_parts.bottom\)"),
        (own_call, {"stages": 1}, r"\(OwnCall\) is subclassed"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), {"stages": 1}, "not built; begin it with keras.Input"),
        (lambda: keras.layers.Dense(2), {"stages": 1}, "only a Keras model can be split, received Dense"),
        (lambda: 3, {"stages": 1}, "received int"),
        (
            lambda: type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})(),
            {"stages": 1},
            r"received Sequential of tf_keras, which is Keras 2.*TF_USE_LEGACY_KERAS.*import keras$",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_no_cut_is_refused(build, arguments, match):
    with pytest.raises(SplitError, match=match):
        Pipeline.split(build(), **arguments, transport="inproc")


def test_a_shared_layer_within_one_stage_is_one_value():
    model = shared(keras.layers.Dense(4))
    with Pipeline.split(model, stages=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        assert len(pipe.get_weights()) == 2
        assert pipe.verify(np.ones((4, 4), "float32"), np.ones((4, 4), "float32")).ok


def test_splitting_leaves_the_model_as_it_was():
    model = regressor()
    before = [layer.name for layer in model.layers], model.get_weights(), model.get_config()
    split_model(model, 2)
    after = [layer.name for layer in model.layers], model.get_weights(), model.get_config()
    assert after[0] == before[0] and after[2] == before[2]
    assert_same_arrays(after[1], before[1])

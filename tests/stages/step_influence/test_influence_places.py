"""Names, steps and slices find the tensors that are meant, and what does not exist is an error that says what does."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import influence

layers = keras.layers

DICT = {"x": np.ones((2, 3, 4), "float32"), "words": np.ones((2, 3), "int32")}


def both(given: Any) -> Any:
    y = tf.tanh(given["x"])
    return {"out": y, "list": [y[:, 0], y[:, 1]], "x": y * 2, "n": given["words"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": "nothing"}, "outputs: output has no 'nothing'; it holds 'out', 'list', 'x', 'n'"),
        ({"outputs": [("list", 2)]}, r"outputs: list has no 2; it holds elements 0 to 1"),
        ({"outputs": "list"}, r"outputs: list is not one tensor but .* go on to one, as in \('list', 0\)"),
        ({"outputs": [("out", 3)]}, r"out has no 3 on axis 1: expected numbers from 0 to 2 \(shape \(2, 3, 4\)"),
        ({"outputs": [("out", 0, 0, 0)]}, r"out has shape \(2, 3, 4\), which has no axis 3"),
        ({"outputs": [("out", 0)], "output_axis": 5}, r"no axis 5 to index; output_axis=5 is the axis"),
        ({"outputs": "n"}, "outputs: n is int32; only floating tensors have gradients"),
        ({"outputs": [2.5]}, "expected names, numbers and slices"),
        ({"outputs": []}, "outputs: expected at least one"),
        ({"outputs": ["out", "out"]}, "outputs: out was named twice"),
        ({"outputs": [("out", 0)], "sources": [("x", 0)]}, "'x' is the name of an input and of an output"),
        ({"outputs": "out", "sources": [("input", "x", 7)]}, "x has no 7 on axis 1"),
        ({"outputs": "out", "sources": [("input", "x", 0)], "source_axis": 3}, "source_axis=3"),
        ({"outputs": "out", "sources": "y"}, "expected a step of the inputs, a name, or a variable, received 'y'"),
        ({"outputs": "out", "sources": "words"}, "sources: words is int32"),
        ({"outputs": "out", "sources": [("out", 1)]}, r"out\[1\] is a part of the same tensor as the output out"),
        ({"outputs": "out", "sources": [tf.Variable(1)]}, "the variable .* is int32"),
        ({"memory_limit": 0}, "memory_limit: expected a positive number"),
    ],
    ids=str,
)
def test_wrong_use_says_what_there_is(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(both, DICT, **arguments)


def test_what_has_no_dense_derivative_is_refused() -> None:
    x = np.ones((2, 2), "float32")
    with pytest.raises(TypeError, match=r"received a RaggedTensor; return its to_tensor\(\)"):
        influence(lambda x: tf.RaggedTensor.from_tensor(x), x)
    with pytest.raises(TypeError, match="complex64"):
        influence(lambda x: tf.complex(x, x), x)
    with pytest.raises(ValueError, match="'unbuilt' is not built"):
        influence(layers.Dense(2, name="unbuilt"), x)
    with pytest.raises(ValueError, match="sources: expected at least one floating"):
        influence(lambda x: tf.cast(x, tf.float32), np.ones((1, 2), "int32"))


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (None, ("out[0]", "out[1]", "out[2]", "list[0]", "list[1]", "x[0]", "x[1]", "x[2]")),
        ("out", ("out",)),
        (("out", -1), ("out[2]",)),
        ([("out", slice(None, None, 2)), ("list", slice(None))], ("out[0]", "out[2]", "list[0]", "list[1]")),
        (("out", 1, slice(1, 3)), ("out[1][1]", "out[1][2]")),
        (("output", "list", np.int64(-1)), ("list[1]",)),
    ],
    ids=str,
)
def test_rows_are_labelled_by_the_way_to_them(outputs: Any, labels: tuple[str, ...]) -> None:
    found = influence(both, DICT, outputs=outputs, sources=[("input", "x")])
    assert found.outputs == labels


def test_structures_reach_the_function_as_they_are() -> None:
    """A named tuple, a tuple, None: what goes in comes as it was given, and what comes out is walked."""

    def function(given: Any) -> Any:
        assert isinstance(given, tuple) and isinstance(given[0], Pair) and given[1] is None
        return Pair({"a": given[0].first * 2}, [None, given[0].second])

    x = np.ones((1, 2, 1), "float32")
    found = influence(function, (Pair(x, x * 2), None), outputs=[(0, "a"), (1, 1)], sources=[(0, 0), (0, 1, 1)])
    assert found.outputs == ("output[0][a]", "output[1][1]")
    assert found.sources == ("input[0][0]", "input[0][1][1]")
    assert found.cells() == [["2.83", "none"], ["none", "1"]]

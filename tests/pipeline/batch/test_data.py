"""What a user passes becomes arrays that fit, as in Keras; what cannot is refused before a worker hears of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import DataError
from pipeline.batch.data import class_weights, make_batch

ONE = {"x": ("float32", (None, 3))}
TWO = {"a": ("float32", (None, 3)), "b": ("int32", (None, 2))}
X = np.arange(12, dtype="float32").reshape(4, 3)
B = np.arange(8).reshape(4, 2)


def batch(x, y=None, weight=None, inputs=None, needs_target=False, microbatches=3):
    judged = ("out",) if needs_target else ()
    return make_batch(x, y, weight, inputs=inputs or ONE, microbatches=microbatches, labels=("out",), judged=judged)


@pytest.mark.parametrize(
    "x",
    [X, X.tolist(), tf.constant(X), X.astype("float64"), X.astype("int8"), {"x": X}, [X], (X,)],
    ids=["array", "rows", "tensor", "float64", "int8", "dict", "list", "tuple"],
)
def test_one_input_in_every_form(x):
    made = batch(x)
    assert list(made.inputs) == ["x"] and made.inputs["x"].dtype == np.float32
    np.testing.assert_array_equal(made.inputs["x"], X)
    assert made.sizes == (2, 1, 1)
    assert made.targets == {} and made.sample_weights == {}


@pytest.mark.parametrize("x", [[X, B], (X, tf.constant(B)), {"b": B, "a": X}], ids=["list", "tuple", "dict"])
def test_several_inputs_by_order_or_by_name(x):
    made = batch(x, inputs=TWO)
    assert list(made.inputs) == ["a", "b"]
    assert [array.dtype.name for array in made.inputs.values()] == ["float32", "int32"]
    np.testing.assert_array_equal(made.inputs["b"], B)


def test_a_last_axis_of_one_is_added_as_keras_does():
    assert batch(np.ones(4), inputs={"x": ("float32", (None, 1))}).inputs["x"].shape == (4, 1)
    assert batch(np.ones((4, 5)), inputs={"x": ("float32", (None, None, 1))}).inputs["x"].shape == (4, 5, 1)


def test_a_last_axis_of_one_is_taken_away_as_keras_does():
    assert batch(np.ones((4, 1)), inputs={"x": ("float32", (None,))}).inputs["x"].shape == (4,)
    assert batch(X[..., None], inputs=ONE).inputs["x"].shape == X.shape


def test_low_precision_and_free_sizes():
    made = batch(X[:, None], inputs={"x": ("bfloat16", (None, None, 3))})
    assert made.inputs["x"].dtype.name == "bfloat16"


def test_an_input_that_only_the_worker_knows_is_taken_as_it_is():
    assert batch(X.astype("float64"), inputs={"x": None}).inputs["x"].dtype == np.float32
    assert batch(B, inputs={"x": None}).inputs["x"].dtype == np.int64


def test_targets_and_weights():
    made = batch(X, [0, 1, 2, 1], [1, 2, 3, 4], needs_target=True)
    assert made.targets["out"].tolist() == [0, 1, 2, 1] and made.targets["out"].dtype.kind == "i"
    assert made.sample_weights["out"].dtype == np.float32
    assert batch(X, X.astype("float64"), needs_target=True).targets["out"].dtype == np.float32
    for one in ({"only": X}, [X], (X,)):
        assert batch(X, one, needs_target=True).targets["out"].shape == (4, 3)
    assert batch(X, "ignored", "ignored").targets == {}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": X[:, :2]}, r"x \('x'\) must have the shape \('n', 3\).*received \(4, 2\)"),
        ({"x": np.float32(3)}, "received a scalar"),
        ({"x": X[:0]}, "no samples"),
        ({"x": [[1, 2, 3], [1, 2]]}, "rows differ in shape"),
        ({"x": np.array([["a", "b", "c"]])}, "array of numbers, received dtype <U1"),
        ({"x": np.array([[None, 1, 2]])}, "received dtype object"),
        ({"x": {"other": X}}, r"takes 1 input\(s\) \(x\), x is a dict that lacks 'x' and has 'other'"),
        ({"x": [X, X]}, r"takes 1 input\(s\) \(x\), x has 2"),
        ({"x": X, "inputs": TWO}, r"takes 2 input\(s\) \(a, b\), x has 1"),
        ({"x": [X, B[:3]], "inputs": TWO}, r"same number of samples, received \{'a': 4, 'b': 3\}"),
        ({"x": X, "needs_target": True}, "y is missing"),
        ({"x": X, "y": np.ones(3), "needs_target": True}, "one target per sample: expected 4, received 3"),
        ({"x": X, "y": np.float32(1), "needs_target": True}, "received a scalar"),
        ({"x": X, "y": {"p": X, "q": X}, "needs_target": True}, "y must be one array of targets, received 2"),
        ({"x": X, "y": np.array(["cat"] * 4), "needs_target": True}, "y must be an array of numbers"),
        ({"x": X, "y": X, "weight": np.ones(5), "needs_target": True}, "one weight per sample: expected 4, received 5"),
        ({"x": X, "y": X, "weight": 2.0, "needs_target": True}, "received a scalar"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments, match):
    with pytest.raises(DataError, match=match):
        batch(**arguments)


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 1]), np.array([[0], [1], [2], [1]]), np.eye(3)[[0, 1, 2, 1]]])
def test_class_weights_are_those_of_keras(labels):
    weights = {0: 2.0, 1: 0.5}
    from keras.src.trainers.data_adapters.data_adapter_utils import class_weight_to_sample_weights

    expected = class_weight_to_sample_weights(labels, weights)
    np.testing.assert_array_equal(class_weights(labels, weights), np.asarray(expected).reshape(-1))
    assert class_weights(labels, weights).dtype == keras.config.floatx()

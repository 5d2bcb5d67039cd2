"""Finite differences in float64 agree with one tape, say where they cannot, and find what is wrong."""

from __future__ import annotations

from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from pipeline.reference.witness.differences import derivative, differences
from pipeline.reference.witness.float64_twin import wide_floats
from pipeline.reference.witness.results import Differences, Size
from pipeline.verify.by_witnesses import Yardstick, by_differences
from pipeline.verify.tape import Observed
from stages.recipe.by_value import copied
from tests.pipeline.reference.witnessing import NEAR, Case, bits, case, case_of

layers = keras.layers


@cache
def found(kind: str) -> Differences:
    return differences(case(kind).stages, case(kind).batch)


def outcome(kind: str, step: Observed):
    one = case(kind)
    return by_differences(step, found(kind), one.names, one.yardstick)


@pytest.mark.parametrize("kind", NEAR)
def test_finite_differences_are_one_tape_and_leave_no_trace(kind: str) -> None:
    one = case(kind)
    before = bits(one.stages)
    result = found(kind)
    assert bits(one.stages) == before
    assert keras.config.floatx() == "float32" and keras.config.dtype_policy().name == "float32"
    said = outcome(kind, one.step)
    assert said.refusal == ""
    assert [judged.row for judged in said.judged if not judged.row.ok] == []
    assert not any("not checked" in judged.row.verdict for judged in said.judged)
    owners = {(one.stage, one.place) for one in result.directions}
    assert len(said.judged) == 1 + len(owners)


def test_a_shared_variable_is_stepped_in_all_its_stages_at_once() -> None:
    places = {(d.stage, d.place) for d in found("tied").directions}
    names = case("tied").names
    assert len(names.variables) == len(places) + sum(not owns for owns in names.tied.values())


def test_truncated_gradients_are_no_derivative() -> None:
    assert "truncated after 1 of 2 windows" in differences(case("truncated").stages, case("truncated").batch).refusal


FAULTS = {
    "scaled by 1/M": lambda g: g / 2,
    "scaled by M": lambda g: g * 2,
    "by a thousandth": lambda g: g * 1.001,
    "lost": lambda g: None,
    "transposed": lambda g: np.ascontiguousarray(g[::-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "stage"), [("dense", 0), ("dense", 1), ("convolution", 0), ("tied", 0)])
def test_a_wrong_gradient_is_found_and_named(fault: str, kind: str, stage: int) -> None:
    one = case(kind)
    wrong = [FAULTS[fault](one.step.gradients[stage][0]), *one.step.gradients[stage][1:]]
    said = outcome(kind, one.faulty({stage: wrong}))
    assert [j.row.name for j in said.judged if not j.row.ok] == [one.names.variables[stage, 0]]


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda t: 2 + 3 * t + 5 * t**2 - 7 * t**3, 3),
        (lambda t: np.sin(1000 * t) / 1000, 1),
        (lambda t: 1e6 + np.exp(t), 1),
    ],
    ids=["polynomial", "curved", "far from zero"],
)
def test_a_smooth_function_has_its_derivative_within_the_error(function, slope) -> None:
    value, error = derivative(function, function(0.0), 1.0)
    assert abs(value - slope) <= error < 1e-4


@pytest.mark.parametrize("function", [abs, lambda t: max(t, 0.0), lambda t: abs(t - 1e-7), lambda t: float(t > 0)])
def test_a_kink_or_a_jump_has_an_error_as_large_as_itself(function) -> None:
    assert derivative(function, function(0.0), 1.0)[1] >= 0.5


def kinked() -> Case:
    """A bias of exactly zero before a ReLU whose inputs are zero for half of the samples."""
    keras.utils.set_random_seed(2)
    x = keras.Input((3,))
    h = layers.ReLU(name="cut")(layers.Dense(3, name="low")(x))
    pipe = Pipeline.split(keras.Model(x, layers.Dense(2)(h)), at=["cut"], microbatches=2, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 3)).astype("float32")
    data[::2] = 0
    return case_of(pipe, data, rng.normal(size=(4, 2)).astype("float32"))


def test_a_variable_at_a_kink_is_named_as_not_checked_and_raises_no_alarm() -> None:
    one = kinked()
    said = by_differences(one.step, differences(one.stages, one.batch), one.names, one.yardstick)
    rows = {j.row.name: j.row for j in said.judged}
    assert all(row.ok for row in rows.values())
    unchecked = [name for name, row in rows.items() if "not checked" in row.verdict]
    assert unchecked == ["stage0/low/bias"]
    assert "kink" in rows["stage0/low/bias"].verdict


@keras.saving.register_keras_serializable("tapeline_tests")
class Through(layers.Layer):
    """Rounds, with the gradient of a line: what a straight-through estimator does."""

    def call(self, x):
        return x + tf.stop_gradient(tf.round(x) - x)


@keras.saving.register_keras_serializable("tapeline_tests")
class OwnDraw(layers.Layer):
    """Draws float32 numbers past Keras."""

    def call(self, x):
        noise = tf.random.stateless_uniform(tf.shape(x), seed=[1, 2], dtype=x.dtype)
        return x * noise


def with_layer(layer) -> Case:
    keras.utils.set_random_seed(2)
    x = keras.Input((3,))
    h = layers.Dense(3)(layers.Dense(3, name="middle")(layer(layers.Dense(3, name="low")(x))))
    pipe = Pipeline.split(keras.Model(x, h), at=["middle"], microbatches=2, transport="inproc")
    pipe.compile("sgd", "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    return case_of(pipe, *(rng.normal(size=(4, 3)).astype("float32") for _ in range(2)))


def test_a_gradient_that_is_not_the_derivative_on_purpose_raises_no_alarm() -> None:
    one = with_layer(Through())
    said = by_differences(one.step, differences(one.stages, one.batch), one.names, one.yardstick)
    rows = {j.row.name: j.row for j in said.judged}
    assert all(row.ok for row in rows.values())
    assert "not its derivative" in rows["stage0/low/kernel"].verdict
    assert "not checked" not in rows["stage0/middle/kernel"].verdict


def test_a_layer_that_draws_in_its_own_way_is_refused_with_its_stage() -> None:
    one = with_layer(OwnDraw())
    assert "stage 'stage0'" in differences(one.stages, one.batch).refusal


def test_a_layer_that_cannot_run_in_float64_is_refused_with_its_stage() -> None:
    one = with_layer(layers.Lambda(times_ones))
    refusal = differences(one.stages, one.batch).refusal
    assert "stage 'stage0'" in refusal and "float64" in refusal


@keras.saving.register_keras_serializable("tapeline_tests")
def times_ones(x):
    return tf.multiply(x, tf.ones((3,), tf.float32))


def test_a_model_in_bfloat16_is_refused_since_the_check_could_not_fail() -> None:
    one = case("dense")
    result = found("dense")
    coarse = Differences(**{**vars(result), "size": Size(4000, "bfloat16")})
    said = by_differences(one.step, coarse, one.names, one.yardstick)
    assert "bfloat16" in said.refusal and said.judged == ()


def test_the_users_own_tolerance_counts() -> None:
    one = case("dense")
    wrong = [one.step.gradients[0][0] * 1.001, *one.step.gradients[0][1:]]
    tight, loose = (Yardstick(one.yardstick.allowed, 2, given) for given in (1e-5, 0.1))
    for yardstick, ok in ((tight, False), (loose, True)):
        said = by_differences(one.faulty({0: wrong}), found("dense"), one.names, yardstick)
        assert all(j.row.ok for j in said.judged) is ok


def test_every_floating_dtype_of_a_copy_is_replaced() -> None:
    model = keras.Sequential(
        [keras.Input((2,), dtype="int32"), layers.Embedding(3, 2), layers.Dense(2, dtype="mixed_bfloat16")]
    )
    copy = copied(model, "it", floats="float64")
    assert {v.dtype for v in copy.variables} == {"float64"}
    assert {layer.compute_dtype for layer in copy.layers} == {"float64"}
    assert copy.inputs[0].dtype == "int32"


def test_float64_is_the_default_only_inside_and_also_after_a_failure() -> None:
    with pytest.raises(KeyError), wide_floats():
        assert keras.config.floatx() == "float64"
        raise KeyError
    assert keras.config.floatx() == "float32"


def test_random_layers_draw_in_their_own_dtype_beside_layers_of_another() -> None:
    one = with_layer(layers.Dropout(0.3, dtype="float64", seed=5))
    said = by_differences(one.step, differences(one.stages, one.batch), one.names, one.yardstick)
    assert said.refusal == ""
    assert all(j.row.ok for j in said.judged)

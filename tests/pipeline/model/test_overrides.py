"""Methods of a model's own that its stages would not call are refused, and what a nested model does is done."""

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline, Segment
from pipeline.errors import SplitError
from stages.errors import SegmentError
from stages.recipe.overrides import TRAINING

X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


class Tenfold(keras.Model):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


class Doubling(keras.Sequential):
    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


class Masking(keras.Model):
    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return None


def functional(kind: type) -> Any:
    x = keras.Input((4,))
    return kind(x, keras.layers.Dense(2)(keras.layers.Dense(3)(x)))


def sequential(kind: type = keras.Sequential) -> Any:
    return kind([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_method_of_the_models_own_is_refused(name: str) -> None:
    kind = type("Own", (keras.Model,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(SplitError, match=rf"has {name}\(\) of its own, which a pipeline would ignore"):
        Pipeline.split(functional(kind), stages=2)
    with pytest.raises(SegmentError, match=name):
        Segment.of(functional(kind))


def test_a_method_that_is_set_on_the_model_is_refused_too() -> None:
    model = sequential()
    model.train_step = lambda data: {}
    with pytest.raises(SplitError, match=r"train_step\(\)"):
        Pipeline.split(model, stages=2)


@pytest.mark.parametrize("model", [lambda: sequential(Doubling), lambda: functional(Masking)])
def test_a_call_of_the_models_own_is_refused(model: Any) -> None:
    with pytest.raises(SplitError, match=r"of its own, which its stages would ignore|is subclassed"):
        Pipeline.split(model(), stages=2)


def test_a_penalty_on_the_outputs_of_a_model_is_refused() -> None:
    model = sequential()
    model.activity_regularizer = keras.regularizers.L2(0.1)
    with pytest.raises(SplitError, match="activity regulariser of its own"):
        Pipeline.split(model, stages=2)


@pytest.mark.parametrize("inner", [lambda: sequential(Doubling), lambda: functional(Tenfold)])
def test_a_nested_model_does_what_it_does_in_keras(inner: Any) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), inner(), keras.layers.Dense(1)])
    expected = model.predict(X, verbose=0)
    with Pipeline.split(model, stages=3, transport="inproc") as pipe:
        np.testing.assert_allclose(pipe.predict(X, verbose=0), expected, rtol=1e-5)

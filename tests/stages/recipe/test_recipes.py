"""What reaches a worker is plain JSON, and makes the same object there; what cannot is refused with what to do."""

import json

import keras
import numpy as np
import pytest

from stages.errors import RecipeError
from stages.recipe.describe import create, describe, function_name, import_function
from tests.pipeline import parts


def there_and_back(thing):
    return create(json.loads(json.dumps(describe(thing, "it"))))


@pytest.mark.parametrize("thing", [None, True, 3, 0.5, "adam", [1, "mse", None], {"a": [1], "b": {"c": None}}], ids=str)
def test_plain_data_stays_as_it_is(thing):
    assert there_and_back(thing) == thing


def test_a_tuple_becomes_a_list():
    assert there_and_back(("mse", 1)) == ["mse", 1]


@pytest.mark.parametrize(
    "thing",
    [
        keras.optimizers.AdamW(0.02, beta_1=0.7, weight_decay=0.1, clipnorm=1.0),
        keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)),
        keras.losses.Huber(delta=0.3),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.2, reduction="sum"),
        keras.metrics.AUC(curve="PR", num_thresholds=7, name="area"),
        keras.metrics.F1Score(average="macro", threshold=0.5),
        parts.Quartic(scale=4.0),
        parts.Largest(name="big"),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_keras_objects_keep_every_argument(thing):
    again = there_and_back(thing)
    assert type(again) is type(thing) and again is not thing
    assert again.get_config() == thing.get_config()
    assert getattr(again, "_fn_kwargs", None) == getattr(thing, "_fn_kwargs", None)


def test_a_lists_items_are_described_each():
    again = there_and_back([keras.metrics.AUC(name="a"), "mse", parts.absolute_cube])
    assert again[0].name == "a" and again[1] == "mse" and again[2] is parts.absolute_cube


def test_functions_are_named():
    assert function_name(parts.bottom, "it") == "tests.pipeline.parts:bottom"
    assert import_function("tests.pipeline.parts:bottom") is parts.bottom
    assert import_function("tests.pipeline.parts:Scale.get_config") is parts.Scale.get_config
    assert there_and_back(parts.absolute_cube) is parts.absolute_cube
    assert there_and_back(keras.losses.log_cosh) is keras.losses.log_cosh


def test_models_with_custom_layers_keep_names_arguments_and_types():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="d"), parts.Scale(3.0, name="s"), parts.Shift()]
    )
    again = there_and_back(model)
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    assert isinstance(again.layers[1], parts.Scale) and again.layers[1].factor == 3.0
    again.set_weights(model.get_weights())
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(again(x), model(x))


def nested_function():
    def inner(y_true, y_pred):
        return y_pred

    return inner


def from_main():
    def function():
        pass

    function.__module__, function.__qualname__ = "__main__", "function"
    return function


class Nothing:
    """No get_config, no call."""


@pytest.mark.parametrize(
    ("thing", "match"),
    [
        (
            lambda y_true, y_pred: y_pred,
            "the loss must be a function that another process can import.*a lambda.*write it as",
        ),
        (nested_function(), "defined inside another function"),
        (from_main(), "from the main script or notebook; move it into a module.*from my_parts import function"),
        (Nothing(), "must be a Keras object, its name or a function, received Nothing"),
        (
            keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)]),
            "contains a lambda, which cannot be described",
        ),
    ],
    ids=["lambda", "nested", "main", "no Keras object", "Lambda layer"],
)
def test_what_a_worker_could_not_make_is_refused(thing, match):
    with pytest.raises(RecipeError, match=match):
        describe(thing, "the loss")


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here:f'"),
        ("tests.pipeline.parts:absent", "cannot import 'tests.pipeline.parts:absent'"),
        ("tests.pipeline.parts:os", "names module, expected a function"),
    ],
)
def test_what_cannot_be_imported_is_named(reference, match):
    with pytest.raises(RecipeError, match=match):
        import_function(reference)

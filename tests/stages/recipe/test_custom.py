"""Custom layers and functions get into another process by import alone, or are refused with the way to do it."""

from __future__ import annotations

import json
import sys
import types

import keras
import numpy as np
import pytest

from stages.errors import RecipeError
from stages.recipe import custom_objects
from stages.recipe.describe import create, describe


class Unregistered(keras.layers.Layer):
    def call(self, x):
        return 3 * x


@keras.saving.register_keras_serializable("test_custom")
class Registered(keras.layers.Layer):
    def call(self, x):
        return 5 * x


@keras.saving.register_keras_serializable("test_custom")
def plus_seven(x):
    return x + 7


def not_registered(x):
    return x


def model(*layers):
    return keras.Sequential([keras.Input((1,)), *layers])


def test_registered_and_unregistered_ones_are_made_again():
    made = model(Unregistered(), Registered(), keras.layers.Activation(plus_seven))
    recipe = json.loads(json.dumps(describe(made, "the model")))
    assert set(recipe["custom"]) == {"Unregistered", "test_custom>Registered", "test_custom>plus_seven"}
    again = create(recipe)
    np.testing.assert_array_equal(again(np.ones((2, 1), np.float32)), np.full((2, 1), 22.0))
    assert type(again.layers[0]) is Unregistered


def test_models_of_keras_alone_have_none():
    made = model(keras.layers.Dense(2, activation="relu", kernel_regularizer="l2", dtype="bfloat16"))
    assert describe(made, "the model")["custom"] == {}


def test_only_what_keras_does_not_find_is_handed_to_it():
    here = Unregistered.__module__
    homes = {"Unregistered": f"{here}:Unregistered", "test_custom>Registered": f"{here}:Registered"}
    assert custom_objects.find(homes) == {"Unregistered": Unregistered}


@pytest.mark.parametrize("home", ["no_such_module:Layer", f"{__name__}:NoSuchLayer"])
def test_what_is_not_there_is_named(home):
    with pytest.raises(RecipeError, match=f"cannot import '{home.partition(':')[2]}' from '{home.partition(':')[0]}'"):
        custom_objects.find({"Layer": home})


def test_unregistered_function_is_refused_with_the_decorator():
    with pytest.raises(
        RecipeError, match=r"function 'not_registered'.*register_keras_serializable\(\) above its `def`"
    ):
        describe(model(keras.layers.Activation(not_registered)), "the model")


@pytest.mark.parametrize("thing", [Unregistered, plus_seven], ids=["class", "function"])
def test_main_script_is_refused_with_the_way_out(monkeypatch, thing):
    monkeypatch.setattr(thing, "__module__", "__main__")
    layer = keras.layers.Activation(thing) if thing is plus_seven else thing()
    with pytest.raises(RecipeError, match=rf"'{thing.__name__}' from the main script.*from my_layers import"):
        describe(model(layer), "the model")


def test_class_inside_a_function_is_refused():
    class Inner(keras.layers.Layer):
        def call(self, x):
            return x

    with pytest.raises(RecipeError, match=r"class 'Inner' of the module .*, which is not at its top"):
        describe(model(Inner()), "the model")


def test_two_classes_of_one_name_are_refused(monkeypatch):
    """Keras tells unregistered classes apart by their name only, and would make both layers of one class."""
    other = types.ModuleType("another_module")
    other.Unregistered = type("Unregistered", (Unregistered,), {"__module__": "another_module"})
    monkeypatch.setitem(sys.modules, "another_module", other)
    with pytest.raises(RecipeError, match=r"two classes called 'Unregistered' .*another_module:Unregistered"):
        describe(model(Unregistered(), other.Unregistered()), "the model")


def test_lambda_is_refused():
    with pytest.raises(RecipeError, match="a lambda, which cannot be described without its code"):
        describe(model(keras.layers.Lambda(lambda x: x)), "the model")


@pytest.mark.parametrize(("old", "name"), [("stages.ragged", "RaggedSteps"), ("stages.initial_states", "LearnedState")])
def test_layers_of_ours_are_found_under_the_modules_that_old_checkpoints_name(old, name):
    custom_objects.find({f"tapeline>{name}": f"{old}:{name}"})
    assert keras.saving.get_registered_object(f"tapeline>{name}").__name__ == name

"""Objects copied by their state: in another process they are what they were, or the copy is refused by name."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages.errors import RecipeError
from stages.recipe.by_value import copied, pack, unpack
from tests.stages.recipe.layers_of_keras import models, same, seen
from tests.stages.recipe.things_of_users import notebook, things

ROOT = Path(__file__).parents[3]


def seen_elsewhere(questions: list[Any]) -> list[Any]:
    """What a new process sees of packed objects."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.stages.recipe.elsewhere"],
        input=pickle.dumps(questions),
        capture_output=True,
        cwd=ROOT,
        timeout=110,
    )
    assert found.returncode == 0, found.stderr.decode()[-3000:]
    return pickle.loads(found.stdout)


def model() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5)])


@pytest.mark.gate
def test_everything_is_the_same_in_another_process() -> None:
    questions, here, names = [], [], []
    for name, made, x in models():
        questions.append(("tests.stages.recipe.layers_of_keras", "seen", pack(made, "the model").data, x))
        here.append(seen(made, x))
        names.append(name)
    for name, thing, look, x in things():
        questions.append((look.__module__, look.__name__, pack(thing, "it").data, x))
        here.append(look(thing, x))
        names.append(name)
    there = seen_elsewhere(questions)
    assert [name for name, a, b in zip(names, here, there, strict=True) if not same(a, b)] == []


def test_a_copy_shares_nothing_and_goes_on_by_itself() -> None:
    made = model()
    copy = copied(made, "it")
    copy.layers[0].kernel.assign(copy.layers[0].kernel * 0)
    assert np.all(made.layers[0].kernel.numpy() != 0)
    copy.compile("sgd", "mse")
    copy.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    assert not hasattr(made, "optimizer") or made.optimizer is None


def test_what_is_packed_together_stays_together() -> None:
    made = model()
    loss = notebook().Weighted(2.0)
    loss.layer = made.layers[0]
    packed = pack({"model": made, "loss": loss}, "it")
    unpacked = unpack(packed.data)
    assert unpacked.thing["loss"].layer is unpacked.thing["model"].layers[0]
    for ours, theirs in zip(packed.variables, unpacked.variables, strict=True):
        assert ours is not theirs and ours.path == theirs.path
    assert any(v is loss.beta for v in packed.variables)
    assert any(v is unpacked.thing["loss"].beta for v in unpacked.variables)


def test_values_that_follow_on_another_way_are_zeros() -> None:
    made = model()
    packed = pack(made, "it", without_values=made.variables)
    assert packed.variables == ()
    copy = unpack(packed.data).thing
    assert [v.shape for v in copy.variables] == [v.shape for v in made.variables]
    assert all(np.all(v.numpy() == 0) for v in copy.variables)


def test_a_variable_of_another_stage_is_refused() -> None:
    loss = notebook().Weighted(2.0)
    loss.layer = model().layers[0]
    with pytest.raises(RecipeError, match=r"the loss .* holds .* a variable of the stage 'top'"):
        pack(loss, "the loss", foreign={id(v): "the stage 'top'" for v in loss.layer.variables})


def test_floats_may_become_wider() -> None:
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.LayerNormalization()])
    x = np.random.default_rng(0).normal(size=(5, 4))
    wide = copied(made, "it", floats="float64")
    assert wide(x).dtype == tf.float64 and {v.dtype for v in wide.variables} == {"float64"}
    assert np.abs(np.asarray(wide(x)) - np.asarray(made(x))).max() < 1e-6


OPTIMIZERS = ("SGD", "Adam", "AdamW", "Nadam", "Adafactor", "Lion", "RMSprop", "Adagrad", "Adadelta", "Ftrl", "Lamb")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_built_optimizer_is_as_before_it_was_built(name: str) -> None:
    variables = [keras.Variable(np.ones((3, 2)), name="a"), keras.Variable(np.ones(2), name="b")]
    made = getattr(keras.optimizers, name)(0.1)
    expected = list(map(_tail, made.variables))
    made.build(variables)
    built = list(map(_tail, made.variables))
    made.apply([v * 0.1 for v in variables])
    copy = copied(made, "it", unbuilt=[(made, {"global_clipnorm": 2.0})])
    assert list(map(_tail, copy.variables)) == expected and not copy.built and copy.global_clipnorm == 2.0
    again = copied(variables, "them")
    copy.build(again)
    assert list(map(_tail, copy.variables)) == built
    copy.apply([v * 0.1 for v in again])


def _tail(variable: Any) -> str:
    return variable.path.rpartition("/")[2] if not variable.path.startswith("variable") else "variable"


def test_an_optimizers_own_variables_stay_and_its_slots_go() -> None:
    class Own(keras.optimizers.SGD):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.boost = self.add_variable((), "ones", name="boost")
            self.slots: list[Any] = []

        def build(self, variables: Any) -> None:
            super().build(variables)
            for variable in variables:
                self.slots.append(self.add_variable_from_reference(variable, "slot"))

    made = Own()
    made.build([keras.Variable(1.0), keras.Variable(2.0)])
    copy = copied(made, "it", unbuilt=[(made, {})])
    assert [v.name for v in copy.variables] == ["iteration", "learning_rate", "boost"] and copy.slots == []


CANNOT = {
    "an open file": lambda: Path(__file__).open(),  # noqa: SIM115
    "a generator": lambda: (i for i in range(3)),
    "a tf.data pipeline": lambda: tf.data.Dataset.range(3),
    "a thread": threading.Thread,
    "a tensor of the type variant": lambda: tf.data.Dataset.range(1)._variant_tensor,
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_copied_is_named(what: str) -> None:
    made, thing = model(), CANNOT[what]()
    made.layers[0].something = thing
    with pytest.raises(
        RecipeError, match=rf"the layer '{made.layers[0].name}' \(Dense\) .*'something' {what}"
    ) as caught:
        pack(made, "the model")
    assert "\n" not in str(caught.value)
    if hasattr(thing, "close"):
        thing.close()


def test_a_tensor_left_over_from_a_trace_says_so_when_it_is_read() -> None:
    layer = notebook().Bare(3)
    made = keras.Sequential([keras.Input((4,)), layer])
    copy = copied(made, "it")
    with pytest.raises(RecipeError, match=r"a tensor that an earlier call left there"):
        copy.layers[0].scores.shape  # noqa: B018
    copy(np.ones((2, 4)))
    assert copy.layers[0].scores.shape == (2, 3)


def test_a_missing_module_is_named() -> None:
    import tests.stages.recipe.layers_of_keras as module

    data = pack(module.models, "it").data.replace(b"layers_of_keras", b"layers_of_nobod")
    with pytest.raises(RecipeError, match="layers_of_nobod"):
        unpack(data)

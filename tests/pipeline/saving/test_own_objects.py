"""A checkpoint has no code: what is lost is named when it is saved, and the user's own objects get the values back."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import CheckpointError, Pipeline, Segment
from stages.recipe.describe import create, describe
from stages.recipe.differences import lost
from tests.stages.recipe.layers_of_keras import models
from tests.stages.recipe.things_of_users import notebook

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
L = keras.layers
MINE = notebook()
X = np.random.default_rng(0).normal(300, 50, size=(8, 4)).astype("float32")
Y = X[:, :1] / 300
INPROC: dict[str, Any] = {"transport": "inproc", "microbatches": 1}


def adapted() -> Any:
    layer = L.Normalization()
    layer.adapt(X)
    return layer


def penalised() -> Any:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="a"), L.Dense(1)])
    model.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    return model


def of(*layers: Any) -> Any:
    return keras.Sequential([keras.Input((4,)), *layers, L.Dense(1)])


LOSING: dict[str, tuple[Callable[[], Any], str]] = {
    "a class of a notebook": (lambda: of(MINE.Bare(3)), "model '.*' cannot be made again from its configuration.*Bare"),
    "a lambda": (lambda: of(L.Dense(3, activation=lambda x: 2 * x)), "model '.*' contains a lambda"),
    "what adapt found": (lambda: of(adapted()), "the model's configuration leaves out: 'mean' of the layer"),
    "a penalty set later": (penalised, r"'_kernel\.regularizer' of the layer 'a' \(Dense\)"),
    "a function called like Keras's": (lambda: of(L.Activation(keras.ops.gelu)), "the function keras.*would become"),
}


@pytest.mark.parametrize("what", LOSING)
def test_it_is_named_and_comes_back_in_the_users_own_model(what: str, tmp_path: Path) -> None:
    make, said = LOSING[what]
    with Pipeline.split(make(), stages=2, **INPROC) as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
        pipe.train_on_batch(X, Y)
        with pytest.warns(UserWarning, match=f"(?s)a checkpoint has no code.*{said}"):
            pipe.save(tmp_path / "c")
        saved, expected = pipe.get_weights(), [pipe.train_on_batch(X, Y) for _ in range(2)]
    assert {file.suffix for file in (tmp_path / "c").iterdir()} == {".json", ".npz"}
    assert "__lambda__" not in (tmp_path / "c/manifest.json").read_text()  # Keras's way of writing code
    with pytest.raises(CheckpointError, match=f"(?s)needs your own objects.*{said}"):
        Pipeline.load(tmp_path / "c")
    model = make()
    with Pipeline.load(tmp_path / "c", model=model, **INPROC) as pipe:
        assert all(np.array_equal(a, b) for a, b in zip(saved, model.get_weights(), strict=True))
        assert [pipe.train_on_batch(X, Y) for _ in range(2)] == expected
    with Pipeline.load(tmp_path / "c", stages=3 if len(model.layers) > 2 else 1, model=make(), **INPROC) as pipe:
        assert pipe.train_on_batch(X, Y) == expected[0]


def test_losses_optimizers_and_builders_come_back_too(tmp_path: Path) -> None:
    def build() -> Any:
        return of(L.Dense(3))

    own = {"loss": MINE.focal(1.5), "optimizer": keras.optimizers.Adam(MINE.Warm(0.01)), "metrics": [MINE.Over(0.1)]}
    again = {"loss": MINE.focal(1.5), "optimizer": keras.optimizers.Adam(MINE.Warm(0.01)), "metrics": [MINE.Over(0.1)]}
    with Pipeline([Segment(build)], **INPROC) as pipe:
        pipe.compile(**own, run_eagerly=True)
        pipe.train_on_batch(X, Y)
        with pytest.warns(UserWarning, match=r"model=\.\.\., optimizer=\.\.\., loss=\.\.\."):
            pipe.save(tmp_path / "c")
        expected = pipe.train_on_batch(X, Y)
    with pytest.raises(CheckpointError, match=r"needs your own objects.*loss=\.\.\."):
        Pipeline.load(tmp_path / "c", model=[Segment(build)], optimizer=again["optimizer"])
    with Pipeline.load(tmp_path / "c", model=[Segment(build)], **again, **INPROC) as pipe:
        assert pipe.train_on_batch(X, Y) == expected


def test_another_model_is_refused(tmp_path: Path) -> None:
    with Pipeline.split(of(L.Dense(3)), stages=2, **INPROC) as pipe:
        pipe.compile("sgd", "mse")
        pipe.train_on_batch(X, Y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.save(tmp_path / "c")  # it has all that there is
    for other in (of(L.Dense(5)), of(), of(L.Dense(3), L.Dense(3)), "model"):
        with pytest.raises(CheckpointError, match=r"not the one that was saved|takes the Keras model"):
            Pipeline.load(tmp_path / "c", model=other)
    pipe.close()


def test_what_a_configuration_says_is_not_reported_as_lost() -> None:
    found = {}
    for name, model, _ in models():
        try:
            copy = create(describe(model, name))
        except Exception:
            continue
        for ours, theirs in zip(model.variables, copy.variables, strict=True):
            theirs.assign(ours.numpy())
        found[name] = lost(model, copy)
    assert len(found) > 60 and {name for name, words in found.items() if words} <= {"Activation"}  # ops.gelu


class Gained(L.Layer):
    """A layer as most are written; Keras notes what it was made with."""

    def __init__(self, gain: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.gain = gain

    def call(self, inputs: Any) -> Any:
        return self.gain * inputs


class Weighted(keras.losses.Loss):
    """A loss as most are written."""

    def __init__(self, weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.weight = weight

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.weight * keras.ops.square(y_true - y_pred)


def changed_later() -> Any:
    layer = Gained(name="mine")
    layer.gain = 3.0
    return layer


@pytest.mark.gate
@pytest.mark.parametrize(
    ("layer", "loss", "said"),
    [
        (changed_later, "mse", r"'gain' of the layer 'mine' \(Gained\), 3.0, would become 1.0"),
        (lambda: L.Dense(3), Weighted(5.0), "'weight' of Weighted, 5.0, would become 1.0"),
        (adapted, Weighted(), ""),  # Keras's files have what adapt found
    ],
    ids=["a layer", "a loss", "nothing"],
)
def test_what_a_keras_file_leaves_out_is_named_once_when_it_is_saved(
    layer: Callable[[], Any], loss: Any, said: str, tmp_path: Path
) -> None:
    """What is told is what plain Keras gives back."""
    with Pipeline.split(of(layer()), stages=2, **INPROC) as pipe:
        pipe.compile("sgd", loss, run_eagerly=True)
        if said:
            with pytest.warns(UserWarning, match=f"configurations and weights only.*{said}"):
                pipe.save(tmp_path / "m.keras")
        pipe.save(tmp_path / "m.keras")
        right = pipe.predict(X, verbose=0)
    again = keras.models.load_model(tmp_path / "m.keras", {"Gained": Gained, "Weighted": Weighted})
    assert np.array_equal(again.predict(X, verbose=0), right) == ("mine" not in said)

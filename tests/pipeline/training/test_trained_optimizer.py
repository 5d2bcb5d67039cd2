"""An optimizer that has trained goes on: what it knows reaches the stages, and comes back to it, as in plain Keras."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.errors import CompileError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(size=(8, 1)).astype("float32")
STEPS = 2


def a_model() -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(1)])


def trained(optimizer: Any) -> Any:
    """A model after some steps of plain Keras."""
    model = a_model()
    model.compile(optimizer, "mse", run_eagerly=True)
    goes_on(model)
    return model


def goes_on(model: Any) -> list[Any]:
    return [model.train_on_batch(X, Y) for _ in range(STEPS)]


def decaying() -> Any:
    return keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)


KINDS: dict[str, Callable[[], Any]] = {
    "Adam under a schedule": lambda: keras.optimizers.Adam(decaying()),
    "momentum and averages": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
    "Nadam, which keeps a product of its own": lambda: keras.optimizers.Nadam(0.05),
    "a scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05), initial_scale=4.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_as_in_plain_keras_there_and_back(kind: str) -> None:
    ours, plain = trained(KINDS[kind]()), trained(KINDS[kind]())
    with Pipeline.split(ours, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(ours.optimizer, "mse", run_eagerly=True)
        losses = [pipe.train_on_batch(X, Y) for _ in range(STEPS)]
    assert losses == pytest.approx(goes_on(plain), rel=1e-6)
    for a, b in zip([*ours.variables, *ours.optimizer.variables], [*plain.variables, *plain.optimizer.variables]):  # noqa: B905
        assert np.array_equal(a.numpy(), b.numpy()), a.path
    assert goes_on(ours) == goes_on(plain)


def test_it_goes_on_from_keras_s_file(tmp_path: Path) -> None:
    plain = trained(KINDS["Adam under a schedule"]())
    plain.save(tmp_path / "m.keras")
    ours = keras.models.load_model(tmp_path / "m.keras")
    with Pipeline.split(ours, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(ours.optimizer, "mse", run_eagerly=True)
        losses = [pipe.train_on_batch(X, Y) for _ in range(STEPS)]
        assert losses == goes_on(plain)
        pipe.compile(ours.optimizer, "mae")  # with other rules, it goes on too
        assert pipe.optimizer.iterations == 2 * STEPS and np.any(
            pipe.session.values.slots().of_variable[0, 0]["momentums"]
        )
        pipe.compile(keras.optimizers.Adam(0.1), "mse")  # said so: anew
        assert not np.any(pipe.session.values.slots().of_variable[0, 0]["momentums"])


def test_one_optimizer_per_stage_goes_on() -> None:
    model = a_model()
    optimizers = [keras.optimizers.SGD(0.1, momentum=0.9) for _ in model.layers]
    for number, (optimizer, layer) in enumerate(zip(optimizers, model.layers, strict=True)):
        optimizer.build(layer.trainable_variables)
        optimizer.apply([v * 0 + number + 1 for v in layer.trainable_variables])
    kept = [slot.numpy() for optimizer in optimizers for slot in optimizer.variables[2:]]
    with Pipeline.split(model, stages=2, transport="inproc") as pipe:
        pipe.compile(optimizers, "mse")
        slots = pipe.session.values.slots()
        found = [slots.of_variable[i, k]["momentums"] for i in range(2) for k in range(2)]
        assert all(np.array_equal(a, b) for a, b in zip(found, kept, strict=True))
        assert [int(slots.own_of(i)["iterations"]) for i in range(2)] == [1, 1]


def test_a_rate_that_was_set_after_the_last_update_stays() -> None:
    model = trained("adam")
    lower = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model.optimizer, "learning_rate", 0.5)
    )
    with Pipeline.split(model, stages=2, transport="inproc") as pipe:
        pipe.compile(model.optimizer, "mse")
        pipe.fit(X, Y, verbose=0, callbacks=[lower])
        assert float(model.optimizer.learning_rate) == 0.5


def test_one_that_has_trained_something_else_is_refused() -> None:
    other = trained("adam").optimizer
    with Pipeline.split(a_model(), stages=2, transport="inproc") as pipe:
        with pytest.raises(CompileError, match=r"built for other variables, it does not know 4 of these .*Adam\.from"):
            pipe.compile(other, "mse")
        adam, sgd = keras.optimizers.Adam(), keras.optimizers.SGD()
        for optimizer in (adam, sgd):
            pipe.compile(optimizer, "mse")
            pipe.train_on_batch(X, Y)
        with pytest.raises(CompileError, match="has made 1 updates in a pipeline, and what it keeps"):
            pipe.compile(adam, "mse")
        pipe.compile("adam", "mse")
        pipe.compile(sgd, "mse")  # keeps nothing, so nothing is lost

"""What no configuration carries trains as in plain Keras: stages have the user's own objects, as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from pipeline import Pipeline
from tests.levels import in_turn
from tests.stages.recipe.things_of_users import notebook

L = keras.layers
MINE = notebook()
RNG = np.random.default_rng(1)
X, FAR = RNG.normal(size=(8, 4)).astype("float32"), RNG.normal(300, 50, (8, 4)).astype("float32")
NUMBERS, Y = RNG.integers(0, 9, (8, 4)), RNG.normal(size=(8, 1)).astype("float32")


class Setting(NamedTuple):
    """A model with what it is compiled with."""

    layers: list[Any]
    loss: Any = "mean_squared_error"
    metrics: Any = None
    optimizer: Any = "sgd"
    x: Any = X
    after: Callable[[Any], None] = lambda model: None
    dtype: str | None = None


def named(name: str) -> Any:
    """A user's class without a name or **kwargs, as a layer of this name."""
    return MINE.Bare(3)


def gained(model: Any) -> None:
    model.layers[0].gain = 5.0


def penalised(model: Any) -> None:
    for layer in model.layers:
        layer.kernel.regularizer = keras.regularizers.L2(0.1)


def bounded(model: Any) -> None:
    model.layers[0].kernel.constraint = keras.constraints.MaxNorm(0.5)
    model.layers[1].bias.trainable = False


def without_dropout(model: Any) -> None:
    model.layers[1].rate = 0.0


def adapted(layer: Any, data: Any) -> Any:
    layer.adapt(data)
    return layer


SETTINGS: dict[str, Callable[[], Setting]] = {
    "Normalization that was adapted": lambda: Setting([adapted(L.Normalization(), FAR), L.Dense(3), L.Dense(1)], x=FAR),
    "Discretization that was adapted": lambda: Setting(
        [adapted(L.Discretization(num_bins=4), X), L.Embedding(6, 3), L.Flatten(), L.Dense(1)]
    ),
    "IntegerLookup that was adapted": lambda: Setting(
        [adapted(L.IntegerLookup(), NUMBERS), L.Embedding(12, 3), L.Flatten(), L.Dense(1)], x=NUMBERS, dtype="int64"
    ),
    "a layer with __init__(self, units) alone": lambda: Setting([named("a"), L.Dense(1)]),
    "an attribute set after construction": lambda: Setting([named("a"), L.Dense(1)], after=gained),
    "regularisers put on variables": lambda: Setting([L.Dense(3), L.Dense(1)], after=penalised),
    "a constraint and a frozen variable": lambda: Setting([L.Dense(3), L.Dense(1)], after=bounded),
    "Dropout without a rate": lambda: Setting([L.Dense(3), L.Dropout(0.5), L.Dense(1)], after=without_dropout),
    "a function called like Keras's": lambda: Setting([L.Dense(3, activation=MINE.gelu), L.Dense(1)]),
    "keras.ops.gelu": lambda: Setting([L.Dense(3, activation=ops.gelu), L.Dense(1)]),
    "a layer as an activation": lambda: Setting([L.Dense(3, activation=L.PReLU()), L.Dense(1)]),
    "a lambda": lambda: Setting([L.Dense(3, activation=lambda x: x * x), L.Lambda(lambda x: x + 1), L.Dense(1)]),
    "layers in lists and dicts": lambda: Setting([MINE.Traced(), L.Dense(1)]),
    "layers for training, and for nothing": lambda: Setting([MINE.Conditional(4), L.Dense(1)]),
    "a model as a layer": lambda: Setting(
        [MINE.Doubling(keras.Sequential([keras.Input((4,)), L.Dense(3)])), L.Dense(1)]
    ),
    "a loss without get_config": lambda: Setting([L.Dense(3), L.Dense(1)], MINE.Weighted(5.0)),
    "a loss in a closure": lambda: Setting([L.Dense(3), L.Dense(1)], MINE.focal(1.5)),
    "a lambda as a loss": lambda: Setting([L.Dense(3), L.Dense(1)], lambda a, b: ops.mean((a - b) ** 4, axis=-1)),
    "a metric with a threshold": lambda: Setting([L.Dense(3), L.Dense(1)], metrics=[MINE.Over(0.1)]),
    "an optimizer with apply_gradients": lambda: Setting([L.Dense(3), L.Dense(1)], optimizer=MINE.Tenfold(0.01)),
    "a schedule without get_config": lambda: Setting(
        [L.Dense(3), L.Dense(1)], optimizer=keras.optimizers.Adam(MINE.Warm(0.1))
    ),
    "a rate that is a function": lambda: Setting(
        [L.Dense(3), L.Dense(1)], optimizer=keras.optimizers.SGD(lambda: 0.25)
    ),
}


def made(setting: Setting) -> Any:
    model = keras.Sequential([keras.Input((4,), dtype=setting.dtype), *setting.layers])
    setting.after(model)
    return model


@pytest.mark.parametrize("name", in_turn(list(SETTINGS), 6, len(SETTINGS)))
def test_training_is_that_of_plain_keras_bit_for_bit(name: str) -> None:
    keras.utils.set_random_seed(2)
    setting = SETTINGS[name]()
    model = made(setting)
    keras.utils.set_random_seed(2)
    own = SETTINGS[name]()
    plain = made(own)
    plain.compile(own.optimizer, own.loss, metrics=own.metrics, run_eagerly=True)
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(setting.optimizer, setting.loss, metrics=setting.metrics, run_eagerly=True)
        for _ in range(2):
            ours = pipe.train_on_batch(setting.x, Y, return_dict=True)
            plain.reset_metrics()  # older releases of Keras go on counting, and give arrays
            theirs = keras.tree.map_structure(float, plain.train_on_batch(own.x, Y, return_dict=True))
            assert ours == pytest.approx(theirs, rel=1e-6)
        for a, b in zip(pipe.get_weights(), plain.get_weights(), strict=True):
            assert np.array_equal(a, b)
        merged = pipe.merge()
        assert np.array_equal(np.asarray(merged(setting.x)), np.asarray(plain(own.x)))


def test_a_loss_that_reads_a_variable_of_its_own_stage_trains_it() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Dense(1)])
    kernel = model.layers[1].kernel

    def decayed(y_true: Any, y_pred: Any) -> Any:
        return ops.mean((y_true - y_pred) ** 2, axis=-1) + ops.sum(kernel**2)

    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", decayed, run_eagerly=True)
        found = pipe.gradients(X, Y)
    with tf.GradientTape() as tape:
        loss = keras.losses.get(decayed)(Y, model(X))
        loss = ops.mean(loss)
    expected = tape.gradient(loss, kernel.value)
    (name,) = [name for name in found if name.endswith(kernel.path)]
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_a_loss_that_reads_a_variable_of_another_stage_is_refused() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Dense(1)])
    kernel = model.layers[0].kernel
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", lambda a, b: ops.mean((a - b) ** 2, axis=-1) + ops.sum(kernel**2))
        with pytest.raises(Exception, match=r"stage 'stage1' .* a variable of the stage 'stage0'"):
            pipe.train_on_batch(X, Y)


def test_the_users_variables_of_a_loss_are_known_and_can_be_given_new_values() -> None:
    model, loss = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Dense(1)]), MINE.Weighted(1.0)
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", loss)
        before = pipe.test_on_batch(X, Y)
        assert {i: [v.name for v in some] for i, some in pipe.session.workers.besides().items()} == {0: [], 1: ["beta"]}
        pipe.session.workers.driver().set("besides", {1: [np.float32(6.0)]})
        assert pipe.test_on_batch(X, Y) == pytest.approx(3 * before, rel=1e-6)

"""What the user changes while training takes effect as in plain Keras run eagerly, or is refused by name.

The other side is plain Keras with the same change, eager: a compiled one bakes Python's numbers in when it is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from pipeline import Pipeline
from pipeline.errors import CompileError
from tests.levels import in_turn
from tests.one_tape import difference

L = keras.layers
RNG = np.random.default_rng(7)
X, Y = RNG.normal(size=(12, 4)).astype("float32"), RNG.normal(size=(12, 1)).astype("float32")
MODES = pytest.mark.parametrize("run_eagerly", in_turn([False, True], 1, 2), ids=["compiled", "eager"])


class Weighted(keras.losses.Loss):
    """A loss with a variable and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = keras.Variable(1.0)
        self.power = 2

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.beta * ops.mean(ops.abs(y_true - y_pred) ** self.power, axis=-1)


class Every(keras.callbacks.Callback):
    """Does something after every batch, and after every epoch."""

    def __init__(self, batch: Any = None, epoch: Any = None) -> None:
        super().__init__()
        self.batch, self.epoch = batch or (lambda n: None), epoch or (lambda n: None)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batch(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epoch(epoch)


def made() -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), L.Dense(3, name="mid"), L.Dense(1, name="end")])


def same(pipe: Any, plain: Any, ours: Any, theirs: Any, within: float = 1e-6) -> None:
    """Logs and weights of a pipeline are those of plain Keras."""
    assert ours.history.keys() == theirs.history.keys()
    for name, values in theirs.history.items():
        assert ours.history[name] == pytest.approx(values, rel=2e-6), name
    assert difference(pipe.get_weights(), plain.get_weights()) <= within


FIT = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}


@MODES
def test_a_variable_of_the_loss_that_a_callback_sets(run_eagerly: bool) -> None:
    plain, model, theirs, ours = made(), made(), Weighted(), Weighted()
    plain.compile("sgd", theirs, run_eagerly=True)
    expected = plain.fit(X, Y, callbacks=[Every(lambda n: theirs.beta.assign(n + 0.5))], **FIT)
    with Pipeline.split(model, stages=3, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", ours, run_eagerly=run_eagerly)
        found = pipe.fit(X, Y, callbacks=[Every(lambda n: ours.beta.assign(n + 0.5))], **FIT)
        same(pipe, plain, found, expected)
        ours.beta.assign(5.0)
        theirs.beta.assign(5.0)
        assert pipe.test_on_batch(X, Y) == pytest.approx(plain.test_on_batch(X, Y), rel=1e-6)
        pipe.verify(X, Y).raise_if_failed()


@MODES
def test_loss_weights_that_are_variables(run_eagerly: bool) -> None:
    def two() -> tuple[Any, Any]:
        keras.utils.set_random_seed(3)
        x = keras.Input((4,))
        h = L.Dense(5, "tanh")(x)
        return keras.Model(x, {"a": L.Dense(1, name="a")(h), "b": L.Dense(1, name="b")(h)}), keras.Variable(1.0)

    (plain, theirs), (model, ours) = two(), two()
    targets = {"a": Y, "b": 2 * Y}
    start, expected = plain.get_weights(), []
    optimizer = keras.optimizers.SGD(0.1)
    for weight in (1.0, 4.0, 0.25):  # by hand: Keras takes no variable where it checks the type
        theirs.assign(weight)
        with tf.GradientTape() as tape:
            p = plain(X)
            loss = float(weight) * ops.mean((p["a"] - Y) ** 2) + 0.5 * ops.mean((p["b"] - 2 * Y) ** 2)
        values = plain.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in values]), values)
        expected.append(float(loss))
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), "mse", loss_weights={"a": ours, "b": 0.5}, run_eagerly=run_eagerly)
        found = []
        for weight in (1.0, 4.0, 0.25):
            ours.assign(weight)
            found.append(pipe.train_on_batch(X, targets, return_dict=True)["loss"])
        assert found == pytest.approx(expected, rel=1e-6)
        assert difference(pipe.get_weights(), plain.get_weights()) <= 1e-6
        assert difference(start, plain.get_weights()) > 1e-3


NUMBERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "momentum": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), {"momentum": 0.5}),
    "clipnorm": (lambda: keras.optimizers.SGD(0.1), {"clipnorm": 0.05}),
    "clipvalue": (lambda: keras.optimizers.SGD(0.1), {"clipvalue": 0.01}),
    "global_clipnorm": (lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.0), {"global_clipnorm": 0.03}),
    "decay and betas": (lambda: keras.optimizers.AdamW(0.01), {"weight_decay": 0.3, "beta_1": 0.5}),
    "learning_rate": (lambda: keras.optimizers.SGD(0.1), {"learning_rate": 0.01}),
}


@MODES
def test_numbers_of_the_optimizer_between_fits_and_in_callbacks(run_eagerly: bool) -> None:
    plain, model = made(), made()
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        for name in NUMBERS if run_eagerly else ("momentum", "clipnorm", "global_clipnorm"):
            optimizer, new = NUMBERS[name]
            theirs, ours = optimizer(), optimizer()
            start = plain.get_weights()
            pipe.compile(ours, "mse", run_eagerly=run_eagerly)
            pipe.set_weights(start)
            plain.compile(theirs, "mse", run_eagerly=True)

            def change(place: int, target: Any, new: dict[str, Any] = new) -> None:
                for attribute, value in new.items() if place == 1 else ():
                    setattr(target, attribute, value)

            expected = plain.fit(X, Y, callbacks=[Every(partial(change, target=theirs))], **{**FIT, "epochs": 1})
            found = pipe.fit(X, Y, callbacks=[Every(partial(change, target=ours))], **{**FIT, "epochs": 1})
            same(pipe, plain, found, expected, 2e-6)


def test_counts_of_updates_and_slots_that_are_assigned() -> None:
    """In a callback and between calls: a count, of which a schedule and Adam's corrections are made; momentums."""

    def optimizer() -> Any:
        return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), use_ema=True)

    def trained(twin: Any, losses: list[Any]) -> list[Any]:
        own = twin.optimizer
        restart = Every(lambda n: own.iterations.assign(9) if n == 1 else None)
        losses.append(twin.fit(X, Y, callbacks=[restart], **FIT).history["loss"])
        own.iterations.assign(0)
        losses += [twin.train_on_batch(X, Y) for _ in range(2)]
        own.iterations.assign(3)
        return [*losses, twin.train_on_batch(X, Y), int(own.iterations)]

    plain, model = made(), made()
    for one in (plain, model):
        one.compile(optimizer(), "mse", run_eagerly=True)
        one.train_on_batch(X, Y)
        for variable in one.optimizer.variables:
            if "momentum" in variable.path:
                variable.assign(variable + 0.5)
    expected = trained(plain, [])
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(model.optimizer, "mse", run_eagerly=True)
        assert keras.tree.flatten(trained(pipe, [])) == pytest.approx(keras.tree.flatten(expected), rel=1e-6)
        paths = [variable.path for variable in model.optimizer.variables]
        place = next(k for k, path in enumerate(paths) if "momentum" in path)
        slot, theirs = model.optimizer.variables[place], plain.optimizer.variables[place]
        slot.assign(0 * slot)
        with pytest.raises(CompileError, match=r"optimizer's variable '.*momentum' was assigned while"):
            pipe.fit(X, Y, **FIT)
    slot.assign(0 * slot)
    theirs.assign(0 * theirs)
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(model.optimizer, "mse", run_eagerly=True)
        pipe.fit(X, Y, **FIT)
        plain.fit(X, Y, **FIT)
        slot.assign(0 * slot)
        theirs.assign(0 * theirs)
        same(pipe, plain, pipe.fit(X, Y, **FIT), plain.fit(X, Y, **FIT))


def test_what_would_change_an_optimizers_slots_is_refused() -> None:
    with Pipeline.split(made(), stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), "mse")
        pipe.train_on_batch(X, Y)
        pipe.optimizer.momentum = 0.5
        with pytest.raises(CompileError, match=r"momentum=0.5 after compile.*compile with a new optimizer"):
            pipe.train_on_batch(X, Y)
        schedule = keras.optimizers.schedules.ExponentialDecay
        pipe.compile(keras.optimizers.SGD(schedule(0.1, 2, 0.5)), "mse")
        pipe.train_on_batch(X, Y)
        pipe.optimizer.learning_rate = schedule(0.5, 2, 0.5)
        with pytest.raises(CompileError, match="another learning rate schedule after compile"):
            pipe.train_on_batch(X, Y)


def test_attributes_that_only_a_new_copy_would_have_are_refused_by_name() -> None:
    keras.utils.set_random_seed(3)
    dropping = L.Dropout(0.5, name="drops")
    model = keras.Sequential([keras.Input((4,)), L.Dense(5), dropping, L.Dense(1)])
    loss, factor = Weighted(), 2.0

    def scaled(y_true: Any, y_pred: Any) -> Any:
        return factor * ops.mean((y_true - y_pred) ** 2, axis=-1)

    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", loss)
        pipe.fit(X, Y, **FIT)
        with pytest.raises(CompileError, match=r"the layer 'drops' got rate=0.1 \(it was 0.5\) after compile"):
            pipe.fit(X, Y, callbacks=[Every(epoch=lambda n: setattr(dropping, "rate", 0.1))], **FIT)
        dropping.rate = 0.5
        loss.power = 4
        with pytest.raises(CompileError, match="the loss Weighted got power=4"):
            pipe.train_on_batch(X, Y)
        pipe.compile("sgd", scaled, metrics=[keras.metrics.BinaryAccuracy(threshold=0.5, name="over")])
        pipe.train_on_batch(X, Y)
        factor = 3.0
        with pytest.raises(CompileError, match=r"the loss scaled got factor=3.0 \(it was 2.0\)"):
            pipe.evaluate(X, Y, verbose=0)
        weights = np.ones(1, "float32")
        pipe.compile(
            "sgd", partial(lambda y, p, weights: ops.mean((y - p) ** 2 * weights, axis=-1), weights=weights), metrics=[]
        )
        before = pipe.test_on_batch(X, Y)
        weights *= 2
        with pytest.raises(CompileError, match="got weights=other values in its array after compile"):
            pipe.test_on_batch(X, Y)
        pipe.compile("sgd", partial(lambda y, p, weights: ops.mean((y - p) ** 2 * weights, axis=-1), weights=weights))
        assert pipe.test_on_batch(X, Y) == pytest.approx(2 * before, rel=1e-6)


class Annealed(L.Layer):
    """Adds a loss with a factor that no gradient trains."""

    def __init__(self) -> None:
        super().__init__(name="annealed")
        self.factor = self.add_weight(shape=(), initializer="zeros", trainable=False, name="factor")

    def call(self, x: Any) -> Any:
        self.add_loss(self.factor * ops.mean(x**2))
        return x


@MODES
def test_a_layers_factor_that_a_callback_sets(run_eagerly: bool) -> None:
    def annealed() -> Any:
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), Annealed(), L.Dense(1)])

    plain, model = annealed(), annealed()
    plain.compile("sgd", "mse", run_eagerly=True)
    expected = plain.fit(X, Y, callbacks=[Every(lambda n: plain.layers[1].factor.assign(n + 0.5))], **FIT)
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=run_eagerly)
        found = pipe.fit(X, Y, callbacks=[Every(lambda n: model.layers[1].factor.assign(n + 0.5))], **FIT)
        same(pipe, plain, found, expected)


def test_layers_that_are_frozen_are_said_to_go_on_until_the_next_compile() -> None:
    model = made()
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.fit(X, Y, **FIT)
        model.layers[0].trainable = False
        with pytest.warns(UserWarning, match=r"layer.trainable was changed after compile\(\)"):
            pipe.fit(X, Y, **FIT)
        pipe.evaluate(X, Y, verbose=0)  # said once


class Table(L.Layer):
    """Multiplies by numbers from a table of 4 MiB; has a vocabulary of objects, and counts its calls."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__(name="table")
        self.table = np.ones((1024, 1024), "float32")
        self.vocabulary = np.array([f"word {n}" for n in range(9000)], dtype=object)
        self._rate, self.powers, self._seen = 1.0, [1.0], 0

    def call(self, x: Any) -> Any:
        self._seen = self._seen + 1
        return self.gain * self._rate * x ** self.powers[0] * self.table[0, : x.shape[-1]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda low, table: table.table.__setitem__((0, 0), 5.0), "the layer 'table' got table=other values"),
        (lambda low, table: table.vocabulary.__setitem__(8999, "another"), "'table' got vocabulary=other values"),
        (lambda low, table: setattr(table, "gain", 3.0), "the layer 'table' got gain=3.0"),
        (lambda low, table: setattr(low, "activation", ops.tanh), "the layer 'low' got activation="),
        (lambda low, table: setattr(low.kernel, "regularizer", keras.regularizers.L2(0.1)), "kernel' got regularizer="),
        (lambda low, table: setattr(low, "activity_regularizer", keras.regularizers.L2()), "activity_regularizer="),
        (lambda low, table: setattr(low, "dtype_policy", "mixed_bfloat16"), "'low' got dtype_policy='mixed_bfloat16'"),
        (lambda low, table: setattr(low.kernel, "constraint", keras.constraints.NonNeg()), "kernel' got constraint="),
    ],
    ids=["large array", "objects", "new", "function", "regulariser", "activity", "policy", "constraint"],
)
def test_what_else_is_changed_in_place_is_refused_by_name(change: Any, told: str) -> None:
    """Before the workers start, with the first training, it takes effect."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="low"), Table(), L.Dense(1)])
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.train_on_batch(X, Y)
        change(*model.layers[:2])
        with pytest.raises(CompileError, match=told):
            pipe.fit(X, Y, **FIT)


@pytest.mark.gate
def test_numbers_within_settings_are_refused_by_name() -> None:
    """Of regularisers and constraints, and what is private or in a list of the user's own layer, but no count."""
    low = L.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1), bias_constraint=keras.constraints.MaxNorm(2.0))
    model = keras.Sequential([keras.Input((4,)), low, Table(), L.Dense(1, activity_regularizer="l1", name="end")])
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.train_on_batch(X, Y)
        for thing, name, new, told in (
            (low.kernel.regularizer, "l2", 9.0, r"regularizer.l2=9.0 \(it was 0.1\) after compile"),
            (low.bias.constraint, "max_value", 9.0, r"constraint.max_value=9.0 \(it was 2.0\)"),
            (model.layers[2].activity_regularizer, "l1", 9.0, "layer 'end' got activity_regularizer.l1=other values"),
            (model.layers[1], "_rate", 9.0, r"the layer 'table' got _rate=9.0 \(it was 1.0\)"),
            (model.layers[1], "powers", [9.0], r"the layer 'table' got powers=\[9.0\], another list than it was"),
        ):
            was = getattr(thing, name)
            setattr(thing, name, new)
            with pytest.raises(CompileError, match=told):
                pipe.fit(X, Y, **FIT)
            setattr(thing, name, was)
        model(X)
        pipe.evaluate(X, Y, verbose=0)


@pytest.mark.gate
@pytest.mark.parametrize("when", ["before compile", "before the first training"])
def test_what_is_changed_after_the_split_and_before_the_workers_start_is_trained(when: str) -> None:
    """Weights, statistics, attributes, functions, regularisers, constraints, rates, frozen layers: all at once."""

    def build() -> Any:
        keras.utils.set_random_seed(3)
        middle = [Table(), L.Dropout(0.5, seed=2), L.BatchNormalization(), L.Dense(2, name="frozen")]
        return keras.Sequential([keras.Input((4,)), L.Dense(3, name="low"), *middle, L.Dense(1)])

    def change(model: Any) -> None:
        low, table, drop, norm, frozen = model.layers[:5]
        low.kernel.assign(low.kernel * 3)
        low.kernel.regularizer, low.activation = keras.regularizers.L2(0.1), ops.tanh
        low.activity_regularizer, low.kernel.constraint = keras.regularizers.L1(0.1), keras.constraints.MaxNorm(0.9)
        table.gain, drop.rate, norm.epsilon, norm.momentum = 3.0, 0.0, 0.5, 0.5
        table.table[0, 1] = 2.0
        norm.moving_mean.assign(norm.moving_mean + 1)
        frozen.trainable = False

    plain, model = build(), build()
    with Pipeline.split(model, stages=2, microbatches=1, transport="inproc") as pipe:
        for twin, own in ((plain, plain), (pipe, model)):
            if when == "before compile":
                change(own)
            twin.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
            if when != "before compile":
                change(own)
        same(pipe, plain, pipe.fit(X, Y, **FIT), plain.fit(X, Y, **FIT))
        assert pipe.predict(X, verbose=0) == pytest.approx(plain.predict(X, verbose=0), rel=1e-6)


@MODES
def test_values_that_the_own_model_is_given_between_fits(run_eagerly: bool) -> None:
    plain, model = made(), made()
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=run_eagerly)
        plain.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        for one in (plain, pipe):
            one.fit(X, Y, **FIT)
        for one in (plain, model):
            one.get_layer("mid").kernel.assign(one.get_layer("mid").kernel * 0.5)
        assert pipe.predict(X, verbose=0) == pytest.approx(plain.predict(X, verbose=0), abs=1e-6)
        for one in (plain, model):
            one.get_layer("end").bias.assign([1.0])
        same(pipe, plain, pipe.fit(X, Y, **FIT), plain.fit(X, Y, **FIT))


def test_values_that_the_own_model_is_given_in_vain_are_named() -> None:
    model = made()
    kernel = model.get_layer("mid").kernel
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse")
        copying = Every(epoch=lambda n: model.set_weights(pipe.get_weights()))
        pipe.fit(X, Y, callbacks=[copying], **FIT)
        with pytest.raises(CompileError, match=r"variable '.*mid/kernel' was assigned while the workers have newer"):
            pipe.fit(X, Y, callbacks=[Every(epoch=lambda n: kernel.assign(kernel * 0.5))], **FIT)

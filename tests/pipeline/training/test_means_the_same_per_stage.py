"""An optimizer for each stage: one tape, and each optimizer applied by hand to the variables of its stage."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import CheckpointError, CompileError, Pipeline
from tests.levels import in_turn
from tests.natural_tape import natural_tape
from tests.one_tape import difference
from tests.pipeline.reference.twins import SEED, assert_same_arrays, callback_model, numbers
from tests.pipeline.training.same_models import chain

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

layers = keras.layers
optimizers = keras.optimizers
X, Y = numbers(11)
CUTS = ["norm", "b", "c"]
NAMES = ("stage0", "stage1", "stage2", "stage3")
OWNERS = {"a": 0, "norm": 0, "b": 1, "c": 2}
"""Layers with something to train; the last stage has nothing."""


def stack() -> Any:
    keras.utils.set_random_seed(SEED)
    return chain(
        (6,),
        layers.Dense(5, "tanh", name="a"),
        layers.BatchNormalization(momentum=0.5, name="norm"),
        layers.Dense(4, "tanh", name="b"),
        layers.Dropout(0.2, name="drop"),
        layers.Dense(1, name="c"),
        layers.Rescaling(0.7, name="scale"),
    )


def different() -> list[Any]:
    """Different kinds, rates, schedules, and values of their own (Nadam's product) that other stages do not have."""
    decay = optimizers.schedules.ExponentialDecay(0.1, 1, 0.8)
    return [
        optimizers.Nadam(0.02),
        optimizers.SGD(0.1, momentum=0.9, nesterov=True, clipnorm=0.1),
        optimizers.Nadam(decay, beta_1=0.5),
        optimizers.Adam(0.5, use_ema=True),
    ]


class ByHand:
    """One tape over the uncut model, and optimizers that each get the gradients of their stage's variables."""

    def __init__(self) -> None:
        self.model, self.optimizers = stack(), different()
        self.groups: list[list[Any]] = [[] for _ in self.optimizers]
        for layer in self.model.layers:
            self.groups[OWNERS.get(layer.name, 3)] += layer.trainable_variables

    def step(self, microbatches: int) -> None:
        """One update."""
        loss = keras.losses.MeanSquaredError()
        _, gradients = natural_tape(self.model, X, [Y], [loss], microbatches, restore=False)
        found = {id(v): g for v, g in zip(self.model.trainable_variables, gradients, strict=True)}
        for optimizer, variables in zip(self.optimizers, self.groups, strict=True):
            optimizer.apply([keras.ops.convert_to_tensor(found[id(v)]) for v in variables], variables)


def pipeline(**options: Any) -> Pipeline:
    return Pipeline.split(stack(), at=CUTS, **{"microbatches": 4, "transport": "inproc", **options})


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
@pytest.mark.parametrize(("schedule", "by_name"), in_turn([("gpipe", False), ("1f1b", True)], 2, 2, several=True))
def test_each_optimizer_updates_its_stage(schedule: str, by_name: bool, run_eagerly: bool) -> None:
    """Given as a list or by name; every optimizer's rate may be set, and each counts."""
    reference, mine = ByHand(), different()
    with pipeline(schedule=schedule) as pipe:
        assert pipe.names == NAMES
        given: Any = dict(zip(reversed(NAMES), reversed(mine), strict=True)) if by_name else mine
        pipe.compile(given, "mse", run_eagerly=run_eagerly)
        for step in range(4):
            if step == 2:
                reference.optimizers[1].learning_rate = mine[1].learning_rate = 0.02
            pipe.train_on_batch(X, Y)
            reference.step(4)
        if run_eagerly:
            assert_same_arrays(pipe.get_weights(), reference.model.get_weights())
        assert difference(pipe.get_weights(), reference.model.get_weights()) <= 1e-5
        assert [int(one.iterations) for one in mine] == [4, 4, 4, 4]
        pipe.verify(X, Y).raise_if_failed()


@pytest.mark.gate
def test_checkpoints_and_files(tmp_path: Any) -> None:
    """The same cuts go on with every optimizer's own state; other cuts are refused; files hold the model alone."""
    with pipeline() as pipe:
        pipe.compile(different(), "mse", run_eagerly=True)
        for _ in range(3):
            pipe.train_on_batch(X, Y)
        pipe.save(tmp_path / "here")
        saver = callback_model(pipe)
        saver.save(tmp_path / "whole.keras")
        saver.save_weights(tmp_path / "some.weights.h5")
        before = pipe.get_weights()
        last = [pipe.train_on_batch(X, Y) for _ in range(2)]
        weights = pipe.get_weights()
        saver.load_weights(tmp_path / "some.weights.h5")
        assert_same_arrays(pipe.get_weights(), before)
        fit = {"batch_size": 11, "verbose": 0, "callbacks": keras.callbacks.ModelCheckpoint(tmp_path / "fit.keras")}
        pipe.fit(X, Y, **fit)
        end = pipe.get_weights()
    for name, expected in (("whole", before), ("fit", end)):
        model = keras.models.load_model(tmp_path / f"{name}.keras")
        assert not model.compiled
        assert_same_arrays(model.get_weights(), expected)
    with Pipeline.load(tmp_path / "here", transport="inproc") as again:
        assert int(again.optimizer.iterations) == 3
        assert [again.train_on_batch(X, Y) for _ in range(2)] == last
        assert_same_arrays(again.get_weights(), weights)
    for where in ({"stages": 2}, {"at": ["a"]}):
        with pytest.raises(CheckpointError, match="own cuts only"):
            Pipeline.load(tmp_path / "here", transport="inproc", **where)


def test_compiling_again_goes_on_where_the_optimizer_is_the_same() -> None:
    """The same objects keep their state; one other object among them begins anew."""
    runs = []
    for change in (False, True):
        mine = different()
        with pipeline() as pipe:
            pipe.compile(mine, "mse", run_eagerly=True)
            pipe.train_on_batch(X, Y)
            if change:
                pipe.compile(mine, "mse", run_eagerly=True)
            pipe.train_on_batch(X, Y)
            runs.append(pipe.get_weights())
            if change:
                mine[2] = different()[2]
                pipe.compile(mine, "mse", run_eagerly=True)
                slots = pipe.session.values.slots()
                assert [int(slots.own_of(stage)["iterations"]) for stage in range(4)] == [2, 2, 0, 2]
    assert_same_arrays(*runs)


SAME = optimizers.SGD(0.1)
REFUSED: dict[str, tuple[Any, str]] = {
    "too few": (["sgd"] * 3, "one for each of 4.*received 3"),
    "the same twice": ([SAME, SAME, "sgd", "sgd"], "the same object is there twice"),
    "the same twice by name": (dict.fromkeys(NAMES, SAME), "the same object is there twice"),
    "another name": (dict.fromkeys((*NAMES[:3], "stage9"), "sgd"), "must name every stage.*received.*'stage9'"),
    "a norm over all": ([optimizers.SGD(global_clipnorm=1.0), "sgd", "sgd", "sgd"], "global_clipnorm is decided over"),
    "a loss scale": (
        ["sgd", "sgd", "sgd", optimizers.LossScaleOptimizer(optimizers.SGD())],
        "loss scaling is decided over",
    ),
    "what Keras does not know": (["sgd", "sgd", "sgdd", "sgd"], "no optimizer called 'sgdd'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pipeline() as pipe, pytest.raises(CompileError, match=f"(?s){message}"):
        pipe.compile(given, "mse")


def decaying(model: Any) -> Any:
    """Weight decay without some variables by object and some by name."""
    optimizer = optimizers.AdamW(0.05, weight_decay=0.5)
    excluded = [model.get_layer("b").kernel, model.get_layer("norm").gamma]
    optimizer.exclude_from_weight_decay(var_list=excluded, var_names=["bias"])
    return optimizer


@pytest.mark.parametrize("where", in_turn([{"stages": 1}, {}, {"at": ["a"]}], 1, 3), ids=str)
def test_weight_decay_leaves_out_what_keras_leaves_out(where: dict[str, Any], tmp_path: Any) -> None:
    """Also after a checkpoint was loaded into other cuts."""
    model, whole = stack(), stack()
    whole.compile(decaying(whole), "mse", run_eagerly=True)
    with Pipeline.split(model, at=CUTS, microbatches=1, transport="inproc") as pipe:
        pipe.compile(decaying(model), "mse", run_eagerly=True)
        for twin in (pipe, whole):
            for _ in range(2):
                twin.train_on_batch(X, Y)
        pipe.save(tmp_path / "here")
        assert_same_arrays(pipe.get_weights(), whole.get_weights())
    with Pipeline.load(tmp_path / "here", transport="inproc", **where) as again:
        for twin in (again, whole):
            for _ in range(2):
                twin.train_on_batch(X, Y)
        assert_same_arrays(again.get_weights(), whole.get_weights())


@pytest.mark.gate
def test_stateful_metrics_of_several_outputs_are_keras() -> None:
    """AUC, F1 and mean IoU of outputs in different stages: fit bit for bit, evaluate over microbatches too."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(14, 6)).astype("float32")
    y = [rng.integers(0, 2, (14, 1)).astype("float32"), np.eye(3, dtype="float32")[rng.integers(0, 3, 14)]]

    def build() -> Any:
        keras.utils.set_random_seed(SEED)
        inputs = keras.Input((6,), name="x")
        h = layers.Dense(5, "tanh", name="low")(inputs)
        return keras.Model(
            inputs,
            [layers.Dense(1, "sigmoid", name="early")(h), layers.Dense(3, "softmax", name="late")(h)],
        )

    def compiled() -> dict[str, Any]:
        iou = keras.metrics.MeanIoU(3, sparse_y_true=False, sparse_y_pred=False, dtype="float32", name="iou")
        return {
            "optimizer": optimizers.SGD(0.3),
            "loss": ["binary_crossentropy", "categorical_crossentropy"],
            "metrics": [[keras.metrics.AUC(name="auc")], [iou]],
            "weighted_metrics": [None, [keras.metrics.F1Score(average="macro", name="f1")]],
            "run_eagerly": True,
        }

    model = build()
    model.compile(**compiled())
    fit = {"batch_size": 5, "epochs": 2, "verbose": 0, "shuffle": False, "validation_data": (x[:6], [a[:6] for a in y])}
    history = model.fit(x, y, **fit).history
    evaluated = model.evaluate(x, y, batch_size=5, verbose=0)
    assert {"early_auc", "late_iou", "late_f1", "val_late_f1"} <= set(history)
    for microbatches in (1, 3):
        options = {"microbatches": microbatches, "transport": "inproc"}
        with Pipeline.split(build(), at=[["early"]], **options) as pipe:
            pipe.compile(**compiled())
            ours = pipe.fit(x, y, **fit).history
            assert list(ours) == list(history)
            for key, values in history.items():
                np.testing.assert_allclose(ours[key], values, rtol=0 if microbatches == 1 else 2e-6, err_msg=key)
            rtol = 0 if microbatches == 1 else 2e-6
            np.testing.assert_allclose(pipe.evaluate(x, y, batch_size=5, verbose=0), evaluated, rtol=rtol)

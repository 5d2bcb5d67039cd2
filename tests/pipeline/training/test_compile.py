"""Optimizers, losses and metrics by name and by object mean what they mean in Keras on the unsplit model."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from pipeline import CompileError, Pipeline
from stages.errors import RecipeError
from tests.levels import in_turn
from tests.pipeline import parts
from tests.pipeline.reference.twins import (
    assert_same_arrays,
    assert_same_logs,
    classes,
    classifier,
    numbers,
    regressor,
    twins,
)

X, Y = classes(20)
ONE_HOT = keras.utils.to_categorical(Y, 3).astype("float32")
XN, YN = numbers(20)
CATEGORICAL, SPARSE = "categorical_crossentropy", "sparse_categorical_crossentropy"
WEIGHTS = np.linspace(0.1, 2, 20, dtype="float32")

OPTIMIZERS = {
    "adadelta": "adadelta",
    "adafactor": "adafactor",
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.03),
    "accumulation": lambda: keras.optimizers.Adam(0.03, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.Adam(0.03, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=2),
    "adagrad": "adagrad",
    "adam": "adam",
    "adamax": "adamax",
    "adamw": "adamw",
    "ftrl": "ftrl",
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "lion": "lion",
    "nadam": "nadam",
    "rmsprop": "rmsprop",
    "sgd": "sgd",
    "Adam amsgrad": lambda: keras.optimizers.Adam(0.03, amsgrad=True),
    "SGD nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "RMSprop centered": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "weight decay": lambda: keras.optimizers.AdamW(0.03, weight_decay=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.05),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.05),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 6)),
}


def without_address(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize("name", in_turn(list(OPTIMIZERS), 3, 14))
def test_stages_update_as_one_optimizer_over_the_joined_model(name):
    def compiled():
        given = OPTIMIZERS[name]
        return {"optimizer": given() if callable(given) else given, "loss": "mse"}

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=5)


def test_clipping_by_global_norm_is_decided_over_all_stages():
    def compiled():
        return {"optimizer": keras.optimizers.SGD(0.5, global_clipnorm=0.05), "loss": "mse"}

    with twins(regressor, compiled) as pair:
        pair.fit(XN, YN, batch_size=5, epochs=2)
        for ours, theirs in zip(pair.pipe.get_weights(), pair.model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


METRICS = {
    "accuracy of classes": (["accuracy"], Y, SPARSE),
    "acc of one-hot": (["acc"], ONE_HOT, CATEGORICAL),
    "a loss's name": (["sparse_categorical_crossentropy"], Y, SPARSE),
    "several, in order": (["mse", "accuracy", "mae"], ONE_HOT, "mse"),
    "AUC": (
        [lambda: keras.metrics.AUC(multi_label=True, num_labels=3, name="auc")],
        ONE_HOT,
        CATEGORICAL,
    ),
    "AUC by name": (["AUC"], ONE_HOT, CATEGORICAL),
    "F1": ([lambda: keras.metrics.F1Score(average="macro", name="f1")], ONE_HOT, CATEGORICAL),
    "F1 per class": ([lambda: keras.metrics.F1Score(name="f1")], ONE_HOT, CATEGORICAL),
    "TopK": (
        [lambda: keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
        Y,
        SPARSE,
    ),
    "MeanIoU": (
        [lambda: keras.metrics.MeanIoU(3, sparse_y_pred=False, dtype="float32", name="iou")],
        Y,
        SPARSE,
    ),
    "precision, recall": (
        [lambda: keras.metrics.Precision(name="p"), lambda: keras.metrics.Recall(name="r")],
        ONE_HOT,
        "mse",
    ),
    "names of one's own": ([lambda: keras.metrics.MeanSquaredError(name="mine")], ONE_HOT, "mse"),
    "a function": ([parts.absolute_cube], ONE_HOT, "mse"),
    "a class of one's own": ([lambda: parts.Largest()], ONE_HOT, "mse"),
}


@pytest.mark.parametrize("weighted", in_turn([False, True], 1, 2), ids=["metrics", "weighted_metrics"])
@pytest.mark.parametrize("name", in_turn(list(METRICS), 4, len(METRICS)))
def test_metrics_count_as_keras_on_the_unsplit_model(name, weighted):
    """Over 3 microbatches, which do not change what has been counted when the batch is done."""
    given, target, loss = METRICS[name]
    weights = WEIGHTS if weighted and name not in ("a class of one's own",) else None

    def compiled():
        made = [make() if _is_maker(make) else make for make in given]
        return {"optimizer": "sgd", "loss": loss, "weighted_metrics" if weighted else "metrics": made}

    with twins(classifier, compiled, microbatches=3, at=["norm"]) as pair:
        arguments = {"sample_weight": weights, "batch_size": 8, "verbose": 0, "return_dict": True}
        theirs, ours = pair.both(lambda twin: twin.evaluate(X, target, **arguments))
        assert list(ours) == list(theirs) and len(ours) > 1
        for key in theirs:
            np.testing.assert_allclose(np.asarray(ours[key]), np.asarray(theirs[key]), rtol=1e-5, err_msg=key)


def _is_maker(thing):
    return getattr(thing, "__name__", "") == "<lambda>"


@pytest.mark.gate
def test_metrics_with_state_are_the_same_bits_in_training_and_validation():
    def compiled():
        return {
            "optimizer": "adam",
            "loss": CATEGORICAL,
            "metrics": [keras.metrics.AUC(name="auc"), "accuracy", keras.metrics.F1Score(name="f1")],
            "weighted_metrics": ["mse"],
        }

    with twins(classifier, compiled) as pair:
        theirs, ours = pair.fit(X, ONE_HOT, sample_weight=WEIGHTS, batch_size=8, epochs=2, validation_split=0.25)
        assert_same_logs(ours, theirs)
        theirs, ours = pair.both(lambda twin: twin.train_on_batch(X, ONE_HOT))
        assert len(ours) == len(theirs) == 5
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_early_stopping_finds_the_direction_of_a_metric_of_ones_own_name():
    def compiled():
        return {"optimizer": "sgd", "loss": "mse", "metrics": [keras.metrics.F1Score(average="micro", name="quality")]}

    def callbacks():
        return [keras.callbacks.EarlyStopping("quality", patience=0)]

    with twins(classifier, compiled) as pair:
        pair.assert_fit_alike(X, ONE_HOT, batch_size=10, epochs=4, callbacks=callbacks)


LOSSES = {
    "a name": "mean_absolute_error",
    "a Keras object": lambda: keras.losses.Huber(delta=0.1),
    "a sum": lambda: keras.losses.MeanSquaredError(reduction="sum"),
    "weighted mean": lambda: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
    "a Keras function": keras.losses.log_cosh,
    "a function of one's own": parts.absolute_cube,
    "a class of one's own": lambda: parts.Quartic(scale=3.0),
}


@pytest.mark.gate
@pytest.mark.parametrize("name", in_turn(list(LOSSES), 7, 7))
def test_losses_by_name_object_and_function(name):
    given = LOSSES[name]

    def compiled():
        return {"optimizer": "sgd", "loss": given() if _is_maker(given) else given}

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=8, sample_weight=WEIGHTS)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"optimizer": "adamm"}, "'adamm'.*did you mean 'Adam"),
        ({"loss": "sparse_crossentropy"}, "loss called 'sparse_crossentropy'; did you mean"),
        ({"metrics": ["acuracy"]}, "metric called 'acuracy'; did you mean"),
        ({"weighted_metrics": ["nonsense_of_all_kinds"]}, "metric called"),
        ({"loss": {"y": "mse"}}, "loss names 'y', the pipeline's only output is"),
        ({"loss": ["mse", "mae"]}, "has one output.*received 2 entries"),
        ({"metrics": ["crossentropy"]}, "metric called 'crossentropy'"),
        ({"loss_weights": [1.0, 2.0]}, "has one output.*received 2 entries"),
        ({"jit_compile": True}, "must be 'auto' or False"),
        ({"optimizer": 3}, "unknown optimizer"),
    ],
    ids=without_address,
)
def test_what_compile_cannot_do_is_refused_with_what_to_do(arguments, match):
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe, pytest.raises(CompileError, match=match):
        pipe.compile(**{"optimizer": "sgd", "loss": "mse", **arguments})


def test_what_no_worker_can_have_is_refused():
    with Path(__file__).open() as file, Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:

        def reading(y_true, y_pred):
            return y_pred * len(file.name)

        with pytest.raises(RecipeError, match=r"cannot be copied into a worker.*'file' an open file"):
            pipe.compile("sgd", reading)
            pipe.train_on_batch(XN, YN)


def test_training_without_an_optimizer_or_a_loss():
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:
        pipe.compile(optimizer=None, loss="mse", run_eagerly=True)
        assert pipe.evaluate(XN, YN, verbose=0) > 0
        with pytest.raises(CompileError, match="needs an optimizer"):
            pipe.fit(XN, YN, verbose=0)


def test_compile_again_keeps_weights_and_starts_a_new_optimizer():
    def compiled():
        return {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse"}

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=5)
        before = pair.pipe.get_weights()
        pair.both(lambda twin: twin.compile(**compiled(), metrics=["mae"], run_eagerly=True))
        assert_same_arrays(pair.pipe.get_weights(), before)
        history = pair.assert_fit_alike(XN, YN, batch_size=5)
        assert list(history) == ["loss", "mae"]


def test_compile_again_with_the_same_optimizer_goes_on_with_it():
    def compiled():
        return {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse"}

    def again(twin):
        twin.compile(optimizer=twin.optimizer, loss="mae", run_eagerly=True)

    with twins(regressor, compiled) as pair:
        pair.assert_fit_alike(XN, YN, batch_size=5)
        pair.both(again)
        pair.assert_fit_alike(XN, YN, batch_size=5)


@pytest.mark.gate
def test_recompute_is_one_value_for_all_or_one_per_stage():
    def compiled():
        return {"optimizer": "adam", "loss": "sparse_categorical_crossentropy"}

    for recompute in (True, [True, False, True]):
        with twins(classifier, compiled, stages=3, recompute=recompute) as pair:
            pair.assert_fit_alike(X, Y, batch_size=8)
    with pytest.raises(CompileError, match=r"one value per stage \(3\), received 2"):
        Pipeline.split(classifier(), stages=3, recompute=[True, False], transport="inproc")


class Counting(keras.layers.Layer):
    """Has a metric of its own, as layers that know more than `compile` does."""

    def __init__(self):
        super().__init__()
        self.sizes = keras.metrics.Mean(name="sizes")

    def call(self, x):
        self.sizes.update_state(keras.ops.mean(keras.ops.abs(x), axis=-1))
        return x


@pytest.mark.parametrize(("run_eagerly", "recompute"), in_turn([(True, False), (False, True)], 1, 2, several=True))
def test_metrics_of_layers_are_in_the_logs_as_in_keras(run_eagerly, recompute):
    """Each epoch from zero, once a sample also where a pass is made again; a verification in between counts nothing."""

    def build():
        dense = keras.layers.Dense
        return keras.Sequential([keras.Input((4,)), dense(3, name="cut"), Counting(), dense(1), Counting(), dense(1)])

    def compiled():
        return {"optimizer": "sgd", "loss": "mse", "run_eagerly": run_eagerly}

    x = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    with twins(build, compiled, at=["cut"], microbatches=1, recompute=recompute) as pair:
        pair.pipe.verify(x[:6], x[:6, :1]).raise_if_failed()
        theirs, ours = pair.fit(x, x[:, :1], batch_size=6, epochs=2, shuffle=False)
        assert list(ours) == list(theirs) == ["loss", "sizes"]
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, rtol=0 if run_eagerly else 1e-5)


def test_what_a_later_compile_leaves_out_stays_as_in_keras():
    """Loss and metrics that are not given are those of the compile before; metrics=[] ends them."""
    later = [{}, {"loss": "mae"}, {"weighted_metrics": ["mse"]}, {"run_eagerly": True}, {"metrics": []}, {}]
    x, y = numbers(8)
    logs = []
    for one in (regressor(), Pipeline.split(regressor(), stages=2, microbatches=1, transport="inproc")):
        one.set_weights([np.full_like(w, 0.1) for w in one.get_weights()])
        one.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
        logs.append([])
        for arguments in later:
            one.compile("sgd", **{"run_eagerly": True, **arguments})
            logs[-1].append(one.evaluate(x, y, batch_size=8, verbose=0, return_dict=True))
    one.close()
    assert logs[0] == logs[1]
    assert [sorted(each) for each in logs[1]] == [["loss", "mae"]] * 2 + [["loss", "mse"]] * 2 + [["loss"]] * 2
    assert logs[1][0]["loss"] != logs[1][1]["loss"] == logs[1][2]["loss"]

"""The check "steps": updates equal those of Keras's optimizers over the joined model, and wrong ones are found."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from stages.worker.worker import Worker
from tests.levels import in_turn

layers = keras.layers


def model(**dense):
    inputs = keras.Input((6,))
    low = layers.Dense(5, activation="relu", name="low", **dense)(inputs)
    x = layers.BatchNormalization(name="norm")(low)
    x = layers.Dropout(0.3, name="drop")(x)
    x = layers.Dense(5, name="middle", kernel_regularizer="l2")(x)
    x = layers.Add(name="add")([x, low])
    return keras.Model(inputs, layers.Dense(3, activation="softmax", dtype="float32", name="top")(x))


def words():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True, name="words")(inputs)
    x = layers.LSTM(5, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="top")(x))


def batch(samples=10):
    rng = np.random.default_rng(0)
    return rng.standard_normal((samples, 6), dtype="float32"), rng.integers(0, 3, samples)


def sentences(samples=10):
    rng = np.random.default_rng(0)
    return rng.integers(0, 9, (samples, 7)), rng.integers(0, 3, samples)


def running(built, at, optimizer, eager=True, microbatches=3, **options):
    keras.utils.set_random_seed(0)
    pipe = Pipeline.split(built, at=at, microbatches=microbatches, transport="inproc", **options)
    metrics = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    pipe.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics, run_eagerly=eager)
    return pipe


def excluded(built):
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def accumulating(built):
    return keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)


OPTIMIZERS = {
    "sgd": lambda built: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda built: keras.optimizers.Adam(0.01, amsgrad=True),
    "rmsprop": lambda built: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "adafactor": lambda built: keras.optimizers.Adafactor(0.01),
    "nadam": lambda built: keras.optimizers.Nadam(0.01),
    "ftrl": lambda built: keras.optimizers.Ftrl(0.01),
    "lion": lambda built: keras.optimizers.Lion(0.01),
    "averages": lambda built: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "schedule": lambda built: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "clipped": lambda built: keras.optimizers.SGD(0.1, clipnorm=0.01),
    "by global norm": lambda built: keras.optimizers.Adam(0.01, global_clipnorm=0.01),
    "excluded": excluded,
    "accumulating": accumulating,
    "one each": lambda built: [keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01), keras.optimizers.Lion(0.01)],
}


COMPILED = ("adam", "averages", "by global norm", "one each")
HEALTHY = [("by global norm", False), *((name, True) for name in OPTIMIZERS)]
HEALTHY += [(name, False) for name in COMPILED if (name, False) not in HEALTHY]


@pytest.mark.parametrize(("name", "eager"), in_turn(HEALTHY, 2, 12, several=True))
def test_healthy_updates_pass(name, eager):
    built = model()
    with running(built, ["drop", "middle"], OPTIMIZERS[name](built), eager) as pipe:
        pipe.fit(*batch(), batch_size=5, verbose=0)
        report = pipe.verify(*batch(), checks="steps", steps=3)
        report.raise_if_failed()
        kinds = {row.kind for row in report.rows if row.check == "steps"}
        assert {"weight", "optimizer", "statistics", "seed", "metric", "prediction"} <= kinds
        (kernel,) = [row for row in report.of("weight", check="steps") if row.name == "stage1/middle/kernel"]
        assert kernel.shape == (5, 5), "the last step's, not all steps' together"
        clipped = name == "by global norm"
        if eager and not clipped:
            assert {row.difference for row in report.rows if row.check != "own"} == {0.0}
        if clipped:
            assert any("global norm" in row.why for row in report.rows)


def test_a_rate_that_was_set_between_two_verifications_is_the_references_too():
    optimizer = keras.optimizers.SGD(0.1)
    with running(model(), ["drop"], optimizer) as pipe:
        pipe.verify(*batch(), checks="steps").raise_if_failed()
        optimizer.learning_rate = 0.025
        pipe.verify(*batch(), checks="steps", steps=2).raise_if_failed()


@pytest.mark.parametrize("microbatches", in_turn([3, 1], 1, 2))
@pytest.mark.parametrize("eager", in_turn([True, False], 1, 1), ids=["eager", "compiled"])
def test_rows_of_embeddings_are_updated_as_one_tape_does(eager, microbatches):
    """With one microbatch sparse gradients reach the optimizer: Adam squares the rows of repeated words unsummed."""
    with running(words(), ["words", "lstm"], keras.optimizers.Adam(0.01), eager, microbatches) as pipe:
        pipe.verify(*sentences(), checks=("tape", "steps"), steps=2).raise_if_failed()


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_tied_variables_have_the_owners_slots(eager):
    shared = layers.Dense(6, name="shared", activation="tanh")
    inputs = keras.Input((6,))
    x = layers.Dense(6, name="between")(shared(inputs))
    built = keras.Model(inputs, layers.Dense(3, activation="softmax", name="top")(shared(x)))
    with running(built, ["between"], keras.optimizers.Adam(0.01), eager) as pipe:
        report = pipe.verify(*batch(), checks=("tape", "steps"), steps=2)
        report.raise_if_failed()
        rows = [row.stage for row in report.of("optimizer", check="steps") if "shared/kernel: momentums" in row.name]
        assert sorted(rows) == ["stage0", "stage1"]


@pytest.mark.parametrize("scale", in_turn([1024.0, 1e30], 1, 2), ids=["applied", "overflowing"])
def test_loss_scaling(scale):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=scale)
    with running(model(dtype="mixed_float16"), ["drop", "middle"], optimizer) as pipe:
        pipe.verify(*batch(), checks="steps", steps=2).raise_if_failed()
        assert float(optimizer.dynamic_scale) == np.float32(scale) and int(pipe.optimizer.iterations) == 0, "put back"


def test_states_kept_between_batches():
    built = keras.Sequential([keras.Input((6, 2)), layers.LSTM(4, return_sequences=True, name="low"), layers.Dense(1)])
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 6, 2), dtype="float32"), np.zeros((4, 6, 1), "float32")
    options = {"windows": 3, "truncate": 1, "keep_state": True, "transport": "inproc", "microbatches": 2}
    with Pipeline.split(built, at=["low"], **options) as pipe:
        pipe.compile("adam", "mse", run_eagerly=True)
        pipe.train_on_batch(x, y)
        before = pipe.session.values.read("kept states")
        pipe.verify(x, y, checks=("tape", "steps"), steps=2).raise_if_failed()
        after = pipe.session.values.read("kept states")
        assert any(np.any(state) for state in before[0])
        for a, b in zip(before[0], after[0], strict=True):
            assert a.tobytes() == b.tobytes()


def test_no_optimizer_is_said():
    with running(model(), ["norm"], None) as pipe:
        report = pipe.verify(*batch(), checks=("tape", "steps"))
        (steps,) = [check for check in report.checks if check.name == "steps"]
        assert not steps.ran and "no optimizer" in steps.reason and report.ok


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_an_update_made_twice_is_found_where_it_was_made(eager, monkeypatch):
    right = Worker.apply

    def twice(self, order):
        right(self, order)
        if self.specs[0].name == "stage1":
            hosted = self.hosted[self.specs[0].index]
            hosted.optimizer.iterations.assign_add(1)
            weight = hosted.stage.trainable_variables[0]
            weight.assign(weight + 1e-3)

    monkeypatch.setattr(Worker, "apply", twice)
    with running(model(), ["drop", "middle"], keras.optimizers.SGD(0.1), eager) as pipe:
        report = pipe.verify(*batch(), checks="steps")
        assert not report.ok
        assert report.first.stage == "stage1" and report.first.row.kind == "weight"
        assert {row.stage for row in report.failed if row.kind == "weight"} == {"stage1"}


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_the_global_norm_of_an_embedding_counts_its_rows_as_keras_does(optimizer):
    """With one microbatch Keras takes the norm of unsummed rows, and sums them when it clips."""
    built = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 4, name="words"), layers.Flatten()])
    built.add(layers.Dense(3, activation="softmax"))
    x, y = np.array([[1, 1, 2], [1, 3, 3]]), np.array([0, 2])
    twin = keras.models.clone_model(built)
    twin.set_weights(built.get_weights())
    twin.compile(optimizer(0.1, global_clipnorm=0.05), "sparse_categorical_crossentropy", run_eagerly=True)
    with running(built, ["words"], optimizer(0.1, global_clipnorm=0.05), microbatches=1) as pipe:
        pipe.verify(x, y, checks=("tape", "steps")).raise_if_failed()
        pipe.train_on_batch(x, y)
        twin.train_on_batch(x, y)
        for ours, theirs in zip(pipe.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)

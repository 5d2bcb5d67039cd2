"""What is trained here with and without deaths, and all the bits that must be equal."""

from __future__ import annotations

import functools

import keras
import numpy as np

from pipeline import Pipeline
from pipeline.runtime.driver import Driver
from pipeline.runtime.recovery import lasting_driver
from tests.dying_workers import FAULTS, left, plan_faults

STAGES = ("stage0", "stage1", "stage2")
MICROBATCHES = 3
SIZE = 12
GROUPS = ("model", "optimizer", "metrics", "besides", "layer states", "kept states")


def model():
    """Dropout, statistics, and one layer at both ends: its weights are tied between the first stage and the last."""
    keras.utils.set_random_seed(11)
    tied = keras.layers.Dense(6, name="tied")
    inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.25)(tied(inputs))
    x = keras.layers.BatchNormalization(name="first")(x)
    x = keras.layers.Dense(8, activation="tanh")(x)
    x = keras.layers.Dropout(0.25, name="second")(x)
    x = keras.layers.BatchNormalization()(keras.layers.Dense(6)(x))
    return keras.Model(inputs, keras.layers.Dense(1)(tied(x)))


def data(batches):
    """So many batches of inputs (n, 6) and targets (n, 1)."""
    x = np.random.default_rng(5).normal(size=(batches * SIZE, 6)).astype("float32")
    return x, x[:, :1] * x[:, 1:2]


def pipeline(*, eager=True, **options):
    """Three stages; Adam, clipping by the norm over all of them, loss scaling, metrics of two kinds."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(1e-2, global_clipnorm=0.5), initial_scale=8.0, dynamic_growth_steps=3
    )
    options = {"at": ["first", "second"], "microbatches": MICROBATCHES, "check_first_batch": False, **options}
    pipe = Pipeline.split(model(), **options)
    pipe.compile(optimizer, "mse", metrics=["mae", keras.metrics.RootMeanSquaredError()], run_eagerly=eager)
    return pipe


def bits(pipe):
    """Everything that training changes: in the workers, and what decides about updates here."""
    driver = pipe.session.workers.driver()
    found = {
        (group, stage, k): array.tobytes()
        for group in GROUPS
        for stage, arrays in driver.get(group).items()
        for k, array in enumerate(arrays)
    }
    found["here"] = [variable.numpy().tobytes() for variable in pipe.optimizer.variables]
    found["iterations"] = int(pipe.optimizer.inner_optimizer.iterations)
    return found


class Faults(keras.callbacks.Callback):
    """Writes down, before each batch, the faults that are to come in it.

    Args:
        path: The list of faults.
        faults: For each batch a list of (stage, place, how).

    Attributes:
        missed: Those that did not come.
        logs: Of each batch.
    """

    def __init__(self, path, faults=()):
        super().__init__()
        self.path, self.faults = path, list(faults)
        self.missed, self.logs = [], []

    def on_train_batch_begin(self, batch, logs=None):
        """The next ones; those of the batch before may come until now, as in its update."""
        if self.path is not None:
            self.missed += left(self.path)
            plan_faults(self.path, *(self.faults.pop(0) if self.faults else ()))

    def on_train_batch_end(self, batch, logs=None):
        """What Keras shows."""
        self.logs.append(dict(logs))


def train(pipe, batches, path=None, faults=()):
    """(bits, history, logs of every batch, states of callbacks) of two epochs, and the faults that did not come."""
    x, y = data(batches)
    keras.utils.set_random_seed(3)
    watching = Faults(path, faults)
    early = keras.callbacks.EarlyStopping("loss", patience=9)
    history = pipe.fit(x, y, SIZE, 2, verbose=0, callbacks=[watching, early], validation_data=(x[:20], y[:20])).history
    return (bits(pipe), history, watching.logs, (early.best, early.wait)), watching.missed


def let_die(monkeypatch, path):
    """From now on workers die as the list says that is at a path."""
    plan_faults(path)
    monkeypatch.setenv(FAULTS, str(path))
    monkeypatch.setattr(lasting_driver, "Driver", functools.partial(Driver, entry="tests.dying_workers:main"))

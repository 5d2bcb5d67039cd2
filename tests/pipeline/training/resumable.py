"""A user's training that is stopped and goes on: the program's parts, and all that it leaves, item by item."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline import Pipeline

X = np.random.default_rng(0).normal(size=(60, 6)).astype("float32")
Y = (X.sum(1) > 0).astype("int32")
STEPS = 9
"""Of a whole training: three epochs of three batches; the last one has fewer samples."""


def model() -> Any:
    """Seeds, statistics and dropout in both stages."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(8, "relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(3),
        ]
    )


def begin(transport: str = "inproc", eager: bool = True, optimizer: Any = None) -> Pipeline:
    """Made and compiled, as a user would for the first time."""
    keras.utils.set_random_seed(5)
    pipe = Pipeline.split(model(), stages=2, microbatches=1, transport=transport)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pipe.compile(optimizer or keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], run_eagerly=eager)
    return pipe


class Noting(keras.callbacks.Callback):
    """Keeps what it hears, and draws random numbers, as users' callbacks do."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.heard.append((batch, logs["loss"], logs["accuracy"], float(np.random.rand())))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.heard.append((epoch, sorted(logs), float(keras.random.uniform(()))))


class Stopping(keras.callbacks.Callback):
    """Stops the program behind so many batches of its own, or where it says."""

    def __init__(self, behind: int, stop: Any = None) -> None:
        super().__init__()
        self.behind, self.stop = behind, stop

    def state(self) -> None:
        """Nothing that training needs."""

    def go_on_from(self, state: None) -> None:
        """Nothing."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.behind -= 1
        if not self.behind:
            raise KeyboardInterrupt if self.stop is None else self.stop()


def callbacks(folder: Path | None = None) -> list[Any]:
    """Keras's that keep something, and the user's own."""
    return [
        Noting(),
        keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=0.5),
        *([] if folder is None else [keras.callbacks.CSVLogger(str(folder / "log.csv"))]),
    ]


def fit(pipe: Pipeline, given: list[Any], more: list[Any], **options: Any) -> Any:
    """The training, the same every time."""
    said = {"batch_size": 16, "epochs": 3, "validation_split": 0.2, "verbose": 0, **options}
    return pipe.fit(*said.pop("data", (X, Y)), callbacks=[*given, *more], **said)


def left(pipe: Pipeline, history: Any, given: list[Any]) -> dict[str, str]:
    """{item: its bits} of all that a training leaves."""
    noting, early, plateau, *logs = given
    values = {what: pipe.session.values.read(what) for what in ("model", "optimizer", "metrics", "kept states")}
    found = {
        f"{what} {stage} {k}": f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        for what, stages in values.items()
        for stage, arrays in stages.items()
        for k, array in enumerate(arrays)
    }
    found |= {"history": repr(dict(history.history)), "epochs": repr(history.epoch), "heard": repr(noting.heard)}
    found |= {"best": repr((early.best, early.wait, early.best_epoch)), "plateau": repr((plateau.best, plateau.wait))}
    found["best weights"] = repr([hashlib.sha256(np.asarray(one).tobytes()).hexdigest() for one in early.best_weights])
    found |= {"rate": repr(float(pipe.optimizer.learning_rate)), "updates": repr(int(pipe.optimizer.iterations))}
    found |= {"next numbers": repr((float(np.random.rand()), float(tf.random.normal(()))))}
    return found | {f"log {k}": Path(log.filename).read_text() for k, log in enumerate(logs)}


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """The kinds of items that are not the same, ``model`` for ``model 0 3``."""
    return {name.partition(" ")[0] for name in one.keys() | other.keys() if one.get(name) != other.get(name)}

"""The demonstration: a CNN on real handwritten digits, in three stage processes, verified and timed.

It is what `tapeline demo` runs, and it can fail: a gradient that differs from one tape's, or an accuracy below what
this model reaches, gives a non-zero exit status.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from pipeline.errors import DataError
from pipeline.pipeline import Pipeline
from pipeline.report.timeline_figure import save_timeline

ACCURACY = 0.97
"""What the trained model must reach on digits it has not seen."""
_TEST_EVERY = 5
_BATCH = 64
_TRACED = 512


def load_digits() -> tuple[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], ...]:
    """The 1797 handwritten digits of scikit-learn, every fifth one kept for the test.

    Returns:
        (x, y) to train on and (x, y) to test: x float32 (n, 8, 8, 1) in [0, 1], y int64 (n,).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    data = digits()
    x = (data.images / 16.0).astype("float32")[..., None]
    test = np.arange(len(x)) % _TEST_EVERY == 0
    return (x[~test], data.target[~test]), (x[test], data.target[test])


def build_model() -> Any:
    """A small CNN with 10 classes; 54 410 parameters."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(),
            layers.Dense(96, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )


def run(folder: Path, epochs: int = 10, seed: int = 0) -> int:
    """Train, verify, draw.

    Args:
        folder: Where the report and the picture go; made if it is not there.
        epochs: Passes over the training digits.
        seed: For weights, dropout and shuffling.

    Returns:
        The exit status: 0 if the accuracy was reached and the verification holds.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    keras.utils.set_random_seed(seed)
    train, test = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    with Pipeline.split(build_model(), at=["pool1", "pool2"], microbatches=8, schedule="1f1b") as pipe:
        pipe.compile(
            optimizer=keras.optimizers.Adam(0.003), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        console.print(f"3 stage processes, {pipe.microbatches} microbatches, 1F1B, {pipe.transport}\n")
        pipe.fit(*train, batch_size=_BATCH, epochs=epochs, validation_data=test, verbose=1)
        accuracy = pipe.evaluate(*test, batch_size=_BATCH, return_dict=True, verbose=0)["accuracy"]
        report = pipe.verify(train[0][:_BATCH], train[1][:_BATCH], checks=("tape", "steps"))
        console.print(report.table())
        timeline = pipe.timeline(train[0][:_TRACED], train[1][:_TRACED])
        for suffix in ("html", "json", "txt"):
            report.save(folder / f"verification.{suffix}")
        names = [*pipe.names[:-1], f"{pipe.names[-1]} (F = F+B)"]  # the last stage's compiled forward goes backward too
        save_timeline(timeline, folder / "timeline.png", names=names)
    enough = accuracy >= ACCURACY
    console.print(
        f"\ntest accuracy {accuracy:.4f}{'' if enough else f' (below {ACCURACY})'}; gradients {report.summary()}; "
        f"artefacts: {folder}/verification.html, verification.json, verification.txt, timeline.png",
        soft_wrap=True,
    )
    return 0 if enough and report.ok else 1

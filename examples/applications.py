"""A model that nobody here wrote: MobileNetV2 of `keras.applications`, cut in two lines and trained on digits.

    whole = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    pipe = Pipeline.split(whole, stages=2, microbatches=2)

156 layers with skip connections, trained from nothing on scikit-learn's handwritten digits, enlarged to 32 x 32, in two
processes. The example checks that the gradients of the two processes are those of one tape bit for bit, and that the
model reaches an accuracy on digits that it has not seen; the exit status is the verdict.

    python examples/applications.py
    python examples/applications.py --balance time

With `--balance time` every layer is measured first. The example shows the cuts with the least to send, cuts where the
slower stage is as fast as can be, and in the end shows what a step should take beside what it takes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from pipeline import Pipeline

TRAINED_ON = 1500
# Batch normalisation takes its statistics over a microbatch, and behind the last of five halvings an image is one
# number per channel: the microbatch must be large enough for statistics. 25 images will do, 5 would not.
BATCH, MICROBATCHES = 50, 2


def load() -> tuple[np.ndarray, np.ndarray]:
    """Digits enlarged to (1797, 32, 32, 3), from -1 to 1, and which digit each is (1797,)."""
    data = load_digits()
    grey = (data.images[..., None] / 8 - 1).astype("float32")
    return np.repeat(tf.image.resize(grey, (32, 32)), 3, axis=-1), data.target


def build() -> keras.Model:
    """The model as the zoo has it, but for one setting."""
    whole = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    for layer in whole.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # not 0.999: the moving averages of evaluation have a hundred steps, not thousands
    return whole


def split(whole: keras.Model, balance: str, x: np.ndarray) -> Pipeline:
    """Two stages, equal in parameters or, as measured on a microbatch, in time."""
    if balance == "parameters":
        return Pipeline.split(whole, stages=2, microbatches=MICROBATCHES)
    sample = x[: BATCH // MICROBATCHES]
    table = Pipeline.cuts(whole, sample)
    print(replace(table, rows=tuple(sorted(table.rows, key=lambda row: row.bytes)[:8])))
    return Pipeline.split(whole, stages=2, balance=balance, sample=sample, microbatches=MICROBATCHES)


def main() -> int:
    """Verify, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="passes over the digits (default 6)")
    parser.add_argument("--accuracy", type=float, default=0.6, help="what must be reached (default 0.6)")
    parser.add_argument("--balance", choices=("parameters", "time"), default="parameters", help="where to cut")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the digits")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    x, y = load()
    with split(build(), options.balance, x) as pipe:
        loss = "sparse_categorical_crossentropy"
        # Eagerly: compiling rounds otherwise, which opens and closes ReLUs. The model uncut differs as much.
        pipe.compile("sgd", loss, run_eagerly=True)
        report = pipe.verify(x[:BATCH], y[:BATCH])
        print(report.summary())
        pipe.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
        pipe.fit(x[:TRAINED_ON], y[:TRAINED_ON], batch_size=BATCH, epochs=options.epochs, verbose=2)
        _, accuracy = pipe.evaluate(x[TRAINED_ON:], y[TRAINED_ON:], batch_size=BATCH, verbose=0)
        if pipe.prediction is not None:
            print(pipe.prediction.beside(pipe.timeline(x[:BATCH], y[:BATCH])))
    print(f"accuracy on {len(x) - TRAINED_ON} other digits: {accuracy:.3f}; expected: at least {options.accuracy}")
    return 0 if report.ok and accuracy >= options.accuracy else 1


if __name__ == "__main__":
    sys.exit(main())

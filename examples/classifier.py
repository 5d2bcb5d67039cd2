"""The founding case, whole: a CNN classifier trained split and unsplit, equal after every step (case A2).

    [Conv 32 3x3, relu, max-pool 2] x 2, Conv 64 3x3, relu, max-pool 2 | Flatten, Dense 64, relu, Dropout 0.5, Dense 1

The cut is at the bar. Both runs start from the same weights and seeds and see the same batches; after every update all
weights, moving statistics and seed states are compared bit for bit. The data are real: is a handwritten digit even?

    python examples/classifier.py
"""

from __future__ import annotations

import sys
from itertools import accumulate, pairwise

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from pipeline import Pipeline, microbatch_sizes

STEPS, BATCH, MICROBATCHES = 12, 30, 4
layers = keras.layers


def build() -> keras.Model:
    """The whole classifier, for 26 x 26 images."""
    return keras.Sequential(
        [
            keras.Input((26, 26, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2, name="pool3"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


def load() -> tuple[np.ndarray, np.ndarray]:
    """Digits enlarged to (n, 26, 26, 1), and whether each is even."""
    data = load_digits()
    x = (data.images[: STEPS * BATCH, ..., None] / 16).astype("float32")
    y = (data.target[: STEPS * BATCH, None] % 2 == 0).astype("float32")
    return np.array(tf.image.resize(x, (26, 26))), y


def unsplit_step(model: keras.Model, optimizer: keras.Optimizer, x: np.ndarray, y: np.ndarray) -> float:
    """One update with one tape a microbatch over the whole model: the way without any pipeline."""
    loss_of, total, gradients = keras.losses.BinaryCrossentropy(), np.float32(0), None
    for a, b in pairwise(accumulate(microbatch_sizes(len(x), MICROBATCHES), initial=0)):
        with tf.GradientTape() as tape:
            loss = loss_of(y[a:b], model(x[a:b], training=True)) * np.float32((b - a) / len(x))
        found = tape.gradient(loss, [v.value for v in model.trainable_variables])
        gradients = found if gradients is None else [g + h for g, h in zip(gradients, found, strict=True)]
        total += np.float32(loss)
    optimizer.apply(gradients, model.trainable_variables)
    return float(total)


def main() -> int:
    """Train both and compare after every step."""
    keras.utils.set_random_seed(0)
    tf.config.threading.set_intra_op_parallelism_threads(1)  # convolutions round by the number of threads
    x, y = load()
    model = build()
    different = 0
    with Pipeline.split(model, at=["pool3"], microbatches=MICROBATCHES, threads=1) as pipe:
        pipe.compile(keras.optimizers.Adam(), "binary_crossentropy", run_eagerly=True)
        initial = [v.numpy() for v in model.variables]
        optimizer = keras.optimizers.Adam()
        for step in range(STEPS):
            part = slice(step * BATCH, (step + 1) * BATCH)
            split = pipe.train_on_batch(x[part], y[part])
            whole = unsplit_step(model, optimizer, x[part], y[part])
            pairs = zip(pipe.merge().variables, model.variables, strict=True)
            unequal = [b.path for a, b in pairs if a.numpy().tobytes() != b.numpy().tobytes()]
            different += len(unequal) + (abs(split - whole) > 1e-6)
            verdict = "all variables equal bit for bit" if not unequal else f"DIFFERENT: {', '.join(unequal)}"
            print(f"step {step + 1:2}: loss split {split:.7f}, unsplit {whole:.7f}; {verdict}")
    moved = sum(not np.array_equal(a, b.numpy()) for a, b in zip(initial, model.variables, strict=True))
    print(f"{len(model.variables)} variables, {moved} of them trained; differences: {different}")
    return 0 if different == 0 and moved else 1


if __name__ == "__main__":
    sys.exit(main())

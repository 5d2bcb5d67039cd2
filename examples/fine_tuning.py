"""Fine-tuning: what was learned stays as it is in one process, a new head learns in another.

    digits 0 to 4 ──► [ lower part | old head ]    trained in this process, by Keras
                           ║ frozen
    digits 5 to 9 ──► [ lower part ]──►[ new head ]    stage 0 and stage 1, each a process

A small CNN learns five digits. Its convolutions are then frozen (`trainable = False`) and a new head learns the five
digits that the convolutions have never seen. The example checks that no bit of the frozen part changes, moving averages
included, that there are gradients of the new head only, equal to those of one tape, and that the head learns.

    python examples/fine_tuning.py
"""

from __future__ import annotations

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from pipeline import Pipeline

BATCH, EXPECTED = 32, 0.8
layers = keras.layers


def load(digits: range) -> tuple[np.ndarray, np.ndarray]:
    """The digits of this range enlarged to (n, 16, 16, 1), and which of them each is (n,), from 0."""
    data = load_digits()
    some = np.isin(data.target, digits)
    images = (data.images[some][..., None] / 16).astype("float32")
    return np.array(tf.image.resize(images, (16, 16))), data.target[some] - digits.start


def pretrained() -> keras.Model:
    """A CNN that knows the digits 0 to 4; it is cut behind the layer "features"."""
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(name="features"),
            layers.Dense(5, activation="softmax", name="old_head"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*load(range(5)), batch_size=BATCH, epochs=4, verbose=2)
    return model


def with_new_head(model: keras.Model) -> keras.Model:
    """The frozen lower part of `model`, with a head that has learned nothing yet."""
    for layer in model.layers[:-1]:
        layer.trainable = False  # also means: BatchNormalization uses its moving averages and leaves them alone
    hidden = layers.Dense(32, activation="relu", name="hidden")(model.get_layer("features").output)
    return keras.Model(model.inputs, layers.Dense(5, activation="softmax", name="new_head")(hidden))


def main() -> int:
    """Train the lower part, freeze it, train the new head, check."""
    keras.utils.set_random_seed(0)
    model = with_new_head(pretrained())
    before = [variable.numpy() for variable in model.variables]
    x, y = load(range(5, 10))
    seen = len(x) * 3 // 4
    with Pipeline.split(model, at=["features"], microbatches=4) as pipe:
        pipe.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
        gradients = pipe.gradients(x[:BATCH], y[:BATCH])
        report = pipe.verify(x[:BATCH], y[:BATCH])
        pipe.fit(x[:seen], y[:seen], batch_size=BATCH, epochs=6, verbose=2)
        _, accuracy = pipe.evaluate(x[seen:], y[seen:], verbose=0)
        after = [variable.numpy() for variable in pipe.merge().variables]
    pairs = zip(model.variables, before, after, strict=True)
    changed = [variable.path for variable, old, new in pairs if old.tobytes() != new.tobytes()]
    print(f"gradients of: {', '.join(gradients)}")
    print(f"changed: {', '.join(changed)}; the same in every bit: {len(before) - len(changed)} other variables")
    print(f"gradients {report.summary()}")
    print(f"accuracy on {len(x) - seen} images of digits 5 to 9: {accuracy:.3f}; expected: at least {EXPECTED}")
    head = [variable.path for variable in model.trainable_variables]
    only_the_head = changed == head and list(gradients) == [f"{pipe.names[1]}/{path}" for path in head]
    return 0 if only_the_head and report.ok and accuracy >= EXPECTED else 1


if __name__ == "__main__":
    sys.exit(main())

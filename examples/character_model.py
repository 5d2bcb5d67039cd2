"""A character model on real English text, trained over three processes.

The text is Python's own language reference, which comes with Python (`pydoc_data.topics`). The model reads 48
characters and predicts the next one at every place: an embedding with a GRU, a second GRU, a dense layer, each part in
a process of its own. The example checks that the loss falls below that of the best table of character pairs (what a
model reaches that only knows the last character), and that the gradients equal those of one tape.

    python examples/character_model.py --steps 240
"""

from __future__ import annotations

import argparse
import sys
from pydoc_data.topics import topics

import keras
import numpy as np

from pipeline import Pipeline

LENGTH = 48
BATCH = 64


def load_text() -> tuple[np.ndarray, list[str]]:
    """The corpus as numbers (n,) int32, and the characters that they stand for."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    return np.array([number[character] for character in text], dtype="int32"), characters


def pair_entropy(text: np.ndarray, kinds: int) -> float:
    """Nats per character of the best predictor that sees only the character before."""
    counts = np.zeros((kinds, kinds))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    rows = counts.sum(axis=1, keepdims=True)
    logs = np.log(np.divide(counts, rows, where=counts > 0, out=np.ones_like(counts)))
    return float(-(counts * logs).sum() / counts.sum())


def batches(text: np.ndarray, seed: int):
    """Endless random windows: x (64, 48) and y, the same shifted by one."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
        windows = text[starts[:, None] + np.arange(LENGTH + 1)]
        yield windows[:, :-1], windows[:, 1:]


def build_parts(kinds: int) -> list[keras.Model]:
    """The three parts of the model."""
    layers = keras.layers
    return [
        keras.Sequential(
            [keras.Input((LENGTH,), dtype="int32"), layers.Embedding(kinds, 48), layers.GRU(128, return_sequences=True)]
        ),
        keras.Sequential([keras.Input((LENGTH, 128)), layers.GRU(128, return_sequences=True)]),
        keras.Sequential([keras.Input((LENGTH, 128)), layers.Dense(kinds)]),
    ]


def main() -> int:
    """Train, check, and continue a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer updates (default 240)")
    steps = parser.parse_args().steps
    keras.utils.set_random_seed(1)
    text, characters = load_text()
    limit = pair_entropy(text, len(characters))
    with Pipeline(build_parts(len(characters)), microbatches=4) as pipe:
        pipe.compile(
            optimizer=keras.optimizers.Adam(4e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        history = pipe.fit(batches(text, seed=1), steps_per_epoch=steps // 4, epochs=4, verbose=2)
        loss = pipe.evaluate(batches(text, seed=2), steps=10, verbose=0)
        report = pipe.verify(*next(batches(text, seed=3)))
        start = "the value of the expression is a new object that"[-LENGTH:]
        print(f"\n{start}|{continued(pipe, start, characters, 60)}")
    first = history.history["loss"][0]
    print(f"loss {first:.3f} in the first quarter, {loss:.3f} now; a table of pairs reaches {limit:.3f}")
    print(f"gradients {report.summary()}")
    return 0 if loss < limit and loss < first and report.ok else 1


def continued(pipe: Pipeline, start: str, characters: list[str], count: int) -> str:
    """The most likely continuation, one character at a time."""
    window, found = [characters.index(character) for character in start], ""
    for _ in range(count):
        logits = pipe.predict_on_batch(np.array([window[-LENGTH:]], dtype="int32"))[0, -1]
        window.append(int(np.argmax(logits)))
        found += characters[window[-1]]
    return found


if __name__ == "__main__":
    sys.exit(main())

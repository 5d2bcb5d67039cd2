"""Three organisations, one model: two have different columns of the same patients, the third has the diagnoses.

    clinic    columns 0 to 14   ──► [ bottom a ] ──za──►┐
                                                        [ top ] ◄── diagnoses    lab, which has the one open port
    hospital  columns 15 to 29  ──► [ bottom b ] ──zb──►┘

Each is a process in a folder of its own, with its own key, and nothing in common with the others but a port, a plan and
their public keys. They train on scikit-learn's breast-cancer table and evaluate. The example then trains the joined
model over the joined table on one tape, with plain Keras, and checks that the weights of all three are its weights, bit
for bit.

    python examples/parties.py
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import pipeline
from pipeline import read_plan
from transport.key_files import KeyFolder

EXPECTED = 0.9
PARTIES = {"clinic": slice(0, 15), "hospital": slice(15, 30), "lab": None}
PLAN = """
hub = "lab"
[parties]
{keys}
[stages]
a = {{ owner = "clinic", x = true }}
b = {{ owner = "hospital", x = true }}
top = {{ owner = "lab", y = true }}
[[edges]]
tensor = "za"
from = "a"
to = "top"
shape = [4]
dtype = "float32"
[[edges]]
tensor = "zb"
from = "b"
to = "top"
shape = [4]
dtype = "float32"
[training]
batch = 64
microbatches = 2
epochs = 5
order_seed = 3
"""
MODELS = """
import keras

def bottom(seed):
    start = keras.initializers.GlorotUniform(seed)
    return keras.Sequential([keras.Input((15,)), keras.layers.Dense(4, "tanh", kernel_initializer=start)])

def top():
    start = keras.initializers.GlorotUniform(2)
    za, zb = keras.Input((4,)), keras.Input((4,))
    joined = keras.layers.Concatenate()([za, zb])
    return keras.Model([za, zb], keras.layers.Dense(1, "sigmoid", kernel_initializer=start)(joined))
"""
FEATURES = """
import numpy as np
from models import bottom
from pipeline import Party

def make():
    return Party(bottom({seed}), x=np.load("x.npy"), ids=np.load("ids.npy"), optimizer="adam")
"""
LABELS = """
import keras, numpy as np
from models import top
from pipeline import Party

def make():
    optimizer = keras.optimizers.SGD(0.5)
    y, ids = np.load("y.npy"), np.load("ids.npy")
    return Party(top(), y=y, ids=ids, optimizer=optimizer, loss="binary_crossentropy", metrics=["accuracy"])
"""


def table() -> tuple[np.ndarray, np.ndarray]:
    """Standardised columns (569, 30) and diagnoses (569, 1)."""
    x, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(x).astype("float32"), y[:, None].astype("float32")


def furnish(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Give each party its folder, key, rows and models; public keys and the plan are what they exchange."""
    folders = {name: KeyFolder(folder / name / "keys") for name in PARTIES}
    keys = {name: own.new(name) for name, own in folders.items()}
    plan = PLAN.format(keys="\n".join(f'{name} = {{ key = "{own.public}" }}' for name, own in keys.items()))
    for seed, (name, columns) in enumerate(PARTIES.items()):
        home = folder / name
        for other in set(PARTIES) - {name}:
            folders[name].trust(folders[other].path / f"{other}.pub")
        (home / "plan.toml").write_text(plan)
        (home / "models.py").write_text(MODELS)
        (home / "mine.py").write_text(LABELS if columns is None else FEATURES.format(seed=seed))
        np.save(home / "ids.npy", np.arange(len(y)))
        np.save(home / ("y.npy" if columns is None else "x.npy"), y if columns is None else x[:, columns])


def session(folder: Path, *options: str) -> str:
    """Run all three and give back what the lab printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    running = {}
    for name in PARTIES:
        end = ["serve", "--listen", address] if name == "lab" else ["join", "--at", address]
        command = [sys.executable, "-m", "pipeline", "party", end[0], "plan.toml", "mine:make", "--as", name]
        running[name] = subprocess.Popen(
            [*command, *end[1:], "--keys", "keys", *options],
            cwd=folder / name,
            env={**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )
    printed = {name: process.communicate()[0] for name, process in running.items()}
    assert all(process.returncode == 0 for process in running.values()), printed
    return printed["lab"]


def one_tape(folder: Path, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """The weights after the same training of the joined model over the joined table, by Keras alone."""
    sys.path.insert(0, str(folder / "lab"))
    models = importlib.import_module("models")
    parts = [models.bottom(0), models.bottom(1), models.top()]
    optimizers = [keras.optimizers.Adam(), keras.optimizers.Adam(), keras.optimizers.SGD(0.5)]
    plan, loss = read_plan(folder / "lab" / "plan.toml"), keras.losses.BinaryCrossentropy()
    variables = [variable for part in parts for variable in part.trainable_variables]
    for epoch in range(plan.epochs):
        order = np.random.default_rng([plan.order_seed, epoch]).permutation(len(y))
        for begin in range(0, len(y), plan.batch):
            batch, sums = order[begin : begin + plan.batch], [0] * len(variables)
            for rows in np.array_split(batch, plan.microbatches):
                with tf.GradientTape() as tape:
                    tensors = [parts[place](x[rows, 15 * place : 15 * place + 15], training=True) for place in (0, 1)]
                    value = loss(y[rows], parts[2](tensors, training=True)) * np.float32(len(rows) / len(batch))
                sums = [a + b for a, b in zip(sums, tape.gradient(value, variables), strict=True)]
            for part, optimizer in zip(parts, optimizers, strict=True):
                mine, sums = sums[: len(part.trainable_variables)], sums[len(part.trainable_variables) :]
                optimizer.apply(mine, part.trainable_variables)
    ours = [folder / party / "trained" / stage for party, stage in zip(PARTIES, ("a", "b", "top"), strict=True)]
    theirs = [part.get_weights() for part in parts]
    for part, path, expected in zip(parts, ours, theirs, strict=True):
        part.load_weights(f"{path}.weights.h5")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(part.get_weights(), expected, strict=True)), path
    return [weight for weights in theirs for weight in weights]


def main() -> None:
    """Train, evaluate, compare."""
    x, y = table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        furnish(folder, x, y)
        print(session(folder, "--save", "trained"))
        judged = session(folder, "--task", "evaluate", "--load", "trained")
        weights = one_tape(folder, x, y)
    accuracy = float(judged.rpartition("accuracy ")[2].split()[0])
    print(f"accuracy {accuracy:.4f}; {len(weights)} arrays of three parties equal one tape over the table, bit for bit")
    assert accuracy >= EXPECTED
    print("and what it costs: the lab's gradients tell the clinic and the hospital every diagnosis (docs/parties.md)")


if __name__ == "__main__":
    main()

"""What the user's own objects cost as judges: the look at the first batch, and the check "own" of every verification.

The look: time of the first `train_on_batch` with it and without it, in turns. The check: its share of a `verify`, the
second one, beside a step.

    python benchmarks/first_batch.py [--rounds 5]

Each round starts a pipeline of two processes anew, so the first step has its traces in it; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from pipeline import Pipeline


def dense() -> tuple[Any, np.ndarray]:
    """Six Dense layers of 64 units, 256 samples."""
    layers = [keras.layers.Dense(64, activation="relu") for _ in range(6)]
    return keras.Sequential([keras.Input((64,)), *layers]), np.ones((256, 64), "float32")


def mobile_net() -> tuple[Any, np.ndarray]:
    """MobileNetV2 of 10 classes, 64 images of 64 x 64."""
    model = keras.applications.MobileNetV2(input_shape=(64, 64, 3), weights=None, classes=10)
    return model, np.random.default_rng(0).uniform(-1, 1, (64, 64, 64, 3)).astype("float32")


def first_step(make: Any, look: bool) -> float:
    """Seconds of the first step of a pipeline whose workers stand already."""
    keras.utils.set_random_seed(0)
    model, x = make()
    y = np.zeros((len(x), *model.output_shape[1:]), "float32")
    with Pipeline.split(model, stages=2, microbatches=4, check_first_batch=look) as pipe:
        pipe.compile("sgd", "mean_squared_error")
        pipe.get_weights()  # the workers are up
        begin = time.perf_counter()
        pipe.train_on_batch(x, y)
        return time.perf_counter() - begin


def judging(make: Any, rounds: int) -> tuple[float, float, float]:
    """Medians in seconds: of a step, of the check "own", and of a verification by "own" alone."""
    keras.utils.set_random_seed(0)
    model, x = make()
    y = np.zeros((len(x), *model.output_shape[1:]), "float32")
    steps, checks, alone = [], [], []
    with Pipeline.split(model, stages=2, microbatches=4) as pipe:
        pipe.compile("sgd", "mean_squared_error")
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            pipe.train_on_batch(x, y)
            middle = time.perf_counter()
            report = pipe.verify(x, y, checks="own")
            steps.append(middle - begin)
            alone.append(time.perf_counter() - middle)
            checks += [check.seconds for check in report.checks if check.name == "own"]
    found = [statistics.median(some[1:]) for some in (steps, checks, alone)]
    return found[0], found[1], found[2]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| model | first step without, s | with, s | the look takes, s |")
    print("|---|---|---|---|")
    for name, make in {"6 x Dense(64)": dense, "MobileNetV2, 64 px": mobile_net}.items():
        first_step(make, look=True)  # the fork server, imports
        without, beside = zip(*[(first_step(make, False), first_step(make, True)) for _ in range(rounds)], strict=True)
        extra = statistics.median(b - a for a, b in zip(without, beside, strict=True))
        print(f"| {name} | {statistics.median(without):.2f} | {statistics.median(beside):.2f} | {extra:.2f} |")
    print("\n| model | a step, s | the check own, s | verify(checks='own'), s |")
    print("|---|---|---|---|")
    for name, make in {"6 x Dense(64)": dense, "MobileNetV2, 64 px": mobile_net}.items():
        step, check, alone = judging(make, rounds)
        print(f"| {name} | {step:.3f} | {check:.2f} | {alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()

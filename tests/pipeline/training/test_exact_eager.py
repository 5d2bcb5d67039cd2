"""Eager pipelines are one tape, bit for bit: gradients, losses, and weights after 20 steps.

Every pair of (stack, optimizer, schedule, stages, microbatches, divisible batch) occurs; workers are threads, so that
both sides use the same thread pools. A few runs in real processes follow, where `Pipeline.verify` is the judge.

Eager Keras is slow, so check and gate take several microbatches for 20 steps with the dense stack only, which every
optimizer has, and for 4 with the others; `make soak` takes 20 with all.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.covering import all_pairs
from tests.levels import SOAK, in_turn
from tests.models import STACKS, cross_entropy, grouped, stack
from tests.one_tape import Gradients, OneTape, assert_same_bits, reported

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}
FACTORS = {
    "stack": [found.name for found in STACKS],
    "stages": [1, 2, 3, 5],
    "optimizer": list(OPTIMIZERS),
    "microbatches": [1, 4, 7],
    "schedule": ["1f1b", "gpipe"],
    "divisible": [False, True],
}
ROWS = all_pairs(FACTORS)
SAMPLES = {(1, True): 4, (1, False): 5, (4, True): 8, (4, False): 10, (7, True): 14, (7, False): 9}


def test_the_rows_hold_every_pair() -> None:
    """Every two factors meet in every combination of their values."""
    for a, b in combinations(FACTORS, 2):
        assert {(row[a], row[b]) for row in ROWS} == set(product(FACTORS[a], FACTORS[b]))
    assert all((n % m == 0) == even or m == 1 for (m, even), n in SAMPLES.items())


@lru_cache
def one_tape(
    name: str, optimizer: str, microbatches: int, samples: int
) -> tuple[list[np.float32], Gradients, Gradients, list[np.ndarray]]:
    """Losses of 20 steps, gradients before and after them, and the last weights, in the order of the blocks."""
    chosen = stack(name)
    blocks = chosen.build()
    x, y = chosen.data(2 * samples)
    tape = OneTape(blocks, cross_entropy(), OPTIMIZERS[optimizer]())
    first = tape.gradients(x[:samples], y[:samples], microbatches)[1]
    losses = [tape.train(x[rows], y[rows], microbatches) for rows in batches(name, microbatches, samples)]
    last = tape.gradients(x[:samples], y[:samples], microbatches)[1]
    return losses, first, last, [variable.numpy() for variable in model_variables(blocks)]


def model_variables(parts: Any) -> list[Any]:
    """Trainable weights of all parts, then the others (statistics): the same order however parts are grouped."""
    trainable = [v for part in parts for v in part.trainable_weights]
    return trainable + [v for part in parts for v in part.non_trainable_weights]


def batches(name: str, microbatches: int, samples: int) -> list[slice]:
    """Two batches by turns, one for each step."""
    steps = 20 if microbatches == 1 or name == "dense" or SOAK else 4
    return [slice(0, samples), slice(samples, 2 * samples)] * (steps // 2)


@pytest.mark.parametrize("row", in_turn(ROWS, 3, len(ROWS)), ids=lambda row: "-".join(map(str, row.values())))
def test_equals_one_tape_bit_for_bit(row: dict[str, Any]) -> None:
    """Gradients before and after, every loss, and all weights and statistics after 20 steps have equal bits."""
    microbatches, samples = row["microbatches"], SAMPLES[row["microbatches"], row["divisible"]]
    losses, first, last, weights = one_tape(row["stack"], row["optimizer"], microbatches, samples)
    chosen = stack(row["stack"])
    x, y = chosen.data(2 * samples)
    parts = grouped(chosen.build(), row["stages"])
    with Pipeline(parts, microbatches, row["schedule"], "inproc") as pipe:
        pipe.compile(OPTIMIZERS[row["optimizer"]](), cross_entropy(), run_eagerly=True)
        assert_same_bits(list(pipe.gradients(x[:samples], y[:samples]).values()), first, "first gradient")
        for step, rows in enumerate(batches(row["stack"], microbatches, samples)):
            assert pipe.train_on_batch(x[rows], y[rows]) == reported(losses[step], samples), f"loss of step {step}"
        assert_same_bits(list(pipe.gradients(x[:samples], y[:samples]).values()), last, "last gradient")
        ours = iter(pipe.get_weights())
    for trained in parts:
        trained.set_weights([next(ours) for _ in trained.weights])
    assert_same_bits([v.numpy() for v in model_variables(parts)], weights, "weight")


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "schedule", "samples"),
    in_turn(
        [
            ("batch-normalization", 3, 4, "gpipe", 10),
            ("convolution", 5, 7, "1f1b", 9),
            ("gru", 2, 4, "1f1b", 6),
            ("attention", 3, 4, "1f1b", 8),
        ],
        1,
        4,
        several=True,
    ),
)
def test_processes_equal_one_tape_bit_for_bit(
    name: str, stages: int, microbatches: int, schedule: str, samples: int
) -> None:
    """In processes of their own, after some updates: `verify`, whose one tape is a process too, finds equal bits."""
    chosen = stack(name)
    x, y = chosen.data(samples)
    with Pipeline(grouped(chosen.build(), stages), microbatches, schedule, "auto") as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), cross_entropy(), run_eagerly=True)
        for _ in range(2):
            pipe.train_on_batch(x, y)
        report = pipe.verify(x, y)
    report.raise_if_failed()
    assert report.tolerance.relative == 0.0
    assert {row.difference for row in report.rows if row.check != "own"} == {0.0}
    assert report.loss == report.reference_loss
    assert len(report.gradients) == sum(len(block.trainable_variables) for block in chosen.build())

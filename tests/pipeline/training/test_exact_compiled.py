"""Compiled pipelines are one tape within rounding, and recomputing the forward pass changes nothing.

Gradients: the largest difference is at most 1e-6 of the largest |gradient|. Weights after 20 steps: at most 1e-5 of the
largest |weight|. The other side is the eager one-tape trainer, so what a compiler reorders is in the difference.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import in_turn
from tests.models import STACKS, cross_entropy, grouped, part, stack
from tests.one_tape import OneTape, assert_same_bits, difference

layers = keras.layers
STEPS = 20

# stack, stages, microbatches, samples, schedule, recompute; every value of each factor beside several of the others
ROWS = [
    ("batch-normalization", 3, 4, 10, "1f1b", True),
    ("dense", 1, 7, 9, "gpipe", False),
    ("dense", 5, 4, 10, "1f1b", False),
    ("convolution", 3, 4, 8, "gpipe", False),
    # Not 14: statistics of two samples make training chaotic, and rounding grows by half a decade a step.
    ("batch-normalization", 2, 7, 28, "gpipe", False),
    ("layer-normalization", 2, 7, 14, "1f1b", False),
    ("lstm", 2, 4, 10, "1f1b", False),
    ("gru", 3, 1, 5, "gpipe", True),
    ("attention", 3, 4, 10, "1f1b", False),
    ("dropout", 5, 4, 10, "1f1b", True),
    ("dropout", 2, 7, 9, "gpipe", False),
]


def optimizer() -> Any:
    """Momentum, not Adam: that divides by the gradient's size, so a gradient of mere rounding takes full steps."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "samples", "schedule", "recompute"), in_turn(ROWS, 1, 8, several=True)
)
def test_equals_one_tape_within_rounding(
    name: str, stages: int, microbatches: int, samples: int, schedule: str, recompute: bool
) -> None:
    """Gradients, losses, and weights and statistics after 20 steps."""
    chosen = stack(name)
    x, y = chosen.data(samples)
    parts = grouped(chosen.build(), stages)
    tape = OneTape(parts, cross_entropy(), optimizer())
    with Pipeline(parts, microbatches, schedule, "inproc", recompute=recompute) as pipe:
        pipe.compile(optimizer(), cross_entropy())
        _, expected = tape.gradients(x, y, microbatches)
        assert difference(list(pipe.gradients(x, y).values()), expected) <= 1e-6
        for _ in range(STEPS):
            loss = pipe.train_on_batch(x, y)
            assert loss == pytest.approx(float(tape.train(x, y, microbatches)), rel=1e-5)
        ours, theirs = pipe.get_weights(), tape.weights()
    assert difference(ours, theirs) <= 1e-5
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 0.1)


def test_every_stack_is_there() -> None:
    """The zoo's newest stack too."""
    assert {row[0] for row in ROWS} == {found.name for found in STACKS}


@pytest.mark.parametrize("name", in_turn(["adam", "adamw"], 1, 2))
def test_adaptive_optimizers(name: str) -> None:
    """Where no gradient is only noise, optimizers that divide by its size agree too."""
    x, y = stack("dense").data(10)
    parts = grouped(stack("dense").build(), 3)
    make = {"adam": lambda: keras.optimizers.Adam(0.01), "adamw": lambda: keras.optimizers.AdamW(0.01)}[name]
    tape = OneTape(parts, cross_entropy(), make())
    with Pipeline(parts, 4, "1f1b", "inproc") as pipe:
        pipe.compile(make(), cross_entropy())
        for _ in range(STEPS):
            pipe.train_on_batch(x, y)
            tape.train(x, y, 4)
        assert difference(pipe.get_weights(), tape.weights()) <= 1e-5


@pytest.mark.gate
def test_processes_equal_one_tape() -> None:
    """In processes of their own, with another batch size after some updates: `verify` accepts 1e-6."""
    chosen = stack("attention")
    x, y = chosen.data(13)
    with Pipeline(grouped(chosen.build(), 3), 4, "1f1b", "auto", recompute=[False, True, False]) as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), cross_entropy())
        for samples in (8, 13):
            pipe.train_on_batch(x[:samples], y[:samples])
        report = pipe.verify(x, y)
    report.raise_if_failed()
    assert report.tolerance.relative <= 1e-6


@pytest.mark.gate
@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_recomputing_changes_nothing(run_eagerly: bool) -> None:
    """Dropout draws the same masks, statistics move once, seeds end where they would: losses and all variables agree.

    Eager: bit for bit. Compiled: within rounding, states of the random generators exactly.
    """
    x, y = stack("dense").data(10)
    keras.utils.set_random_seed(8)
    parts = [
        part((6,), layers.Dense(8), layers.Dropout(0.4), layers.BatchNormalization(momentum=0.7)),
        part((8,), layers.Dense(8, "relu"), layers.GaussianNoise(0.3), layers.Dropout(0.3)),
        part((8,), layers.BatchNormalization(momentum=0.8), layers.Dropout(0.2), layers.Dense(3)),
    ]
    variables = [variable for model in parts for variable in model.variables]
    start, seen = [variable.numpy() for variable in variables], []
    for recompute in (False, True, [False, True, False]):
        for variable, value in zip(variables, start, strict=True):  # they have the trained ones after a pipeline
            variable.assign(value)
        with Pipeline(parts, 4, "1f1b", "inproc", recompute=recompute) as pipe:
            pipe.compile(optimizer(), cross_entropy(), run_eagerly=run_eagerly)
            losses = [pipe.train_on_batch(x, y) for _ in range(3)]
            gradients = list(pipe.gradients(x, y).values())
            merged = pipe.merge()
        kept = {id(v) for v in merged.non_trainable_weights}
        states = [v.numpy() for v in merged.non_trainable_variables if id(v) not in kept]
        statistics = [v.numpy() for v in merged.non_trainable_weights]
        seen.append((losses, gradients, states, statistics, [v.numpy() for v in merged.trainable_variables]))
    plain = seen[0]
    assert len(plain[2]) == 4 and len(plain[3]) == 4
    for other in seen[1:]:
        assert_same_bits(other[2], plain[2], "seed state")
        if run_eagerly:
            assert other[0] == plain[0]
            for i in (1, 3, 4):
                assert_same_bits(other[i], plain[i], "value")
        else:
            assert other[0] == pytest.approx(plain[0], rel=1e-6)
            assert all(difference(other[i], plain[i]) <= 2e-6 for i in (1, 3, 4))

"""Long sequences in many windows: the same training, and memory that does not grow with the number of windows."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import SOAK

pytestmark = pytest.mark.gate

layers = keras.layers
MIB = 2**20


def pieces(batch: int, sequence: int, steps: int) -> tuple[list[tuple[Any, Any]], int]:
    """Batches of characters of Python's language reference with the characters after them, and how many kinds."""
    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = np.array([number[character] for character in text], dtype="int32")
    random, found = np.random.default_rng(1), []
    for _ in range(steps):
        starts = random.integers(0, len(codes) - sequence - 1, batch)
        rows = codes[starts[:, None] + np.arange(sequence + 1)]
        found.append((rows[:, :-1], rows[:, 1:]))
    return found, len(number)


def character_model(kinds: int, sequence: int) -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((sequence,), dtype="int32"),
            layers.Embedding(kinds, 8),
            layers.LSTM(12, return_sequences=True),
            layers.LSTM(12, return_sequences=True),
            layers.Dense(kinds),
        ]
    )


def compiled(twin: Any) -> Any:
    # Not Adam: Keras's own squares the rows of an embedding's gradient before it adds up those of one character.
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    twin.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return twin


def curve(twin: Any, batches: list[tuple[Any, Any]]) -> list[float]:
    return [float(np.asarray(twin.train_on_batch(x, y)).ravel()[0]) for x, y in batches]


def test_a_character_model_learns_the_same_in_windows_over_processes() -> None:
    """The issue's sizes are in examples/character_windows.py."""
    batches, kinds = pieces(batch=8, sequence=64, steps=25)
    with compiled(Pipeline.split(character_model(kinds, 64), stages=2, windows=8, microbatches=2)) as pipe:
        ours = curve(pipe, batches)
    theirs = curve(compiled(character_model(kinds, 64)), batches)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert theirs[-1] < 0.9 * theirs[0]


def resident(pid: int, what: str) -> int:
    """`VmRSS` or `VmHWM` of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


SAMPLES, UNITS, STEPS = 64, 192, 1
HELD = 8 * SAMPLES * UNITS * 4
"""Bytes that the tape of one window holds at the least: an LSTM's gates, products and states."""


def memory(windows: int, truncate: int | None) -> list[dict[str, int]]:
    """What two worker processes have after an update over so many short windows, and their peaks, in bytes."""
    keras.utils.set_random_seed(1)
    net = keras.Sequential(
        [
            keras.Input((None, 4)),
            layers.LSTM(UNITS, return_sequences=True, name="low"),
            layers.LSTM(UNITS, return_sequences=True, name="high"),
            layers.Dense(1),
        ]
    )
    x = np.random.default_rng(0).normal(size=(SAMPLES, windows * STEPS, 4)).astype("float32")
    with Pipeline.split(net, at=["low"], windows=windows, truncate=truncate, microbatches=1) as pipe:
        pipe.compile("sgd", "mse")
        pipe.train_on_batch(x, x[..., :1])
        pids = pipe.session.workers.driver().pids
        return [{what: resident(pid, what) for what in ("VmRSS", "VmHWM")} for pid in pids if pid is not None]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_is_flat_over_many_truncated_windows() -> None:
    """Truncation closes old tapes: after 400 windows (1000 in the soak) a worker has what it had after 100. Without
    it, tapes stay."""
    short, long, whole = memory(100, 4), memory(1000 if SOAK else 400, 4), memory(200, None)
    for few, many in zip(short, long, strict=True):
        for what in few:
            assert many[what] <= 1.05 * few[what], (what, few, many)
    for few, kept in zip(short, whole, strict=True):
        assert kept["VmHWM"] - few["VmHWM"] >= 0.5 * 100 * HELD, (few, kept)  # so the figures above could have failed

"""A character model over long sequences: windows beside one pass of the whole length.

Two LSTM layers read 256 characters of Python's own language reference (`pydoc_data.topics`) and predict the next one at
every place. Plain Keras reads them in one pass. The pipeline reads them in 8 windows, over 2 processes: while the upper
layer is at window t, the lower one is at window t + 1; states and their gradients go from window to window, so it is
the same training. The example checks that the loss stays the same, within 1e-5 of itself, at every one of 50 steps.

Then it measures, in fresh processes and each row several times (the medians are shown), what a step takes: its time,
and the peak resident memory of each process (`VmHWM`), in parentheses how much of that came with the steps.

    whole length      one process and two, no windows
    windows           as above; all tapes of a sequence are open at its end, so it saves no memory by itself
    recompute         only a window's inputs and states are kept, and its forward pass is computed again
    truncate          a state's gradient goes back through some windows only, so their tapes can be closed; another
                      gradient, for less memory

The exit status is 0 if the losses agree and fall.

    python examples/character_windows.py                                  # a few minutes
    python examples/character_windows.py --sequence 64 --units 16 --steps 10 --rounds 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import Pipeline

layers = keras.layers
ALLOWED = 1e-5
"""How far apart two losses may be, as a part of the loss."""
MIB = 2**20


def load_text() -> tuple[np.ndarray, int]:
    """The corpus as numbers (n,) int32, and how many different characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return np.array([number[character] for character in text], dtype="int32"), len(number)


def batches(text: np.ndarray, batch: int, sequence: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless random pieces: x (batch, sequence) and y, the same shifted by one; always the same ones."""
    random = np.random.default_rng(1)
    while True:
        starts = random.integers(0, len(text) - sequence - 1, batch)
        pieces = text[starts[:, None] + np.arange(sequence + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


def build(kinds: int, sequence: int, units: int) -> Any:
    """The model; always from the same seed."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((sequence,), dtype="int32"),
            layers.Embedding(kinds, 32, name="embedding"),
            layers.LSTM(units, return_sequences=True, name="low"),
            layers.LSTM(units, return_sequences=True, name="high"),
            layers.Dense(kinds, name="logits"),
        ]
    )


def compiled(twin: Any) -> Any:
    """A model or a pipeline, compiled for training."""
    # Not Adam: Keras's own squares the rows of an embedding's gradient before it adds up those of one character.
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    twin.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return twin


def losses(twin: Any, data: Iterator[Any], steps: int) -> list[float]:
    """The loss of every step."""
    found = []
    for _ in range(steps):
        value = twin.train_on_batch(*next(data))
        found.append(float(value[0] if isinstance(value, list) else value))
    return found


def resident(pid: int, what: str) -> int:
    """`VmRSS` or `VmHWM` of a process, in bytes; Linux."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no {what}; this measurement needs Linux")


def measured(model: Any, data: Iterator[Any], steps: int, options: Any) -> tuple[list[int], list[int], float]:
    """In fresh processes: each one's peak, how much of it came with the steps, and the median seconds of a step."""
    with compiled(Pipeline.split(model, microbatches=1, **options)) as pipe:
        x, y = next(data)
        pipe.evaluate(x[:1], y[:1], verbose=0)  # starts the processes
        pids = [pid for pid in pipe.session.workers.driver().pids if pid is not None]
        before = [resident(pid, "VmRSS") for pid in pids]
        times = []
        for _ in range(steps + 1):
            batch = next(data)
            begin = time.perf_counter()
            pipe.train_on_batch(*batch)
            times.append(time.perf_counter() - begin)
        peaks = [resident(pid, "VmHWM") for pid in pids]
    return peaks, [p - b for p, b in zip(peaks, before, strict=True)], statistics.median(times[1:])  # first: traced


def table(text: np.ndarray, kinds: int, given: argparse.Namespace) -> Table:
    """Memory and time of each way."""
    windows = {"stages": 2, "windows": given.windows}
    ways: dict[str, dict[str, Any]] = {
        "1 process, whole length": {"stages": 1},
        "2 processes, whole length": {"stages": 2},
        f"2 processes, {given.windows} windows": windows,
        "  and recompute": {**windows, "recompute": True},
        "  and truncate=2": {**windows, "truncate": 2},
    }
    found: dict[str, list[tuple[list[int], list[int], float]]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way, options in ways.items():
            model, data = build(kinds, given.sequence, given.units), batches(text, given.batch, given.sequence)
            found[way].append(measured(model, data, given.timed, options))
    drawn = Table(
        title=f"Sequence {given.sequence}, batch {given.batch}, {given.units} units; medians of {given.rounds}",
        title_justify="left",
    )
    for column in ("way", "peak of process 0, MiB", "peak of process 1, MiB", "time of a step, ms"):
        drawn.add_column(column, justify="left" if column == "way" else "right")
    for way, rounds in found.items():
        cells = []
        for place in range(2):
            values = [(p[place], g[place]) for p, g, _ in rounds if place < len(p)]
            medians = [statistics.median(v) / MIB for v in zip(*values, strict=True)]
            cells.append(f"{medians[0]:.0f} ({medians[1]:+.0f})" if medians else "")
        drawn.add_row(way, *cells, f"{1000 * statistics.median(t for _, _, t in rounds):.0f}")
    return drawn


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=256, help="characters (default 256)")
    parser.add_argument("--windows", type=int, default=8, help="into how many they are cut (default 8)")
    parser.add_argument("--units", type=int, default=128, help="of each layer (default 128)")
    parser.add_argument("--batch", type=int, default=32, help="samples (default 32)")
    parser.add_argument("--steps", type=int, default=50, help="updates that are compared (default 50)")
    parser.add_argument("--timed", type=int, default=5, help="updates that are measured (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is measured; 0: never (default 3)")
    return parser.parse_args()


def main() -> int:
    """Print both curves, the figures and the verdict; return the exit status."""
    given = arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    text, kinds = load_text()
    if given.rounds:
        console.print(table(text, kinds, given))
    shape = (given.batch, given.sequence)
    with compiled(
        Pipeline.split(build(kinds, given.sequence, given.units), stages=2, windows=given.windows, microbatches=1)
    ) as pipe:
        ours = losses(pipe, batches(text, *shape), given.steps)
    theirs = losses(compiled(build(kinds, given.sequence, given.units)), batches(text, *shape), given.steps)
    for step in sorted({0, given.steps // 4, given.steps // 2, 3 * given.steps // 4, given.steps - 1}):
        console.print(f"step {step + 1:3}: loss {ours[step]:.6f} in windows, {theirs[step]:.6f} in one pass by Keras")
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    console.print(f"Largest difference over {given.steps} steps: {apart:.1e} of the loss, allowed {ALLOWED:.0e}")
    good = apart <= ALLOWED and ours[-1] < ours[0]
    console.print("[bold green]OK[/]" if good else "[bold red]FAILED[/] the curves differ, or the loss does not fall")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Measure what a pipeline costs and gains here: step time against the same work in one process on one thread.

The model is N wide: 6 x Dense(N, relu), mean squared error, SGD, 8 microbatches. *One process* runs the same
microbatches in compiled functions (forward, loss and backward in one), with one thread, in a worker of its own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.pipeline import Pipeline

MICROBATCHES = 8
LAYERS = 6
WARM_UP = 5


@dataclass(frozen=True)
class StepTime:
    """The measured step times of one model size.

    Attributes:
        width: N.
        microbatch: Samples per microbatch.
        stages: How many processes.
        pipeline: Median seconds per step of the pipeline.
        single: Median seconds per step of one process, same microbatches, one thread.
        bound: The speed-up that the plan's bubble allows.
    """

    width: int
    microbatch: int
    stages: int
    pipeline: float
    single: float
    bound: float

    @property
    def speed_up(self) -> float:
        """Single over pipeline."""
        return self.single / self.pipeline


def make_model(width: int) -> Any:
    """6 x Dense(N, relu)."""
    return keras.Sequential(
        [keras.Input((width,)), *(keras.layers.Dense(width, activation="relu") for _ in range(LAYERS))]
    )


def median_time(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of `steps` calls, after a warm-up."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_step(width: int, microbatch: int, stages: int, steps: int) -> StepTime:
    """Time a pipeline and one process on the same batch, alternating, medians over all rounds."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((MICROBATCHES * microbatch, width), dtype="float32") for _ in range(2))
    rounds: dict[int, list[float]] = {1: [], stages: []}
    pipes = {
        count: Pipeline.split(make_model(width), stages=count, microbatches=MICROBATCHES, threads=1) for count in rounds
    }
    try:
        for pipe in pipes.values():
            pipe.compile(optimizer=keras.optimizers.SGD(0.001), loss="mean_squared_error")
        for _ in range(3):
            for count, pipe in pipes.items():
                rounds[count].append(median_time(lambda pipe=pipe: pipe.train_on_batch(x, y), steps))  # type: ignore[misc]
    finally:
        for pipe in pipes.values():
            pipe.close()
    bound = stages * MICROBATCHES / (MICROBATCHES + stages - 1)
    return StepTime(width, microbatch, stages, statistics.median(rounds[stages]), statistics.median(rounds[1]), bound)


def bench_table(rows: Sequence[StepTime]) -> Table:
    """The figures as a rich table."""
    found = Table(title=f"{LAYERS} x Dense(N, relu), SGD, {MICROBATCHES} microbatches, one thread per process")
    for name in ("N", "microbatch", "stages", "one process", "pipeline", "speed-up", "bubble bound"):
        found.add_column(name, justify="right")
    for row in rows:
        found.add_row(
            str(row.width),
            str(row.microbatch),
            str(row.stages),
            f"{row.single * 1e3:.2f} ms",
            f"{row.pipeline * 1e3:.2f} ms",
            f"{row.speed_up:.2f}x",
            f"{row.bound:.2f}x",
        )
    return found


def run(sizes: Sequence[tuple[int, int]], stages: int, steps: int, output: Path | None) -> int:
    """Measure, print, and write JSON if asked."""
    rows = [measure_step(width, microbatch, stages, steps) for width, microbatch in sizes]
    Console().print(bench_table(rows))
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    return 0

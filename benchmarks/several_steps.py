"""Steps that need no round trip: `fit` with `steps_per_execution=k` beside one step an execution, in the same run.

    python benchmarks/several_steps.py                       # N = 64 and 512, k = 1 and 16
    python benchmarks/several_steps.py --sizes 64x32 --several 1 4 16

The model is that of `benchmarks/bare_step.py`, in two stages of one thread each. Rounds alternate; a round is one epoch
of `fit` over the same batches, Keras's loop and data included. Printed are the least and the median time of a step, and
the median of the rounds' ratios to the first k.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STEPS = 64


def compare(width: int, microbatch: int, several: list[int], rounds: int) -> dict[int, list[float]]:
    """{k: milliseconds of a step in each round}."""
    import keras
    import numpy as np

    from pipeline import Pipeline
    from pipeline.commands.bench import make_model

    batch = 8 * microbatch
    x, y = (np.random.default_rng(k).standard_normal((STEPS * batch, width), dtype="float32") for k in (0, 1))
    fit: dict[str, Any] = {"batch_size": batch, "shuffle": False, "verbose": 0}
    found: dict[int, list[float]] = {k: [] for k in several}
    with ExitStack() as stack:
        pipes = {}
        for k in several:
            pipe = stack.enter_context(Pipeline.split(make_model(width), stages=2, microbatches=8, threads=1))
            pipe.compile(keras.optimizers.SGD(1e-3), "mean_squared_error", steps_per_execution=k)
            pipe.fit(x[: 16 * batch], y[: 16 * batch], **fit)
            pipes[k] = pipe
        for _ in range(rounds):
            for k, pipe in pipes.items():
                begin = time.perf_counter()
                pipe.fit(x, y, **fit)
                found[k].append((time.perf_counter() - begin) / STEPS * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures what a step takes when several go to the workers at once.",
        epilog="example: python benchmarks/several_steps.py --sizes 64x32 --several 1 4 16",
    )
    parser.add_argument("--sizes", nargs="+", default=["64x32", "512x64"], help="N x microbatch")
    parser.add_argument("--several", nargs="+", type=int, default=[1, 16], help="values of steps_per_execution")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each, by turns")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for size in arguments.sizes:
        found = compare(*map(int, size.split("x")), arguments.several, arguments.rounds)
        first = found[arguments.several[0]]
        for k, times in found.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(times, first, strict=True))
            print(
                f"{size}, steps_per_execution={k}: {min(times):.2f} ms at the least, "
                f"{statistics.median(times):.2f} ms in the middle, {ratio:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()

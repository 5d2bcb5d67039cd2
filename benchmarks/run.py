"""Measure everything that benchmarks/README.md states, and write its table.

    make bench                                        # the peer too, after `make peer`
    python benchmarks/run.py --write                  # put the tables into benchmarks/README.md
    python benchmarks/run.py --only memory --quick    # see that one of them can be measured here

Figures are medians; ratios are taken within one run, in which both sides alternate, so that a noisy machine disturbs
them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

TABLES = ("steps", "stage", "start", "transport", "memory")
SIZES = ((64, 32), (512, 64), (1024, 128))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def peer_case(python: Path, size: tuple[int, int], steps: int) -> dict[str, Any]:
    """The peer's figures for one size: torch.distributed.pipelining 1F1B over gloo, and its own single process."""
    command = [
        str(python),
        str(ROOT / "benchmarks/peer_torch.py"),
        f"--case={size[0]}x{size[1]}",
        f"--steps={max(20, steps)}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    case: dict[str, Any] = json.loads(found.stdout)["cases"][0]
    return case


def step_times(python: Path | None, steps: int, rounds: int) -> str:
    """Step time against one process of our own, and against the peer, in alternating rounds."""
    from pipeline.commands.bench import measure_step

    rows = []
    for size in SIZES:
        ours, peers = [], []
        for _ in range(rounds):
            ours.append(measure_step(*size, stages=2, steps=steps))
            if python is not None:
                peers.append(peer_case(python, size, steps))
        speed_up = median([run.speed_up for run in ours])
        row = [
            f"{size[0]} x {size[1]}",
            f"{median([run.single for run in ours]) * 1e3:.2f} ms",
            f"{median([run.pipeline for run in ours]) * 1e3:.2f} ms",
            f"{speed_up:.2f}x",
            f"{ours[0].bound:.2f}x",
        ]
        if peers:
            theirs = [case["pipeline"]["median_ms"] for case in peers]
            ratio = median([t / (run.pipeline * 1e3) for t, run in zip(theirs, ours, strict=True)])
            row += [f"{median(theirs):.2f} ms", f"{median([c['speedup'] for c in peers]):.2f}x", f"{ratio:.2f}x"]
        else:
            row += ["not run", "", ""]
        rows.append(row)
    header = ["N x microbatch", "one process", "2 stages", "speed-up", "bubble bound", "peer, 2 stages"]
    return markdown([*header, "peer's speed-up", "peer / ours"], rows)


def timed(action: Callable[[], Any], count: int) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return median(times)


def tiny_stage() -> str:
    """Forward and backward of a compiled stage, beside one fused compiled function, in microseconds."""
    import gc

    import keras
    import numpy as np
    import tensorflow as tf

    from stages.stage import Stage
    from stages.tape.contract import PassKey
    from stages.tape.direct_calls import direct

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    x = tf.constant(np.random.default_rng(0).standard_normal((32, 64), dtype="float32"))
    variables = [v.value for v in model.trainable_variables]
    sums = [tf.Variable(tf.zeros_like(v)) for v in variables]

    def fused(inputs: Any, output_gradients: Any) -> list[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([inputs, *variables])
            out = model(inputs, training=True)
        dx, *gradients = tape.gradient(out, [inputs, *variables], output_gradients)
        for total, gradient in zip(sums, gradients, strict=True):
            total.assign_add(gradient)
        return [out, dx]

    spec = tf.TensorSpec((None, 64), tf.float32)
    plain = tf.function(fused, input_signature=(spec, spec), autograph=False)
    least = direct(fused, (spec, spec))
    stages = {recompute: Stage(model, run_eagerly=False, recompute=recompute) for recompute in (False, True)}

    def handed_over(stage: Stage) -> None:
        stage.forward_flat((x,), PassKey(0), training=True)
        stage.backward_flat((x,), PassKey(0))

    ways: dict[str, Callable[[], Any]] = {
        "stage, tape kept": lambda: handed_over(stages[False]),
        "stage, recomputing": lambda: handed_over(stages[True]),
        "fused, as a tf.function": lambda: plain(x, x),
        "fused, called directly": lambda: least(x, x),
    }
    for action in ways.values():
        timed(action, 50)
    gc.freeze()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(9):
        for name, action in ways.items():
            found[name].append(timed(action, 100) * 1e6)
    base = found["fused, called directly"]
    rows = []
    for name, times in found.items():
        ratio = median([a / b for a, b in zip(times, base, strict=True)])
        rows.append([name, f"{median(times):.0f} us", f"{ratio:.2f}x"])
    return markdown(["4 x Dense(64), batch 32, forward + backward", "time", "to the fused function"], rows)


_START = """
import time, keras, numpy as np
from pipeline import Pipeline
x = np.zeros((16, 8), "float32")
def first():
    model = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8) for _ in range(4))])
    begin = time.perf_counter()
    pipe = Pipeline.split(model, stages=4)
    pipe.compile("sgd", "mean_squared_error")
    pipe.train_on_batch(x, x)
    took = time.perf_counter() - begin
    pipe.close()
    return took
print("FOUND", first(), min(first() for _ in range(3)))
"""


def start_up(rounds: int) -> str:
    """Seconds from Pipeline(...) to the first finished step, 4 stages of a tiny model, in fresh user processes."""
    cold, warm = [], []
    for _ in range(rounds):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", _START], capture_output=True, text=True, check=True, env=environment, timeout=300
        )
        line = next(line for line in run.stdout.splitlines() if line.startswith("FOUND"))
        cold.append(float(line.split()[1]))
        warm.append(float(line.split()[2]))
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tensorflow, keras"], capture_output=True, check=True)
    imported = time.perf_counter() - begin
    rows = [
        ["cold: the fork server has yet to import TensorFlow", f"{median(cold):.2f} s"],
        ["warm: another pipeline of the same process", f"{median(warm):.2f} s"],
        ["for comparison: one `import tensorflow, keras` in a fresh process", f"{imported:.2f} s"],
    ]
    return markdown(["4 stages, `Pipeline(...)` to the first finished step", "time"], rows)


def transport() -> str:
    """The ways of one host beside bare pyzmq, as benchmarks/transport.py measures it."""
    command = [sys.executable, str(ROOT / "benchmarks/transport.py")]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=900, env={**os.environ, "COLUMNS": "110"}
    )
    return "```text\n" + run.stdout.strip() + "\n```"


def memory(quick: bool, rounds: int) -> str:
    """The peak memory of every worker beside bound and prediction, as benchmarks/memory.py measures it."""
    from benchmarks import memory as peaks

    setting = peaks.QUICK if quick else peaks.FULL
    return "\n\n".join(markdown(*make(setting, rounds)) for make in (peaks.table, peaks.predictions))


def written(page: str, tables: dict[str, str]) -> str:
    """The page with these tables between their markers, `<!-- name -->` and `<!-- end of name -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"benchmarks/README.md has no place for the table {name!r}: {begin} ... {end}")
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="an interpreter with torch, for the peer (make peer)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--quick", action="store_true", help="5 steps, one round, the smaller memory setting")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args()
    steps, rounds = (5, 1) if options.quick else (options.steps, options.rounds)
    ways: dict[str, Callable[[], str]] = {
        "steps": lambda: step_times(options.python, steps, rounds),
        "stage": tiny_stage,
        "start": lambda: start_up(rounds),
        "transport": transport,
        "memory": lambda: memory(options.quick, rounds),
    }
    chosen = [options.only] if options.only else list(ways)
    if options.python is None and "steps" in chosen:
        print("the peer is not measured: no interpreter with torch was given (make peer, then make bench)\n")
    tables = {}
    for name in chosen:
        tables[name] = ways[name]()
        print(tables[name], end="\n\n", flush=True)
    if options.write:
        page = ROOT / "benchmarks/README.md"
        page.write_text(written(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

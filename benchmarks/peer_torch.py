"""The peer's step time: ``torch.distributed.pipelining`` 1F1B over gloo, beside one process of the same library.

It stands alone and imports nothing of the project, since it runs under an environment of its own that has PyTorch
(`make peer`); ``benchmarks/run.py --python .venv-peer/bin/python`` calls it and puts its figures into the table. The
case is the one that the project measures of itself: six times Linear(N) and ReLU, mean squared error, SGD, the batch in
M microbatches, one thread a process.

    .venv-peer/bin/python benchmarks/peer_torch.py                     # all cases, JSON on standard output
    .venv-peer/bin/python benchmarks/peer_torch.py --case 64x32 --steps 50

For each case the JSON holds, in milliseconds a step, median and least:

- ``pipeline``: two processes, 1F1B; the interval between the ends of two consecutive steps in the slower process;
- ``single_microbatches``: one process that runs the same microbatches one after another;
- ``single_full_batch``: one process, the whole batch at once;
- ``speedup``: single_microbatches over pipeline, by medians;

and ``loss``, the first step's, which all three must agree on: a figure of another computation would be worth nothing.

The single process runs in a child as well, never while the pipeline runs, so that both have the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

LAYERS = 6
CASES = ("64x32", "512x64", "1024x128")
LEARNING_RATE = 0.01
SEED = 1
TIMEOUT = 900.0  # seconds for one case, start-up and warm-up included


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure torch.distributed.pipelining 1F1B over gloo against one process; prints JSON.",
        epilog="example: .venv-peer/bin/python benchmarks/peer_torch.py --case 64x32 --steps 50",
    )
    parser.add_argument("--case", action="append", metavar="NxB", help=f"width x microbatch; default {' '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default 30)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default 5)")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches a step (default 8)")
    parser.add_argument("--stages", type=int, default=2, choices=(2, 3, 6), help="processes (default 2)")
    parser.add_argument("--role", choices=("pipeline", "single"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.steps, options.warmup, options.microbatches) < 1:
        parser.error("--steps, --warmup and --microbatches must be at least 1")
    try:
        options.cases = [tuple(int(part) for part in case.split("x")) for case in options.case or CASES]
        if not all(len(case) == 2 and min(case) > 0 for case in options.cases):
            raise ValueError
    except ValueError:
        parser.error(f"--case must be WIDTHxMICROBATCH such as 64x32, not {options.case}")
    return options


# -- in the children, the only ones that import torch ------------------------------------------------------------


def build(width: int, first: int, last: int) -> Any:
    """Layers ``first`` to ``last`` (exclusive) of the model, with the same weights whichever process builds them."""
    import torch

    layers: list[Any] = []
    for index in range(first, last):
        torch.manual_seed(SEED + index)
        layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def data(width: int, batch: int) -> tuple[Any, Any]:
    """Inputs and targets, each float32 (batch, width)."""
    import torch

    torch.manual_seed(SEED + LAYERS)
    return torch.randn(batch, width), torch.randn(batch, width)


def intervals(step: Callable[[], float | None], warmup: int, steps: int) -> tuple[list[float], float | None]:
    """Milliseconds between the ends of consecutive measured steps, and the loss of the very first step."""
    loss = step()
    for _ in range(warmup - 1):
        step()
    ends = [time.perf_counter()]
    for _ in range(steps):
        step()
        ends.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(ends)], loss


def measure_single(width: int, microbatch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process, the same microbatches one after another, then the whole batch at once."""
    import torch

    batch = microbatch * options.microbatches
    inputs, targets = data(width, batch)
    criterion = torch.nn.MSELoss()

    def stepper(pieces: int) -> Callable[[], float]:
        model = build(width, 0, LAYERS)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        chunks = list(zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True))

        def step() -> float:
            optimizer.zero_grad()
            total = 0.0
            for x, y in chunks:
                loss = criterion(model(x), y)
                (loss / pieces).backward()
                total += loss.item() / pieces
            optimizer.step()
            return total

        return step

    result: dict[str, Any] = {}
    for name, pieces in (("single_microbatches", options.microbatches), ("single_full_batch", 1)):
        result[name], result[f"{name}_loss"] = intervals(stepper(pieces), options.warmup, options.steps)
    return result


def measure_pipeline(width: int, microbatch: int, options: argparse.Namespace) -> dict[str, Any]:
    """This process's part of the pipeline: its stage, driven by 1F1B."""
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, stages = options.rank, options.stages
    store = dist.FileStore(str(options.folder / "store"), stages)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=stages)
    depth = LAYERS // stages
    model = build(width, rank * depth, (rank + 1) * depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    stage = PipelineStage(model, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, options.microbatches, loss_fn=torch.nn.MSELoss())
    inputs, targets = data(width, microbatch * options.microbatches)

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[Any] = []
        if rank == 0:
            schedule.step(inputs)
        elif rank == stages - 1:
            schedule.step(target=targets, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        return sum(loss.item() for loss in losses) / len(losses) if losses else None

    times, loss = intervals(step, options.warmup, options.steps)
    dist.barrier()
    dist.destroy_process_group()
    return {"times": times, "loss": loss}


def child(options: argparse.Namespace) -> None:
    """Measure in this process and leave the result in the folder."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    (width, microbatch) = options.cases[0]
    measure = measure_pipeline if options.role == "pipeline" else measure_single
    result = {"torch": torch.__version__, **measure(width, microbatch, options)}
    (options.folder / f"{options.role}-{options.rank}.json").write_text(json.dumps(result))


# -- in the process that the caller starts -----------------------------------------------------------------------


def start(role: str, case: tuple[int, int], options: argparse.Namespace, folder: Path, processes: int) -> list[Any]:
    """Run ``processes`` children to their end and return what each measured.

    Raises:
        SystemExit: when a child fails or the time is over; the others are ended first.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    shared = [f"--{name}={getattr(options, name)}" for name in ("steps", "warmup", "microbatches", "stages")]
    shared += [f"--case={case[0]}x{case[1]}", f"--role={role}", f"--folder={folder}"]
    children = [
        subprocess.Popen([sys.executable, __file__, *shared, f"--rank={rank}"], env=environment, stdout=sys.stderr)
        for rank in range(processes)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.poll() is None for process in children):
            failed = [process.returncode for process in children if process.returncode]
            if failed or time.monotonic() > deadline:
                sys.exit(f"peer_torch: {role} {case}: " + (f"exit status {failed[0]}" if failed else "out of time"))
            time.sleep(0.05)
        if any(process.returncode for process in children):
            sys.exit(f"peer_torch: {role} {case}: exit status {[process.returncode for process in children]}")
    finally:
        for process in children:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{role}-{rank}.json").read_text()) for rank in range(processes)]


def summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": round(statistics.median(times), 3), "least_ms": round(min(times), 3)}


def measure_case(case: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements of one case, checked to be of the same computation."""
    with tempfile.TemporaryDirectory() as name:
        ranks = start("pipeline", case, options, Path(name), options.stages)
        (single,) = start("single", case, options, Path(name), 1)
    losses = [ranks[-1]["loss"], single["single_microbatches_loss"], single["single_full_batch_loss"]]
    if max(losses) - min(losses) > 1e-5 * max(losses):
        sys.exit(f"peer_torch: {case}: the first losses differ, so the computations do: {losses}")
    slowest = max((rank["times"] for rank in ranks), key=statistics.median)
    result = {
        "width": case[0],
        "microbatch": case[1],
        "pipeline": summary(slowest),
        "single_microbatches": summary(single["single_microbatches"]),
        "single_full_batch": summary(single["single_full_batch"]),
        "loss": losses[0],
        "torch": single["torch"],
    }
    result["speedup"] = round(result["single_microbatches"]["median_ms"] / result["pipeline"]["median_ms"], 3)
    return result


def main() -> None:
    options = parse()
    if options.role:
        child(options)
        return
    cases = [measure_case(case, options) for case in options.cases]
    report = {
        "peer": "torch.distributed.pipelining Schedule1F1B over gloo",
        "torch": cases[0]["torch"],
        "python": platform.python_version(),
        "layers": LAYERS,
        "stages": options.stages,
        "microbatches": options.microbatches,
        "steps": options.steps,
        "cases": [{key: value for key, value in case.items() if key != "torch"} for case in cases],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

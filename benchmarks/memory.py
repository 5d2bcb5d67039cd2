"""Measure the peak memory of every worker under several schedules, beside what is predicted and the plan's bound.

The model is a stack of narrow `Dense` layers on many rows, so that a layer's activations are hundreds of times its
weights. What is measured is `VmHWM`, the kernel's own high-water mark of a worker's resident memory, less `VmRSS` at
the moment before the steps:

1. Each case has fresh workers: the allocator keeps the pages that earlier steps freed, so later ones show no growth.
2. One step with one row per microbatch goes before. It traces every function and fills nothing.
3. Then the mark is set back (`5` to `/proc/<pid>/clear_refs`), so that it is not that of building and tracing. `VmRSS`
   afterwards would say what the allocator kept, which need not be the peak; `VmHWM` by itself counts TensorFlow, too.

The bound is the plan's number of open tapes times what a tape holds, and once what the microbatch at work needs:

               open tape                           at work, once
    kept       inputs, kept tensors, outputs       gradients of the kept tensors
    recompute  inputs, outputs                     the kept tensors and their gradients
    fused      inputs and their gradients          the kept tensors and their gradients

*Fused* is the compiled last stage: its forward, loss and backward are one function. Where gradients come from another
worker, one may wait in the inbox for every open tape; at work there are also the tensors on their way, and the first
and the last worker hold the batch that they were sent.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline import Pipeline
from pipeline.cutting.stage_prediction import peak_bytes
from pipeline.plan.schedules import build_plan
from stages.tape.graph_split import Traced, split_functions

MIB = 2**20
FEATURES = 8


@dataclass(frozen=True)
class Setting:
    """How much is computed.

    Attributes:
        rows: Samples per microbatch.
        width: Units of a layer.
        layers: Layers per stage.
        stages: Workers.
        microbatches: Microbatches per step.
        steps: Steps whose peak is taken.
    """

    rows: int = 16384
    width: int = 64
    layers: int = 8
    stages: int = 4
    microbatches: int = 8
    steps: int = 3


FULL = Setting()
QUICK = Setting(rows=8192, steps=1)


@dataclass(frozen=True)
class Way:
    """A schedule, with or without recomputation."""

    schedule: str
    recompute: bool

    def __str__(self) -> str:
        return self.schedule + (", recompute" if self.recompute else "")


WAYS = (Way("gpipe", False), Way("1f1b", False), Way("1f1b", True))
WAYS_PREDICTED = (
    *WAYS,
    Way("gpipe", True),
    *(Way(name, again) for name in ("zb-h1", "zb-h2") for again in (False, True)),
)
"""Of which what workers take is predicted, action by action; the bound knows no halves of backwards."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one microbatch in one stage.

    Attributes:
        inputs: What the stage takes.
        outputs: What it gives.
        kept: What its backward needs of its forward; weights do not count, as they are there anyway.
        together: The three without what is in several of them.
    """

    inputs: int
    outputs: int
    kept: int
    together: int


@dataclass(frozen=True)
class Worker:
    """What one worker was predicted to take, and took.

    Attributes:
        tapes: The most open tapes in the plan.
        bound: Bytes.
        growth: Measured bytes; the median over the rounds.
    """

    tapes: int
    bound: int
    growth: float


@dataclass(frozen=True)
class Row:
    """One way of training in one mode: all workers, and the median seconds of a step."""

    way: Way
    eager: bool
    workers: tuple[Worker, ...]
    seconds: float


def make_pipeline(setting: Setting, way: Way, sample: Any = None) -> Pipeline:
    """A stack of Dense(width, relu), the same number of layers in each stage; one output."""
    layers = [
        keras.layers.Dense(setting.width, activation="relu", name=f"dense_{i}")
        for i in range(setting.stages * setting.layers - 1)
    ]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers, keras.layers.Dense(1, name="out")])
    cuts = [f"dense_{setting.layers * stage - 1}" for stage in range(1, setting.stages)]
    options = {"schedule": way.schedule, "recompute": way.recompute, "threads": 1}
    return Pipeline.split(model, at=cuts, microbatches=setting.microbatches, sample=sample, **options)


def predicted(setting: Setting, way: Way) -> list[int]:
    """For each worker the bytes that it should take at most beyond its weights, compiled, by `Pipeline.prediction`."""
    sample = np.zeros((setting.rows, FEATURES), "float32")
    with make_pipeline(setting, way, sample) as pipe:
        prediction = pipe.prediction
    assert prediction is not None
    found = [
        stage.under_way + peak_bytes(prediction.stages, program)
        for stage, program in zip(prediction.stages, prediction.plan.programs, strict=True)
    ]
    found[0] += setting.microbatches * sample.nbytes
    return found


def sizes(model: Any, rows: int) -> Sizes:
    """What one microbatch of `rows` samples takes in a stage, from the graph that the compiled stage is cut in."""
    found: list[Traced] = []
    inputs: list[Any] = []

    def joint(*tensors: Any) -> Traced:
        variables = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([*tensors, *variables])
            outputs = keras.tree.flatten(model(*tensors, training=True))
        seeds = [tf.compat.v1.placeholder(output.dtype, output.shape) for output in outputs]
        gradients = tape.gradient(outputs, [*tensors, *variables], output_gradients=seeds)
        inputs.extend(tensors)
        found.append(Traced(outputs, seeds, gradients))
        return found[0]

    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    kept = [t for t in split_functions(joint, signature, list).kept if t.op.type != "ReadVariableOp"]

    def total(tensors: Sequence[Any]) -> int:
        unique = {tensor.name: tensor for tensor in tensors}.values()
        return sum(prod(rows if size is None else size for size in t.shape) * t.dtype.size for t in unique)

    outputs = found[0].outputs
    return Sizes(total(inputs), total(outputs), total(kept), total([*inputs, *outputs, *kept]))


def bound(size: Sizes, tapes: int, *, recompute: bool, fused: bool, batch: int) -> int:
    """Bytes that a worker needs at most beyond its weights, as the module's table says.

    Args:
        size: One microbatch of its stage.
        tapes: The most that the plan has open at once.
        recompute: Only inputs are kept.
        fused: Forward, loss and backward are one function.
        batch: Bytes that the driver sent it.
    """
    if fused:
        held = 2 * size.inputs
    elif recompute:
        held = size.inputs + 2 * size.outputs
    else:
        held = size.together + size.outputs
    once = size.kept + (size.kept if fused or recompute else 0)
    under_way = 2 * (size.inputs + size.outputs)
    return tapes * held + once + under_way + batch


def bounds(setting: Setting, way: Way, eager: bool) -> Iterator[tuple[int, int]]:
    """For each worker the open tapes of the plan and the bytes that follow from them."""
    plan = build_plan(way.schedule, setting.stages, setting.microbatches)
    with make_pipeline(setting, way) as pipe:
        models = [segment.model for segment in pipe.segments]
    for stage, (model, tapes) in enumerate(zip(models, plan.peak_in_flight(), strict=True)):
        size = sizes(model, setting.rows)
        last = stage == setting.stages - 1
        driver = size.inputs * (stage == 0) + size.outputs * last  # a target is like its output
        batch = driver * setting.microbatches
        yield tapes, bound(size, tapes, recompute=way.recompute, fused=last and not eager, batch=batch)


def resident(pid: int, what: str) -> int:
    """`VmRSS` or `VmHWM` of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/{pid}/status has no {what}; this benchmark needs Linux")


class Growth:
    """How far a process's resident memory rises above what it is now.

    Args:
        pid: A process of this user.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the mark is now what is resident now
        self._before = resident(pid, "VmRSS")

    def peak(self) -> int:
        """The highest so far, in bytes."""
        return resident(self._pid, "VmHWM") - self._before


def growths(setting: Setting, way: Way, eager: bool) -> tuple[list[int], float]:
    """For each worker the peak of some steps beyond what it had before, in bytes; and the median seconds of a step."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((setting.microbatches * setting.rows, FEATURES), dtype="float32")
    y = x[:, :1].copy()
    with make_pipeline(setting, way) as pipe:
        pipe.compile(optimizer=keras.optimizers.SGD(0.001), loss="mean_squared_error", run_eagerly=eager)
        pipe.train_on_batch(x[: setting.microbatches], y[: setting.microbatches])
        workers = [Growth(pid) for pid in pipe.session.workers.driver().pids if pid is not None]
        times = []
        for _ in range(setting.steps):
            begin = time.perf_counter()
            pipe.train_on_batch(x, y)
            times.append(time.perf_counter() - begin)
        peaks = [worker.peak() for worker in workers]
    return peaks, statistics.median(times)


def measure(setting: Setting, rounds: int, modes: Sequence[bool] = (False, True)) -> list[Row]:
    """Every way in every mode (`eager` or not), in alternating rounds; medians."""
    cases = [(way, eager) for eager, way in itertools.product(modes, WAYS)]
    found: dict[tuple[Way, bool], list[tuple[list[int], float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(growths(setting, *case))
    rows = []
    for way, eager in cases:
        peaks = zip(*(run for run, _ in found[way, eager]), strict=True)
        workers = tuple(
            Worker(tapes, limit, statistics.median(peak))
            for (tapes, limit), peak in zip(bounds(setting, way, eager), peaks, strict=True)
        )
        rows.append(Row(way, eager, workers, statistics.median(seconds for _, seconds in found[way, eager])))
    return rows


def predictions(setting: Setting, rounds: int) -> tuple[list[str], list[list[str]]]:
    """The header and the cells: measured MiB beside those that were predicted, compiled, medians of the rounds."""
    rows = []
    for way in WAYS_PREDICTED:
        peaks = zip(*(growths(setting, way, eager=False)[0] for _ in range(rounds)), strict=True)
        cells = [
            f"{taken / MIB:.0f} of {size / MIB:.0f} ({taken / size:.2f})"
            for taken, size in zip(map(statistics.median, peaks), predicted(setting, way), strict=True)
        ]
        rows.append([str(way), *cells])
    return ["MiB at the peak, of those predicted", *(f"worker {i}" for i in range(setting.stages))], rows


def table(setting: Setting, rounds: int) -> tuple[list[str], list[list[str]]]:
    """The header and the cells: measured MiB, the bound, and the tapes that it follows from."""
    header = [
        "MiB at the peak, of the bound (open tapes)",
        *(f"worker {i}" for i in range(setting.stages)),
        "step",
    ]
    rows = [
        [
            f"{row.way}, {'eager' if row.eager else 'compiled'}",
            *(f"{w.growth / MIB:.0f} of {w.bound / MIB:.0f} ({w.tapes})" for w in row.workers),
            f"{row.seconds:.2f} s",
        ]
        for row in measure(setting, rounds)
    ]
    return header, rows

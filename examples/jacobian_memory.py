"""Jacobians explode with size: know it before, refuse it, or work in blocks (case A3).

dL/dW is as large as W. dOut/dW, which the chain rule multiplies it from, is size(Out) times as large. This example

    1. says what the Jacobians would take, from shapes alone, for batches up to one that no machine could hold;
    2. shows the refusal above a limit, with the figure;
    3. evaluates the same Jacobians in blocks of rows within that limit, and measures that it stays within it;

and ends by checking itself: exit status 0 if the figures are right, the refusal came before anything was evaluated, and
the blocked gradients equal those of one tape.

    python examples/jacobian_memory.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from stages.jacobian.chain_rule import MemoryLimitExceeded, chain_rule, jacobian_bytes
from stages.jacobian.memory import readable_bytes

layers = keras.layers
MIB = 1 << 20
LIMIT = 192 * MIB
BATCH = 16
TOLERANCE = 1e-6
"""Of the largest |gradient|: what the order of summation may change in float32."""


def build() -> list[keras.Model]:
    """Two segments; the wider one has 65 792 weights and biases."""
    return [
        keras.Sequential([keras.Input((256,)), layers.Dense(256, activation="relu")], name="bottom"),
        keras.Sequential([keras.Input((256,)), layers.Dense(10, activation="softmax")], name="top"),
    ]


def sizes(segments: list[keras.Model]) -> Table:
    """What it would take, by batch size; nothing is run."""
    drawn = Table(title="What the Jacobians take, from shapes alone")
    for heading in ("batch", "dL/dvariables", "dOut/dvariables held", "needed to build them"):
        drawn.add_column(heading, justify="right")
    gradients = sum(4 * int(np.prod(v.shape)) for segment in segments for v in segment.trainable_variables)
    for batch in (1, BATCH, 256, 4096):
        estimate = jacobian_bytes(segments, tf.TensorSpec((batch, 256), tf.float32), independent_samples=True)
        figures = (gradients, estimate.held, estimate.needed)
        drawn.add_row(str(batch), *(readable_bytes(figure) for figure in figures))
    return drawn


def resident(field: str) -> int | None:
    """Bytes of resident memory of this process (VmRSS now, VmHWM at its peak); None where the system does not say."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found.group(1)) * 1024


def main() -> int:
    """Show the three steps; return the exit status."""
    keras.utils.set_random_seed(1)
    console = Console(width=None if sys.stdout.isatty() else 130)
    segments = build()
    x = tf.random.normal((BATCH, 256))
    y = tf.random.uniform((BATCH,), 0, 10, tf.int32)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy()
    wrong: list[str] = []

    console.print(sizes(segments))
    estimate = jacobian_bytes(segments, x, independent_samples=True)
    expected = (BATCH * 256) * (256 * 256 + 256) * 4  # outputs of the bottom x its weights and biases x float32
    if estimate.held != expected:
        wrong.append(f"the estimate says {estimate.held} bytes, counted by hand it is {expected}")

    console.print(f"\nmemory_limit = {readable_bytes(LIMIT)}:")
    try:
        chain_rule(segments, x, lambda out: cross_entropy(y, out), memory_limit=LIMIT)
        wrong.append("Jacobians above the limit were evaluated")
    except MemoryLimitExceeded as refused:
        console.print(f"refused: {refused}", highlight=False)
        if refused.needed != estimate.needed:
            wrong.append(f"the refusal says {refused.needed} bytes, the estimate {estimate.needed}")

    before = resident("VmRSS")
    result = chain_rule(segments, x, lambda out: cross_entropy(y, out), memory_limit=LIMIT, blocked="auto")
    peak = resident("VmHWM")
    console.print()
    for part in result.segments:
        how = f"in {part.blocks} blocks of rows" if part.blocks else "whole"
        console.print(f"{part.name}: {readable_bytes(part.jacobians.most)} of Jacobians, evaluated {how}")
    if result.segments[0].blocks < 2:
        wrong.append("the bottom's Jacobians should have needed several blocks")
    if before is not None and peak is not None:
        console.print(f"memory of this process grew by at most {readable_bytes(peak - before)}")
        if peak - before > LIMIT:
            wrong.append(f"the blocked evaluation took {readable_bytes(peak - before)}, more than the limit")

    with tf.GradientTape() as tape:
        value = cross_entropy(y, segments[1](segments[0](x, training=True), training=True))
    variables = [v for segment in segments for v in segment.trainable_variables]
    found = [g for part in result.segments for g in part.gradients.values()]
    reference = [g.numpy() for g in tape.gradient(value, [v.value for v in variables])]
    largest = max(float(np.abs(g).max()) for g in reference)
    for variable, ours, theirs in zip(variables, found, reference, strict=True):
        off = float(np.abs(ours - theirs).max()) / largest if ours is not None else float("inf")
        console.print(f"{variable.path}: {off:.1e} of the largest gradient away from one tape")
        if not off <= TOLERANCE:
            wrong.append(f"{variable.path} is {off:.1e} away from one tape, allowed {TOLERANCE:.0e}")

    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not wrong:
        console.print(
            f"[bold green]OK[/] {readable_bytes(estimate.needed)} said beforehand, refused above the limit, and "
            f"evaluated in blocks within {readable_bytes(LIMIT)}; the gradients are those of one tape."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

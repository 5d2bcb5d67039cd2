"""Two models, two tapes, one training: what each part must be told by the part above it (case A1).

A network is cut into three. Whoever differentiates each part's own output trains three unrelated models: the numbers
look like gradients and are wrong. This example puts four ways side by side, for every kernel and bias:

    one tape      the whole network under one tape: what is right by definition
    hand-off      each part has its own tape and gets dL/dOut from the part above:
                  tape.gradient(out, [inputs, *variables], output_gradients=dL/dOut)
    Jacobians     the chain rule written out, dL/dOut . dOut/dvariables, with full Jacobians
    naive         each part differentiates its own output, tape.gradient(out, variables)

and ends by checking them: exit status 0 if the first three agree and the last does not.

    python examples/two_tapes.py
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from stages import Stage, chain_rule

Gradients = dict[str, np.ndarray]
layers = keras.layers
TOLERANCE = 1e-6
"""Of the largest |gradient|: what the order of summation may change in float32."""
NAIVE_AT_LEAST = 0.1
"""The naive way is off by more than this part of the largest |gradient|, or the example shows nothing."""


def build() -> list[keras.Model]:
    """The three segments."""
    return [
        keras.Sequential(
            [keras.Input((10, 10, 1)), layers.Conv2D(6, 2, activation="relu", name="conv")], name="bottom"
        ),
        keras.Sequential([keras.Input((9, 9, 6)), layers.Conv2D(6, 2, activation="relu", name="conv")], name="middle"),
        keras.Sequential(
            [keras.Input((8, 8, 6)), layers.Flatten(), layers.Dense(1, activation="sigmoid", name="dense")], name="top"
        ),
    ]


def one_tape(segments: list[keras.Model], x: Any, loss: Any) -> Gradients:
    """The whole network under one tape."""
    variables = [(v.path, v.value) for s in segments for v in s.trainable_variables]
    with tf.GradientTape() as tape:
        out = x
        for segment in segments:
            out = segment(out, training=True)
        value = loss(out)
    found = tape.gradient(value, [variable for _, variable in variables])
    return {name: g.numpy() for (name, _), g in zip(variables, found, strict=True)}


def hand_off(segments: list[keras.Model], x: Any, loss: Any) -> Gradients:
    """Forward through the stages, dL/dOut from the loss, and back: each stage hands dL/dInputs down."""
    stages = [Stage(segment) for segment in segments]
    out = x
    for stage in stages:
        out = stage.forward(out, microbatch=0)
    with tf.GradientTape() as tape:
        tape.watch(out)
        value = loss(out)
    gradient = tape.gradient(value, out)
    for stage in reversed(stages):
        gradient = stage.backward(gradient, microbatch=0)
    return {path: g for stage in stages for path, g in stage.gradients().items() if g is not None}


def jacobians(segments: list[keras.Model], x: Any, loss: Any) -> Gradients:
    """`jacobian` for the variables, `batch_jacobian` for the input, contracted with dL/dOut."""
    found = chain_rule(segments, x, loss)
    return {path: g for part in found.segments for path, g in part.gradients.items() if g is not None}


def naive(segments: list[keras.Model], x: Any, loss: Any) -> Gradients:
    """Each part differentiates its own output; only the last one has ever heard of the loss."""
    found: Gradients = {}
    out = x
    for i, segment in enumerate(segments):
        with tf.GradientTape() as tape:
            out = segment(out, training=True)
            objective = loss(out) if i == len(segments) - 1 else out
        variables = segment.trainable_variables
        gradients = tape.gradient(objective, [v.value for v in variables])
        found |= {v.path: g.numpy() for v, g in zip(variables, gradients, strict=True)}
    return found


WAYS = {"one tape": one_tape, "hand-off": hand_off, "Jacobians": jacobians, "naive": naive}


def differences(found: dict[str, Gradients]) -> dict[str, dict[str, float]]:
    """Largest difference to one tape, per way and variable, as a part of the largest |gradient| of all variables."""
    reference = found["one tape"]
    largest = max(float(np.abs(g).max()) for g in reference.values())
    return {
        way: {name: float(np.abs(gradients[name] - g).max()) / largest for name, g in reference.items()}
        for way, gradients in found.items()
    }


def table(found: dict[str, Gradients], off: dict[str, dict[str, float]]) -> Table:
    """One row a variable: the norm by each way, and how far it is from one tape."""
    drawn = Table(title="dL/dvariable four ways: norm, and largest difference to one tape / largest |gradient|")
    drawn.add_column("variable")
    drawn.add_column("shape")
    for way in found:
        drawn.add_column(way, justify="right", style="red" if way == "naive" else None)
    for name, reference in found["one tape"].items():
        cells = [f"{np.linalg.norm(reference):.6g}"]
        cells += [f"{np.linalg.norm(found[w][name]):.6g}  ({off[w][name]:.1e})" for w in found if w != "one tape"]
        drawn.add_row(name, str(reference.shape), *cells)
    return drawn


def faults(off: dict[str, dict[str, float]]) -> list[str]:
    """What is not as it should be; empty if all is well."""
    found = [f"hand-off, {name}: not bit-identical to one tape ({e:.1e})" for name, e in off["hand-off"].items() if e]
    found += [
        f"Jacobians, {name}: {e:.1e} of the largest gradient away from one tape, allowed {TOLERANCE:.0e}"
        for name, e in off["Jacobians"].items()
        if not e <= TOLERANCE
    ]
    for part in ("bottom", "middle"):
        worst = max(e for name, e in off["naive"].items() if name.startswith(part))
        if not worst > NAIVE_AT_LEAST:
            found.append(f"naive, {part}: expected to be wrong, differs by only {worst:.1e}")
    return found


def main() -> int:
    """Print the table and the verdict; return the exit status."""
    keras.utils.set_random_seed(1)
    segments = build()
    x = tf.random.uniform((3, 10, 10, 1))
    y = tf.constant([[0.0], [1.0], [1.0]])
    mean_squared_error = keras.losses.MeanSquaredError()
    found = {name: way(segments, x, lambda out: mean_squared_error(y, out)) for name, way in WAYS.items()}
    off = differences(found)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table(found, off))
    wrong = faults(off)
    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not wrong:
        worst = max(off["Jacobians"].values())
        console.print(
            f"[bold green]OK[/] hand-off: bit-identical to one tape. Jacobians: within {worst:.1e} of it. "
            "Naive: right only in the top part, which has the loss; the parts below train towards nothing."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A ragged two-dimensional series from a one-dimensional one, over two processes (case D).

Model A reads a series and gives one vector IR[i] per element. Model B is run steps[i] times on IR[i] and carries its
state; Out[i][0 .. steps[i]) are its outputs. How many there are differs from element to element:

    IR      IR[0]          IR[1]               IR[2]
              │              │                   │
    B     s ─►□─►□─►□ ──────►□─►□─►□─►□ ────────►□─►□         D1: steps 3, 4, 2, and the state runs on
              │  │  │        │  │  │  │          │  │
    Out     [0][0] ..      [1][0] ..           [2][0] ..      (3, 4, 2, 4): elements, longest, batch, units

A and B are stages in processes of their own, and the ragged part is an ordinary Keras layer, `RaggedSteps`. The example
checks, and exits with status 1 if anything is not so:

    D1  A's and B's gradients are, bit for bit, those of two loops of Python under one tape
    D2  the same if the state begins anew at every element, and these are other gradients
    D3  the number of steps decided while running, for every sample by itself: until the L2 norm of a dense read-out of
        the state passes a threshold, at most max_steps; eager and compiled stages agree with one tape
    D4  Out[2][0] is connected with Out[0][1] exactly if the state runs on
    --  whatever stands in the targets' padding, every bit of loss and gradients stays

    python examples/ragged_series.py
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

from pipeline import Pipeline
from stages.layers.ragged.layout import as_ragged, elements_first, row_lengths
from stages.layers.ragged.steps import NormAbove, RaggedSteps

layers = keras.layers
Gradients = dict[str, np.ndarray]
STEPS, LONGEST = (3, 4, 2), 4
MAX_STEPS, THRESHOLD = 6, 0.9
TOLERANCE = 1e-6
"""Of the largest |gradient|: what another order of summation may change in float32."""


def model_a() -> keras.Model:
    """From the series (batch, 3, 4) to IR (batch, 3, 4)."""
    return keras.Sequential([keras.Input((3, 4)), layers.SimpleRNN(4, return_sequences=True, name="A")], name="a")


def model_b(carry_state: bool) -> keras.Model:
    """From IR to Out, (batch, 3, 4, 4)."""
    ragged = RaggedSteps(layers.SimpleRNNCell(4, name="cell"), STEPS, carry_state=carry_state, name="B")
    return keras.Sequential([keras.Input((3, 4)), ragged], name="b")


def model_b_deciding() -> keras.Model:
    """From IR to read-outs of B's state, (batch, 3, 6, 3); how many there are is found out while running."""
    ragged = RaggedSteps(
        layers.SimpleRNNCell(4, name="cell"),
        max_steps=MAX_STEPS,
        stop=NormAbove(THRESHOLD),
        read_out=layers.Dense(3, name="read_out"),
        emit="read_out",
        name="B",
    )
    return keras.Sequential([keras.Input((3, 4)), ragged], name="b")


def named(tape: Any, value: Any, models: list[keras.Model]) -> Gradients:
    """The tape's gradients by the variables' names."""
    variables = [(v.path, v.value) for m in models for v in m.trainable_variables]
    found = tape.gradient(value, [variable for _, variable in variables])
    return {name: g.numpy() for (name, _), g in zip(variables, found, strict=True)}


def two_loops(a: keras.Model, b: keras.Model, x: Any, y: Any, carry_state: bool) -> Gradients:
    """One tape over A and, written by hand, B's two loops; the loss is the mean over the real steps."""
    cell = b.layers[0].cell
    with tf.GradientTape() as tape:
        series = a(x, training=True)
        first = cell.get_initial_state(batch_size=len(x))
        zero = tf.zeros((len(x), 4))
        state, out = first, []
        for i, count in enumerate(STEPS):
            element = series[:, i]
            state = state if carry_state else first
            for _ in range(count):
                step, state = cell(element, state)
                out.append(step)
            out += [zero] * (LONGEST - count)
        padded = tf.reshape(tf.stack(out, axis=1), (len(x), 3, LONGEST, 4))
        padded._keras_mask = tf.tile(tf.sequence_mask(STEPS, LONGEST)[None], (len(x), 1, 1))
        value = keras.losses.MeanSquaredError()(y, padded)
    return named(tape, value, [a, b])


def by_two_processes(a: keras.Model, b: keras.Model, x: Any, y: Any, eager: bool = True) -> tuple[Gradients, Any]:
    """A and B as stages; the gradients, and Out with the batch in front."""
    with Pipeline([a, b], microbatches=1) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=eager)
        found = list(pipe.gradients(x, y).values())
        out = pipe.predict(x, verbose=0)
    names = [v.path for m in (a, b) for v in m.trainable_variables]
    return dict(zip(names, found, strict=True)), out


def off(found: Gradients, expected: Gradients) -> float:
    """The largest difference, as a part of the largest |gradient|."""
    largest = max(float(np.abs(g).max()) for g in expected.values())
    return max(float(np.abs(found[name] - g).max()) for name, g in expected.items()) / largest


def influence(a: keras.Model, b: keras.Model, x: Any) -> Any | None:
    """dOut[2][0] / dOut[0][1], summed over outputs; None: no gradient flows."""
    with tf.GradientTape() as tape:
        rows = b.layers[0].rows(a(x))
    return tape.gradient(rows[2][0], rows[0][1])


def with_other_padding(y: np.ndarray) -> np.ndarray:
    """The targets with nonsense where no output is."""
    other = y.copy()
    for i, count in enumerate(STEPS):
        other[:, i, count:] = 1e6
    return other


def steps_in_a_list(console: Console, x: np.ndarray, y: np.ndarray, carry_state: bool) -> tuple[Gradients, list[str]]:
    """D1, D2 and D4 for one setting: the gradients, and what is not as it should be."""
    setting = "runs on" if carry_state else "begins anew"
    keras.utils.set_random_seed(1)
    a, b = model_a(), model_b(carry_state)
    expected = two_loops(a, b, x, y, carry_state)
    found, out = by_two_processes(a, b, x, y)
    noisy, _ = by_two_processes(a, b, x, with_other_padding(y))
    flow = influence(a, b, x)

    table = Table(title=f"The state {setting}: dL/dvariable from two processes", title_justify="left")
    for column in ("variable", "norm", "two loops under one tape", "targets' padding changed"):
        table.add_column(column, justify="left" if column == "variable" else "right")
    for name, gradient in expected.items():
        pairs = (found[name], gradient), (noisy[name], found[name])
        same = ("equal bits" if one.tobytes() == other.tobytes() else "OTHER" for one, other in pairs)
        table.add_row(name, f"{np.linalg.norm(gradient):.6f}", *same)
    console.print(table)
    case = elements_first(out)
    ragged = as_ragged(case, STEPS)
    told = "none" if flow is None else f"{np.linalg.norm(flow):.3g}"
    console.print(f"Out: {case.shape}, as a ragged tensor {ragged.shape}; |dOut[2][0]/dOut[0][1]|: {told}\n")

    same = {name: found[name].tobytes() == gradient.tobytes() for name, gradient in expected.items()}
    wrong = [f"D1/D2, state {setting}, {name}: not the bits of one tape" for name, equal in same.items() if not equal]
    wrong += [f"state {setting}, {n}: padding matters" for n in found if found[n].tobytes() != noisy[n].tobytes()]
    if case.shape != (3, 4, 2, 4) or ragged.row_lengths().numpy().tolist() != list(STEPS):
        wrong.append(f"D1: Out has the shape {case.shape} and rows of {ragged.row_lengths()}")
    if (flow is not None) != carry_state:
        wrong.append(f"D4, state {setting}: the influence of Out[0][1] on Out[2][0] is {told}")
    return expected, wrong


def steps_decided_while_running(console: Console, x: np.ndarray) -> list[str]:
    """D3: what is not as it should be."""
    keras.utils.set_random_seed(3)
    a, b = model_a(), model_b_deciding()
    y = np.random.default_rng(2).normal(size=(len(x), 3, MAX_STEPS, 3)).astype("float32")
    with tf.GradientTape() as tape:
        out = b(a(x, training=True), training=True)
        value = keras.losses.MeanSquaredError()(y, out)
    expected = named(tape, value, [a, b])
    lengths = row_lengths(out).numpy()
    norms = np.linalg.norm(out, axis=-1)
    differences = {}
    for mode in ("eager", "compiled"):
        found, _ = by_two_processes(a, b, x, y, eager=mode == "eager")
        differences[mode] = off(found, expected)

    table = Table(
        title=f"Steps until the read-out's norm passes {THRESHOLD}, at most {MAX_STEPS}", title_justify="left"
    )
    for column in ("sample", "IR[0]", "IR[1]", "IR[2]", "norms of the last row's steps"):
        table.add_column(column, justify="right")
    for sample, row in enumerate(lengths):
        last = " ".join(f"{norm:.2f}" for norm in norms[sample, 2, : row[2]])
        table.add_row(str(sample), *map(str, row), last)
    console.print(table)
    told = ", ".join(f"{mode} {e:.1e}" for mode, e in differences.items())
    console.print(f"Difference of the gradients to one tape, as a part of the largest: {told}\n")

    allowed = {"eager": 0.0, "compiled": TOLERANCE}
    wrong = [f"D3, {mode}: {e:.1e} from one tape" for mode, e in differences.items() if not e <= allowed[mode]]
    for (sample, i), count in np.ndenumerate(lengths):
        before, end = norms[sample, i, : count - 1], norms[sample, i, count - 1]
        if (before > THRESHOLD).any() or not (end > THRESHOLD or count == MAX_STEPS):
            wrong.append(f"D3: sample {sample} stopped at element {i} after {count} steps, norms {before}, {end}")
    if len(np.unique(lengths)) < 3:
        wrong.append(f"D3: the example shows nothing, all lengths are {np.unique(lengths)}")
    return wrong


def main() -> int:
    """Print what is seen and the verdict; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 4)).astype("float32")
    y = random.normal(size=(2, 3, LONGEST, 4)).astype("float32")
    running, wrong = steps_in_a_list(console, x, y, carry_state=True)
    anew, more = steps_in_a_list(console, x, y, carry_state=False)
    wrong += more
    apart = off(anew, running)
    if not apart > 0.01:
        wrong.append(f"D2: both settings give the same gradients, {apart:.1e} apart")
    wrong += steps_decided_while_running(console, random.normal(size=(4, 3, 4)).astype("float32"))
    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not wrong:
        console.print(
            "[bold green]OK[/] A and B in two processes have the gradients of one tape, to the bit. Begun anew at "
            f"every element, the state gives other gradients ({apart:.0%} of the largest apart): then Out[2][0] knows "
            "nothing of Out[0][1], and no gradient leads from the one to the other. Padding contributes nothing."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

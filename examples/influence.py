"""Which step learns from which? An influence map answers for every pair (case D4).

A lower model A reads a series of three elements, step by step, and gives IR[0], IR[1], IR[2]. An upper model B is run
3, 4 and 2 times on them and gives Out[0][0..2], Out[1][0..3], Out[2][0..1]:

    x[0]            x[1]                 x[2]
     │               │                    │
    [A]────────────►[A]─────────────────►[A]                 A's state always runs on
     │ IR[0]         │ IR[1]              │ IR[2]
    [B]─►[B]─►[B]┈┈►[B]─►[B]─►[B]─►[B]┈┈►[B]─►[B]            ┈┈► B's state runs on from element to element, or is reset
     │    │    │     │    │    │    │     │    │
    Out[0][0..2]    Out[1][0..3]         Out[2][0..1]

Are Out[0][1] and Out[2][0] connected by a gradient? One cannot see it in the code, nor in one gradient. The map says,
for every pair, whether any operation leads from one to the other (connected) and how large the derivative is (flows).

A second map shows a stateful Keras layer fed window by window (case B): it has no gradient from one window to the last.

Pictures are saved beside where it is run. Exit status 0 if the maps are as they must be.

    python examples/influence.py
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

from stages import InfluenceMap, influence

STEPS = (3, 4, 2)
UNITS = 4
LATER, EARLIER = "Out[2][0]", "Out[0][1]"
ELEMENT = np.repeat(range(len(STEPS)), STEPS)
"""The element that each of the nine steps of B belongs to."""


def build() -> tuple[Any, Any]:
    """The cells of A and B."""
    return keras.layers.SimpleRNNCell(UNITS), keras.layers.SimpleRNNCell(UNITS)


def two_levels(a: Any, b: Any, x: Any, runs_on: bool) -> dict[str, Any]:
    """Run both models. Steps are returned as tensors of their own: each can be asked about."""
    state_a = state_b = tf.zeros((x.shape[0], UNITS))
    middle, out = [], []
    for i, count in enumerate(STEPS):
        state_a, _ = a(x[:, i], [state_a])
        middle.append(state_a)
        if not runs_on:
            state_b = tf.zeros_like(state_b)
        row = []
        for _ in range(count):
            state_b, _ = b(state_a, [state_b])
            row.append(state_b)
        out.append(row)
    return {"IR": middle, "Out": out}


def of_two_levels(a: Any, b: Any, x: Any, runs_on: bool) -> InfluenceMap:
    """All steps of B: how they depend on each other, on A's outputs and on the series."""
    out = [("Out", i, slice(None)) for i in range(len(STEPS))]
    sources = [*out, ("IR", slice(None)), ("x", slice(None))]
    return influence(lambda given: two_levels(a, b, given["x"], runs_on), {"x": x}, outputs=out, sources=sources)


def faults_of_two_levels(found: InfluenceMap, runs_on: bool) -> list[str]:
    """What is not as it must be: a step depends on no later one, and on earlier ones as far as the state runs."""
    elements = range(len(STEPS))
    expected = {
        "Out": np.tril(np.ones((len(ELEMENT), len(ELEMENT)), bool)) & (runs_on | (ELEMENT[:, None] == ELEMENT[None])),
        "IR": ELEMENT[:, None] >= np.array(elements),
        "x": ELEMENT[:, None] >= np.array(elements),
    }
    wrong = []
    for name, flows in expected.items():
        columns = [j for j, source in enumerate(found.sources) if source.startswith(f"{name}[")]
        for row, column in np.argwhere(found.flows[:, columns] != flows):
            wrong.append(
                f"state runs on: {runs_on}; {found.explain(found.outputs[row], found.sources[columns[column]])}"
            )
    return wrong


def windows_of_a_stateful_layer(x: Any) -> InfluenceMap:
    """A stateful layer is called on two halves of a series; `influence` is told of the halves apart."""
    layer = keras.layers.SimpleRNN(UNITS, return_sequences=True, stateful=True)
    layer.build(x[:, :3].shape)

    def windows(halves: Any) -> Any:
        layer.reset_state()
        return [layer(half) for half in halves]

    every = [(half, slice(None)) for half in range(2)]
    return influence(windows, [x[:, :3], x[:, 3:]], outputs=every, sources=every)


def main() -> int:
    """Print the maps and what they say; return the exit status."""
    keras.utils.set_random_seed(1)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    a, b = build()
    x = tf.random.normal((2, len(STEPS), 4))
    wrong: list[str] = []
    sizes: dict[bool, float | None] = {}
    for runs_on in (True, False):
        found = of_two_levels(a, b, x, runs_on)
        said = "runs on from element to element" if runs_on else "is reset at every element"
        console.print(f"\n[bold]B's state {said}[/]")
        console.print(found)
        path = found.save(f"influence_{'running_on' if runs_on else 'reset'}.png", title=f"B's state {said}")
        console.print(
            f"{found.explain(LATER, EARLIER)}\n{found.explain(EARLIER, LATER)}\nDrawn in {path}.", markup=False
        )
        wrong += faults_of_two_levels(found, runs_on)
        sizes[runs_on] = found.size(LATER, EARLIER)
        common = [found.size(step, "IR[0]") for step in (EARLIER, LATER)]
        if not all(common):
            wrong.append(f"both steps must depend on IR[0], received {common}")
    if not sizes[True] or sizes[False] is not None:
        wrong.append(f"{LATER} must depend on {EARLIER} only if the state runs on; sizes: {sizes}")
    console.print(
        "\nThe answer: if B's state runs on, Out[2][0] is computed from Out[0][1], and a loss on it sends a gradient "
        "there.\nIf it is reset, it is not: no gradient passes between them. Even so they have a common cause: both "
        "depend on IR[0]\nand x[0], Out[2][0] through A's state, so a loss on either trains A on the first element.",
        markup=False,
    )

    found = windows_of_a_stateful_layer(tf.random.normal((2, 6, 4)))
    console.print("\n[bold]A stateful layer, two windows of three steps[/]")
    console.print(found)
    path = found.save("influence_stateful.png", title="A stateful layer, window by window")
    console.print(
        "Values go on from window to window, the gradient does not: the state in between is a variable.\n"
        f"{found.explain('output[1][0]', 'input[0][2]')}\nDrawn in {path}.",
        markup=False,
    )
    if not np.array_equal(found.flows, np.kron(np.eye(2), np.tril(np.ones((3, 3)))) == 1):
        wrong.append("a stateful layer's gradient must stay within its window")
    if found.connected[3:, :3].any() or found.connected[:3, 3:].any():
        wrong.append("a stateful layer's windows must not be connected")

    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not wrong:
        console.print(
            f"[bold green]OK[/] {LATER} by {EARLIER}: size {sizes[True]:.3g} if the state runs on, not connected if it "
            "is reset; all other pairs as they must be."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A vanilla RNN differentiated by hand, by one tape, and step by step across processes (case C).

Three steps, two tanh units, a softmax at every step, the cross-entropies added up. The gradients were worked out by
hand and published; here they come out four times:

    closed form   the formulas, in NumPy (examples/rnn_by_hand.py)
    one tape      all steps under one tf.GradientTape
    stages        every time step is a Stage of its own, in the hand; all share the cell's weights. What the stage of
                  step t is given by its readout and by step t+1, added up, is δ(t) = dL/dh(t)
    processes     every time step is a Stage in a *process* of its own: states go to the next process, their gradients
                  come back, and the weights that all processes share (U, W, b, V, c) get the sum

How δ(t) gets out of a process: at each step, a trainable matrix of zeros is added to the state, one row a sample. It
changes no value, and its gradient is dL/dh(t). The initial state is such a matrix too, so its gradient is dL/dh(0).

The inputs were not published; those of least norm that lead to the published states are used. Exit status 0 if all four
agree within 1e-6 and the published figures come out within 1e-6.

    python examples/vanilla_rnn.py
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
from rnn_by_hand import Weights, closed_form, inputs_for_states, published

from pipeline import Pipeline
from stages import Stage

Figures = dict[str, np.ndarray]
layers = keras.layers
TOLERANCE = 1e-6
PUBLISHED = {"δ(1)": "delta1", "dV": "dV", "dc": "dc", "db": "db"}
"""Our names of what was published -> the names in `published()`, beside the outputs ŷ(t)."""


def by_formulas(x: Any, y: Any, h0: Any, weights: Weights) -> Figures:
    """The closed form."""
    found = closed_form(x, y, h0, weights)
    figures = {f"ŷ({t})": value for t, value in enumerate(found.probabilities, 1)}
    figures |= {f"δ({t})": value for t, value in enumerate(found.delta, 1)}
    figures |= {"dh(0)": found.dh0, "dV": found.dV, "dc": found.dc, "dW": found.dW, "db": found.db, "dU": found.dU}
    return figures


def by_one_tape(x: Any, y: Any, h0: Any, weights: Weights) -> Figures:
    """All steps under one tape, in plain TensorFlow."""
    U, W, b, V, c = map(tf.constant, (weights.U, weights.W, weights.b, weights.V, weights.c))
    start = tf.constant(h0)
    states, outputs, loss = [start], [], tf.constant(0, start.dtype)
    with tf.GradientTape() as tape:
        tape.watch([U, W, b, V, c, start])
        for now, target in zip(x, y, strict=True):
            states.append(tf.tanh(now @ U + states[-1] @ W + b))
            logits = states[-1] @ V + c
            outputs.append(tf.nn.softmax(logits))
            loss += tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(target, logits))
    gradients = tape.gradient(loss, [*states, V, c, W, b, U])
    names = ["dh(0)", *(f"δ({t})" for t in range(1, len(states))), "dV", "dc", "dW", "db", "dU"]
    figures = {f"ŷ({t})": value.numpy() for t, value in enumerate(outputs, 1)}
    return figures | {name: g.numpy() for name, g in zip(names, gradients, strict=True)}


class Network:
    """The network's layers, ordinary ones of Keras, with given weights: what the time steps share."""

    def __init__(self, weights: Weights) -> None:
        dtype = weights.U.dtype.name
        self.features, self.units = weights.U.shape
        self.dtype = dtype
        self.from_input = layers.Dense(self.units, dtype=dtype, name="from_input")
        self.from_state = layers.Dense(self.units, use_bias=False, dtype=dtype, name="from_state")
        self.readout = layers.Dense(weights.V.shape[1], dtype=dtype, name="readout")
        for layer, width, values in (
            (self.from_input, self.features, [weights.U, weights.b]),
            (self.from_state, self.units, [weights.W]),
            (self.readout, self.units, [weights.V, weights.c]),
        ):
            layer.build((None, width))
            layer.set_weights(values)

    def input(self, width: int, name: str) -> Any:
        """A symbolic input."""
        return keras.Input((width,), dtype=self.dtype, name=name)

    def step(self, t: int, x: Any, h: Any) -> Any:
        """h(t)."""
        total = layers.Add(dtype=self.dtype, name=f"sum{t}")([self.from_input(x), self.from_state(h)])
        return layers.Activation("tanh", dtype=self.dtype, name=f"tanh{t}")(total)

    def output(self, t: int, h: Any) -> Any:
        """ŷ(t)."""
        return layers.Activation("softmax", dtype=self.dtype, name=f"y{t}")(self.readout(h))


def by_stages(x: Any, y: Any, h0: Any, weights: Weights) -> Figures:
    """The hand-off, held in the hand: one Stage a step for the cell, and one a step for its readout and loss."""
    network, steps = Network(weights), len(x)
    cells, readouts = [], []
    for t in range(1, steps + 1):
        now, before = network.input(network.features, "x"), network.input(network.units, "h")
        cells.append(Stage(keras.Model([now, before], network.step(t, now, before)), f"step{t}"))
        state = network.input(network.units, "h")
        loss = keras.losses.CategoricalCrossentropy(reduction="sum", dtype=network.dtype)
        readouts.append(Stage(keras.Model(state, network.output(t, state)), f"readout{t}", loss=loss))

    figures: Figures = {}
    h = tf.constant(h0)
    for t, (cell, readout) in enumerate(zip(cells, readouts, strict=True), 1):
        h = cell.forward([x[t - 1], h])
        readout.forward_loss(h, y[t - 1])
        figures[f"ŷ({t})"] = readout.forward(h, training=False).numpy()
    handed = tf.zeros_like(h0)
    for t in range(steps, 0, -1):
        delta = readouts[t - 1].backward() + handed
        figures[f"δ({t})"] = delta.numpy()
        _, handed = cells[t - 1].backward(delta)
    figures["dh(0)"] = handed.numpy()
    of_cells, of_readouts = (_sums(stages) for stages in (cells, readouts))
    return figures | {
        "dV": of_readouts["readout/kernel"],
        "dc": of_readouts["readout/bias"],
        "dW": of_cells["from_state/kernel"],
        "db": of_cells["from_input/bias"],
        "dU": of_cells["from_input/kernel"],
    }


def _sums(stages: list[Stage]) -> Figures:
    """Gradients by variable, added up over the stages that share it."""
    totals: Figures = {}
    for stage in reversed(stages):
        for path, gradient in stage.gradients().items():
            assert gradient is not None
            totals[path] = totals[path] + gradient if path in totals else gradient
    return totals


def unrolled(weights: Weights, h0: Any, steps: int) -> keras.Model:
    """All steps as one Functional model, for a batch of len(h0) samples.

    Its inputs are x(1) to x(T) and each sample's row of the identity matrix, which picks the sample's row of h(0) and
    of the zeros that are added to each state; its outputs are ŷ(1) to ŷ(T).
    """
    network = Network(weights)
    sample = network.input(len(h0), "sample")
    xs = [network.input(network.features, f"x{t}") for t in range(1, steps + 1)]
    options = {"use_bias": False, "kernel_initializer": "zeros", "dtype": network.dtype}
    h, ys = layers.Dense(network.units, name="h0", **options)(sample), []
    for t, x in enumerate(xs, 1):
        zeros = layers.Dense(network.units, name=f"delta{t}", **options)(sample)
        h = layers.Add(dtype=network.dtype, name=f"h{t}")([network.step(t, x, h), zeros])
        ys.append(network.output(t, h))
    model = keras.Model([*xs, sample], ys)
    model.get_layer("h0").set_weights([np.asarray(h0)])
    return model


def by_processes(x: Any, y: Any, h0: Any, weights: Weights, **options: Any) -> Figures:
    """The hand-off between processes: one process a time step.

    As Keras does, `Pipeline` makes float64 arrays `keras.config.floatx()`.
    """
    steps = len(x)
    at = [[f"h{t}", f"y{t}"] for t in range(1, steps)]  # behind a step's state and output begins the next process
    batch = [*x, np.eye(len(h0), dtype=x.dtype)]
    with Pipeline.split(unrolled(weights, h0, steps), at=at, **options) as pipe:
        assert len(pipe.segments) == steps
        losses = [keras.losses.CategoricalCrossentropy(reduction="sum", dtype=x.dtype.name) for _ in y]
        pipe.compile("sgd", losses if steps > 1 else losses[0], run_eagerly=True)
        outputs = pipe.predict_on_batch(batch)
        by_path = pipe.gradients(batch, list(y) if steps > 1 else y[0])
    outputs = outputs if isinstance(outputs, list) else [outputs]
    found = {path.split("/", 1)[1]: gradient for path, gradient in by_path.items() if gradient is not None}
    figures = {f"ŷ({t})": np.asarray(value) for t, value in enumerate(outputs, 1)}
    figures |= {f"δ({t})": found[f"delta{t}/kernel"] for t in range(1, steps + 1)}
    return figures | {
        "dh(0)": found["h0/kernel"],
        "dV": found["readout/kernel"],
        "dc": found["readout/bias"],
        "dW": found["from_state/kernel"],
        "db": found["from_input/bias"],
        "dU": found["from_input/kernel"],
    }


WAYS = {"closed form": by_formulas, "one tape": by_one_tape, "stages": by_stages, "processes": by_processes}


def outside_check() -> tuple[tuple[Any, Any, Any, Weights], Figures]:
    """The published network with inputs that reproduce its states, and the published results by our names."""
    weights, figures = published()
    h0 = np.zeros((1, 2), "float32")
    given = inputs_for_states(figures["h"], h0, weights), figures["y"], h0, weights
    results = {f"ŷ({t})": value for t, value in enumerate(figures["probabilities"], 1)}
    return given, results | {name: figures[theirs] for name, theirs in PUBLISHED.items()}


def table(found: dict[str, Figures], known: Figures) -> Table:
    """Every entry of every quantity by every way, beside the published one."""
    drawn = Table(title="A vanilla RNN: outputs and gradients")
    drawn.add_column("quantity")
    for heading in (*found, "published"):
        drawn.add_column(heading, justify="right")
    for name, reference in found["closed form"].items():
        cells = ["\n".join(f"{v:+.8f}" for v in figures[name].ravel()) for figures in found.values()]
        cells.append("\n".join(f"{v:+.8f}" for v in known[name].ravel()) if name in known else "")
        shape = "x".join(map(str, reference.shape))
        drawn.add_row(f"{name}  {shape}", *cells, end_section=True)
    return drawn


def faults(found: dict[str, Figures], known: Figures) -> list[str]:
    """What is not as it should be; empty if all is well."""
    wrong = []
    for way, figures in found.items():
        for against, expected in (("the closed form", found["closed form"]), ("the published figure", known)):
            for name, value in expected.items():
                off = float(np.abs(figures[name] - value).max()) if figures[name].shape == value.shape else float("inf")
                if not off <= TOLERANCE:
                    wrong.append(f"{way}, {name}: {off:.1e} away from {against}, allowed {TOLERANCE:.0e}")
    return wrong


def main() -> int:
    """Print the table and the verdict; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    given, known = outside_check()
    found = {name: way(*given) for name, way in WAYS.items()}
    console.print(table(found, known))
    wrong = faults(found, known)
    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not wrong:
        steps = len(given[0])
        console.print(
            f"[bold green]OK[/] {len(found)} ways agree within {TOLERANCE:.0e}, and so do the published ŷ, dV, dc, "
            f"δ(1) and db. In the last one each of the {steps} time steps ran in a process of its own: what the next "
            "process told it about its state is all that it ever knew of the future."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

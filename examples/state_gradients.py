"""Which variables does the new state of a GRU depend on? (case E)

    x (34, 75, 30) ─► Conv1D, BatchNormalization, ReLU ─► GRU(64), dropout ─► Dense(2) on every step ─► output
                      h0 (34, 64) ───────────────────────►      └──────────────────────────────────► new state

Sequences have unequal length; the rows behind their end are zeros, and masked. Gradients of the *output* reach every
variable. Gradients of the *new state* reach convolution, normalisation and GRU, and not the dense layer: for its kernel
and bias the tape says None. That is no fault: the state is there before the dense layer reads the steps. A None can
also mean that something on the way blocks the gradient (an assignment, a cast to integers, NumPy), though. Which of the
two it is can be found out: change the variable, and see if the state changes.

The exit status is 0 if all of this is so:

    E1  both kinds of gradients, by one tape in plain Keras, by one `Stage`, by two handed over by hand, and by a
        pipeline of two processes: the same variables are connected, with the same bits, dropout included, as the seeds
        are the same; so is dL/dh0
    E2  a validation batch of another size; training draws dropout and moves statistics, evaluation does neither
    E3  a reshape that cannot fit is an error that names the stage, the layer, the tensors and both shapes
    E4  every None is explained

    python examples/state_gradients.py
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from pipeline import Pipeline, PipelineError, Segment, stateful
from stages import Stage

layers, ops = keras.layers, keras.ops
THREADS = 1
"""The same number here and in the workers: convolutions round differently with another."""
SAMPLES, STEPS, FEATURES, FILTERS, UNITS = 34, 75, 30, 100, 64
VALIDATION = 13
Gradients = dict[str, np.ndarray | None]


@dataclass
class Found:
    """What one way gives.

    Attributes:
        output: (n, 75, 2).
        new_state: (n, 64).
        gradients: By objective, "output" or "new_state": {variable or "h0": dL/d that, or None}.
    """

    output: np.ndarray
    new_state: np.ndarray
    gradients: dict[str, Gradients]


def data() -> tuple[np.ndarray, np.ndarray]:
    """x (34, 75, 30), zero behind each sequence's end, and h0 (34, 64)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, STEPS, FEATURES)).astype("float32")
    for row, length in zip(x, random.integers(STEPS // 3, STEPS + 1, SAMPLES), strict=True):
        row[length:] = 0
    return x, random.normal(size=(SAMPLES, UNITS)).astype("float32")


class Network:
    """The layers, and the two parts that they make.

    Attributes:
        features: x -> features (n, 75, 100), mask (n, 75).
        readout: Features, mask -> output; the GRU keeps its state to itself, as usual in Keras.
        states: The same with the state as input and output, from `stateful`.
    """

    def __init__(self) -> None:
        keras.utils.set_random_seed(1)
        x = keras.Input((STEPS, FEATURES), name="x")
        mask = ops.any(ops.not_equal(x, 0.0), axis=-1)
        y = layers.Conv1D(FILTERS, 3, padding="same", name="convolution")(x)
        y = layers.ReLU()(layers.BatchNormalization(name="normalisation")(y))
        self.features = keras.Model(x, [y, mask], name="features")

        y, mask = keras.Input((STEPS, FILTERS), name="y"), keras.Input((STEPS,), dtype="bool", name="mask")
        options = {"dropout": 0.3, "recurrent_dropout": 0.2}
        self.gru = layers.GRU(UNITS, return_sequences=True, return_state=True, name="gru", **options)
        self.dense = layers.Dense(2, name="dense")
        steps, _ = self.gru(y, mask=mask)
        self.readout = keras.Model([y, mask], self.masked(self.dense(steps), mask), name="readout")
        self.states = stateful(self.readout)

    @staticmethod
    def masked(output: Any, mask: Any) -> Any:
        """Zeros behind the end."""
        return output * ops.expand_dims(ops.cast(mask, output.dtype), -1)

    @property
    def variables(self) -> dict[str, Any]:
        """Trainable ones, by layer and name."""
        found = [*self.features.trainable_variables, *self.readout.trainable_variables]
        return {named(v.path): v for v in found}

    @property
    def unlearned(self) -> dict[str, Any]:
        """What a call changes by itself, by path: moving statistics and the state of random generators."""
        return {v.path: v for m in (self.features, self.readout) for v in m.non_trainable_variables}


def named(path: str) -> str:
    """Layer and name of a variable, from its path."""
    return "/".join(path.split("/")[-2:])


def from_the_same_start(network: Network, act: Callable[[], Any]) -> Any:
    """What `act` gives; statistics and random generators are put back behind it."""
    before = {path: v.numpy() for path, v in network.unlearned.items()}
    try:
        return act()
    finally:
        for path, variable in network.unlearned.items():
            variable.assign(before[path])


def plain(network: Network, x: Any, h0: Any, training: bool) -> tuple[Any, Any]:
    """Output and new state in plain Keras."""
    features, mask = network.features(x, training=training)
    steps, state = network.gru(features, mask=mask, initial_state=h0, training=training)
    return network.masked(network.dense(steps), mask), state


def seeds(output: Any, state: Any) -> dict[str, tuple[Any, Any]]:
    """By objective: dL/doutput and dL/dnew_state, where L is the mean square of what the objective is named for."""
    return {"output": (seed(output), None), "new_state": (None, seed(state))}


def seed(value: Any) -> Any:
    """Where back-propagation begins: dL/dvalue of Keras's mean squared error to zeros."""
    with tf.GradientTape() as tape:
        tape.watch(value)
        loss = keras.losses.MeanSquaredError()(tf.zeros_like(value), value)
    return tape.gradient(loss, value)


def by_one_tape(network: Network, x: Any, h0: Any) -> Found:
    """All of it under one tape."""
    source = tf.constant(h0)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(source)
        output, state = plain(network, tf.constant(x), source, training=True)
    gradients = {}
    for objective, (of_output, of_state) in seeds(output, state).items():
        target, start = (output, of_output) if of_output is not None else (state, of_state)
        sources = [*(v.value for v in network.variables.values()), source]
        found = tape.gradient(target, sources, output_gradients=start)
        gradients[objective] = {k: array(g) for k, g in zip([*network.variables, "h0"], found, strict=True)}
    return Found(output.numpy(), state.numpy(), gradients)


def array(gradient: Any) -> np.ndarray | None:
    """A gradient as an array; None stays None."""
    return None if gradient is None else np.array(gradient)


def by_one_stage(network: Network, x: Any, h0: Any) -> Found:
    """One Stage, whose state is handed in and out."""
    source, h = keras.Input((STEPS, FEATURES)), keras.Input((UNITS,))
    whole = keras.Model([source, h], network.states.model([*network.features(source), h]))
    return by_hand(network, [Stage(whole, "whole", states=network.states.states)], x, h0)


def by_two_stages(network: Network, x: Any, h0: Any) -> Found:
    """The convolution in one Stage, the GRU in another."""
    return by_hand(network, [Stage(network.features, "features"), readout_stage(network)], x, h0)


def readout_stage(network: Network) -> Stage:
    """The GRU and what follows as a Stage with a state."""
    return Stage(network.states.model, "readout", states=network.states.states)


def by_hand(network: Network, stages: Sequence[Stage], x: Any, h0: Any) -> Found:
    """Forward through all, the initial state given to the last; backward in reverse, once for each objective."""
    last, gradients = stages[-1], {}
    for objective in ("output", "new_state"):

        def forward() -> tuple[Any, Any]:
            values = x
            for stage in stages[:-1]:
                values = stage.forward(values)
            return last.forward(values, state=[h0]), last.state()[0]

        output, state = from_the_same_start(network, forward)
        of_output, of_state = seeds(output, state)[objective]
        back = last.backward(of_output, state_gradient=[of_state])
        for stage in reversed(stages[:-1]):
            back = stage.backward(back)
        found = {named(k): g for stage in stages for k, g in stage.gradients().items()}
        gradients[objective] = found | {"h0": array(last.initial_state_gradients()[0])}
        for stage in stages:
            stage.zero_gradients()
    return Found(output.numpy(), state.numpy(), gradients)


def by_two_processes(network: Network, x: Any, h0: Any) -> Found:
    """A pipeline. The state in front of the sequence and the one behind it are tensors like others; h0 gets no gradient
    there, as data come from outside.
    """
    segments = [
        Segment(model=network.features, inputs=("x",), outputs=("features", "mask"), name="features"),
        Segment(
            model=network.states.model,
            inputs=("features", "mask", "h0"),
            outputs=("output", "new_state"),
            name="readout",
        ),
    ]
    targets = {"output": np.zeros((len(x), STEPS, 2), "float32"), "new_state": np.zeros((len(x), UNITS), "float32")}
    gradients = {}
    for objective in targets:
        with Pipeline(segments, microbatches=1, threads=THREADS) as pipe:
            losses = {name: "mse" if name == objective else None for name in targets}
            pipe.compile("sgd", losses, run_eagerly=True)
            found = pipe.gradients([x, h0], targets)
            gradients[objective] = {named(k): g for k, g in found.items()}
    return Found(np.empty(0), np.empty(0), gradients)


def with_a_state_of_its_own(network: Network, x: Any) -> list[str]:
    """A pipeline whose second segment hands its state to itself, as windows need it; it begins with zeros."""
    segments = [
        Segment(model=network.features, inputs=("x",), outputs=("features", "mask"), name="features"),
        Segment(
            model=network.states.model,
            inputs=("features", "mask"),
            outputs=("output",),
            states=network.states.states,
            name="readout",
        ),
    ]
    expected = from_the_same_start(network, lambda: by_one_tape(network, x, np.zeros((len(x), UNITS), "float32")))
    with Pipeline(segments, microbatches=1, threads=THREADS) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        found = pipe.gradients(x, np.zeros((len(x), STEPS, 2), "float32"))
        pipe.verify(x, np.zeros((len(x), STEPS, 2), "float32")).raise_if_failed()
        size = pipe.predict_on_batch(x[:VALIDATION]).shape
    wrong = compare("a segment with states", {named(k): g for k, g in found.items()}, expected.gradients["output"])
    return wrong + ([] if size == (VALIDATION, STEPS, 2) else [f"E2: predictions of the shape {size}"])


def compare(way: str, found: Gradients, expected: Gradients) -> list[str]:
    """Where gradients are not connected alike, or have other bits."""
    wrong = []
    for name, gradient in found.items():
        theirs = expected[name]
        if (gradient is None) != (theirs is None):
            wrong.append(f"{way}, {name}: {'None' if gradient is None else 'a gradient'}, the tape says otherwise")
        elif gradient is not None and gradient.tobytes() != theirs.tobytes():
            wrong.append(f"{way}, {name}: {np.abs(gradient - theirs).max():.1e} from the tape's, not the same bits")
    return wrong


def reason(network: Network, name: str, x: Any, h0: Any) -> str:
    """Why the new state has no gradient for a variable: whether the state changes if the variable does."""
    variable = network.variables[name]

    def state() -> np.ndarray:
        return from_the_same_start(network, lambda: plain(network, x, h0, training=True)[1].numpy())

    value, before = variable.numpy(), state()
    variable.assign(value + 1)
    changed = not np.array_equal(state(), before)
    variable.assign(value)
    if changed:
        return "blocked: the new state changes with it, and still the tape has no way there"
    return f"new_state does not depend on it: the layer {name.split('/')[0]!r} reads the GRU's steps, behind the state"


def gradients_of_the_state(console: Console, network: Network, x: Any, h0: Any) -> list[str]:
    """E1 and E4: what is not as it should be."""
    expected = from_the_same_start(network, lambda: by_one_tape(network, x, h0))
    wrong, same = [], {}
    ways = {"one Stage": by_one_stage, "two Stages": by_two_stages, "two processes": by_two_processes}
    for way, play in ways.items():
        found = play(network, x, h0)
        faults = []
        for objective, gradients in expected.gradients.items():
            faults += compare(f"E1, {way}, {objective}", found.gradients[objective], gradients)
        for name in ("output", "new_state"):
            values = getattr(found, name)
            if values.size and values.tobytes() != getattr(expected, name).tobytes():
                faults.append(f"E1, {way}: another {name} than by one tape, so another dropout")
        same[way] = "equal bits" if not faults else "OTHER"
        wrong += faults
    table = Table(title="Norm of the gradient of mean(... ** 2), by one tape", title_justify="left")
    for column in ("variable", "of the output", "of the new state"):
        table.add_column(column, justify="left" if column == "variable" else "right")
    for name in expected.gradients["output"]:
        shown = [expected.gradients[objective][name] for objective in ("output", "new_state")]
        table.add_row(name, *("None" if g is None else f"{np.linalg.norm(g):.2e}" for g in shown))
    console.print(table)
    console.print("Beside it: " + ", ".join(f"{way} {verdict}" for way, verdict in same.items()))

    nones = {objective: {k for k, g in by.items() if g is None} for objective, by in expected.gradients.items()}
    if nones != {"output": set(), "new_state": {"dense/kernel", "dense/bias"}}:
        wrong.append(f"E1: None for {nones}")
    for name in sorted(nones["new_state"]):
        why = reason(network, name, x, h0)
        console.print(f"None for {name}: {why}.")
        wrong += [] if why.startswith("new_state does not depend") else [f"E4: {name} is {why}"]
    return wrong


def other_batch_size(console: Console, network: Network, x: Any, h0: Any) -> list[str]:
    """E2: what is not as it should be."""
    stages = [Stage(network.features, "features"), readout_stage(network)]

    def run(count: int, training: bool) -> np.ndarray:
        out = stages[0].forward(x[:count], training=training)
        out = stages[1].forward(out, training=training, state=[h0[:count]]).numpy()
        for stage in stages:
            stage.zero_gradients()  # forgets open tapes
        return out

    def values(kind: str = "") -> list[bytes]:
        return [v.numpy().tobytes() for path, v in network.unlearned.items() if kind in path]

    statistics = values("moving")  # Keras's GRU moves its generators in evaluation, too, and uses none of it
    first, again = run(VALIDATION, False), run(VALIDATION, False)
    keras_says = plain(network, tf.constant(x[:VALIDATION]), tf.constant(h0[:VALIDATION]), training=False)[0].numpy()
    same = values("moving") == statistics
    evaluated = values()
    one, other = run(SAMPLES, True), run(SAMPLES, True)
    trained = values()
    checks = {
        "evaluation is not that of Keras": first.tobytes() == keras_says.tobytes(),
        "evaluation is drawn by lot": first.tobytes() == again.tobytes(),
        "evaluation changes statistics": same,
        "training does not draw dropout": not np.array_equal(one, other),
        "training leaves statistics or random generators alone": all(
            a != b for a, b in zip(evaluated, trained, strict=True)
        ),
    }
    console.print(
        f"Validation with {first.shape[0]} samples after training with {one.shape[0]}: "
        f"{'as Keras, to the bit' if all(checks.values()) else 'WRONG'}; dropout and normalisation switch.\n"
    )
    return [f"E2: {fault}" for fault, good in checks.items() if not good]


def impossible_reshape(console: Console) -> list[str]:
    """E3: what is not as it should be."""
    steps, mask = keras.Input((STEPS, 2), name="steps"), keras.Input((STEPS, 1), name="mask")
    wrong = layers.Multiply(name="masked")([ops.reshape(steps, (5, -1, 2)), mask])
    batch = [np.ones((32, STEPS, 2), "float32"), np.ones((32, STEPS, 1), "float32")]
    faults = []
    segment = Segment(model=keras.Model([steps, mask], wrong), name="readout")
    with Pipeline([segment], microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        try:
            pipe.predict_on_batch(batch)
        except PipelineError as error:
            told = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split("--- traceback")[0].split())
            console.print(f"A reshape that cannot fit: {told}\n", markup=False, highlight=False)
            names = ("'readout'", "'masked'", "(5,480,2)from'reshape", "(32,75,1)from'mask'")
            faults = [part for part in names if part not in told.replace(" ", "")]
        else:
            faults = ["an error"]
    return [f"E3: the message lacks {part}" for part in faults]


def main() -> int:
    """Print what is seen and the verdict; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    network, (x, h0) = Network(), data()
    wrong = gradients_of_the_state(console, network, x, h0)
    wrong += with_a_state_of_its_own(network, x)
    wrong += other_batch_size(console, network, x, h0)
    wrong += impossible_reshape(console)
    for fault in wrong:
        console.print(f"[bold red]FAILED[/] {fault}", highlight=False)
    if not wrong:
        console.print(
            "[bold green]OK[/] The new state depends on convolution, normalisation and GRU, not on the dense layer: "
            "in one stage, in two, and in two processes, with the bits of one tape."
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

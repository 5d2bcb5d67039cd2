"""Back-propagating through several forward passes (case B).

A recurrent layer reads 6 steps in one pass (B0), or 3 and 3 in two passes of a layer that is `stateful=True` (B1).
Outputs and loss are the same, and the gradients are not. The reason in four lines:

    w = tf.Variable(2.0)
    with tf.GradientTape() as tape:      # x is watched
        w.assign(w * x)                  # the state after the first pass: a *variable*
        y = w * w                        # the second pass reads it
    tape.gradient(y, x)                  # None: the tape records what is read from a variable, not what is assigned

So the second pass takes the state as a given number. Loops change nothing (B2), they assign too. What B1 computes is
not noise, either: it is back-propagation truncated after one pass, and the example shows that it is.

The hand-off makes the state an input and an output, like an activation, and hands its gradient back (B3):

    pass      0              1
    state  0 ─► [ cell ] ─h─► [ cell ] ─►          forward
             ◄─ dL/dh ──────◄─                     backward, last pass first

The same holds through depth: below one layer in one pass, above it another one pass by pass (B5), equal to both layers
in one pass (B4). Both are then cut into 1 to 6 windows over 1 to 3 stages by `Pipeline(..., windows=)`.

The exit status is 0 if B1 and B2 are wrong in the way that is said here, and B3 and B5 are right: within 1e-6 (float32)
and 1e-12 (float64) of the full length, and as pipelines bit for bit one tape over the same windows.

    python examples/several_passes.py
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from pipeline import Pipeline, stateful
from stages import Stage

layers = keras.layers
STEPS, UNITS = 6, 4
ALLOWED = {"float32": 1e-6, "float64": 1e-12}
"""Of the largest |gradient|."""
WRONG = 1e-2
"""A gradient that is further off than this part of the largest is not rounding."""


class Result(NamedTuple):
    """What one way gives.

    Attributes:
        outputs: (2, 6, 4).
        loss: The mean over all passes.
        gradients: dL/dvariable, by the variable's name.
    """

    outputs: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def data(dtype: str = "float32") -> np.ndarray:
    """x0 (2, 3, 4) joined to itself: 6 steps. The target is the input."""
    x0 = np.random.default_rng(0).random((2, 3, 4)).astype(dtype)
    return np.concatenate([x0, x0], axis=1)


def recurrent_layer(name: str, dtype: str, **options: Any) -> Any:
    """The layer that everything here is about."""
    return layers.SimpleRNN(UNITS, return_sequences=True, dtype=dtype, name=name, **options)


def model(*names: str, dtype: str = "float32", pads: int = 0) -> Any:
    """Recurrent layers, one on the other, and layers that change nothing, so that there are places to cut."""
    keras.utils.set_random_seed(1)
    stack = [recurrent_layer(name, dtype) for name in names]
    ends = [layers.Identity(dtype=dtype, name=f"same{i}") for i in range(pads)]
    return keras.Sequential([keras.Input((STEPS, UNITS), dtype=dtype), *ends[:1], *stack, *ends[1:]])


def stateful_model() -> Any:
    """One recurrent layer with the same weights that keeps its state in a variable, for passes of any length."""
    layer = recurrent_layer("low", "float32", stateful=True)
    twin = keras.Sequential([keras.Input(batch_shape=(2, None, UNITS)), layer])
    twin.set_weights(model("low").get_weights())
    return twin


def named(variables: Any, found: Any) -> dict[str, np.ndarray]:
    """Gradients by the names of layer and variable."""
    layer = ["high" if "high" in v.path.split("/") else "low" for v in variables]
    return {f"{name}/{v.name}": np.asarray(g) for name, v, g in zip(layer, variables, found, strict=True)}


def one_pass(net: Any, x: np.ndarray) -> Result:
    """B0, B4: all steps in one pass, under one tape."""
    with tf.GradientTape() as tape:
        out = net(tf.constant(x), training=True)
        loss = tf.reduce_mean((out - x) ** 2)
    variables = net.trainable_variables
    found = tape.gradient(loss, [v.value for v in variables])
    return Result(out.numpy(), float(loss), named(variables, found))


def passes_of_a_stateful_layer(net: Any, x: np.ndarray, passes: int) -> Result:
    """B1: one call after the other, and one tape over all of them."""
    net.layers[0].reset_state()
    with tf.GradientTape() as tape:
        outs = [net(tf.constant(part), training=True) for part in np.split(x, passes, axis=1)]
        out = tf.concat(outs, axis=1)
        loss = tf.reduce_mean((out - x) ** 2)
    variables = net.trainable_variables
    return Result(out.numpy(), float(loss), named(variables, tape.gradient(loss, [v.value for v in variables])))


def loop_over_a_stateful_layer(net: Any, x: np.ndarray, passes: int) -> Result:
    """B2: the same in a loop of TensorFlow's inside a compiled function."""
    net.layers[0].reset_state()
    parts = tf.stack(np.split(x, passes, axis=1))

    @tf.function
    def run() -> Any:
        outs = tf.TensorArray(tf.float32, passes)
        for i in tf.range(passes):
            outs = outs.write(i, net(parts[i], training=True))
        return tf.concat(tf.unstack(outs.stack(), passes), axis=1)

    with tf.GradientTape() as tape:
        out = run()
        loss = tf.reduce_mean((out - x) ** 2)
    variables = net.trainable_variables
    return Result(out.numpy(), float(loss), named(variables, tape.gradient(loss, [v.value for v in variables])))


def hand_over(lower: Any, upper: Any, x: np.ndarray, windows: int) -> Result:
    """B3, B5: `upper` window by window, its state handed on; `lower`, if there is one, in one pass before it."""
    above = stateful(upper)
    top = Stage(above.model, "upper", states=above.states)
    bottom = None if lower is None else Stage(lower, "lower")

    middle = tf.constant(x) if bottom is None else bottom.forward(x)
    parts = np.array_split(np.asarray(middle), windows, axis=1)
    outs = [top.forward(part, window=w) for w, part in enumerate(parts)]

    targets = np.array_split(x, windows, axis=1)
    seeds = [2 * (out - target) / x.size for out, target in zip(outs, targets, strict=True)]  # dL/dOut, by window
    back: list[Any] = [None] * windows
    for w in reversed(range(windows)):
        back[w] = top.backward(seeds[w], window=w)
    if bottom is not None:
        bottom.backward(tf.concat(back, axis=1))

    out = np.concatenate(outs, axis=1)
    stages = [stage for stage in (bottom, top) if stage is not None]
    found = {k: g for s in stages for k, g in named(s.trainable_variables, s.gradients().values()).items()}
    return Result(out, float(np.mean((out - x) ** 2)), found)


def by_pipeline(net: Any, x: np.ndarray, **options: Any) -> tuple[Result, bool]:
    """The same by a pipeline that cuts depth and time, and whether its gradients have the bits of one tape."""
    with Pipeline.split(net, microbatches=1, **options) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        out = pipe.predict_on_batch(x)
        loss = pipe.test_on_batch(x, x)
        found = pipe.gradients(x, x).values()
        report = pipe.verify(x, x)
    return Result(out, float(loss), named(net.trainable_variables, found)), report.ok and report.tolerance.relative == 0


def off(found: Result, control: Result) -> dict[str, float]:
    """The largest difference of each gradient, as a part of the control's largest |gradient|."""
    largest = max(float(np.abs(g).max()) for g in control.gradients.values())
    return {k: float(np.abs(found.gradients[k] - g).max()) / largest for k, g in control.gradients.items()}


class Findings:
    """The table that is printed, and what is not as it should be."""

    def __init__(self, variables: Any) -> None:
        self.wrong: list[str] = []
        self.variables = list(variables)
        self.table = Table(title="Largest difference to the control", title_justify="left")
        for column in ("way", "outputs", "loss", *(name.partition("/")[2] for name in self.variables)):
            self.table.add_column(column, justify="left" if column == "way" else "right")

    def add(self, way: str, found: Result, control: Result, allowed: float | None, end: bool = False) -> None:
        """A row. `allowed`: of the gradients; None: at least one must be plainly wrong."""
        apart = off(found, control)
        outputs = float(np.abs(found.outputs - control.outputs).max())
        loss = abs(found.loss - control.loss) / control.loss
        shown = [f"{max(apart[k] for k in apart if k.endswith(name.partition('/')[2])):.1e}" for name in self.variables]
        self.table.add_row(way, f"{outputs:.1e}", f"{loss:.1e}", *shown, end_section=end)
        rounding = allowed or ALLOWED["float32"]
        if not (outputs <= rounding and loss <= rounding):
            self.wrong.append(f"{way}: outputs are {outputs:.1e}, the loss is {loss:.1e} off, allowed {rounding:.0e}")
        worst = max(apart.values())
        if allowed is None and not worst > WRONG:
            self.wrong.append(f"{way}: its gradients should be wrong, they are only {worst:.1e} off")
        if allowed is not None and not worst <= allowed:
            self.wrong.append(f"{way}: its gradients are {worst:.1e} off, allowed {allowed:.0e}")


def assignment_blocks() -> bool:
    """The four lines of the text above: whether the tape finds nothing."""
    x, w = tf.constant(3.0), tf.Variable(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        w.assign(w * x)
        y = w * w
    return tape.gradient(y, x) is None


def through_time(console: Console, findings: Findings, x: np.ndarray, control: Result) -> None:
    """B1 and B2, why they are wrong, and B3 in the hand."""
    net = stateful_model()
    add = findings.add
    two = passes_of_a_stateful_layer(net, x, 2)
    add("B1  two passes of a stateful layer", two, control, None)
    for passes in (2, 6):
        end = passes == 6
        looped = loop_over_a_stateful_layer(net, x, passes)
        add(f"B2  {passes} passes in a loop", looped, control, None, end)
    same = max(off(loop_over_a_stateful_layer(net, x, 2), two).values())
    truncated, _ = by_pipeline(model("low"), x, stages=1, windows=2, truncate=1, transport="inproc")
    as_truncated = max(off(truncated, two).values())

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        converted = stateful(net)
    diagnosis = [str(warning.message) for warning in told if "no gradient passes" in str(warning.message)]
    console.print(f"[bold]Diagnosis of B1[/] {'; '.join(diagnosis)}.")
    console.print(
        f"Without any layer: w.assign(w * x); y = w * w has dy/dx = {None if assignment_blocks() else 'a number'}. "
        f"B2's gradients are those of B1 ({same:.1e} apart), and both are those of back-propagation truncated after "
        f"one pass ({as_truncated:.1e} apart): the second pass takes the state as given.\n"
    )
    findings.wrong += [] if diagnosis else ["B1: `stateful` does not say that the layer keeps its state in a variable"]
    findings.wrong += [] if assignment_blocks() else ["an assignment to a variable lets a gradient through"]
    for what, apart in (("B2 and B1", same), ("truncation after one pass and B1", as_truncated)):
        findings.wrong += [] if apart <= ALLOWED["float32"] else [f"the gradients of {what} are {apart:.1e} apart"]
    if [v.path for v in converted.model.trainable_variables] != [v.path for v in net.trainable_variables]:
        findings.wrong.append("the layer that hands its state over does not have the variables of the stateful one")


def handed_over(findings: Findings, dtype: str) -> None:
    """B3 against B0 and B5 against B4, in the hand, for every number of windows."""
    x = data(dtype)
    for windows in range(1, STEPS + 1):
        found = hand_over(None, model("low", dtype=dtype), x, windows)
        control = one_pass(model("low", dtype=dtype), x)
        findings.add(f"B3  {windows} windows, {dtype}", found, control, ALLOWED[dtype], windows == STEPS)
    both = model("low", "high", dtype=dtype)
    control = one_pass(both, x)
    for windows in range(1, STEPS + 1):
        lower = keras.Sequential([keras.Input((STEPS, UNITS), dtype=dtype), both.get_layer("low")])
        upper = keras.Sequential([keras.Input((STEPS, UNITS), dtype=dtype), both.get_layer("high")])
        found = hand_over(lower, upper, x, windows)
        findings.add(f"B5  {windows} windows above, {dtype}", found, control, ALLOWED[dtype], windows == STEPS)


def pipelines(findings: Findings, x: np.ndarray) -> None:
    """B3 and B5 as pipelines: threads for every number of stages and windows, and once processes."""
    grid = [(s, w, "inproc") for s, w in itertools.product((1, 2, 3), range(1, STEPS + 1))] + [(3, 3, "ipc")]
    for case, (stages, windows, transport) in itertools.product(("B3", "B5"), grid):
        names = ("low",) if case == "B3" else ("low", "high")
        pads = max(0, stages - len(names))
        net = model(*names, pads=pads)
        control = one_pass(net, x)
        cuts = {"stages": 1} if stages == 1 else {"at": CUTS[case, stages]}
        found, same_bits = by_pipeline(net, x, windows=windows, transport=transport, **cuts)
        where = "processes" if transport == "ipc" else "threads"
        way = f"{case}  {windows} windows, {stages} stages, {where}"
        findings.add(way, found, control, ALLOWED["float32"], (stages, windows) == (3, STEPS) or transport == "ipc")
        if not same_bits:
            findings.wrong.append(f"{way}: not the bits of one tape over the same windows")


CUTS = {
    ("B3", 2): ["same0"],
    ("B3", 3): ["same0", "low"],
    ("B5", 2): ["low"],
    ("B5", 3): ["same0", "low"],
}
"""Behind which layers a pipeline is cut, by case and number of stages (2 or 3)."""


def main() -> int:
    """Print what is seen and the verdict; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    x = data()
    control = one_pass(model("low"), x)
    findings = Findings(control.gradients)
    through_time(console, findings, x, control)
    for dtype in ALLOWED:
        handed_over(findings, dtype)
    pipelines(findings, x)
    console.print(findings.table)
    console.print("Gradients: as a part of the control's largest; with two layers, of the two the worse.")
    for fault in findings.wrong:
        console.print(f"[bold red]FAILED[/] {fault}")
    if not findings.wrong:
        console.print(
            "[bold green]OK[/] A state in a variable gives the right outputs and the wrong gradients. A state that is "
            "handed over gives the gradients of the full length, through time and depth, and to the bit those of one "
            "tape over the same windows."
        )
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

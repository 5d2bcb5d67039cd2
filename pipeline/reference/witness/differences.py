"""Finite differences in float64: the one witness that knows nothing of gradients.

    f(t)  = the loss of the whole batch with W + t d in place of W        d: random, |d| = 1
    f'(0) ~ (f(t) - f(-t)) / 2t                                          compared with  sum(dL/dW * d)

The batch goes through float64 twins of the segments (`pipeline.reference.witness.float64_twin`) in the same
microbatches and windows with the same random draws, since normalisation and dropout depend on them; the loss is Keras's
own of the joined predictions of all microbatches, so it knows no weights of microbatches either.

The step is not chosen by hand. From t = 10^-3 max(|W|, 1) down by factors of 4, two neighbouring steps give
Richardson's extrapolation R = (16 D(t/4) - D(t)) / 15, free of the error in t^2, and three reasons to doubt it
(Ridders 1982):

    |R - D(t/4)|                         what extrapolation changed: truncation
    |(4 s(t/4) - s(t)) / 3|              s = (f(t) - 2 f(0) + f(-t)) / t is how far the slopes to both sides differ: its
                                         limit at t = 0 is zero where f is smooth, else the jump of the slope
                                         (ReLU at 0, ties of a maximum)
    4 eps |f| / t                        rounding, eps of float64

Their sum is the error; the pair with the smallest counts, and stepping ends when it is small. A direction at a kink has
a large error at every step, so it decides nothing and cannot raise a false alarm.

Cost: one trace of the batch, then 5 to 13 passes forward per variable and direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.compare.tolerance import eps
from pipeline.reference.one_tape.batch import Whole
from pipeline.reference.witness.batch_loss import BatchLoss, apart
from pipeline.reference.witness.float64_twin import WIDE
from pipeline.reference.witness.flow import WitnessRefusedError, size_of, undisturbed
from pipeline.reference.witness.results import Differences, Direction, direction
from stages.worker.hosted_stage import HostedStage

DIRECTIONS = 2
"""Random directions of each variable."""
_FIRST, _FACTOR, _STEPS = 1e-3, 4.0, 6


def differences(
    hosted: Sequence[HostedStage], batch: Whole, seed: int = 0, directions: int = DIRECTIONS
) -> Differences:
    """Derivatives of the loss of a batch along random directions of every trainable variable.

    Args:
        hosted: The stages, in the order of the flow, with the values set; left as they are.
        batch: The batch, with targets.
        seed: Of the directions (`pipeline.reference.witness.results.direction`).
        directions: Of each variable.

    Returns:
        The derivatives with their errors, or the refusal.
    """
    try:
        with undisturbed(hosted):
            return _differences(hosted, batch, seed, directions)
    except WitnessRefusedError as error:
        return Differences(refusal=str(error))


def _differences(hosted: Sequence[HostedStage], batch: Whole, seed: int, directions: int) -> Differences:
    if batch.truncate is not None and batch.truncate < batch.grid.windows:
        raise WitnessRefusedError(
            f"gradients are truncated after {batch.truncate} of {batch.grid.windows} windows, so they are not the "
            "derivative of the loss"
        )
    with undisturbed(hosted):  # the twin is compared with the model
        function = BatchLoss.twin(hosted, batch)
    expected = function.gradients()
    own = BatchLoss.own(hosted, batch).gradients()
    gradients = [(own.variables[key], g) for key, g in expected.variables.items()]
    traced = function.traced()
    found = []
    for (stage, place), copies in function.variables.items():
        gradient, value = expected.variables[stage, place], np.array(copies[0].value.read_value())
        for number in range(directions):
            d = direction(seed, stage, place, number, value.shape)
            along = _along(function, traced, copies, value, d)
            slope, error = derivative(along, expected.loss, float(np.linalg.norm(value)))
            said = 0.0 if gradient is None else float(np.sum(gradient * d))
            found.append(Direction(stage, place, number, slope, error, said))
    return Differences(
        found,
        seed,
        max((float(np.max(np.abs(g), initial=0.0)) for _, g in gradients if g is not None), default=0.0),
        size_of(hosted, batch),
        apart(gradients),
        expected.loss,
        note=f"{function.calls} passes forward of {batch.grid.samples} samples in float64",
    )


def _along(
    function: BatchLoss, run: Callable[[], Any], copies: Sequence[Any], value: Any, d: Any
) -> Callable[[float], float]:
    """The loss as a function of the step along a direction of one variable."""

    def f(step: float) -> float:
        for copy in copies:
            copy.assign(value + step * d)
        try:
            return float(function.value(run))
        finally:
            for copy in copies:
                copy.assign(value)

    return f


def derivative(f: Callable[[float], float], at: float, norm: float) -> tuple[float, float]:
    """A derivative at 0 by central differences, and an estimate of its error; see the module.

    Args:
        f: The function.
        at: f(0).
        norm: Size of what is stepped from; steps are a part of it, or of 1 where it is smaller.

    Returns:
        f'(0), and how far that may be off.
    """
    step = _FIRST * max(norm, 1.0)
    best = (0.0, np.inf)
    before: tuple[float, float] | None = None
    for _ in range(_STEPS):
        up, down = f(step), f(-step)
        slope, bend = (up - down) / (2 * step), (up - 2 * at + down) / step
        if before is not None:
            better = (_FACTOR**2 * slope - before[0]) / (_FACTOR**2 - 1)
            kink = (_FACTOR * bend - before[1]) / (_FACTOR - 1)
            rounding = 4 * eps(WIDE) * max(abs(at), abs(up), abs(down)) / step
            error = abs(better - slope) + abs(kink) + rounding
            if error < best[1]:
                best = better, error
            if error <= eps("float32") * abs(better):
                break
        before = slope, bend
        step /= _FACTOR
    return best


__all__ = ["DIRECTIONS", "derivative", "differences"]

"""Finite differences in float64: the one witness that knows nothing of gradients.

    f(t)  = the loss of the whole batch with W + t d in place of W        d: random, |d| = 1
    f'(0) ~ (f(t) - f(-t)) / 2t                                          compared with  sum(dL/dW * d)

The batch goes through float64 twins of the segments (`pipeline.witness_twin`) in the same microbatches and windows with
the same random draws, since normalisation and dropout depend on them; the loss is Keras's own of the joined predictions
of all microbatches, so it knows no weights of microbatches either.

The step is not chosen by hand. From t = 10^-3 |W| down by factors of 4, two neighbouring steps give Richardson's
extrapolation R = (16 D(t/4) - D(t)) / 15, free of the error in t^2, and three reasons to doubt it (Ridders 1982):

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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.reference_batch import Whole, owned, state_names
from pipeline.tolerance import eps
from pipeline.witness_parts import (
    RefusedError,
    Tensors,
    call_model,
    initial_states,
    inputs_of,
    joined,
    named,
    objective,
    own_losses,
    riding,
    run_flow,
    size_of,
    undisturbed,
)
from pipeline.witness_results import Differences, Direction, direction
from pipeline.witness_twin import WIDE, Twin, check, drawing, wide_floats
from stages.hosted import HostedStage
from stages.jacobian_rows import dense
from stages.part import States

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
        seed: Of the directions (`pipeline.witness_results.direction`).
        directions: Of each variable.

    Returns:
        The derivatives with their errors, or the refusal.
    """
    try:
        with undisturbed(hosted):
            return _differences(hosted, batch, seed, directions)
    except RefusedError as error:
        return Differences(refusal=str(error))


def _differences(hosted: Sequence[HostedStage], batch: Whole, seed: int, directions: int) -> Differences:
    if batch.truncate is not None and batch.truncate < batch.grid.windows:
        raise RefusedError(
            f"gradients are truncated after {batch.truncate} of {batch.grid.windows} windows, so they are not the "
            "derivative of the loss"
        )
    function = _Function(hosted, batch)
    variables = function.variables
    at, gradients = function.gradients()
    found = []
    for (stage, place), copies in variables.items():
        gradient = gradients[stage, place]
        for number in range(directions):
            d = direction(seed, stage, place, number, copies[0].shape)
            value, error = derivative(function.along(copies, d), at, float(np.linalg.norm(np.array(copies[0].value))))
            own = 0.0 if gradient is None else float(np.sum(gradient * d))
            found.append(Direction(stage, place, number, value, error, own))
    largest = max((float(np.max(np.abs(g), initial=0.0)) for g in gradients.values() if g is not None), default=0.0)
    longest = max([batch.grid.samples, *(int(np.prod(np.shape(a)[:2])) for a in batch.inputs.values())])
    note = f"{function.calls} passes forward of {batch.grid.samples} samples in float64"
    return Differences(found, seed, largest, size_of(hosted, longest), at, note=note)


def derivative(f: Callable[[float], float], at: float, norm: float) -> tuple[float, float]:
    """A derivative at 0 by central differences, and an estimate of its error; see the module.

    Args:
        f: The function.
        at: f(0).
        norm: Size of what is stepped from; steps are a part of it, or of 1 where it is 0.

    Returns:
        f'(0), and how far that may be off.
    """
    step = _FIRST * (norm or 1.0)
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


class _Function:
    """The loss of the batch as a function of the twins' variables, traced once where it can be."""

    def __init__(self, hosted: Sequence[HostedStage], batch: Whole) -> None:
        self.hosted, self.batch = hosted, batch
        self.twins = [Twin(stage) for stage in hosted]
        self.states = [States(twin.model) for twin in self.twins]
        self.start = [state.read() for state in self.states]
        self.calls = 0
        self._check()
        self._run = self._traced()

    @property
    def variables(self) -> dict[tuple[int, int], list[Any]]:
        """{(stage, place): the twins' variable and its copies in other stages}, each under its owner."""
        twin = {stage.spec.index: one for stage, one in zip(self.hosted, self.twins, strict=True)}
        found: dict[tuple[int, int], list[Any]] = {}
        for stage in self.hosted:
            ties = {tie.place: tie for tie in stage.ties}
            mine = {id(variable) for variable in owned(stage)}
            for place, variable in enumerate(stage.stage.trainable_variables):
                if id(variable) in mine:
                    homes = [(stage.spec.index, place)]
                    if place in ties:
                        homes = _places(self.hosted, ties[place].name)
                    found[stage.spec.index, place] = [twin[i].model.trainable_variables[p] for i, p in homes]
        return found

    def along(self, copies: Sequence[Any], d: Any) -> Callable[[float], float]:
        """The loss as a function of the step along a direction of one variable."""
        value = np.array(copies[0].value)

        def f(step: float) -> float:
            for copy in copies:
                copy.assign(value + step * d)
            try:
                return float(self._value(self._run))
            finally:
                for copy in copies:
                    copy.assign(value)

        return f

    def gradients(self) -> tuple[float, dict[tuple[int, int], Any]]:
        """The loss, and its gradients by one tape over the twins."""
        variables = self.variables
        flat = [copy.value for copies in variables.values() for copy in copies]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(flat)
            loss = self._value(self._eager)
        found = iter(tape.gradient(loss, flat))
        sums: dict[tuple[int, int], Any] = {}
        for key, copies in variables.items():
            parts = [g for g in [next(found) for _ in copies] if g is not None]
            sums[key] = sum(np.asarray(dense(g)) for g in parts) if parts else None
        return float(loss), sums

    def _value(self, run: Callable[[], Any]) -> Any:
        """The loss, from the states that the model is in."""
        for state, values in zip(self.states, self.start, strict=True):
            state.write(values)
        self.calls += 1
        return run()

    def _traced(self) -> Callable[[], Any]:
        """The loss in one graph; eagerly where it cannot be traced."""
        traced: Callable[[], Any] = tf.function(self._eager, autograph=False)
        try:
            self._value(traced)
        except Exception:
            return self._eager
        return traced

    def _eager(self) -> Any:
        return self._loss(lambda k, i, taken, w: call_model(self.twins[i].model, taken))

    def _loss(self, call: Callable[[int, int, list[Any], int], Sequence[Any]]) -> Any:
        """The loss of the batch: microbatches and windows forward, their predictions joined and judged at once."""
        grid, total = self.batch.grid, tf.zeros((), WIDE)
        parts: dict[str, list[list[Any]]] = {}
        for k, count in enumerate(grid.sizes):
            states = _wide(initial_states(self.hosted, self.batch, k))
            windows: list[Tensors] = []
            for w in range(grid.windows):
                given = {**_wide(inputs_of(self.hosted, self.batch, k, w)), **states}
                own: list[Any] = []

                def one(i: int, taken: list[Any], k: int = k, w: int = w, own: list[Any] = own) -> Sequence[Any]:
                    twin = self.twins[i]
                    with wide_floats(), drawing(twin.narrow), named(self.hosted[i], "its float64 copy"):
                        outputs = call(k, i, taken, w)
                        own += own_losses(twin.model, w, WIDE)
                    return outputs

                windows.append(run_flow(self.hosted, one, given))
                states = {name: windows[-1][name] for stage in self.hosted for name in state_names(stage)}
                total += sum(own) * (count / grid.samples) if own else 0.0
            for name in self._judged():
                parts.setdefault(name, []).append([tensors[name] for tensors in windows])
        predictions = {name: self._predicted(name, each) for name, each in parts.items()}
        with wide_floats():
            return total + objective(self.hosted, [twin.heads for twin in self.twins], self.batch, predictions, WIDE)

    def _judged(self) -> Mapping[str, bool]:
        """{output that has a loss: whether it is over time}."""
        return {
            stage.spec.outputs[head.place][0]: stage.gives_over_time(head.place)
            for stage in self.hosted
            for head in stage.heads
        }

    def _predicted(self, name: str, parts: Sequence[Sequence[Any]]) -> Any:
        over_time = self._judged()[name]
        return joined([joined(some, 1) if over_time else some[-1] for some in parts], 0)

    def _check(self) -> None:
        """Refuse twins that compute something else, with the first stage of which that is so.

        Half the digits of the model's own dtype must agree on the first microbatch: rounding leaves more, another draw
        or another function does not.
        """

        def compared(k: int, i: int, taken: list[Any], w: int) -> Sequence[Any]:
            outputs = call_model(self.twins[i].model, taken)
            if k == 0:
                model = self.hosted[i].stage.model
                ours = call_model(model, [_like(t, self.twins[i].narrow) for t in taken])
                check(ours, outputs, self.hosted[i], eps(self.twins[i].narrow) ** 0.5)
            return outputs

        self._loss(compared)


def _like(tensor: Any, narrow: str) -> Any:
    """A tensor of the twins as the model itself takes it."""
    return riding([tensor], lambda parts: tf.cast(parts[0], narrow) if parts[0].dtype == WIDE else parts[0])


def _places(hosted: Sequence[HostedStage], name: str) -> list[tuple[int, int]]:
    """(stage, place) of all copies of a shared variable."""
    return [(stage.spec.index, tie.place) for stage in hosted for tie in stage.ties if tie.name == name]


def _wide(tensors: Tensors) -> Tensors:
    return {name: tf.cast(t, WIDE) if t.dtype.is_floating else t for name, t in tensors.items()}


__all__ = ["DIRECTIONS", "derivative", "differences"]

"""Tapes that stay open between forward and backward: the eager way, one `tf.GradientTape` per microbatch.

The compiled way is in `stages.compiled`; both keep the same contract, so a stage holds either:

    forward(key, inputs, share)                    → outputs; the tape stays open under `key`
    objective(key, inputs, target, ...)            → the same with the loss on the tape (last stage)
    backward(key, output_gradients)                → input gradients; variable gradients are accumulated
    gradients()                                    → per variable the sum over microbatches, or None
    apply(optimizer, scale)                        → one update from those sums, which are cleared

`share` is the microbatch's part of the batch (n_k / N): own losses count with it, so they count once a batch. Inputs
and outputs are flat values followed by the masks of those that have one (`stages.part`); `masked` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from stages.accumulate import OrderedSum, dense
from stages.loss import Head
from stages.part import Part, States, spread, watch
from stages.tensors import is_differentiable

Masked = Sequence[int]
"""Which values the masks behind them belong to."""


_DISTANCE = 16
"""Longer than the way from an own loss to the tensor it is about, in operations."""


class Key(NamedTuple):
    """Which forward pass a tape belongs to."""

    microbatch: int
    window: int = 0


class Opened(NamedTuple):
    """What a forward pass gives.

    Attributes:
        structure: The outputs in the model's nesting; None where the caller asked for flat ones only.
        outputs: The outputs, flat, followed by the masks of those that have one.
        own_loss: The weighted sum of the part's own losses, a float scalar tensor, or None.
        loss: The weighted loss, a float scalar tensor, or None without an objective.
        masked: Which outputs the masks belong to.
    """

    structure: Any
    outputs: tuple[Any, ...]
    own_loss: Any | None
    loss: Any | None
    masked: tuple[int, ...] = ()

    @property
    def masks(self) -> dict[int, Any]:
        """{output: its mask}."""
        return dict(zip(self.masked, self.outputs[len(self.outputs) - len(self.masked) :], strict=True))


@dataclass(frozen=True, slots=True)
class Objective:
    """What the last stage needs for its loss on one microbatch.

    Attributes:
        target: Eager tensor(s), (n_k, ...).
        sample_weight: Eager tensor or None.
        weight: What this microbatch's loss weighs in the batch (`Head.weights`).
    """

    target: Any
    sample_weight: Any | None
    weight: float


class Tapes(Protocol):
    """Open tapes and accumulated gradients of one part; see the module's drawing."""

    def forward(self, key: Key, inputs: Sequence[Any], share: float, masked: Masked = ()) -> Opened:
        """Run the part in training; its tape stays open under `key`."""

    def objective(
        self, key: Key, inputs: Sequence[Any], share: float, objective: Objective, masked: Masked = ()
    ) -> Opened:
        """The same with the loss on the tape; the metrics count the microbatch."""

    def infer(self, inputs: Sequence[Any], share: float, objective: Objective | None, masked: Masked = ()) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""

    def backward(self, key: Key, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape: accumulate dL/dvariables, return dL/dinputs."""

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables in the order of the trainable variables; None where none exists."""

    def apply(self, optimizer: Any, scale: float | None) -> None:
        """One update from the accumulated gradients (times `scale`), which are then cleared."""

    def clear(self) -> None:
        """Drop open tapes and sums."""


@dataclass(frozen=True, slots=True)
class _Record:
    """One open tape: what to differentiate, with which fixed seeds, with respect to what."""

    tape: Any
    wanted: tuple[bool, ...]
    sources: list[Any]
    outputs: tuple[Any, ...]
    targets: list[Any]
    seeds: list[Any]


@dataclass(frozen=True, slots=True)
class _Again:
    """A forward pass that will be computed again: its inputs, the states it started from, its share."""

    inputs: tuple[Any, ...]
    states: tuple[Any, ...]
    share: float
    masked: tuple[int, ...]


class EagerTapes:
    """One `tf.GradientTape` per microbatch: the same operations, in the same order, as one tape over everything.

    Args:
        part: The model.
        head: The objective, for the last stage.
        recompute: Keep only inputs and states, and run the forward pass again in backward.
    """

    def __init__(self, part: Part, head: Head | None = None, recompute: bool = False) -> None:
        self._part, self._head, self._recompute = part, head, recompute
        self._open: dict[Key, _Record | _Again] = {}
        self._sum = OrderedSum()

    def forward(self, key: Key, inputs: Sequence[Any], share: float, masked: Masked = ()) -> Opened:
        """Run the part under a tape that stays open (or, recomputing, without one)."""
        if not self._recompute:
            return self._run(key, inputs, share, None, masked)
        self._open[key] = _Again(tuple(inputs), States(self._part.model).read(), share, tuple(masked))
        called = self._part.call(inputs, training=True, masked=masked)
        return Opened(called.structure, called.outputs, _weighted_sum(called.own, share), None, called.masked)

    def objective(
        self, key: Key, inputs: Sequence[Any], share: float, objective: Objective, masked: Masked = ()
    ) -> Opened:
        """Run the part and its loss under a tape that stays open; the metrics count the microbatch."""
        return self._run(key, inputs, share, objective, masked)

    def infer(self, inputs: Sequence[Any], share: float, objective: Objective | None, masked: Masked = ()) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""
        structure, outputs, places, own = self._part.call(inputs, training=False, masked=masked)
        loss = None
        if objective is not None and self._head is not None:
            loss = self._loss(structure, objective)
            self._head.update(objective.target, structure, objective.sample_weight)
        return Opened(structure, outputs, _weighted_sum(own, share), loss, places)

    def _run(
        self, key: Key, inputs: Sequence[Any], share: float, objective: Objective | None, masked: Masked
    ) -> Opened:
        variables = self._part.trainable_variables
        loss = None
        wanted = self._part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, wanted, variables)
            structure, outputs, places, own = self._part.call(inputs, training=True, masked=masked)
            ends = tuple(_from_afar(output) for output in outputs) if own and objective is None else outputs
            if objective is not None:
                loss = self._loss(structure, objective)
        targets, seeds = list(own), [tf.fill((), tf.cast(share, loss_.dtype)) for loss_ in own]
        if loss is not None and objective is not None and self._head is not None:
            targets, seeds = [loss, *targets], [tf.ones_like(loss), *seeds]
            self._head.update(objective.target, structure, objective.sample_weight)
        self._open[key] = _Record(tape, wanted, sources, ends if loss is None else (), targets, seeds)
        return Opened(structure, outputs, _weighted_sum(own, share), loss, places)

    def _loss(self, prediction: Any, objective: Objective) -> Any:
        assert self._head is not None
        value = self._head.value(objective.target, prediction, objective.sample_weight)
        return value * tf.cast(objective.weight, value.dtype)

    def backward(self, key: Key, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape, accumulate dL/dvariables in microbatch order, return dL/dinputs."""
        record = self._record(key)
        pairs = [
            (output, tf.zeros_like(output) if gradient is None else gradient)
            for output, gradient in zip(record.outputs, output_gradients, strict=True)
            if is_differentiable(output.dtype)
        ]
        targets = [output for output, _ in pairs] + record.targets
        seeds = [seed for _, seed in pairs] + record.seeds
        found: list[Any | None] = [None] * len(record.sources)
        if targets:
            found = record.tape.gradient(targets, record.sources, output_gradients=seeds)
        inputs = sum(record.wanted)
        self._sum.add(key.microbatch, [dense(gradient) for gradient in found[inputs:]])
        return spread(record.wanted, [dense(gradient) for gradient in found[:inputs]])

    def _record(self, key: Key) -> _Record:
        """Take the open tape of a forward pass, running it again where only its inputs were kept."""
        record = self._open.pop(key)
        if isinstance(record, _Again):
            states = States(self._part.model)
            now = states.read()
            states.write(record.states)
            self._run(key, record.inputs, record.share, None, record.masked)
            states.write(now)
            record = self._open.pop(key)
        assert isinstance(record, _Record)
        return record

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables, in the order of the part's trainable variables; None where none exists."""
        total = self._sum.total()
        return [None] * len(self._part.trainable_variables) if total is None else list(total)

    def apply(self, optimizer: Any, scale: float | None) -> None:
        """Update the variables from the accumulated gradients (times `scale`), then clear them."""
        pairs = [(g, v) for g, v in zip(self.gradients(), self._part.trainable_variables, strict=True) if g is not None]
        if pairs:
            gradients = [g if scale is None else g * tf.cast(scale, g.dtype) for g, _ in pairs]
            optimizer.apply(gradients, [v for _, v in pairs])
        self.clear()

    def clear(self) -> None:
        """Drop all open tapes and sums."""
        self._open.clear()
        self._sum.clear()


def _from_afar(output: Any) -> Any:
    """The output behind a chain of identities, so that its gradient comes in after those of the part's own losses.

    A tape goes backward breadth first and adds what flows into one tensor in the order of arrival. In one tape over the
    whole model the own losses arrive first, since the way through all later parts is longer; three summands in another
    order differ in the last bit.
    """
    for _ in range(_DISTANCE):
        output = tf.identity(output)
    return output


def _weighted_sum(losses: Sequence[Any], share: float) -> Any | None:
    """Own losses as they count in the batch, summed in the model's order."""
    if not losses:
        return None
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total * tf.cast(share, total.dtype)

"""Tapes that stay open between forward and backward: the eager way, one `tf.GradientTape` per microbatch.

The compiled way is in `stages.tape.compiled`; both keep the contract of `stages.tape.contract`.

What several targets of one tape send into one variable or tensor is added in the order in which TensorFlow happens to
meet it; three summands in another order differ in the last bit. So all targets of a stage go through one `IdentityN`:
its gradient waits for all of them, and from there on the order is that of the stage alone, whatever is around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from stages.loss.heads import Heads, Objective
from stages.loss.precision import rounded_once
from stages.tape.accumulate import Contribution, OrderedSum, dense
from stages.tape.contract import Blocks, Opened, PassInputs, PassKey, Tapes
from stages.tape.embedding_rows import fixed_rows, free_batch, is_sparse
from stages.tape.model_call import CallState, Part, spread, watch
from stages.tape.optimizer_update import rescaled, update
from stages.tape.tensors import is_differentiable
from stages.tape.trained import Trained

_DISTANCE = 16
"""Longer than the way from a loss of the stage to the tensor it is about, in operations."""


@dataclass(frozen=True, slots=True)
class _Record:
    """One open tape: what to differentiate, with which fixed seeds, with respect to what."""

    tape: Any
    wanted: tuple[bool, ...]
    sources: list[Any]
    variables: list[Any]
    outputs: tuple[Any, ...]
    targets: list[Any]
    seeds: list[Any]
    inputs: Sequence[Any]
    masked: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Again:
    """A forward pass that will be computed again: its arguments, and the states it started from."""

    given: PassInputs
    variables: list[Any]
    states: CallState
    before: tuple[Any, ...]


class EagerTapes(Tapes):
    """One `tf.GradientTape` per microbatch: the same operations, in the same order, as one tape over everything.

    Args:
        part: The model.
        heads: The objectives of its outputs.
        recompute: Keep only inputs and states, and run the forward pass again in backward.
        kept_apart: Variables (by place) whose microbatches' contributions are kept, to be joined with other stages'.
    """

    def __init__(
        self, part: Part, heads: Heads | None = None, recompute: bool = False, kept_apart: Sequence[int] = ()
    ) -> None:
        self._part, self._heads, self._recompute = part, heads or Heads(), recompute
        self._open: dict[PassKey, _Record | _Again] = {}
        self._trained = Trained()
        self._trained.places(part.trainable_variables)
        self._sum = OrderedSum(kept_apart)
        self._fixed_rows: dict[Any, frozenset[int]] = {}
        self._found: dict[PassKey, tuple[list[Any], list[Any | None]]] = {}
        self.loss_scale = 1.0
        self.blocks = Blocks()
        self.halves = False

    def forward(self, key: PassKey, given: PassInputs) -> Opened:
        """Run the part under a tape that stays open (or, recomputing, without one)."""
        variables = self._part.trainable_variables
        if not self._recompute:
            opened = self._run(key, given, variables)
        else:
            states = CallState(self._part.model)
            self._open[key] = _Again(given, variables, states, states.read())
            called = self._part.call(given.inputs, training=True, masked=given.masked, window=key.window)
            own = _weighted_sum(called.own, given.share)
            losses = self._losses(called.outputs, given.objective)
            opened = Opened(called.structure, called.outputs, own, losses, called.masked)
        if given.objective is not None and not self._heads.counts_at_once:
            self._heads.update(opened.outputs, given.objective)
        return opened

    def infer(self, given: PassInputs, window: int = 0) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""
        structure, outputs, places, own = self._part.call(given.inputs, False, given.masked, window)
        losses = self._losses(outputs, given.objective)
        if given.objective is not None and not self._heads.counts_at_once:
            self._heads.update(outputs, given.objective)
        return Opened(structure, outputs, _weighted_sum(own, given.share), losses, places)

    def _run(self, key: PassKey, given: PassInputs, variables: list[Any]) -> Opened:
        inputs, share, masked, objective = given
        wanted = self._part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, wanted, variables)
            structure, outputs, places, own = self._part.call(inputs, True, masked, key.window)
            losses = self._losses(outputs, objective)
            terms = self._heads.terms(losses, objective.heads) if objective is not None else []
        seeds = [self.loss_scale] * len(terms) + [share * self.loss_scale] * len(own)
        targets = [*terms, *own]
        fills = [tf.fill((), rounded_once(seed, target.dtype)) for seed, target in zip(seeds, targets, strict=True)]
        self._open[key] = _Record(tape, wanted, sources, variables, outputs, targets, fills, free_batch(inputs), masked)
        return Opened(structure, outputs, _weighted_sum(own, share), losses, places)

    def _losses(self, outputs: Sequence[Any], objective: Objective | None) -> tuple[Any, ...]:
        return () if objective is None else tuple(self._heads.values(outputs, objective))

    def backward_input(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape and return dL/dinputs; dL/dvariables, which the tape gives in the same walk, wait."""
        record = self._record(key)
        pairs = [
            (output, gradient)
            for output, gradient in zip(record.outputs, output_gradients)  # noqa: B905 - masks have none
            if gradient is not None and is_differentiable(output.dtype)
        ]
        seeds = record.seeds + [seed for _, seed in pairs]
        found: list[Any | None] = [None] * len(record.sources)
        if seeds:
            with record.tape:
                targets = joint(record.targets, [output for output, _ in pairs])
            found = record.tape.gradient(targets, record.sources, output_gradients=seeds)
        inputs = sum(record.wanted)
        if key.microbatch and any(map(is_sparse, found[inputs:])):
            self._sum.fixed_rows = self._rows_for_all_samples(record)
        self._found[key] = record.variables, found[inputs:]
        return spread(record.wanted, [dense(gradient) for gradient in found[:inputs]])

    def backward_weight(self, key: PassKey) -> None:
        """Add up dL/dvariables in microbatch order."""
        variables, found = self._found.pop(key)
        if variables:  # a part that is frozen at present adds nothing
            gradients = self._trained.spread(self._places(variables), found)
            self._sum.add(self.blocks.of(key), gradients, self.blocks.completes(key))

    def _rows_for_all_samples(self, record: _Record) -> frozenset[int]:
        """Which embeddings this pass looked up once for all samples; found out once for inputs of these shapes."""
        places = self._places(record.variables)
        name = (tuple(record.inputs), tuple(record.masked), places)
        if name not in self._fixed_rows:
            found = fixed_rows(self._part, record.inputs, record.masked, record.variables)
            self._fixed_rows[name] = frozenset(places[i] for i in found)
        return self._fixed_rows[name]

    def _places(self, variables: Sequence[Any]) -> tuple[int, ...]:
        """Where these variables' gradients are summed."""
        places = self._trained.places(variables)
        self._sum.widen(len(self._trained.variables))
        return places

    def _record(self, key: PassKey) -> _Record:
        """Take the open tape of a forward pass, running it again where only its inputs were kept."""
        record = self._open.pop(key)
        if isinstance(record, _Again):
            now = record.states.read()
            record.states.write(record.before)
            self._run(key, record.given, record.variables)
            record.states.write(now)
            record = self._open.pop(key)
        assert isinstance(record, _Record)
        return record

    def as_given(self) -> list[Any | None]:
        """The same as the tapes gave them: tensors or `tf.IndexedSlices`."""
        places = self._places(self._part.trainable_variables)
        total = self._sum.total()
        return [None if total is None else total[place] for place in places]

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What each microbatch added to the variables that are kept apart."""
        return self._sum.contributions(places)

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some accumulated ones."""
        self._sum.replace(places, totals)

    def apply(self, optimizer: Any, scale: float | None, divisor: float | None = None) -> None:
        """Update the variables from the accumulated gradients (over `divisor`, times `scale`), then clear them."""
        pairs = [(g, v) for g, v in zip(self.as_given(), self._part.trainable_variables, strict=True) if g is not None]
        update(optimizer, rescaled([g for g, _ in pairs], scale, divisor), [v for _, v in pairs])
        self.clear()

    def forget_updates(self) -> None:
        """Nothing: an eager update reads the optimizer each time."""

    def forget_traces(self) -> None:
        """Nothing: eager layers read their settings each time."""

    def clear(self, failed: bool = False) -> None:
        """Drop all open tapes and sums."""
        self._open.clear()
        self._found.clear()
        self._sum.clear()


def joint(losses: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """The targets of one stage behind one operation, so that their gradients enter together; see the module.

    In one tape over the whole model what losses send into a tensor arrives first, since the way through all later
    stages is longer; so beside losses, outputs are some operations farther away, and come last.
    """
    if not outputs or len(outputs) + len(losses) == 1:  # nothing comes from elsewhere, or there is nothing to order
        return [*losses, *outputs]
    far = list(outputs)
    for _ in range(_DISTANCE if losses else 0):
        far = [tf.identity(output) for output in far]
    return list(tf.identity_n([*losses, *far]))


def _weighted_sum(losses: Sequence[Any], share: float) -> Any | None:
    """Own losses as they count in the batch, summed in the model's order."""
    if not losses:
        return None
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total * rounded_once(share, total.dtype)

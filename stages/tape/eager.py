"""Tapes that stay open between forward and backward: the eager way, one `tf.GradientTape` per microbatch.

The compiled way is in `stages.tape.compiled`; both keep the same contract, so a stage holds either:

    forward(key, inputs, share, masked, objective) → outputs and losses; the tape stays open under `key`
    backward(key, output_gradients)                → input gradients; variable gradients are accumulated
    gradients()                                    → per variable the sum over microbatches, or None
    apply(optimizer, scale)                        → one update from those sums, which are cleared

`share` is the microbatch's part of the batch (n_k / N): own losses count with it, so they count once a batch. Inputs
and outputs are flat values followed by the masks of those that have one (`stages.tape.model_call`); `masked` says
which.

What several targets of one tape send into one variable or tensor is added in the order in which TensorFlow happens to
meet it; three summands in another order differ in the last bit. So all targets of a stage go through one `IdentityN`:
its gradient waits for all of them, and from there on the order is that of the stage alone, whatever is around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from stages.keras_internals import update_nothing
from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, OrderedSum, dense
from stages.tape.embedding_rows import fixed_rows, free_batch, is_sparse
from stages.tape.model_call import CallState, Part, spread, watch
from stages.tape.tensors import is_differentiable
from stages.tape.trained import Trained

Masked = Sequence[int]
"""Which values the masks behind them belong to."""


_DISTANCE = 16
"""Longer than the way from a loss of the stage to the tensor it is about, in operations."""


class PassKey(NamedTuple):
    """Which forward pass a tape belongs to."""

    microbatch: int
    window: int = 0


class Blocks(NamedTuple):
    """How a step's windows form blocks that gradients stay in (truncation); one block unless said otherwise.

    Attributes:
        number: Blocks per microbatch.
        length: Windows per block; None: all.
    """

    number: int = 1
    length: int | None = None

    def of(self, key: PassKey) -> int:
        """The block that a window is in, among those of all microbatches."""
        return key.microbatch * self.number + (0 if self.length is None else key.window // self.length)

    def completes(self, key: PassKey) -> bool:
        """Whether a window is the last of its block to go backward."""
        return (key.window if self.length is None else key.window % self.length) == 0


class Opened(NamedTuple):
    """What a forward pass gives.

    Attributes:
        structure: The outputs in the model's nesting; None where the caller asked for flat ones only.
        outputs: The outputs, flat, followed by the masks of those that have one.
        own_loss: The weighted sum of the part's own losses, a float scalar tensor, or None.
        losses: With an objective, one float scalar tensor per head: its loss times what the microbatch weighs.
        masked: Which outputs the masks belong to.
    """

    structure: Any
    outputs: tuple[Any, ...]
    own_loss: Any | None
    losses: tuple[Any, ...] = ()
    masked: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[Any, ...]:
        """The outputs without their masks."""
        return self.outputs[: len(self.outputs) - len(self.masked)] if self.outputs else ()

    @property
    def masks(self) -> dict[int, Any]:
        """{output: its mask}."""
        return dict(zip(self.masked, self.outputs[len(self.outputs) - len(self.masked) :], strict=True))


class Tapes(Protocol):
    """Open tapes and accumulated gradients of one part; see the module's drawing.

    Attributes:
        loss_scale: Factor on every loss while it is differentiated; accumulated gradients are this much too large.
        blocks: How windows are grouped when gradients are added.
    """

    loss_scale: float
    blocks: Blocks

    def forward(
        self,
        key: PassKey,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
    ) -> Opened:
        """Run the part in training, with its heads' losses where there is an objective; its tape stays open."""

    def infer(
        self,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
        window: int = 0,
    ) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""

    def backward(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape: accumulate dL/dvariables, return dL/dinputs. An output without a gradient is no target."""

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables in the order of the trainable variables; None where none exists."""

    def as_given(self) -> list[Any | None]:
        """The same as the optimizer gets them: tensors, or `tf.IndexedSlices` with rows that are not summed."""

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What each microbatch adds to some variables, one entry per microbatch (or one for all, compiled)."""

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some accumulated ones."""

    def apply(self, optimizer: Any, scale: float | None, divisor: float | None = None) -> None:
        """One update from the accumulated gradients (over `divisor`, times `scale`), which are then cleared."""

    def clear(self) -> None:
        """Drop open tapes and sums."""


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
    masked: Masked


@dataclass(frozen=True, slots=True)
class _Again:
    """A forward pass that will be computed again: its arguments, and the states it started from."""

    inputs: tuple[Any, ...]
    variables: list[Any]
    states: CallState
    before: tuple[Any, ...]
    share: float
    masked: tuple[int, ...]
    objective: Objective | None


class EagerTapes:
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
        self.loss_scale = 1.0
        self.blocks = Blocks()

    def forward(
        self,
        key: PassKey,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
    ) -> Opened:
        """Run the part under a tape that stays open (or, recomputing, without one)."""
        variables = self._part.trainable_variables
        if not self._recompute:
            opened = self._run(key, inputs, variables, share, masked, objective)
        else:
            states = CallState(self._part.model)
            self._open[key] = _Again(tuple(inputs), variables, states, states.read(), share, tuple(masked), objective)
            called = self._part.call(inputs, training=True, masked=masked, window=key.window)
            own = _weighted_sum(called.own, share)
            opened = Opened(
                called.structure, called.outputs, own, self._losses(called.outputs, objective), called.masked
            )
        if objective is not None and not self._heads.counts_at_once:
            self._heads.update(opened.outputs, objective)
        return opened

    def infer(
        self,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
        window: int = 0,
    ) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""
        structure, outputs, places, own = self._part.call(inputs, False, masked, window)
        losses = self._losses(outputs, objective)
        if objective is not None and not self._heads.counts_at_once:
            self._heads.update(outputs, objective)
        return Opened(structure, outputs, _weighted_sum(own, share), losses, places)

    def _run(
        self,
        key: PassKey,
        inputs: Sequence[Any],
        variables: list[Any],
        share: float,
        masked: Masked,
        objective: Objective | None,
    ) -> Opened:
        wanted = self._part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, wanted, variables)
            structure, outputs, places, own = self._part.call(inputs, True, masked, key.window)
            losses = self._losses(outputs, objective)
            terms = self._heads.terms(losses, objective.heads) if objective is not None else []
        seeds = [self.loss_scale] * len(terms) + [share * self.loss_scale] * len(own)
        targets = [*terms, *own]
        fills = [tf.fill((), tf.cast(seed, target.dtype)) for seed, target in zip(seeds, targets, strict=True)]
        self._open[key] = _Record(tape, wanted, sources, variables, outputs, targets, fills, free_batch(inputs), masked)
        return Opened(structure, outputs, _weighted_sum(own, share), losses, places)

    def _losses(self, outputs: Sequence[Any], objective: Objective | None) -> tuple[Any, ...]:
        return () if objective is None else tuple(self._heads.values(outputs, objective))

    def backward(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape, accumulate dL/dvariables in microbatch order, return dL/dinputs."""
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
        if record.variables:  # a part that is frozen at present adds nothing
            places = self._places(record.variables)
            gradients = self._trained.spread(places, found[inputs:])
            self._sum.add(self.blocks.of(key), gradients, self.blocks.completes(key))
        return spread(record.wanted, [dense(gradient) for gradient in found[:inputs]])

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
            self._run(key, record.inputs, record.variables, record.share, record.masked, record.objective)
            record.states.write(now)
            record = self._open.pop(key)
        assert isinstance(record, _Record)
        return record

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables, in the order of the part's trainable variables; None where none exists."""
        return [dense(gradient) for gradient in self.as_given()]

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

    def clear(self) -> None:
        """Drop all open tapes and sums."""
        self._open.clear()
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


def update(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """One step of an optimizer, also where no objective reaches a variable of the stage.

    One optimizer over all stages counts every step, and takes every variable into its averages. Keras's `apply` does
    nothing without gradients; the stage's count would stay behind, and its averages would stay zero.

    As Keras's trainer, it calls `apply_gradients`, which an optimizer of the user's own may override.
    """
    if gradients:
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        update_nothing(optimizer)


def rescaled(gradients: Sequence[Any], scale: Any | None, divisor: Any | None) -> list[Any]:
    """Gradients over a divisor (the loss scale), then times a factor (of clipping); None leaves a step out.

    As in Keras, an embedding's rows stay apart when they are divided, and are summed when the global norm clips them.
    """
    if divisor is not None:
        gradients = [_with_values(g, tf.divide(_values(g), tf.cast(divisor, g.dtype))) for g in gradients]
    if scale is not None:
        gradients = [tf.multiply(dense(g), tf.cast(scale, g.dtype)) for g in gradients]
    return list(gradients)


def _values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _with_values(gradient: Any, values: Any) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return values
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def _weighted_sum(losses: Sequence[Any], share: float) -> Any | None:
    """Own losses as they count in the batch, summed in the model's order."""
    if not losses:
        return None
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total * tf.cast(share, total.dtype)

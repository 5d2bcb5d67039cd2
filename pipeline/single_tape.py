"""The joined model under one tape: all segments called one after the other, all gradients asked for at once.

No activation or gradient is handed over, no output gradient is passed: this is what a pipeline must equal.

Sums of three or more numbers depend on the order, so the tape has joints where the model is cut: every tensor that a
segment takes is one identity of its own, all that a segment gives goes through one `IdentityN`, and a variable that
several segments have is read through a chain of identities. These change no value, only which sums are made first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.reference_batch import (
    Weights,
    Whole,
    by_head,
    joined,
    of_microbatch,
    owned,
    owner,
    reported,
    scaled_sum,
    standing_in,
    state_names,
    summed,
    weight_part,
)
from stages.accumulate import plus
from stages.grid import Grid
from stages.heads import Objective
from stages.hosted import HostedStage, makes_masks
from stages.part import States, mask_of, with_mask
from stages.tapes import joint
from stages.tensors import is_differentiable
from transport.message import DRIVER

Array = np.ndarray[Any, Any]


@dataclass
class _Pass:
    """What one call of all segments leaves on the tape.

    Attributes:
        tensors: {tensor name: its value}.
        targets: What is differentiated, with `seeds`.
        seeds: As many.
        losses: {stage: [{head: its value}, own loss or None]}.
        states: {state name: its value behind the window}.
        reads: What the segments read in place of each variable.
    """

    tensors: dict[str, Any]
    targets: list[Any] = field(default_factory=list)
    seeds: list[Any] = field(default_factory=list)
    losses: dict[int, list[Any]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    reads: list[Any] = field(default_factory=list)


class SingleTape:
    """One tape over all stages.

    Args:
        hosted: The stages, in the order of the data flow.
    """

    def __init__(self, hosted: Sequence[HostedStage]) -> None:
        self.hosted = hosted
        self._dead: frozenset[tuple[str, int]] | None = None
        """(tensor, window) between segments or windows that no gradient comes back to; None: not known yet."""

    @property
    def variables(self) -> list[Any]:
        """All trainable variables, stage after stage; one that several stages have is there as the first one's."""
        return [v for hosted in self.hosted for v in owned(hosted)]

    def weights(self, batch: Whole) -> Weights:
        """What every head's loss of each microbatch and window weighs; {} without a loss."""
        masks = self._prediction_masks(batch)
        return {place: self._weights(batch, *place, masks) for place in self._heads()} if batch.targets else {}

    def sums(
        self, batch: Whole, weights: Weights, compiled: bool
    ) -> tuple[dict[str, list[Any]], dict[int, list[Any | None]]]:
        """Gradients of the whole batch on the same microbatches.

        Args:
            batch: The batch.
            weights: What `weights` said of it.
            compiled: Whether a microbatch's tape is in one traced function.

        Returns:
            {stage: [each head's loss, own losses]} as workers report them, and for each stage dL/dvariables, summed in
            ascending order of microbatches.
        """
        if self._dead is None:
            self._dead = self._find_dead(batch, weights)
        if self.couples and batch.targets:
            total, found = self._coupled(batch, weights)
            return reported([found]), self._by_stage(total)
        step = tf.function(self._microbatch, autograph=False, reduce_retracing=False) if compiled else self._microbatch
        total = [None] * len(self.variables)
        losses: list[dict[int, list[Any]]] = []
        for k, size in enumerate(batch.grid.sizes):
            part, mine = batch.microbatch(k), of_microbatch(weights, k)
            share = tf.constant(size / batch.grid.samples)
            fixed = (part.grid, batch.loss_scale, batch.truncate)
            blocks, some = step(
                part.inputs, part.targets, part.sample_weights, mine, share, self._initial(batch, k), fixed
            )
            for block in blocks:
                total = [plus(a, b) for a, b in zip(total, block, strict=True)]
            losses += [dict(zip(self._indices, one, strict=True)) for one in some]
        return reported(losses), self._by_stage(total)

    @property
    def couples(self) -> bool:
        """Whether a loss needs the whole batch at once."""
        return any(hosted.heads.couples_samples for hosted in self.hosted)

    @property
    def _indices(self) -> list[int]:
        return [hosted.spec.index for hosted in self.hosted]

    def _microbatch(
        self,
        inputs: Mapping[str, Any],
        targets: Mapping[str, Any],
        sample_weights: Mapping[str, Any],
        weights: Sequence[Any],
        share: Any,
        states: Mapping[str, Any],
        fixed: tuple[Grid, float, int | None],
    ) -> tuple[list[Any], list[Any]]:
        """One microbatch under one tape: dL/dvariables for each block of windows, and each window's losses by stage."""
        part = Whole(inputs, targets, sample_weights, *fixed)
        with self._tape() as tape:
            runs = self._windows(part, by_head(weights), share, states)
        losses = [[run.losses[index] for index in self._indices] for run in runs]
        return self._gradients(tape, part, runs), losses

    @contextmanager
    def _tape(self) -> Iterator[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in self.variables:
                tape.watch(variable.value)
            yield tape

    def _windows(self, part: Whole, weights: Weights, share: Any, states: Mapping[str, Any]) -> list[_Pass]:
        """All windows of a microbatch, one after the other, under whatever tape is open."""
        runs: list[_Pass] = []
        several = part.grid.windows > 1
        for w in range(part.grid.windows):
            reads = [tf.identity(v.value) if several else v.value for v in self.variables]
            states = runs[-1].states if runs else states
            if part.begins_block(w):
                states = {name: tf.stop_gradient(state) for name, state in states.items()}
            with standing_in(zip(self.variables, reads, strict=True) if several else ()):
                run = self._run(part, w, self._objectives(part, w, weights), states, share)
            run.reads = reads
            runs.append(run)
        return runs

    def _gradients(self, tape: Any, part: Whole, runs: Sequence[_Pass]) -> list[list[Any | None]]:
        """For each block of windows dL/dvariables: what later windows add comes first."""
        targets = [target for run in runs for target in run.targets]
        seeds = [seed for run in runs for seed in run.seeds]
        sources = [read for run in runs for read in run.reads]
        flat = tape.gradient(targets, sources, output_gradients=seeds) if targets else [None] * len(sources)
        dense = [None if g is None else tf.convert_to_tensor(g) for g in flat]
        count = len(self.variables)
        blocks: list[list[Sequence[Any | None]]] = []
        for w in range(len(runs)):
            if w == 0 or part.begins_block(w):
                blocks.append([])
            blocks[-1].append(dense[w * count : (w + 1) * count])
        return [[reduce(plus, each) for each in zip(*reversed(block), strict=True)] for block in blocks]

    def _initial(self, batch: Whole, k: int) -> dict[str, Any]:
        """Every stage's states in front of window 0."""
        found: dict[str, Any] = {}
        for hosted in self.hosted:
            if hosted.stage.carried is not None:
                states = hosted.stage.carried.enter(k, 0, batch.grid.sizes[k], True)
                found |= dict(zip(state_names(hosted), states, strict=True))
        return found

    def _by_stage(self, total: Sequence[Any | None]) -> dict[int, list[Any | None]]:
        """The gradients of each stage's trainable variables, shared ones in each stage that has them."""
        found = {id(v): g for v, g in zip(self.variables, total, strict=True)}
        stage = {hosted.spec.index: hosted for hosted in self.hosted}
        owners = {
            id(hosted.stage.trainable_variables[tie.place]): id(owner(tie, stage))
            for hosted in self.hosted
            for tie in hosted.ties
        }
        return {
            i: [found[owners.get(id(v), id(v))] for v in hosted.stage.trainable_variables]
            for i, hosted in stage.items()
        }

    def _heads(self) -> list[tuple[int, int]]:
        """(position of the stage, number of the head in it) of all heads."""
        return [(i, h) for i, hosted in enumerate(self.hosted) for h in range(len(hosted.heads))]

    def _weights(
        self, batch: Whole, i: int, h: int, masks: Mapping[tuple[int, int], Any]
    ) -> dict[tuple[int, int], float]:
        """What a head's loss of each microbatch and window weighs in the batch's."""
        hosted, grid = self.hosted[i], batch.grid
        label, head = hosted.labels[h], list(hosted.heads)[h]
        over_time = hosted.gives_over_time(head.place)
        units = list(grid.units(over_time))
        parts = [weight_part(batch, label, unit, over_time) for unit in units]
        found = head.weights(
            [grid.elements(*unit, over_time) for unit in units],
            [grid.part(batch.targets[label], *unit, over_time) for unit in units],
            None if parts[0] is None else [part for part in parts if part is not None],
            masks.get((i, head.place)),
        )
        return dict(zip(units, found, strict=True))

    def _objectives(self, batch: Whole, window: int | None, weights: Weights) -> dict[int, Objective]:
        """For each stage (by position) with heads what they need for a window of one microbatch, or for all (None)."""
        found: dict[int, Objective] = {}
        for i, hosted in enumerate(self.hosted) if batch.targets else ():
            over = [hosted.gives_over_time(head.place) for head in hosted.heads]
            which = [h for h in range(len(over)) if window is None or over[h] or batch.grid.is_last(window)]
            if not which:
                continue
            labels = {h: hosted.labels[h] for h in which}
            if window is None:
                targets = [batch.targets[label] for label in labels.values()]
                given = [batch.sample_weights.get(label) for label in labels.values()]
            else:
                unit = (0, window)
                targets = [batch.grid.part(batch.targets[label], *unit, over[h]) for h, label in labels.items()]
                given = [weight_part(batch, label, unit, over[h]) for h, label in labels.items()]
            found[i] = Objective(
                tuple(tf.convert_to_tensor(target) for target in targets),
                tuple(None if weight is None else tf.convert_to_tensor(weight) for weight in given),
                tuple(1.0 if window is None else weights[i, h][0, window] for h in which),
                tuple(which),
            )
        return found

    def _run(
        self,
        part: Whole,
        window: int,
        objectives: Mapping[int, Objective],
        states: Mapping[str, Any],
        share: Any,
        training: bool = True,
    ) -> _Pass:
        """Call all segments on one window of a microbatch, under whatever tape is open."""
        run = _Pass(self._inputs(part, window))
        values = self._shared_values()
        for i, hosted in enumerate(self.hosted):
            with standing_in(values.get(i, ())):
                outputs = self._call(hosted, {**run.tensors, **states}, training)
                own = _own_losses(hosted, window)
                losses, terms = [], []
                if i in objectives:
                    losses = hosted.heads.values(outputs, objectives[i])
                    terms = hosted.heads.terms(losses, objectives[i].heads)
            seeds = (share * part.loss_scale, part.loss_scale)
            self._through_one_joint(hosted, run, window, outputs, own, terms, *seeds)
            which = (objectives[i].heads or ()) if i in objectives else ()
            run.losses[hosted.spec.index] = [dict(zip(which, losses, strict=True)), scaled_sum(own, share)]
        return run

    def _inputs(self, part: Whole, window: int) -> dict[str, Any]:
        found = {}
        for hosted in self.hosted:
            for place, (name, source) in enumerate(hosted.spec.inputs):
                if source == DRIVER:
                    over_time = hosted.takes_over_time(place)
                    found[name] = tf.convert_to_tensor(part.grid.part(part.inputs[name], 0, window, over_time))
        return found

    def _through_one_joint(
        self,
        hosted: HostedStage,
        run: _Pass,
        window: int,
        outputs: Sequence[Any],
        own: Sequence[Any],
        terms: Sequence[Any],
        own_seed: float,
        seed: float,
    ) -> None:
        """Let all that a segment gives go through one operation, as its stage's tape does."""
        names = [*(name for name, _ in hosted.spec.outputs), *state_names(hosted)]
        goes_on = [bool(consumers) for _, consumers in hosted.spec.outputs] + [True] * len(hosted.spec.states)
        alive = [
            i
            for i, (name, output) in enumerate(zip(names, outputs, strict=True))
            if goes_on[i] and is_differentiable(output.dtype) and (name, window) not in (self._dead or ())
        ]
        passed = joint([*terms, *own], [outputs[i] for i in alive])
        losses = len(terms) + len(own)
        given = list(outputs)
        for i, tensor in zip(alive, passed[losses:], strict=True):
            mask = mask_of(outputs[i])
            given[i] = tensor if mask is None or tensor is outputs[i] else with_mask(tensor, mask)
        run.tensors |= dict(zip(names, given, strict=True))
        run.states = {**run.states, **{name: run.tensors[name] for name in state_names(hosted)}}
        run.targets += passed[:losses]
        run.seeds += [tf.fill((), tf.cast(seed, term.dtype)) for term in terms]
        run.seeds += [tf.fill((), tf.cast(own_seed, term.dtype)) for term in own]

    def _call(self, hosted: HostedStage, tensors: Mapping[str, Any], training: bool) -> tuple[Any, ...]:
        """One segment's model, its inputs by name; its flat outputs.

        A mask that the segment takes off its input is off for those after it.
        """
        given = [tensors[name] for name in (*(name for name, _ in hosted.spec.inputs), *state_names(hosted))]
        taken = [with_mask(tensor, mask_of(tensor)) for tensor in given]
        outputs = hosted.stage.model(taken[0] if len(taken) == 1 else taken, training=training)
        for tensor, copy in zip(given, taken, strict=True):
            if mask_of(tensor) is not None and mask_of(copy) is None:
                tensor._keras_mask = None
        return tuple(tf.nest.flatten(outputs))

    def _shared_values(self) -> dict[int, list[tuple[Any, Any]]]:
        """For each stage (by position) what to read in place of shared variables: (variable, tensor) pairs.

        owner ─► rest ─► rest ...   each segment reads an identity of its own, so that the uses in one segment are
             └► use 0   └► use 1    summed first, then those of later segments before those of earlier ones.
        """
        stage = {hosted.spec.index: hosted for hosted in self.hosted}
        found: dict[int, list[tuple[Any, Any]]] = {}
        rest: dict[str, Any] = {}
        for i, hosted in enumerate(self.hosted):
            for tie in hosted.ties:
                source = rest[tie.name] if tie.name in rest else tf.convert_to_tensor(owner(tie, stage).value)
                variable = hosted.stage.trainable_variables[tie.place]
                found.setdefault(i, []).append((variable, tf.identity(source)))
                rest[tie.name] = tf.identity(source)
        return found

    def _prediction_masks(self, batch: Whole) -> dict[tuple[int, int], list[Array]]:
        """{(stage by position, output): its masks per microbatch and window}, from a forward pass of all segments."""
        if not batch.targets or not any(makes_masks(hosted.stage.model) for hosted in self.hosted):
            return {}
        found: dict[tuple[int, int], list[Array]] = {}
        states: Mapping[str, Any] = {}
        for k, w in batch.grid.units():
            part = batch.microbatch(k)
            run = self._run(part, w, {}, states if w else self._initial(batch, k), 1.0, training=False)
            states = run.states
            for i, hosted in enumerate(self.hosted):
                for place in {head.place for head in hosted.heads}:
                    mask = mask_of(run.tensors[hosted.spec.outputs[place][0]])
                    if mask is not None and (batch.grid.is_last(w) or hosted.gives_over_time(place)):
                        found.setdefault((i, place), []).append(np.array(mask))
        return found

    def _find_dead(self, batch: Whole, weights: Weights) -> frozenset[tuple[str, int]]:
        """Tensors between segments and windows to which no gradient comes back (behind them everything is stopped).

        A joint would make zeros of "no gradient" for them, so they must not go through one. Found with an ordinary tape
        on the first microbatch; statistics and seeds are put back.
        """
        between = [name for hosted in self.hosted for name, consumers in hosted.spec.outputs if consumers]
        between += [name for hosted in self.hosted for name in state_names(hosted)]
        states = [States(hosted.stage.model) for hosted in self.hosted]
        before = [state.read() for state in states]
        self._dead = frozenset((name, w) for name in between for w in range(batch.grid.windows))  # no joints
        with self._tape() as tape:
            mine = by_head(of_microbatch(weights, 0))
            runs = self._windows(batch.microbatch(0), mine, 1.0, self._initial(batch, 0))
        watched = {
            (name, w): run.tensors[name]
            for w, run in enumerate(runs)
            for name in between
            if is_differentiable(run.tensors[name].dtype)
        }
        targets, seeds = [t for run in runs for t in run.targets], [s for run in runs for s in run.seeds]
        found = tape.gradient(targets, list(watched.values()), output_gradients=seeds) if targets else []
        for state, values in zip(states, before, strict=True):
            state.write(values)
        return frozenset(place for place, gradient in zip(watched, found, strict=False) if gradient is None)

    def _coupled(self, batch: Whole, weights: Weights) -> tuple[list[Any | None], dict[int, list[Any]]]:
        """A loss over the whole batch: all microbatches under one tape, the predictions of coupling stages joined.

        Each microbatch reads the variables through identities of its own, so that its gradients are summed apart.
        """
        whole = {i for i, hosted in enumerate(self.hosted) if hosted.heads.couples_samples}
        losses: list[dict[int, list[Any]]] = []
        targets, seeds = [], []
        runs, reads = [], []
        with self._tape() as tape:
            for k, size in enumerate(batch.grid.sizes):
                part, mine = batch.microbatch(k), by_head(of_microbatch(weights, k))
                each = {i: o for i, o in self._objectives(part, 0, mine).items() if i not in whole}
                reads.append([tf.identity(variable.value) for variable in self.variables])
                with standing_in(zip(self.variables, reads[-1], strict=True)):
                    run = self._run(part, 0, each, {}, size / batch.grid.samples)
                targets += run.targets
                seeds += run.seeds
                losses.append(run.losses)
                runs.append(run)
            at_once = self._objectives(batch, None, weights)
            for i in whole:
                hosted = self.hosted[i]
                names = [name for name, _ in hosted.spec.outputs]
                predictions = {
                    head.place: joined([run.tensors[names[head.place]] for run in runs]) for head in hosted.heads
                }
                values = hosted.heads.values(predictions, at_once[i])  # type: ignore[arg-type]
                terms = hosted.heads.terms(values)
                targets += terms
                seeds += [tf.fill((), tf.cast(batch.loss_scale, term.dtype)) for term in terms]
                losses[0][hosted.spec.index][0] = dict(enumerate(values))
        flat = tape.gradient(targets, [tensor for part in reads for tensor in part], output_gradients=seeds)
        found = iter(None if g is None else tf.convert_to_tensor(g) for g in flat)
        total: list[Any | None] = [None] * len(self.variables)
        for _ in batch.grid.sizes:
            total = [plus(a, next(found)) for a in total]
        return total, summed(losses)


def _own_losses(hosted: HostedStage, window: int) -> list[Any]:
    """A segment's own losses; weight regularisers, which Keras lists last, in window 0 only."""
    model = hosted.stage.model
    losses = list(model.losses)  # every look computes the regularisers
    count = len(losses) - (sum(v.regularizer is not None for v in model.trainable_weights) if window else 0)
    return [tf.reduce_sum(tf.cast(term, "float32")) for term in losses[:count]]


__all__ = ["SingleTape", "Whole"]

"""The joined model under one tape: all segments called one after the other, all gradients asked for at once.

No activation or gradient is handed over, no output gradient is passed: this is what a pipeline must equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.reference.one_tape.batch import (
    Weights,
    Whole,
    by_head,
    of_microbatch,
    owned,
    owner,
    reported,
    state_names,
    summed_losses,
    weight_part,
)
from pipeline.reference.one_tape.joined_model import JoinedModel, Pass
from stages.grid import Grid
from stages.keras_internals import standing_in
from stages.loss.precision import float_of_losses, rounded_once
from stages.masks import joined_with_masks, mask_of
from stages.put_back import values_put_back
from stages.tape.accumulate import dense, plus, plus_all
from stages.tape.embedding_rows import fixed_rows, is_sparse
from stages.tape.model_call import CallState, Part, states_of_layers
from stages.tape.tensors import is_differentiable, to_array
from stages.worker.hosted_stage import HostedStage, makes_masks
from stages.worker.observers import ACTIVATION, GRADIENT, MASK, Observer, Sight

Array = np.ndarray[Any, Any]


class SingleTape(JoinedModel):
    """One tape over all stages.

    Args:
        hosted: The stages, in the order of the data flow.

    Attributes:
        observer: Is shown what is at the cuts, as a worker's observer is; see `stages.worker.observers`.
    """

    def __init__(self, hosted: Sequence[HostedStage]) -> None:
        super().__init__(hosted)
        self.observer: Observer | None = None
        self._looked_up: frozenset[int] | None = None
        self._compiled = tf.function(self._microbatch, autograph=False, reduce_retracing=False)
        self._predicting = tf.function(self._forward, autograph=False, reduce_retracing=False)

    @property
    def variables(self) -> list[Any]:
        """All trainable variables, stage after stage; one that several stages have is there as the first one's."""
        return [v for hosted in self.hosted for v in owned(hosted)]

    def weights(self, batch: Whole) -> Weights:
        """What every head's loss of each microbatch and window weighs; {} without a loss."""
        with values_put_back(v for hosted in self.hosted for v in states_of_layers(hosted.stage.model)):
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
        if self.dead is None:
            self.dead = self._find_dead(batch, weights)
        if self.couples and batch.targets:
            total, found = self._coupled(batch, weights)
            return reported([found]), self._by_stage(total)
        step = self._compiled if compiled else self._microbatch
        total = [None] * len(self.variables)
        losses: list[dict[int, list[Any]]] = []
        for k, size in enumerate(batch.grid.sizes):
            part, mine = batch.microbatch(k), of_microbatch(weights, k)
            share = tf.constant(size / batch.grid.samples, float_of_losses())
            fixed = (size, part.grid.lengths, batch.loss_scale, batch.truncate, self.observer is not None)
            blocks, some, crossing = step(
                part.inputs, part.targets, part.sample_weights, mine, share, self.initial_states(batch, k), fixed
            )
            self._show(k, crossing)
            same = self._fixed_rows() if k and any(map(is_sparse, blocks[0])) else frozenset()
            for block in blocks:
                total = plus_all(total, block, same)
            losses += [dict(zip(self._indices, one, strict=True)) for one in some]
        return reported(losses), self._by_stage(total)

    @property
    def couples(self) -> bool:
        """Whether a loss or a metric needs the whole batch at once."""
        return any(hosted.heads.couples_samples or hosted.heads.counts_at_once for hosted in self.hosted)

    def _microbatch(
        self,
        inputs: Mapping[str, Any],
        targets: Mapping[str, Any],
        sample_weights: Mapping[str, Any],
        weights: Sequence[Any],
        share: Any,
        states: Mapping[str, Any],
        fixed: tuple[int, tuple[int, ...], float, int | None, bool],
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """One microbatch under one tape.

        Returns:
            dL/dvariables for each block of windows, each window's losses by stage, and, if asked for, what each window
            has at the cuts: activation, mask and gradient, in the order of `_crossings`.
        """
        size, lengths, loss_scale, truncate, observed = fixed  # plain numbers: TensorFlow traces anew for each object
        part = Whole(inputs, targets, sample_weights, Grid((size,), lengths), loss_scale, truncate)
        with self._tape() as tape:
            runs = self.run_windows(part, by_head(weights), share, states)
        losses = [[run.losses[index] for index in self._indices] for run in runs]
        at_cuts = self._at_cuts(runs) if observed else []
        blocks, gradients = self._gradients(tape, part, runs, [tensor for tensor, _ in at_cuts])
        crossing = [(tensor, mask, g) for (tensor, mask), g in zip(at_cuts, gradients, strict=True)]
        return blocks, losses, crossing

    def _at_cuts(self, runs: Sequence[Pass]) -> list[tuple[Any, Any | None]]:
        """The tensor and its mask of each crossing, window after window."""
        return [
            (run.taken[name, consumer], run.masks.get((name, consumer)))
            for run in runs
            for name, _, consumer in self._crossings()
        ]

    def _show(self, microbatch: int, crossing: Sequence[Any]) -> None:
        """Let the observer see what a microbatch has at the cuts, gradients per consumer."""
        if self.observer is None:
            return
        places = self._crossings()
        for n, (tensor, mask, gradient) in enumerate(crossing):
            window, place = divmod(n, len(places))
            name, producer, consumer = places[place]
            ends = (self._indices[producer], self._indices[consumer], name, microbatch, window)
            self.observer(Sight(ACTIVATION, True, *ends), to_array(tensor))
            self.observer(Sight(GRADIENT, True, *ends), None if gradient is None else to_array(gradient))
            if mask is not None:
                self.observer(Sight(MASK, True, *ends), to_array(mask))

    @contextmanager
    def _tape(self) -> Iterator[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in self.variables:
                tape.watch(variable.value)
            self._watch = None if self.observer is None else tape.watch
            yield tape
        self._watch = None

    def run_windows(self, part: Whole, weights: Weights, share: Any, states: Mapping[str, Any]) -> list[Pass]:
        """All windows of a microbatch, one after the other, under whatever tape is open."""
        runs: list[Pass] = []
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

    def _gradients(
        self, tape: Any, part: Whole, runs: Sequence[Pass], others: Sequence[Any]
    ) -> tuple[list[list[Any | None]], list[Any | None]]:
        """For each block of windows dL/dvariables: what later windows add comes first; and dL/dothers."""
        targets = [target for run in runs for target in run.targets]
        seeds = [seed for run in runs for seed in run.seeds]
        sources = [read for run in runs for read in run.reads]
        wanted = [is_differentiable(tensor.dtype) for tensor in others]
        sources += [tensor for tensor, yes in zip(others, wanted, strict=True) if yes]
        flat = tape.gradient(targets, sources, output_gradients=seeds) if targets else [None] * len(sources)
        count = len(self.variables)
        found = iter([dense(g) for g in flat[count * len(runs) :]])
        rest = [next(found) if yes else None for yes in wanted]
        blocks: list[list[Sequence[Any | None]]] = []
        for w in range(len(runs)):
            if w == 0 or part.begins_block(w):
                blocks.append([])
            blocks[-1].append(flat[w * count : (w + 1) * count])
        return [[reduce(plus, terms) for terms in zip(*reversed(block), strict=True)] for block in blocks], rest

    def _fixed_rows(self) -> frozenset[int]:
        """Which embeddings (by place among the variables) are looked up once for all samples, in the last pass."""
        if self._looked_up is None:
            places = {id(variable): n for n, variable in enumerate(self.variables)}
            found: set[int] = set()
            for i, hosted in enumerate(self.hosted):
                variables = hosted.stage.trainable_variables
                found |= {
                    places.get(id(variables[k]), -1)
                    for k in fixed_rows(Part(hosted.stage.model, hosted.spec.name), *self._took[i])
                }
            self._looked_up = frozenset(found)
        return self._looked_up

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

    def finals(self, grid: Grid) -> list[tuple[int, str, int, int]]:
        """(stage, tensor, microbatch, window) of all that `outputs` gives, microbatch after microbatch."""
        return [
            (hosted.spec.index, name, k, w)
            for k in range(len(grid.sizes))
            for w in range(grid.windows)
            for hosted, place, name in self._final_outputs()
            if grid.is_last(w) or hosted.gives_over_time(place)
        ]

    def outputs(self, batch: Whole, k: int) -> list[Any]:
        """A microbatch's predictions, in the order of `finals`."""
        part = batch.microbatch(k)
        return self._forward(part.inputs, self.initial_states(batch, k), part.grid.sizes, part.grid.lengths)

    def compiled_outputs(self, batch: Whole, k: int) -> list[Any]:
        """The same by one traced function."""
        part = batch.microbatch(k)
        states = self.initial_states(batch, k)
        found: list[Any] = self._predicting(part.inputs, states, part.grid.sizes, part.grid.lengths)
        return found

    def _final_outputs(self) -> list[tuple[HostedStage, int, str]]:
        return [
            (hosted, place, name)
            for hosted in self.hosted
            for place, (name, _) in enumerate(hosted.spec.outputs)
            if name in hosted.spec.finals
        ]

    def _forward(
        self, inputs: Mapping[str, Any], states: Mapping[str, Any], sizes: tuple[int, ...], lengths: tuple[int, ...]
    ) -> list[Any]:
        """One microbatch in inference mode, window after window."""
        grid = Grid(sizes, lengths)
        part, found = Whole(inputs, {}, {}, grid), []
        for w in range(grid.windows):
            run = self._run(part, w, {}, states, 1.0, training=False)
            states = run.states
            found += [
                run.tensors[name]
                for hosted, place, name in self._final_outputs()
                if grid.is_last(w) or hosted.gives_over_time(place)
            ]
        return found

    def _prediction_masks(self, batch: Whole) -> dict[tuple[int, int], list[Array]]:
        """{(stage by position, output): its masks per microbatch and window}, from a forward pass of all segments."""
        if not batch.targets or not any(makes_masks(hosted.stage.model) for hosted in self.hosted):
            return {}
        found: dict[tuple[int, int], list[Array]] = {}
        states: Mapping[str, Any] = {}
        for k, w in batch.grid.units():
            part = batch.microbatch(k)
            run = self._run(part, w, {}, states if w else self.initial_states(batch, k), 1.0, training=False)
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
        states = [CallState(hosted.stage.model) for hosted in self.hosted]
        before = [state.read() for state in states]
        self.dead = frozenset((name, w) for name in between for w in range(batch.grid.windows))  # no joints
        counting, self.counting = self.counting, False
        observer, self.observer = self.observer, None
        with self._tape() as tape:
            mine = by_head(of_microbatch(weights, 0))
            runs = self.run_windows(batch.microbatch(0), mine, 1.0, self.initial_states(batch, 0))
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
        self.counting, self.observer = counting, observer
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
                hosted, predictions = self.hosted[i], self._predictions(i, runs)
                values = hosted.heads.values(predictions, at_once[i])
                if self.counting and not hosted.heads.counts_at_once:
                    hosted.heads.update(predictions, at_once[i])
                terms = hosted.heads.terms(values)
                targets += terms
                seeds += [tf.fill((), rounded_once(batch.loss_scale, term.dtype)) for term in terms]
                losses[0][hosted.spec.index][0] = dict(enumerate(values))
        for i, hosted in enumerate(self.hosted):
            if self.counting and hosted.heads.counts_at_once:
                hosted.heads.update(self._predictions(i, runs), at_once[i])
        at_cuts = self._at_cuts(runs) if self.observer is not None else []
        wanted = [tensor for tensor, _ in at_cuts if is_differentiable(tensor.dtype)]
        sources = [*(tensor for part in reads for tensor in part), *wanted]
        flat, count = tape.gradient(targets, sources, output_gradients=seeds), len(self.variables)
        total: list[Any | None] = [None] * count
        same = self._fixed_rows() if any(map(is_sparse, flat)) else frozenset()
        for k in range(len(batch.grid.sizes)):
            total = plus_all(total, flat[k * count : (k + 1) * count], same)
        found = iter([dense(g) for g in flat[count * len(runs) :]])
        crossing = [(t, mask, next(found) if is_differentiable(t.dtype) else None) for t, mask in at_cuts]
        cuts = len(crossing) // len(runs)
        for k in range(len(runs)):
            self._show(k, crossing[k * cuts : (k + 1) * cuts])
        return total, summed_losses(losses)

    def _predictions(self, i: int, runs: Sequence[Pass]) -> dict[int, Any]:
        """{output: (n, ...) of all microbatches}, of the outputs of a stage (by position) that are judged."""
        names = [name for name, _ in self.hosted[i].spec.outputs]
        return {
            head.place: joined_with_masks([run.tensors[names[head.place]] for run in runs])
            for head in self.hosted[i].heads
        }


__all__ = ["SingleTape", "Whole"]

"""The reference: the joined model under one tape, in a process of its own.

It hosts all segments, calls them one after the other under a single `tf.GradientTape`, and asks that tape for all
gradients at once. No activation or gradient is handed over, no output gradient is passed: what the pipeline must equal.
It runs in a worker process, since results of convolutions depend on the size of TensorFlow's thread pools, which is set
once per process.

Sums of three or more numbers depend on the order, so the tape has joints where the model is cut: every tensor that a
segment takes is one identity of its own, all that a segment gives goes through one `IdentityN`, and a variable that
several segments have is read through a chain of identities. These change no value, only which sums are made first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from stages.accumulate import plus
from stages.heads import Objective
from stages.hosted import HostedStage, makes_masks
from stages.part import States, mask_of, with_mask
from stages.tapes import joint
from stages.tensors import is_differentiable
from stages.worker import Worker, serve
from transport.message import DRIVER, Key

Array = np.ndarray[Any, Any]
Place = tuple[int, str]
"""(stage, tensor name)."""


@dataclass
class Whole:
    """One batch as the reference sees it.

    Attributes:
        inputs: {name: (n, ...)}.
        targets: {output label: (n, ...)}; empty without a loss.
        sample_weights: {output label: array}.
        sizes: Samples per microbatch.
        loss_scale: Factor on the loss while it is differentiated.
    """

    inputs: Mapping[str, Array]
    targets: Mapping[str, Array]
    sample_weights: Mapping[str, Array]
    sizes: Sequence[int]
    loss_scale: float = 1.0

    @property
    def slices(self) -> list[slice]:
        """Where the microbatches are."""
        return [slice(a, b) for a, b in pairwise(accumulate(self.sizes, initial=0))]


@dataclass
class _Pass:
    """What one call of all segments leaves on the tape.

    Attributes:
        tensors: {tensor name: its value}.
        targets: What is differentiated, with `seeds`.
        seeds: As many.
        losses: {stage: [each head's value, own loss or None]}.
    """

    tensors: dict[str, Any]
    targets: list[Any] = field(default_factory=list)
    seeds: list[Any] = field(default_factory=list)
    losses: dict[int, list[Any]] = field(default_factory=dict)


class SingleTape:
    """One tape over all stages.

    Args:
        hosted: The stages, in the order of the data flow.
    """

    def __init__(self, hosted: Sequence[HostedStage]) -> None:
        self.hosted = hosted
        self._dead: frozenset[str] = frozenset()
        """Tensors between segments that no gradient comes back to."""

    @property
    def variables(self) -> list[Any]:
        """All trainable variables, stage after stage; one that several stages have is there as the first one's."""
        return [v for hosted in self.hosted for v in _owned(hosted)]

    def run(self, batch: Whole) -> tuple[dict[str, list[Any]], dict[int, list[Any | None]]]:
        """Gradients of the whole batch on the same microbatches.

        Returns:
            {stage: [each head's loss, own losses]} as workers report them, and for each stage dL/dvariables, summed in
            ascending order of microbatches.
        """
        masks = self._prediction_masks(batch)
        weights = {place: self._weights(batch, *place, masks) for place in self._heads()} if batch.targets else {}
        whole = any(hosted.heads.couples_samples for hosted in self.hosted) and bool(batch.targets)
        self._dead = self._find_dead(batch, weights)
        total: list[Any | None] = [None] * len(self.variables)
        losses: list[dict[int, list[Any]]] = []
        if whole:
            total, found = self._coupled(batch, weights)
            losses.append(found)
        else:
            for k in range(len(batch.sizes)):
                with self._tape() as tape:
                    run = self._run(batch, k, self._objectives(batch, k, weights))
                total = [plus(a, b) for a, b in zip(total, self._gradient(tape, run.targets, run.seeds), strict=True)]
                losses.append(run.losses)
        return _reported(losses), self._by_stage(total)

    @contextmanager
    def _tape(self) -> Iterator[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in self.variables:
                tape.watch(variable.value)
            yield tape

    def _gradient(self, tape: Any, targets: Sequence[Any], seeds: Sequence[Any]) -> list[Any | None]:
        if not targets:
            return [None] * len(self.variables)
        gradients = tape.gradient(list(targets), [v.value for v in self.variables], output_gradients=list(seeds))
        return [None if g is None else tf.convert_to_tensor(g) for g in gradients]

    def _by_stage(self, total: Sequence[Any | None]) -> dict[int, list[Any | None]]:
        """The gradients of each stage's trainable variables, shared ones in each stage that has them."""
        found = {id(v): g for v, g in zip(self.variables, total, strict=True)}
        stage = {hosted.spec.index: hosted for hosted in self.hosted}
        owners = {
            id(hosted.stage.trainable_variables[tie.place]): id(_owner(tie, stage))
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

    def _weights(self, batch: Whole, i: int, h: int, masks: Mapping[tuple[int, int], Any]) -> Sequence[float]:
        """What a head's loss of each microbatch weighs in the batch's."""
        hosted = self.hosted[i]
        label, head = hosted.labels[h], list(hosted.heads)[h]
        weight = batch.sample_weights.get(label)
        targets = [batch.targets[label][part] for part in batch.slices]
        parts = None if weight is None else [weight[part] for part in batch.slices]
        return head.weights(batch.sizes, targets, parts, masks.get((i, head.place)))

    def _objectives(
        self, batch: Whole, k: int | None, weights: Mapping[tuple[int, int], Sequence[float]]
    ) -> dict[int, Objective]:
        """For each stage (by position) with heads what they need for a microbatch, or for all of them (None)."""
        if not batch.targets:
            return {}
        part = slice(None) if k is None else batch.slices[k]
        found = {}
        for i, hosted in enumerate(self.hosted):
            if len(hosted.heads):
                given = [batch.sample_weights.get(label) for label in hosted.labels]
                found[i] = Objective(
                    tuple(tf.constant(batch.targets[label][part]) for label in hosted.labels),
                    tuple(None if weight is None else tf.constant(weight[part]) for weight in given),
                    tuple(1.0 if k is None else weights[i, h][k] for h in range(len(hosted.heads))),
                )
        return found

    def _run(self, batch: Whole, k: int, objectives: Mapping[int, Objective], training: bool = True) -> _Pass:
        """Call all segments on one microbatch, under whatever tape is open."""
        share = batch.sizes[k] / sum(batch.sizes)
        run = _Pass({name: tf.constant(array[batch.slices[k]]) for name, array in batch.inputs.items()})
        values = self._shared_values()
        for i, hosted in enumerate(self.hosted):
            with standing_in(values.get(i, {})):
                outputs = self._call(hosted, run.tensors, training)
                own = [tf.reduce_sum(tf.cast(term, "float32")) for term in hosted.stage.model.losses]
                losses, terms = [], []
                if i in objectives:
                    losses = hosted.heads.values(outputs, objectives[i])
                    terms = hosted.heads.terms(losses)
            self._through_one_joint(hosted, run, outputs, own, terms, share * batch.loss_scale, batch.loss_scale)
            run.losses[hosted.spec.index] = [losses, _scaled_sum(own, share)]
        return run

    def _through_one_joint(
        self,
        hosted: HostedStage,
        run: _Pass,
        outputs: Sequence[Any],
        own: Sequence[Any],
        terms: Sequence[Any],
        own_seed: float,
        seed: float,
    ) -> None:
        """Let all that a segment gives go through one operation, as its stage's tape does."""
        names = [name for name, _ in hosted.spec.outputs]
        alive = [
            i
            for i, ((name, consumers), output) in enumerate(zip(hosted.spec.outputs, outputs, strict=True))
            if consumers and is_differentiable(output.dtype) and name not in self._dead
        ]
        passed = joint([*terms, *own], [outputs[i] for i in alive])
        losses = len(terms) + len(own)
        given = list(outputs)
        for i, tensor in zip(alive, passed[losses:], strict=True):
            mask = mask_of(outputs[i])
            given[i] = tensor if mask is None or tensor is outputs[i] else with_mask(tensor, mask)
        run.tensors |= dict(zip(names, given, strict=True))
        run.targets += passed[:losses]
        run.seeds += [tf.fill((), tf.cast(seed, term.dtype)) for term in terms]
        run.seeds += [tf.fill((), tf.cast(own_seed, term.dtype)) for term in own]

    def _call(self, hosted: HostedStage, tensors: Mapping[str, Any], training: bool) -> tuple[Any, ...]:
        """One segment's model, its inputs by name; its flat outputs.

        A mask that the segment takes off its input is off for those after it.
        """
        given = [tensors[name] for name, _ in hosted.spec.inputs]
        taken = [with_mask(tensor, mask_of(tensor)) for tensor in given]
        outputs = hosted.stage.model(taken[0] if len(taken) == 1 else taken, training=training)
        for tensor, copy in zip(given, taken, strict=True):
            if mask_of(tensor) is not None and mask_of(copy) is None:
                tensor._keras_mask = None
        return tuple(tf.nest.flatten(outputs))

    def _shared_values(self) -> dict[int, dict[int, tuple[Any, Any]]]:
        """For each stage (by position) what to read in place of shared variables: (variable, tensor) by place.

        owner ─► rest ─► rest ...   each segment reads an identity of its own, so that the uses in one segment are
             └► use 0   └► use 1    summed first, then those of later segments before those of earlier ones.
        """
        stage = {hosted.spec.index: hosted for hosted in self.hosted}
        found: dict[int, dict[int, tuple[Any, Any]]] = {}
        rest: dict[str, Any] = {}
        for i, hosted in enumerate(self.hosted):
            for tie in hosted.ties:
                source = rest[tie.name] if tie.name in rest else tf.convert_to_tensor(_owner(tie, stage).value)
                variable = hosted.stage.trainable_variables[tie.place]
                found.setdefault(i, {})[tie.place] = (variable, tf.identity(source))
                rest[tie.name] = tf.identity(source)
        return found

    def _prediction_masks(self, batch: Whole) -> dict[tuple[int, int], list[Array]]:
        """{(stage by position, output): its masks per microbatch}, from a forward pass of the joined model."""
        if not batch.targets or not any(makes_masks(hosted.stage.model) for hosted in self.hosted):
            return {}
        found: dict[tuple[int, int], list[Array]] = {}
        for k in range(len(batch.sizes)):
            run = self._run(batch, k, {}, training=False)
            for i, hosted in enumerate(self.hosted):
                for place in {head.place for head in hosted.heads}:
                    mask = mask_of(run.tensors[hosted.spec.outputs[place][0]])
                    if mask is not None:
                        found.setdefault((i, place), []).append(np.array(mask))
        return found

    def _find_dead(self, batch: Whole, weights: Mapping[tuple[int, int], Sequence[float]]) -> frozenset[str]:
        """Tensors between segments to which no gradient comes back (behind them everything is stopped or cast).

        A joint would make zeros of "no gradient" for them, so they must not go through one. Found with an ordinary tape
        on the first microbatch; statistics and seeds are put back.
        """
        between = [name for hosted in self.hosted for name, consumers in hosted.spec.outputs if consumers]
        states = [States(hosted.stage.model) for hosted in self.hosted]
        before = [state.read() for state in states]
        self._dead = frozenset(between)  # no joints
        objectives = self._objectives(batch, 0, weights)
        watched: dict[str, Any] = {}
        with self._tape() as tape:
            run = self._run(batch, 0, objectives)
            watched = {name: run.tensors[name] for name in between if is_differentiable(run.tensors[name].dtype)}
        found = tape.gradient(run.targets, list(watched.values()), output_gradients=run.seeds) if run.targets else []
        for state, values in zip(states, before, strict=True):
            state.write(values)
        return frozenset(name for name, gradient in zip(watched, found, strict=False) if gradient is None)

    def _coupled(
        self, batch: Whole, weights: Mapping[tuple[int, int], Sequence[float]]
    ) -> tuple[list[Any | None], dict[int, list[Any]]]:
        """A loss over the whole batch: all microbatches under one tape, the predictions of coupling stages joined.

        Each microbatch reads the variables through identities of its own, so that its gradients are summed apart.
        """
        whole = {i for i, hosted in enumerate(self.hosted) if hosted.heads.couples_samples}
        losses: list[dict[int, list[Any]]] = []
        targets, seeds = [], []
        runs, reads = [], []
        with self._tape() as tape:
            for k in range(len(batch.sizes)):
                each = {i: o for i, o in self._objectives(batch, k, weights).items() if i not in whole}
                reads.append([tf.identity(variable.value) for variable in self.variables])
                with standing_in(dict(enumerate(zip(self.variables, reads[-1], strict=True)))):
                    run = self._run(batch, k, each)
                targets += run.targets
                seeds += run.seeds
                losses.append(run.losses)
                runs.append(run)
            joined = self._objectives(batch, None, weights)
            for i in whole:
                hosted = self.hosted[i]
                names = [name for name, _ in hosted.spec.outputs]
                predictions = {
                    head.place: _joined([run.tensors[names[head.place]] for run in runs]) for head in hosted.heads
                }
                values = hosted.heads.values(predictions, joined[i])  # type: ignore[arg-type]
                terms = hosted.heads.terms(values)
                targets += terms
                seeds += [tf.fill((), tf.cast(batch.loss_scale, term.dtype)) for term in terms]
                losses[0][hosted.spec.index][0] = values
        flat = tape.gradient(targets, [tensor for part in reads for tensor in part], output_gradients=seeds)
        found = iter(None if g is None else tf.convert_to_tensor(g) for g in flat)
        total: list[Any | None] = [None] * len(self.variables)
        for _ in batch.sizes:
            total = [plus(a, next(found)) for a in total]
        return total, _summed(losses)


@contextmanager
def standing_in(values: Mapping[int, tuple[Any, Any]]) -> Iterator[None]:
    """Let Keras variables be read as other tensors for a while."""
    before = [(variable, variable._value) for variable, _ in values.values()]
    try:
        for variable, tensor in values.values():
            variable._value = tensor
        yield
    finally:
        for variable, value in before:
            variable._value = value


class ReferenceWorker(Worker):
    """A worker that hosts all stages and computes a step's gradients under one tape."""

    def _do_step(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        hosted = [self.hosted[index] for index in sorted(self.hosted)]
        inputs, targets, sample_weights = {}, {}, {}
        for stage in hosted:
            index = stage.spec.index
            for name, source in stage.spec.inputs:
                if source == DRIVER:
                    inputs[name] = self._array("activation", order["step"], index, name)
            for label in stage.labels if order["mode"] != "masks" else ():
                targets[label] = self._array("target", order["step"], index, label)
                if label in order["sample_weights"]:
                    sample_weights[label] = self._array("sample_weight", order["step"], index, label)
        if order["mode"] == "masks":
            return {"losses": {}, "masked": False}  # the joined model looks for itself
        batch = Whole(inputs, targets, sample_weights, order["sizes"], order["loss_scale"])
        losses, self._found = SingleTape(hosted).run(batch)
        return {"losses": losses, "metrics": {}}

    def _array(self, kind: str, step: int, stage: int, tensor: str) -> Array:
        array = self._take(Key(kind, step, stage, DRIVER, tensor)).array
        assert array is not None
        return array

    def _gradients_of(self, index: int) -> list[Array | None]:
        """The part of the one tape's gradients that belongs to a stage."""
        return [None if g is None else np.array(g) for g in self._found[index]]


def main(spec: Mapping[str, Any], board: Array) -> None:
    """Entry of the reference's process; the arguments are a worker's."""
    serve(ReferenceWorker, spec, board)


def _owned(hosted: HostedStage) -> list[Any]:
    """A stage's trainable variables without those that an earlier stage has too."""
    others = {tie.place for tie in hosted.ties if tie.stages[0] != hosted.spec.index}
    return [v for place, v in enumerate(hosted.stage.trainable_variables) if place not in others]


def _owner(tie: Any, stage: Mapping[int, HostedStage]) -> Any:
    """The first stage's variable of a tie."""
    first = stage[tie.stages[0]]
    place = next(one.place for one in first.ties if one.name == tie.name)
    return first.stage.trainable_variables[place]


def _joined(parts: Sequence[Any]) -> Any:
    masks = [mask_of(part) for part in parts]
    whole = tf.concat(list(parts), axis=0)
    return whole if masks[0] is None else with_mask(whole, tf.concat(masks, axis=0))


def _scaled_sum(terms: Sequence[Any], share: float) -> Any | None:
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * tf.cast(share, total.dtype)


def _summed(losses: Sequence[Mapping[int, Sequence[Any]]]) -> dict[int, list[Any]]:
    """Losses of the whole batch, as if it were one microbatch."""
    found: dict[int, list[Any]] = {}
    for index in losses[0]:
        each = [one[index][0] for one in losses if len(one[index][0])]
        by_head = [sum(values[1:], start=values[0]) for values in zip(*each, strict=True)]
        own = [one[index][1] for one in losses if one[index][1] is not None]
        found[index] = [by_head, sum(own[1:], start=own[0]) if own else None]
    return found


def _reported(losses: Sequence[Mapping[int, Sequence[Any]]]) -> dict[str, list[Any]]:
    total = _summed(losses)
    return {
        str(index): [[float(value) for value in heads], None if own is None else float(own)]
        for index, (heads, own) in total.items()
    }


__all__ = ["ReferenceWorker", "SingleTape", "Whole", "main"]

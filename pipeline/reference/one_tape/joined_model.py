"""All segments called one after the other, as one model: what the reference puts under its tape.

Sums of three or more numbers depend on the order, so there are joints where the model is cut: every tensor that a
segment takes is one identity of its own, all that a segment gives goes through one `IdentityN`, and a variable that
several segments have is read through a chain of identities. These change no value, only which sums are made first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from pipeline.reference.one_tape.batch import Weights, Whole, owner, scaled_sum, state_names, weight_part
from stages.keras_internals import set_mask, standing_in
from stages.loss.heads import Objective
from stages.loss.precision import float_of_losses, rounded_once
from stages.masks import mask_of, with_mask
from stages.tape.eager import joint
from stages.tape.embedding_rows import free_batch
from stages.tape.model_call import packer
from stages.tape.tensors import is_differentiable
from stages.worker.hosted_stage import HostedStage
from transport.message import DRIVER


@dataclass
class Pass:
    """One call of all segments: its tensors, targets, seeds, losses and states.

    Attributes:
        tensors: {tensor name: its value}.
        targets: Scalar loss terms to be differentiated, with `seeds`.
        seeds: As many.
        losses: {stage: [{head: its value}, own loss or None]}.
        states: {state name: its value behind the window}.
        reads: What the segments read in place of each variable.
        taken: {(tensor, position of the stage that takes it): the tensor as that stage has it}.
        masks: The masks of these, of those that have one.
    """

    tensors: dict[str, Any]
    targets: list[Any] = field(default_factory=list)
    seeds: list[Any] = field(default_factory=list)
    losses: dict[int, list[Any]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    reads: list[Any] = field(default_factory=list)
    taken: dict[tuple[str, int], Any] = field(default_factory=dict)
    masks: dict[tuple[str, int], Any] = field(default_factory=dict)


class JoinedModel:
    """The stages of a pipeline as one model.

    Args:
        hosted: The stages, in the order of the data flow.

    Attributes:
        counting: Whether metrics count what is judged in training.
    """

    def __init__(self, hosted: Sequence[HostedStage]) -> None:
        self.hosted = hosted
        self.counting = False
        self._watch: Callable[[Any], None] | None = None
        self._took: dict[int, tuple[list[tf.TensorSpec], list[int]]] = {}
        """For each stage (by position) what it took in the last pass: its inputs, any number of samples; the masked."""
        self.dead: frozenset[tuple[str, int]] | None = None
        """(tensor, window) between segments or windows that no gradient comes back to; None: not known yet."""

    @property
    def _indices(self) -> list[int]:
        return [hosted.spec.index for hosted in self.hosted]

    def _heads(self) -> list[tuple[int, int]]:
        """(position of the stage, number of the head in it) of all heads."""
        return [(i, h) for i, hosted in enumerate(self.hosted) for h in range(len(hosted.heads))]

    def _crossings(self) -> list[tuple[str, int, int]]:
        """(tensor, producer, consumer) of all that crosses a cut; stages by position."""
        position = {hosted.spec.index: i for i, hosted in enumerate(self.hosted)}
        return [
            (name, position[source], i)
            for i, hosted in enumerate(self.hosted)
            for name, source in hosted.spec.inputs
            if source != DRIVER
        ]

    def initial_states(self, batch: Whole, k: int) -> dict[str, Any]:
        """Every stage's states in front of window 0."""
        found: dict[str, Any] = {}
        for hosted in self.hosted:
            if hosted.stage.carried is not None:
                states = hosted.stage.carried.enter(k, 0, batch.grid.sizes[k], True)
                found |= dict(zip(state_names(hosted), states, strict=True))
        return found

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
    ) -> Pass:
        """Call all segments on one window of a microbatch, under whatever tape is open."""
        run = Pass(self._inputs(part, window))
        values = self._shared_values()
        for i, hosted in enumerate(self.hosted):
            with standing_in(values.get(i, ())):
                outputs = self._call(i, run, states, training)
                own = _own_losses(hosted, window)
                losses, terms = [], []
                if i in objectives:
                    losses = hosted.heads.values(outputs, objectives[i])
                    terms = hosted.heads.terms(losses, objectives[i].heads)
                    if self.counting and not hosted.heads.counts_at_once:
                        hosted.heads.update(outputs, objectives[i])
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
        run: Pass,
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
            if goes_on[i] and is_differentiable(output.dtype) and (name, window) not in (self.dead or ())
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
        run.seeds += [tf.fill((), rounded_once(seed, term.dtype)) for term in terms]
        run.seeds += [tf.fill((), rounded_once(own_seed, term.dtype)) for term in own]

    def _call(self, i: int, run: Pass, states: Mapping[str, Any], training: bool) -> tuple[Any, ...]:
        """One segment's model, its inputs by name; its flat outputs.

        A mask that the segment takes off its input is off for those after it.
        """
        hosted, tensors = self.hosted[i], {**run.tensors, **states}
        names = [*(name for name, _ in hosted.spec.inputs), *state_names(hosted)]
        given = [tensors[name] for name in names]
        taken = [with_mask(tensor, mask_of(tensor)) for tensor in given]
        for name, tensor in zip(names, taken, strict=True):
            if self._watch is not None and is_differentiable(tensor.dtype):
                self._watch(tensor)  # behind frozen segments nothing else would put it on the tape
            run.taken[name, i] = tensor
            if mask_of(tensor) is not None:
                run.masks[name, i] = mask_of(tensor)
        masked = [n for n, tensor in enumerate(taken) if mask_of(tensor) is not None]
        self._took[i] = (free_batch([*taken, *(mask_of(taken[n]) for n in masked)]), masked)
        outputs = hosted.stage.model(packer(hosted.stage.model)(taken), training=training)
        for tensor, copy in zip(given, taken, strict=True):
            if mask_of(tensor) is not None and mask_of(copy) is None:
                set_mask(tensor, None)
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


def _own_losses(hosted: HostedStage, window: int) -> list[Any]:
    """A segment's own losses; weight regularisers, which Keras lists last, in window 0 only."""
    model = hosted.stage.model
    losses = list(model.losses)  # every look computes the regularisers
    count = len(losses) - (sum(v.regularizer is not None for v in model.trainable_weights) if window else 0)
    return [tf.reduce_sum(tf.cast(term, float_of_losses())) for term in losses[:count]]

"""The objectives of one stage: a head for each of its outputs that a loss or a metric judges.

    outputs  o0 ──► other stages         o1 ──► head "main" (weight 1)        o2 ──► head "aux" (weight 0.3)

What Keras's trainer adds up over all outputs, w0 * L0 + w1 * L1 + ..., is here spread over the stages that have the
outputs: every head's term is a target of its own on its stage's tape, with the seed 1 (times the loss scale).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from stages.loss.head import Head
from stages.loss.precision import rounded_once
from stages.loss.ways import Way, Ways
from stages.masks import mask_of, with_mask

Outputs = Sequence[Any] | Mapping[int, Any]
"""A stage's outputs by their place; those without a head may be left out of a mapping."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Targets, sample weights and weights of a stage's heads for one microbatch (of one window), one entry per head.

    Attributes:
        targets: Eager tensors (n_k, ...).
        sample_weights: Eager tensors, or None where a head has none.
        weights: What this microbatch's (and window's) loss weighs in the batch's (`Head.weights`).
        heads: Which of the stage's heads these are for; None: all. In a window that is not the last, an output that
            only the whole sequence gives is not judged.
    """

    targets: tuple[Any, ...]
    sample_weights: tuple[Any | None, ...]
    weights: tuple[Any, ...]
    heads: tuple[int, ...] | None = None

    @property
    def weighted(self) -> tuple[bool, ...]:
        """Which heads have sample weights."""
        return tuple(weight is not None for weight in self.sample_weights)

    def tensors(self) -> tuple[Any, ...]:
        """Targets, then the sample weights that there are."""
        return (*self.targets, *(weight for weight in self.sample_weights if weight is not None))

    @classmethod
    def of_tensors(
        cls,
        tensors: Sequence[Any],
        weighted: Sequence[bool],
        weights: Sequence[Any],
        heads: tuple[int, ...] | None = None,
    ) -> Objective:
        """The objective that `tensors` came from."""
        targets, rest = tensors[: len(weighted)], iter(tensors[len(weighted) :])
        return cls(tuple(targets), tuple(next(rest) if there else None for there in weighted), tuple(weights), heads)


class Heads:
    """The heads of one stage, in the order of the model's outputs."""

    def __init__(self, heads: Sequence[Head] = ()) -> None:
        self._heads = tuple(heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def objective(self, target: Any, sample_weight: Any, weight: float) -> Objective:
        """What one microbatch is judged by.

        Args:
            target: Array or tensor (n, ...); for several heads a list, one per head.
            sample_weight: (n,) or None; for several heads a list, or None.
            weight: What the microbatch's losses weigh in the batch's.
        """
        several = len(self) != 1
        targets = list(target) if several else [target]
        weights = [sample_weight] if not several else [None] * len(self) if sample_weight is None else sample_weight
        return Objective(
            tuple(tf.convert_to_tensor(one) for one in targets),
            tuple(None if one is None else tf.convert_to_tensor(one) for one in weights),
            (weight,) * len(self),
        )

    @property
    def couples_samples(self) -> bool:
        """Whether a loss needs the whole batch at once; then all of the stage's are computed so."""
        return any(head.couples_samples for head in self._heads)

    @property
    def counts_at_once(self) -> bool:
        """Whether a metric gives a number of the whole batch; then all of the stage's count whole batches."""
        return any(head.ways.metrics is Way.WHOLE for head in self._heads)

    def go(self, ways: Sequence[Ways | None]) -> None:
        """Say how each head's loss and metrics are made of microbatches; None: as it is known of Keras's own."""
        for head, given in zip(self, ways, strict=True):
            loss, metrics = head.known
            head.ways = given or Ways(loss or Way.PARTS, metrics or Way.PARTS)

    @property
    def variables(self) -> list[Any]:
        """The metrics' state."""
        return [variable for head in self for variable in head.variables]

    def values(self, outputs: Outputs, objective: Objective) -> list[Any]:
        """Each head's loss on a microbatch, times what the microbatch weighs in the batch: float scalars."""
        found = []
        for head, target, sample_weight, weight in self._with(objective):
            value = head.value(target, outputs[head.place], sample_weight)
            found.append(value * rounded_once(weight, value.dtype))
        return found

    def terms(self, values: Sequence[Any], which: Sequence[int] | None = None) -> list[Any]:
        """What is differentiated: the sum of the values times their loss weights, if any head (of `which`) has a loss.

        One sum, as Keras makes one: what a tensor gets from several losses is then added in Keras's order.
        """
        weighted = [
            value if head.weight is None else value * rounded_once(head.weight, value.dtype)
            for head, value in zip(self._some(which), values, strict=True)
            if head.loss is not None
        ]
        return [sum(weighted[1:], start=weighted[0])] if weighted else []

    def update(self, outputs: Outputs, objective: Objective) -> None:
        """Let the metrics count a microbatch, or a whole batch where one of them must."""
        for head, target, sample_weight, _ in self._with(objective):
            head.update(target, outputs[head.place], sample_weight)

    def results(self) -> dict[str, Any]:
        """The metrics' values so far, by the names that Keras gives them."""
        return {name: value for head in self for name, value in head.results().items()}

    def build(self, examples: Sequence[Any]) -> None:
        """Make the metrics' variables as another process has them: from each head's `Head.example`."""
        for head, example in zip(self, examples, strict=True):
            if example is not None:
                head.example = example
                head.build(*(None if one is None else tf.zeros(one[1], one[0]) for one in example))

    def reset(self) -> None:
        """Let the metrics count anew."""
        for head in self:
            head.reset()

    def _some(self, which: Sequence[int] | None) -> Sequence[Head]:
        return self._heads if which is None else [self._heads[i] for i in which]

    def _with(self, objective: Objective) -> Iterator[tuple[Head, Any, Any | None, Any]]:
        heads = self._some(objective.heads)
        return zip(heads, objective.targets, objective.sample_weights, objective.weights, strict=True)


def whole_batch(
    heads: Heads, parts: Sequence[Mapping[int, Any]], objective: Objective, training: bool, loss_scale: float = 1.0
) -> WholeBatch:
    """Losses over a whole batch, for heads that couple its samples.

    Args:
        heads: Of one stage.
        parts: For each microbatch {output: its tensor (n_k, ...), with its mask}.
        objective: Of the whole batch, every weight 1.
        training: Whether gradients are wanted.
        loss_scale: Factor on the gradients.

    Returns:
        Each head's value, and the gradients of the weighted sum, cut into microbatches.
    """
    joined, masks = _joined(heads, parts)
    places = list(joined)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        for tensor in joined.values():
            tape.watch(tensor)
        judged = {place: with_mask(tensor, masks[place]) for place, tensor in joined.items()}
        values = heads.values(judged, objective)
        terms = heads.terms(values)
    heads.update(judged, objective)
    cut: dict[int, list[Any]] = {}
    if training:
        sizes = [int(part[places[0]].shape[0]) for part in parts]
        seeds = [tf.fill((), rounded_once(loss_scale, term.dtype)) for term in terms]
        found = tape.gradient(terms, list(joined.values()), output_gradients=seeds)
        cut = {place: tf.split(g, sizes) for place, g in zip(places, found, strict=True) if g is not None}
    return WholeBatch(values, [{place: pieces[k] for place, pieces in cut.items()} for k in range(len(parts))])


def count_whole_batch(heads: Heads, parts: Sequence[Mapping[int, Any]], objective: Objective) -> None:
    """Let the metrics count a batch once; the arguments are those of `whole_batch`."""
    joined, masks = _joined(heads, parts)
    heads.update({place: with_mask(tensor, masks[place]) for place, tensor in joined.items()}, objective)


@dataclass(frozen=True, slots=True)
class WholeBatch:
    """Losses over a whole batch, and their gradients.

    Attributes:
        values: One per head.
        gradients: For each microbatch {output: dL/doutput, (n_k, ...)}.
    """

    values: list[Any]
    gradients: list[dict[int, Any]]


def _joined(heads: Heads, parts: Sequence[Mapping[int, Any]]) -> tuple[dict[int, Any], dict[int, Any | None]]:
    """{output: predictions (n, ...) of all microbatches}, and {output: their masks, or None}."""
    places = sorted({head.place for head in heads})
    masks = {place: [mask_of(part[place]) for part in parts] for place in places}
    return (
        {place: tf.concat([part[place] for part in parts], axis=0) for place in places},
        {place: None if some[0] is None else tf.concat(some, axis=0) for place, some in masks.items()},
    )

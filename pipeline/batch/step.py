"""A step in plain data: the batch that goes in, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.plan.step_events import StepRecord
from pipeline.plan.timeline import Timeline
from stages.loss.precision import loss_number
from stages.loss.ways import Way, Ways
from stages.worker.reply import StepReply
from stages.worker.stage_spec import StageSpec


@dataclass(frozen=True)
class Batch:
    """One batch, cut as `sizes` says.

    Attributes:
        inputs: {input name: array (n, ...)}.
        targets: {output label: array (n, ...)}.
        sample_weights: {output label: array}, of those that have any.
        sizes: Samples per microbatch; they sum to n.
        lengths: Time steps per window; () without windows.
        loss_weights: {output label: what its loss weighs now}, of loss weights that are variables.
        ways: {output label: how its loss and metrics are made of the microbatches}, of those that were tried.
    """

    inputs: Mapping[str, np.ndarray[Any, Any]]
    targets: Mapping[str, np.ndarray[Any, Any]]
    sample_weights: Mapping[str, np.ndarray[Any, Any]]
    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    ways: Mapping[str, Ways] = field(default_factory=dict)

    @property
    def at_once(self) -> bool:
        """Whether a loss exists only when the whole batch went forward."""
        return any(ways.loss is Way.WHOLE for ways in self.ways.values())


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        loss: The batch's loss: that of every output by its loss weight, and own losses; None in prediction.
        losses: {output label: its loss, unweighted}.
        metrics: The metrics so far.
        outputs: In prediction: {tensor name: array (n, ...)}.
        spans: With a trace: per worker the (begin, end) of its actions, seconds of its own clock.
        record: With a trace: what driver and workers wrote down besides.
        timeline: With a trace, of a training step: what these two say.
        squared_norms: {(stage, place of a variable): sum of squares of its gradient}, where it was asked for.
        finite: Whether no gradient of any stage has an infinity or a NaN, where that was asked for.
        roundings: Of a compiled reference: how far its gradients, and what it has at the cuts, are from those of the
            same tape run eagerly, the largest of some samples; each as a part of the largest of its kind.
        own_losses: {stage: its own losses (regularisers, `add_loss`)} of those that have any.
        boundary_norms: {(what, producer, consumer, tensor): L2 norm over the batch}, where it was asked for.
    """

    loss: float | None
    losses: dict[str, float]
    metrics: dict[str, float]
    outputs: dict[str, np.ndarray[Any, Any]]
    spans: list[list[tuple[float, float]]]
    record: StepRecord | None = None
    timeline: Timeline | None = None
    squared_norms: Mapping[tuple[int, int], float] = field(default_factory=dict)
    finite: bool = True
    roundings: Mapping[str, float] = field(default_factory=dict)
    own_losses: Mapping[int, float] = field(default_factory=dict)
    boundary_norms: Mapping[tuple[str, int, int, str], float] = field(default_factory=dict)


def result_of(
    answers: Sequence[StepReply],
    specs: Mapping[int, StageSpec],
    batch: Batch,
    outputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    record: StepRecord | None = None,
) -> StepResult:
    """What the workers' answers to a step say together.

    Args:
        answers: One of each worker.
        specs: The stages by number.
        batch: What went in.
        outputs: The predictions, of a step that has them and no loss.
        record: With a trace: what driver and workers wrote down besides.
    """
    counted = [*(answer.metrics for answer in answers), *(answer.inner_metrics for answer in answers)]
    losses, total, own = losses_of(answers, specs, batch.loss_weights)
    return StepResult(
        loss=total if outputs is None else None,
        losses=losses,
        metrics={name: v for part in counted for name, v in part.items()},
        outputs=dict(outputs or {}),
        spans=[list(answer.spans) for answer in answers],
        record=record,
        squared_norms={place: norm for answer in answers for place, norm in answer.squared_norms.items()},
        finite=all(answer.finite for answer in answers),
        roundings=max((answer.roundings for answer in answers), key=len),
        own_losses=own,
        boundary_norms={place: math.sqrt(squares) for answer in answers for place, squares in answer.squares.items()},
    )


def losses_of(
    answers: Sequence[StepReply], specs: Mapping[int, StageSpec], loss_weights: Mapping[str, float]
) -> tuple[dict[str, float], float, dict[int, float]]:
    """The losses out of the workers' answers.

    Returns:
        {output label: its loss}; the objective: these by their weights, then every stage's own losses, in order; and
        {stage: its own losses}.
    """
    by_stage = {i: pair for answer in answers for i, pair in answer.losses.items()}
    found = [
        (head.order, head.label, value, loss_weights.get(head.label, head.weight))
        for i, (by_head, _) in by_stage.items()
        for head, value in zip(specs[i].heads, by_head, strict=False)
    ]
    losses: dict[str, float] = {}
    total = loss_number(0.0)
    for _, label, value, weight in sorted(found, key=lambda head: head[0]):
        losses[label] = value
        total = total + loss_number(value) * loss_number(1.0 if weight is None else weight)
    own_losses = {i: own for i, (_, own) in sorted(by_stage.items()) if own is not None}
    for own in own_losses.values():
        total = total + loss_number(own)
    return losses, float(total), own_losses

"""Stages with their values in this process, and batches for them: what a witness is asked about, without a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import Pipeline
from pipeline.microbatch import microbatch_sizes
from pipeline.reference_batch import Whole
from stages import snapshot
from stages.grid import Grid
from stages.hosted import HostedStage


def stages_of(pipe: Pipeline) -> list[HostedStage]:
    """The pipeline's stages, built here as the reference builds them."""
    session = pipe._session
    found = [HostedStage(replace(spec, optimizer=None, undecayed=())) for spec in session._specs()]
    for stage, segment in zip(found, session.segments, strict=True):
        stage.set("model", snapshot.read(segment.model.variables))
    return found


def whole(pipe: Pipeline, x: Any, y: Any, weights: Any = None, lengths: tuple[int, ...] = (), **options: Any) -> Whole:
    """A batch; several inputs, targets and sample weights as lists in the pipeline's order."""
    session = pipe._session
    xs, ys = (value if isinstance(value, list) else [value] for value in (x, y))
    labels = list(session.wires.labels)
    given = weights if isinstance(weights, list) else [weights] * len(labels)
    sizes = microbatch_sizes(len(xs[0]), session.microbatches)
    return Whole(
        dict(zip(session.wires.inputs, xs, strict=True)),
        dict(zip(labels, ys, strict=True)),
        {label: w for label, w in zip(labels, given, strict=True) if w is not None},
        Grid(tuple(sizes), lengths),
        **options,
    )


def bits(stages: list[HostedStage]) -> list[bytes]:
    """All variables' bits."""
    return [np.asarray(v.value).tobytes() for stage in stages for v in stage.stage.model.variables]


def tape_gradients(stages: list[HostedStage], batch: Whole) -> tuple[dict[int, list[Any]], float]:
    """Gradients by the single tape, and the loss; the stages are left as they are."""
    from pipeline.single_tape import SingleTape

    before = [snapshot.read(stage.stage.model.variables) for stage in stages]
    tape = SingleTape(stages)
    losses, found = tape.sums(batch, tape.weights(batch), False)
    for stage, values in zip(stages, before, strict=True):
        stage.set("model", values)
    total = 0.0
    for stage in stages:
        by_head, own = losses[str(stage.spec.index)]
        for head, value in zip(stage.heads, by_head, strict=True):
            total += value * (1.0 if head.weight is None else head.weight)
        total += own or 0.0
    return {
        i: [None if g is None else np.array(tf.convert_to_tensor(g)) for g in each] for i, each in found.items()
    }, total

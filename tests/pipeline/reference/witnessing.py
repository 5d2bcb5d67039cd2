"""Stages with their values in this process, and batches for them: what a witness is asked about, without a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import Pipeline
from pipeline.batch.microbatch import microbatch_sizes
from pipeline.batch.step import StepResult
from pipeline.reference.one_tape.batch import Whole
from pipeline.reference.one_tape.single_tape import SingleTape
from pipeline.verify.by_witnesses import Yardstick
from pipeline.verify.tape import Allowance, Names, Observed
from stages.grid import Grid
from stages.worker import snapshot
from stages.worker.hosted_stage import HostedStage
from stages.worker.observers import Sight, ValueObserver
from tests.pipeline.reference.witness_kinds import made

NEAR = ("dense", "convolution", "dropout", "tied", "windows")
"""Kinds that each witness is asked about on its own; `test_witnesses` asks all of all, through `Pipeline.verify`."""


@dataclass(frozen=True)
class Case:
    """A pipeline's stages, a batch, and what one tape says of it.

    Attributes:
        stages: Built here.
        batch: The batch.
        step: Gradients, loss and what is at the cuts by one tape: stands for a healthy pipeline's step.
        names: Of stages and variables.
    """

    stages: list[HostedStage]
    batch: Whole
    step: Observed
    names: Names

    @property
    def yardstick(self) -> Yardstick:
        """What a witness may differ by from an eager pipeline."""
        return Yardstick(Allowance(True, {}, None), len(self.batch.grid.sizes) * self.batch.grid.windows)

    def faulty(self, gradients: Mapping[int, list[Any]] | None = None, seen: Any = None, loss: Any = None) -> Observed:
        """The step of a pipeline that has something else."""
        old = self.step
        result = old.result if loss is None else replace(old.result, loss=loss)
        return Observed(result, {**old.gradients, **(gradients or {})}, {**old.seen, **(seen or {})})


@cache
def case(kind: str) -> Case:
    """The case of a kind in `tests.pipeline.witness_kinds`, made once."""
    pipe, x, y, weights = made(kind)
    return case_of(pipe, x, y, weights)


def case_of(pipe: Pipeline, x: Any, y: Any, weights: Any = None, **options: Any) -> Case:
    """The case of any pipeline with a batch; several inputs, targets and weights as lists in the pipeline's order."""
    stages, batch = stages_of(pipe), whole(pipe, x, y, weights, **options)
    names = {
        (stage.spec.index, k): f"{stage.spec.name}/{variable.path}"
        for stage in stages
        for k, variable in enumerate(stage.stage.trainable_variables)
    }
    index = {stage.spec.index: stage for stage in stages}
    tied = {(i, tie.place): tie.stages[0] == i for i, stage in index.items() for tie in stage.ties}
    called = Names([stage.spec.name for stage in stages], names, tied, {})
    return Case(stages, batch, by_tape(stages, batch), called)


def stages_of(pipe: Pipeline) -> list[HostedStage]:
    """The pipeline's stages, built as the reference builds them."""
    session = pipe.session
    found = [HostedStage(replace(spec, undecayed=()), updates=False) for spec in session.workers.specs()]
    for stage, segment in zip(found, session.setup.segments, strict=True):
        stage.set("model", snapshot.read(segment.model.variables))
    return found


def whole(pipe: Pipeline, x: Any, y: Any, weights: Any = None, **options: Any) -> Whole:
    """A batch as the reference gets it."""
    setup = pipe.session.setup
    xs, ys = (value if isinstance(value, list) else [value] for value in (x, y))
    labels = list(setup.wires.labels)
    given = weights if isinstance(weights, list) else [weights] * len(labels)
    lengths = microbatch_sizes(xs[0].shape[1], setup.options.windows) if setup.options.windows > 1 else ()
    return Whole(
        dict(zip(setup.wires.inputs, xs, strict=True)),
        dict(zip(labels, ys, strict=True)),
        {label: w for label, w in zip(labels, given, strict=True) if w is not None},
        Grid(microbatch_sizes(len(xs[0]), setup.options.microbatches), lengths),
        truncate=setup.options.truncate,
        **options,
    )


def bits(stages: list[HostedStage]) -> list[bytes]:
    """All variables' bits."""
    return [np.asarray(v.value).tobytes() for stage in stages for v in stage.stage.model.variables]


def by_tape(stages: list[HostedStage], batch: Whole) -> Observed:
    """A step by one tape; the stages are left as they are."""
    before = [snapshot.read(stage.stage.model.variables) for stage in stages]
    tape = SingleTape(stages)
    seen = ValueObserver()
    tape.observer = seen
    losses, found = tape.sums(batch, tape.weights(batch), False)
    for stage, values in zip(stages, before, strict=True):
        stage.set("model", values)
    total = 0.0
    for stage in stages:
        by_head, own = losses[str(stage.spec.index)]
        for head, value in zip(stage.heads, by_head, strict=True):
            total += value * (1.0 if head.weight is None else head.weight)
        total += own or 0.0
    gradients = {
        i: [None if g is None else np.array(tf.convert_to_tensor(g)) / np.float32(batch.loss_scale) for g in each]
        for i, each in found.items()
    }
    result = StepResult(total, {}, {}, {}, [])
    return Observed(result, gradients, {Sight(*sight): array for sight, array in seen.seen.items()})

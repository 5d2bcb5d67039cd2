"""The running side of a pipeline: its workers, their steps, the values they hold, and the reference beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeline.compiled.compiled import Compiled
from pipeline.cutting.splitter import Split
from pipeline.model.wiring import Wires
from pipeline.runtime.options import Options
from pipeline.runtime.reference import Reference
from pipeline.runtime.setup import Setup
from pipeline.runtime.step_runner import StepRunner
from pipeline.runtime.values import Values
from pipeline.runtime.workers import Workers
from stages.recipe.segment import Segment


@dataclass(frozen=True, eq=False)
class Session:
    """The four things that run, and what they are made of.

    Attributes:
        setup: Segments, wires, options and the cut model: what does not change.
        workers: The stages' processes: started, compiled anew, stopped.
        steps: Training, evaluation, prediction and gradients of one batch.
        values: Variables, weights and optimizer slots, read and written.
        reference: One more process, with all stages joined, that `verify` compares with.
    """

    setup: Setup
    workers: Workers
    steps: StepRunner
    values: Values
    reference: Reference

    @classmethod
    def of(cls, segments: Sequence[Segment], wires: Wires, options: Options, split: Split | None = None) -> Self:
        """A session in which nothing runs as yet.

        Raises:
            ScheduleError, PlanError: The schedule makes no plan that workers can run.
            WiringError: A layer that changes its own variables is in two stages.
        """
        setup = Setup(tuple(segments), wires, options, split)
        workers = Workers(setup)
        steps = StepRunner(setup, workers)
        setup.check()
        values = Values(setup, workers.driver)
        return cls(setup, workers, steps, values, Reference(setup, workers, values))

    @property
    def ours(self) -> bool:
        """Whether this is the process that made it, and no forked copy."""
        return self.workers.turns.ours

    def recompile(self, compiled: Compiled) -> None:
        """Go on under other rules; the workers keep their values, the reference is started anew when needed."""
        self.workers.recompile(compiled)
        self.reference.close("compile() was called")

    def close(self) -> None:
        """End the workers and the reference for good. Idempotent."""
        try:
            self.reference.close("close() was called")
        finally:
            self.workers.close("close() was called")


__all__ = ["Session"]

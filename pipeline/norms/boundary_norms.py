"""Norms of activations and gradients at every cut, over time: which stage makes them vanish or explode, and since when.

What crosses a cut is what the stages before it learn from. The workers add up its squares while it crosses (see
`stages.worker.observers`), so nothing else travels and training is bit for bit the same; the rules of what is flagged
are in `pipeline.norms.flags`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch.step import StepResult
from pipeline.compare.tolerance import eps
from pipeline.errors import CompileError
from pipeline.norms.flags import NOT_FINITE, Boundary, Crossing, FlagLimits, boundaries_in_order, found, ratios
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from pipeline.saying import is_whole
from stages.worker.observers import ACTIVATION, GRADIENT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Flag:
    """A boundary that was found vanishing, exploding or not finite.

    Attributes:
        boundary: Which.
        kind: One of `pipeline.norms.flags.FLAG_KINDS`.
        step: The first step that was so.
        last: The last one.
        count: How many measured steps were so.
        why: In words, at the first of them.
        sentence: All of that in words, with the stages' names.
    """

    boundary: Boundary
    kind: str
    step: int
    last: int
    count: int
    why: str
    sentence: str


class BoundaryNorms(StepWatcher):
    """Measure L2 norms of all activations and gradients at the cuts while a pipeline is trained.

    Weights, optimizer, seeds, metrics and history are bit for bit those of training without it. Norms are over the
    batch, all microbatches and windows; gradients are those of the loss, without a loss scale.

    A measured step takes 1.07 times one that is not (compiled dense layers, 7 ms a step); in steps of 0.6 s
    (convolutions) the difference is less than their noise. Medians, two stages on two cores.

    Args:
        every: Measure step 1 and every so many-th after it, over all `fit`s that this callback is given to.
        vanishing: A ratio to the norm next to the loss (activations: to the input) below this is flagged; None:
            sqrt(eps) of the weights' dtype, 3.5e-4 in float32. `pipeline.norms.flags` has all rules and reasons.
        exploding: One above this is; None: 1 / sqrt(eps), 2.9e3 in float32.
        warn: Whether a RuntimeWarning says so when something is flagged for the first time.

    Attributes:
        steps: The steps that were measured.
        norms: {boundary: its norm at each of `steps`}; NaN also where there was no gradient.
        skipped: Those of `steps` whose update loss scaling skipped: their gradients may not be finite.
        flags: What was flagged, in the order of time.
        names: The stages' names.

    Raises:
        CompileError: An argument is out of its range.

    Example:
        >>> norms = BoundaryNorms(every=10)
        >>> pipe.fit(x, y, epochs=5, callbacks=[norms])
        >>> print(norms)
        >>> norms.save("norms.png")
    """

    def __init__(
        self, every: int = 10, vanishing: float | None = None, exploding: float | None = None, warn: bool = True
    ) -> None:
        super().__init__()
        if not is_whole(every):
            raise CompileError(f"every expects a whole number of steps, at least 1, received {every!r}")
        if not 0 <= (vanishing or 0.0) < 1 or (exploding or 2.0) <= 1:
            raise CompileError(
                "vanishing expects a ratio from 0 to below 1, exploding one above 1, "
                f"received vanishing={vanishing!r}, exploding={exploding!r}"
            )
        self.every, self.warn = every, warn
        self._given = (vanishing, exploding)
        self.steps: list[int] = []
        self.skipped: list[int] = []
        self.norms: dict[Boundary, list[float]] = {}
        self.names: tuple[str, ...] = ()
        self.limits = FlagLimits.of("float32", *self._given)
        self._flags: dict[tuple[Boundary, str], Flag] = {}
        self._marks: dict[Boundary, dict[str, list[int]]] = {}
        self._first: dict[Boundary, float] = {}
        self._crossings: dict[Boundary, Crossing] = {}
        self._loss_scale = 1.0

    @property
    def flags(self) -> tuple[Flag, ...]:
        """What was flagged, one for each boundary and kind, in the order of time."""
        return tuple(self._flags.values())

    def marks(self) -> Mapping[Boundary, Mapping[str, Sequence[int]]]:
        """{boundary: {kind: where in `steps` it was flagged}}."""
        return self._marks

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """What was measured: activations as they flow, then gradients as they flow."""
        return tuple(boundaries_in_order(self.norms))

    def before_step(self, session: Session, data: tuple[Any, Any, Any]) -> str:
        """Let the workers measure, if it is this step's turn."""
        super().before_step(session, data)
        if (self.step - 1) % self.every:
            return ""
        scaling = session.workers.needs_compile("training").loss_scaling
        self._loss_scale = 1.0 if scaling is None else scaling.scale
        return "norms"

    def after_step(self, session: Session, result: StepResult) -> None:
        """Take up what was measured."""
        if (self.step - 1) % self.every == 0:
            scale = self._loss_scale
            norms = {
                Boundary(*place): norm / scale if place[0] == GRADIENT else norm
                for place, norm in result.boundary_norms.items()
                if place[0] in (ACTIVATION, GRADIENT)
            }
            self._describe(session, norms)
            self._add(norms, skipped=not result.finite)

    def ratio(self, boundary: Boundary, measured: int = -1) -> float:
        """A norm beside that of its source; see `pipeline.norms.flags.ratios`.

        Args:
            boundary: One of `norms`.
            measured: At which measured step, by index; default: the last.
        """
        return ratios({b: values[measured] for b, values in self.norms.items()}, self._crossings)[boundary]

    def ends(self, boundary: Boundary) -> tuple[str, str]:
        """The names of the stage that sends it and of the one that receives it."""
        producer, consumer = self.names[boundary.producer], self.names[boundary.consumer]
        return (consumer, producer) if boundary.what == GRADIENT else (producer, consumer)

    def save(self, path: str | Path) -> Path:
        """Draw the norms over time and save the picture; the suffix chooses the format (png, svg, pdf)."""
        from pipeline.norms.figure import save_norms

        return save_norms(self, Path(path))

    def figure(self) -> Figure:
        """The figure that `save` saves."""
        from pipeline.norms.figure import norms_figure

        return norms_figure(self)

    def __str__(self) -> str:
        from pipeline.norms.text import norms_text

        return norms_text(self)

    def _describe(self, session: Session, norms: Mapping[Boundary, float]) -> None:
        """Learn what does not change from step to step; anew for each pipeline."""
        if set(norms) <= set(self._crossings):
            return
        driver = session.workers.driver()
        self.names = session.setup.wires.names
        stages = driver.descriptions.values()
        weights = {variable.dtype for stage in stages for variable in stage.variables if variable.trained}
        self.limits = FlagLimits.of(max(weights, key=eps, default="float32"), *self._given)
        for boundary in norms:
            dtype, shape = driver.output_spec(boundary.producer, boundary.tensor) or ("float32", ())
            self._crossings[boundary] = Crossing(dtype, math.prod(size for size in shape[1:] if size is not None))

    def _add(self, norms: Mapping[Boundary, float], skipped: bool) -> None:
        nothing = [math.nan] * len(self.steps)
        self.steps.append(self.step)
        self.skipped += [self.step] if skipped else []
        for boundary in {**self.norms, **norms}:
            self.norms.setdefault(boundary, list(nothing)).append(norms.get(boundary, math.nan))
        for boundary, norm in norms.items():
            if math.isfinite(norm) and norm > 0.0:
                self._first.setdefault(boundary, norm)
        for (boundary, kind), why in found(norms, self._first, self._crossings, self.limits, self._loss_scale).items():
            if not (skipped and boundary.what == GRADIENT and kind == NOT_FINITE):
                self._flag(boundary, kind, why)

    def _flag(self, boundary: Boundary, kind: str, why: str) -> None:
        self._marks.setdefault(boundary, {}).setdefault(kind, []).append(len(self.steps) - 1)
        known = self._flags.get((boundary, kind))
        if known is not None:
            self._flags[boundary, kind] = replace(known, last=self.step, count=known.count + 1)
            return
        sender, receiver = self.ends(boundary)
        name = f"dL/d{boundary.tensor}" if boundary.what == GRADIENT else f"activation {boundary.tensor!r}"
        sentence = f"{name} from {sender!r} to {receiver!r} is {kind} at step {self.step}: {why}"
        self._flags[boundary, kind] = Flag(boundary, kind, self.step, self.step, 1, why, sentence)
        if self.warn:
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)

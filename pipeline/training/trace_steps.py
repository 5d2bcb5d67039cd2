"""Traces of real training steps: what each worker and this process did and when, for Perfetto and for TensorBoard.

    callbacks before │ data │ watch the batch │ prepare │ send the batch │ wait for workers │ decide, order the update
    └── a turn of the training, from one step's end to the next one's ───────────────────────────────────────────────┘

Only steps that are traced are noted, in the workers too; all others take not a moment longer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import tensorflow as tf

from pipeline.batch.step import StepResult
from pipeline.errors import CompileError, TimelineError
from pipeline.plan.bottleneck import Bottleneck
from pipeline.plan.chrome_trace import save_trace
from pipeline.plan.step_events import DriverSpan, StepEvents, Update
from pipeline.plan.timeline import Timeline
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from pipeline.saying import is_whole

__all__ = ["TraceSteps"]


class TraceSteps(StepWatcher):
    """Trace some steps of `fit`: a file for Perfetto, scalars for TensorBoard, and what holds training back.

    Weights, optimizer, seeds, metrics and history are bit for bit those of training without it.

    Args:
        filepath: Where the trace goes when the last step to be traced is over, or training ends; a name that ends with
            `.json`, to be opened in ui.perfetto.dev or chrome://tracing. None: nowhere.
        first: The first step that is traced, counted from 1 over all `fit`s that this callback is given to. The very
            first ones also trace functions, and take long.
        steps: How many steps are traced; None: all from `first` on, which a file would be too small for.
        every: From the first on each so many-th step is traced.
        log_dir: Where TensorBoard finds scalars of each traced step, in its folder `pipeline`; None: none are written.

    Attributes:
        timelines: The steps that were traced, with everything that happened in them; the last one only where `steps` is
            None.

    Raises:
        CompileError: An argument is out of its range, or `log_dir` is given and tensorboard, which writes its files,
            is not installed.

    Example:
        >>> trace = TraceSteps("trace.json", log_dir="logs")
        >>> pipe.fit(x, y, epochs=5, callbacks=[trace])
        >>> print(trace)
    """

    def __init__(
        self,
        filepath: str | Path | None = None,
        *,
        first: int = 5,
        steps: int | None = 3,
        every: int = 1,
        log_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("first", first), ("steps", steps), ("every", every)):
            if not (is_whole(value) or (name == "steps" and value is None)):
                raise CompileError(f"{name} expects a whole number of steps, at least 1, received {value!r}")
        if filepath is not None and Path(filepath).suffix.lower() != ".json":
            raise CompileError(f"a trace is written as .json, received {str(filepath)!r}")
        if filepath is not None and steps is None:
            raise CompileError("a file with all steps would be too large to open; say how many with `steps`")
        if log_dir is not None and find_spec("tensorboard") is None:
            raise CompileError(
                "the package tensorboard, which writes the files of log_dir, is not installed (pip install tensorboard)"
            )
        self.filepath, self.log_dir = filepath, log_dir
        self.first, self.steps, self.every = first, steps, every
        self.timelines: list[Timeline] = []
        self._session: Session | None = None
        self._open = False
        self._left: float | None = None
        self._begun = self._ready = self._ready_before = 0.0
        self._writer: Any = None

    goes_last = True

    @property
    def traces(self) -> bool:  # type: ignore[override]
        """Whether the step that is about to run is traced."""
        ahead = self.step - self.first
        return ahead >= 0 and ahead % self.every == 0 and (self.steps is None or ahead // self.every < self.steps)

    @property
    def bottleneck(self) -> Bottleneck:
        """What holds training back: that of the traced step of median length.

        Raises:
            TimelineError: No step was traced.
        """
        return self._typical.bottleneck

    @property
    def _typical(self) -> Timeline:
        if not self.timelines:
            raise TimelineError(self._none)
        return sorted(self.timelines, key=_turn)[len(self.timelines) // 2]

    @property
    def _none(self) -> str:
        return f"no step was traced: training made {self.step}, and the first to be traced is step {self.first}"

    def save(self, filepath: str | Path) -> Path:
        """Write the steps that were traced so far, as `filepath` says; also after a training that failed.

        Raises:
            TimelineError: None was traced, or another ending than `.json`.
        """
        if not self.timelines:
            raise TimelineError(self._none)
        return save_trace(self.timelines, filepath)

    def figures(self) -> dict[str, float]:
        """The figures of the traced steps, by what they are called in TensorBoard; medians. Times are seconds.

        Raises:
            TimelineError: No step was traced.
        """
        if not self.timelines:
            raise TimelineError(self._none)
        found = [_figures(timeline) for timeline in self.timelines]
        return {name: median(each[name] for each in found) for name in found[0]}

    def __str__(self) -> str:
        """The figures, and one sentence on what holds training back."""
        if not self.timelines:
            return self._none
        figures, count = self.figures(), len(self.timelines)
        lines = [f"{count} traced step(s), medians:"]
        for name, value in figures.items():
            shown = f"{value:.1%}" if name in _SHARES else f"{value * 1e3:.3f} ms" if name != _RATE else f"{value:.1f}"
            lines.append(f"  {name:<32}{shown:>14}")
        return "\n".join([*lines, str(self.bottleneck)])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """What was between two epochs belongs to no step."""
        super().on_epoch_begin(epoch, logs)
        self._left = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """All callbacks have seen the batch's begin (this one is called last): the data come next."""
        super().on_train_batch_begin(batch, logs)
        self._begun = time.monotonic()

    def before_step(self, session: Session, data: tuple[Any, Any, Any]) -> str:
        """The batch is there, and others have looked at it."""
        super().before_step(session, data)
        if self._open and not self.traces:
            self._close()
        self._session, self._ready_before, self._ready = session, self._ready, time.monotonic()
        return ""

    def after_step(self, session: Session, result: StepResult) -> None:
        """Take up what was traced."""
        left, self._left = self._left, time.monotonic()
        if result.timeline is None or not self.traces:
            return
        timeline = self._with_driver(result.timeline, left, self._left)
        self.timelines = [*([] if self.steps is None else self.timelines), timeline]
        self._open = True
        if self.log_dir is not None:
            self._write(_figures(timeline))
            self._left = time.monotonic()  # writing is no part of the next turn

    def on_train_end(self, logs: Any = None) -> None:
        """Write what there is."""
        if self._open:
            self._close()
        if self._writer is not None:
            self._writer.flush()

    def _with_driver(self, timeline: Timeline, left: float | None, now: float) -> Timeline:
        """The timeline with all that this process did in the step's turn."""
        events, zero = timeline.events, timeline.origin
        assert events is not None
        ordered, answered = events.driver[0].start + zero, events.driver[-1].end + zero
        after = left is not None and left > self._begun  # within an execution of several steps: no callbacks between
        outside = [] if left is None or after else [("callbacks", left, self._begun)]
        data = left if left is not None and after else self._begun
        outside += [("data", data, self.arrived), ("watch the batch", self.arrived, self._ready)]
        outside += [("prepare", self._ready, ordered)]
        driver = [DriverSpan(name, begin - zero, end - zero) for name, begin, end in outside]
        driver += [*events.driver, DriverSpan("decide, order the update", answered - zero, now - zero)]
        since = (self._begun if left is None else self._ready_before) - zero
        updates = tuple(update for update in events.updates if update.end > since)  # else it is an older step's
        return replace(timeline, events=replace(events, driver=tuple(driver), updates=updates))

    def _close(self) -> None:
        """Note the last step's update, and write the file."""
        self._open = False
        assert self._session is not None
        last = self.timelines[-1]
        assert last.events is not None
        placement = last.events.plan.placement
        if not self._session.workers.driver().closed:
            told = self._session.workers.driver().get("update times")
            ends = last.events.driver[-1].end
            updates = {
                placement[stage]: Update(placement[stage], *(float(t) - last.origin - ahead for t in times))
                for stage, [times] in told.items()
                if times is not None
                for ahead in [last.events.offsets[placement[stage]]]
            }
            if self.filepath is not None:
                after = [update for update in updates.values() if update.end > last.step_time and ends]
                save_trace([*self.timelines[:-1], _with_updates(last, after)], self.filepath)

    def _write(self, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(Path(str(self.log_dir)) / "pipeline"))
        with self._writer.as_default(), tf.summary.record_if(True):  # whatever another callback records
            for name, value in figures.items():
                tf.summary.scalar(name, value, step=self.step)
        self._writer.flush()


_RATE = "samples per second"
_SHARES = ("bubble",)


def _turn(timeline: Timeline) -> float:
    assert timeline.events is not None
    return max(timeline.events.period, timeline.step_time)


def _with_updates(timeline: Timeline, updates: list[Update]) -> Timeline:
    events: StepEvents | None = timeline.events
    assert events is not None
    return replace(timeline, events=replace(events, updates=(*events.updates, *updates)))


def _figures(timeline: Timeline) -> dict[str, float]:
    """What is worth a curve; seconds, but for `bubble` (a share) and `samples per second`."""
    events = timeline.events
    assert events is not None
    turn, shares = _turn(timeline), timeline.bottleneck.shares
    found = {
        "step": turn,
        _RATE: events.samples / turn if turn else 0.0,
        "bubble": timeline.bubble,
        "driver": shares["driver"] * turn,
        "transfer": shares["transfer"] * turn,
        "update": max((update.end - update.start for update in events.updates), default=0.0),
    }
    for worker, title in enumerate(timeline.titles()):
        found[f"wait/{title}"] = timeline.idle[worker]
    return found

"""Verification inside training: the pipeline is verified on the batch that it is about to be trained on.

    batch ─► [verify: keep all values ─ a step beside one tape ─ put them back] ─► the step as without ─► next batch

A hand-off that is right at the first step may be wrong at the thousandth: a batch of another size, a mask that begins
to matter, a worker that is not what it was. `Pipeline.verify` leaves no trace, so training may ask it at any step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

from pipeline.batch.step import StepResult
from pipeline.errors import CompileError, VerificationError
from pipeline.report.report import Report, SingleTapeError
from pipeline.runtime.session import Session
from pipeline.runtime.watcher import StepWatcher
from pipeline.saying import is_whole
from pipeline.verify.question import Question
from pipeline.verify.verification import verified

_ON_FAILURE = ("raise", "warn")


class VerifyEvery(StepWatcher):
    """Verify a pipeline every so many training steps, as `Pipeline.verify` does; for `Pipeline.fit`.

    Weights, optimizer, statistics, seeds, metrics and history are bit for bit those of training without it. The
    reference's process starts with the first verification and stays until the pipeline is closed.

    A verification by one tape costs 2 to 3 training steps of eager stages and, of compiled ones, 4 (convolutions of
    0.5 s a step) to 13 (dense layers of 6 ms a step): medians, two stages on two cores. The first one starts the
    reference, 0.4 to 4 s. The check "own" comes on top: your model's layers are called eagerly, once in inference and
    once under a tape (two to four times more where rounding is magnified), and one update is made; 15 compiled steps of
    six dense layers, at most 10 of MobileNetV2 (``python benchmarks/first_batch.py``). ``print(callback)`` says what it
    was in a run.

    Args:
        every: Verify step 1 and every so many-th after it; None: only those of `at`. Steps count from 1, over all
            `fit`s that this callback is given to.
        checks: As in `Pipeline.verify`, like `steps`, `tolerance`, `memory_limit` and `seed`. One that is named and
            cannot be made fails too.
        on_failure: ``"raise"`` ends `fit`; ``"warn"`` goes on, with a RuntimeWarning each time.
        at: Verify these steps (too).
        keep: How many reports to keep, the latest; the first that failed stays as well.

    Attributes:
        reports: {step: its report}.
        seconds: {step: what its verification took}, of all verifications.
        training_seconds: What the training steps themselves took.

    Raises:
        CompileError: An argument is not one of the above.
        VerificationError: An unknown check; in `fit`, as `on_failure` says: something differs by more than its
            tolerance (a SingleTapeError, with the report), or the reference's process was lost. The message names step
            and first deviation; the pipeline has the values from before that step.

    Example:
        >>> verifying = VerifyEvery(100, on_failure="warn")
        >>> pipe.fit(x, y, epochs=5, verify_every=verifying)
        >>> print(verifying)
    """

    def __init__(
        self,
        every: int | None = 100,
        checks: str | Sequence[str] = Question.checks,
        steps: int = Question.steps,
        tolerance: float | None = Question.tolerance,
        on_failure: str = "raise",
        at: Collection[int] | None = None,
        *,
        memory_limit: int = Question.memory_limit,
        seed: int = Question.seed,
        keep: int = 100,
    ) -> None:
        super().__init__()
        asked = [*([] if every is None else [every]), *(at or ())]
        if not asked or not all(map(is_whole, asked)):
            raise CompileError(
                "verify_every expects a whole number of training steps, at least 1 (or every=None and at=[1, ...]), "
                f"received every={every!r}, at={at!r}"
            )
        if on_failure not in _ON_FAILURE:
            raise CompileError(f"on_failure expects {' or '.join(map(repr, _ON_FAILURE))}, received {on_failure!r}")
        self.every, self.at, self.on_failure, self.keep = every, frozenset(at or ()), on_failure, keep
        self.question = Question.of(checks, steps=steps, tolerance=tolerance, memory_limit=memory_limit, seed=seed)
        self._named = self.question.checks if checks != "all" else ()
        self.reports: dict[int, Report] = {}
        self.seconds: dict[int, float] = {}
        self.training_seconds = 0.0
        self.first_failed: int | None = None
        self._began = 0.0

    @classmethod
    def of(cls, given: int | VerifyEvery) -> VerifyEvery:
        """From what `Pipeline.fit` takes: a number of steps, or one that is ready."""
        return given if isinstance(given, VerifyEvery) else cls(given)

    def before_step(self, session: Session, data: tuple[Any, Any, Any]) -> str:
        """Verify on this batch, if it is this step's turn."""
        super().before_step(session, data)
        due = self.every is not None and (self.step - 1) % self.every == 0
        if due or self.step in self.at:
            self._verify(session, data)
        self._began = time.monotonic()
        return ""

    def after_step(self, session: Session, result: StepResult) -> None:
        """Count what the step itself took."""
        self.training_seconds += time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """What a training that is saved keeps of this; reports are not among it."""
        return {
            "step": self.step,
            "place": (self._epoch, self._batch),
            "seconds": dict(self.seconds),
            "training_seconds": self.training_seconds,
            "first_failed": self.first_failed,
        }

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Count on from what `state` gave, in another program too."""
        self.step, (self._epoch, self._batch) = state["step"], state["place"]
        self.seconds, self.training_seconds = dict(state["seconds"]), state["training_seconds"]
        self.first_failed = state["first_failed"]

    def _verify(self, session: Session, data: tuple[Any, Any, Any]) -> None:
        begin = time.monotonic()
        try:
            report = verified(session, *data, self.question)
        except VerificationError as error:  # the reference was lost; the pipeline is as it was
            if self.on_failure == "raise":
                raise VerificationError(f"{self.place}: {error}") from error
            self._warn(str(error))
            return
        finally:
            self.seconds[self.step] = time.monotonic() - begin
        self.reports[self.step] = report
        wrong = self._wrong(report)
        if wrong and self.first_failed is None:
            self.first_failed = self.step
        self._forget()
        if wrong and self.on_failure == "raise":
            raise SingleTapeError(f"{self.place}: {wrong}\n{report}", report)
        if wrong:
            self._warn(wrong)

    def _warn(self, wrong: str) -> None:
        warnings.warn(f"{self.place}: {wrong}", RuntimeWarning, stacklevel=2)

    def _wrong(self, report: Report) -> str:
        """What is wrong, in a line; "" if nothing is."""
        if report.failed:
            return f"the hand-off is not right: {report.summary()}"
        missed = [f"{c.name!r}: {c.reason}" for c in report.checks if not c.ran and c.name in self._named]
        return f"asked for by name, but not checked: {'; '.join(missed)}" if missed else report.missed

    def _forget(self) -> None:
        """Keep what `keep` allows: a long run makes thousands of reports of hundreds of rows."""
        old = [step for step in self.reports if step != self.first_failed]
        for step in old[: max(0, len(old) - self.keep)]:
            del self.reports[step]

    def __str__(self) -> str:
        if not self.seconds:
            return f"nothing was verified in {self.step} steps"
        verdict = f"first wrong at step {self.first_failed}" if self.first_failed is not None else "all right"
        total, steps = sum(self.seconds.values()), max(1, self.step)
        first, *later = self.seconds.values()
        lines = [
            f"verified {len(self.seconds)} of {self.step} steps: {verdict}",
            f"took {total:.2f} s, {total / (total + self.training_seconds):.1%} of training: the first {first:.2f} s "
            "with the start of the reference"
            + (f", others {median(later):.3f} s (median)" if later else "")
            + f"; a training step {self.training_seconds / steps:.3f} s",
        ]
        return "\n".join(lines)

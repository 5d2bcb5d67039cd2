"""Verify a running pipeline: one step seen at every cut, and whatever witnesses are asked for; nothing stays changed.

    keep all values ─► a step with observers ─► compare with one tape, with witnesses, with the user's own objects
                                               ─► updates ─► put all values back

The report's first deviation walks the flow (`pipeline.verify.tape`), so that it names the culprit and not what only
follows from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.step import Batch
from pipeline.compare.compare import Judged, Pair, judge
from pipeline.compare.rows import ALWAYS, CHECKS, Check, Deviation, Edge, Flow, Row
from pipeline.compare.tolerance import Tolerance
from pipeline.reference.orders import Witness
from pipeline.reference.witness.results import Differences, WitnessGradients
from pipeline.report.report import Report
from pipeline.verify.by_own import ByOwn, CannotJudgeError
from pipeline.verify.by_witnesses import Yardstick, by_differences, by_gradients
from pipeline.verify.question import Question
from pipeline.verify.steps import Steps
from pipeline.verify.tape import UPDATE, Allowance, Names, Observed, at_cuts, hand_off, losses, variable_gradients
from stages.worker.observers import ACTIVATION

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

WITNESSES = ("chain", "differences", "batch")
"""The checks whose expectation is not one tape's."""
SUSPICIOUS = 1e-3
"""What compiling changes in one tape, as a part of the largest, from which on it is asked whether the tape repeats."""


def verified(session: Session, x: Any, y: Any, sample_weight: Any, question: Question) -> Report:
    """Verify one batch; see `Pipeline.verify`."""
    compiled = session.workers.needs_compile("verify")
    batch = session.steps.batch(x, y, sample_weight, compiled.judged)
    session.steps.look_at_parts(batch)
    with session.reference.telling():
        return Verification(session, batch, question).run()


@dataclass
class Verification:
    """One verification.

    Attributes:
        session: The running pipeline.
        batch: What it is verified on.
        question: What is asked.
    """

    session: Session
    batch: Batch
    question: Question
    _judged: list[Judged] = field(default_factory=list)
    _checks: list[Check] = field(default_factory=list)
    _changed: dict[int, list[str]] = field(default_factory=dict)
    _own_changed: list[str] | None = None
    _here: Callable[[], None] = lambda: None

    def run(self) -> Report:
        """Make all checks; whatever happens, all values are put back."""
        begin = time.monotonic()
        self.session.workers.needs_the_trainable_set("verify")
        self._here = self.session.workers.needs_compile("verify").keep()
        self.session.workers.driver().keep()
        try:
            report = self._checked()
        finally:
            self._put_back()
        self._timed("undisturbed", self._undisturbed)
        return self._report(report, time.monotonic() - begin)

    def _put_back(self) -> None:
        """Give the workers all values back, and what is kept here of the optimizer its own."""
        self._here()
        if not self.session.workers.driver().closed:
            for stage, paths in self.session.workers.driver().put_back().items():
                self._changed.setdefault(stage, []).extend(paths)

    def _checked(self) -> Report:
        session, asked = self.session, self.question.checks
        names = self._names()
        ours = self._observed(session.workers.driver(), trace=True)
        self._timed("hand-off", lambda: hand_off(ours.seen, names))
        theirs, allowed = ours, Allowance(self._eager, {}, self.question.tolerance)
        if set(asked) & {"tape", *WITNESSES}:
            begin = time.monotonic()
            theirs = self._observed(session.reference.synchronised())
            allowed = Allowance(self._eager, theirs.result.roundings, self.question.tolerance)
        if "tape" in asked:
            self._judged += at_cuts(ours.seen, theirs.seen, names, allowed)
            self._judged += losses(ours.result, theirs.result, names, allowed.of("gradient"))
            self._judged += variable_gradients(ours, theirs, names, allowed)
            self._checks.append(Check("tape", True, seconds=time.monotonic() - begin))
        for check in WITNESSES:
            if check in asked:
                self._witnessed(check, ours, names, allowed)
        own = self._by_own(ours, names)
        if "steps" in asked:
            steps = Steps(session, self.batch, self.question, names)
            if reason := steps.refused:
                self._checks.append(Check("steps", False, reason))
            else:
                self._timed("steps", steps.run)
        self._drop_what_a_second_run_would_turn_round(names, theirs.result.roundings)
        nothing = float("nan")
        right = own if theirs is ours else theirs.result.loss
        return Report(
            (),
            (),
            nothing if ours.result.loss is None else ours.result.loss,
            nothing if right is None else right,
            allowed.of("gradient"),
            self._headline(),
            flow=self._flow(ours),
        )

    def _drop_what_a_second_run_would_turn_round(self, names: Names, roundings: Mapping[str, float]) -> None:
        """Give no verdict by a reference that does not give the same numbers twice; it is run twice to see that.

        That is looked at where something deviates, and where compiling changes so much that hardly anything would: a
        model that draws its own numbers gives others eagerly than compiled.
        """
        judges = {"tape", "steps", *WITNESSES}
        wrong = {one.row.check for one in self._judged if not one.row.ok} & judges
        if max(roundings.values(), default=0.0) > SUSPICIOUS:
            wrong = {one.row.check for one in self._judged} & judges
        if not wrong or not (reason := self._chance(names)):
            return
        self._judged = [one for one in self._judged if one.row.check not in wrong]
        self._checks = [replace(c, ran=False, reason=reason) if c.name in wrong else c for c in self._checks]

    def _chance(self, names: Names) -> str:
        """Why two runs of one tape from the same values differ; "" if they do not."""
        first, second = (self._observed(self.session.reference.synchronised()) for _ in range(2))
        allowed = Allowance(self._eager, {}, None)
        found = [
            *at_cuts(first.seen, second.seen, names, allowed),
            *losses(first.result, second.result, names, allowed.of("gradient")),
            *variable_gradients(first, second, names, allowed),
        ]
        if all(one.row.ok for one in found):
            return ""
        own = ByOwn(self.session, self.batch, None, names)
        why = "" if own.refused else own.chance()
        return f"two runs of one tape from the same values give other numbers{why and f': {why}'}"

    def _by_own(self, ours: Observed, names: Names) -> float | None:
        """Let the user's own objects judge the step, asked or not, or note why they cannot; their loss."""
        begin = time.monotonic()
        own = ByOwn(self.session, self.batch, self.question.tolerance, names)
        reason = own.refused
        if not reason:
            try:
                self._judged += own.judged(ours)
            except CannotJudgeError as error:
                reason = str(error)
            self._own_changed = own.changed
            self._put_back()  # an update was made
            self.session.workers.driver().keep()
        self._checks.append(Check("own", not reason, reason, time.monotonic() - begin))
        return own.loss

    def _witnessed(self, check: str, ours: Observed, names: Names, allowed: Allowance) -> None:
        """Let one of the independent witnesses judge the step, or note why it cannot."""
        begin = time.monotonic()
        question = self.question
        (reply,) = self.session.reference.synchronised().ask(Witness(check, question.memory_limit, question.seed))
        there = [array for array in reply.arrays if array is not None]
        units = len(self.batch.sizes) * max(1, len(self.batch.lengths))
        yardstick = Yardstick(allowed, units, self.question.tolerance)
        if check == "differences":
            outcome = by_differences(ours, Differences.from_wire(reply.value, there), names, yardstick)
        else:
            outcome = by_gradients(check, ours, WitnessGradients.from_wire(reply.value, there), names, yardstick)
        self._judged += outcome.judged
        seconds = time.monotonic() - begin
        self._checks.append(Check(check, not outcome.refusal, outcome.refusal, seconds))

    @property
    def _eager(self) -> bool:
        return self.session.workers.needs_compile("verify").run_eagerly

    def _observed(self, driver: Any, trace: bool = False) -> Observed:
        result, found = self.session.steps.differentiate(self.batch, driver, observe="values", trace=trace)
        return Observed(result, found, driver.seen())

    def _names(self) -> Names:
        session = self.session
        variables = {place: name for place, (name, _) in session.values.variable_names().items()}
        specs = session.workers.driver().specs
        tied = {(i, tie.place): tie.stages[0] == i for i, spec in specs.items() for tie in spec.ties}
        judges = {label: stage for label, (_, stage) in _outputs(session).items()}
        return Names(session.setup.wires.names, variables, tied, judges)

    def _timed(self, check: str, make: Callable[[], list[Judged]]) -> None:
        """Add what a check finds, and what it takes."""
        begin = time.monotonic()
        self._judged += make()
        self._checks.append(Check(check, True, seconds=time.monotonic() - begin))

    def _undisturbed(self) -> list[Judged]:
        """All bits of every stage, and of the user's own objects, are as before, or which are not."""
        names = self.session.setup.wires.names
        found = [self._as_before(names[i], names[i], i, paths) for i, paths in sorted(self._changed.items())]
        if self._own_changed is not None:
            found.append(self._as_before("", "your own objects", len(names), self._own_changed))
        return found

    def _as_before(self, stage: str, name: str, place: int, changed: Sequence[str]) -> Judged:
        count = np.asarray(len(changed), np.int64)
        part = Pair(count, np.zeros((), np.int64), (UPDATE, 1 << 30, place), ", ".join(dict.fromkeys(changed)))
        return judge("undisturbed", "left as it was", stage, name, [part], Tolerance.bits())

    def _headline(self) -> str:
        session = self.session
        parts = [f"{len(session.setup.segments)} stages", f"{session.setup.options.microbatches} microbatches"]
        parts += [f"{len(self.batch.lengths)} windows"] if self.batch.lengths else []
        return ", ".join([*parts, str(session.setup.options.schedule), "eager" if self._eager else "compiled"])

    def _flow(self, ours: Observed) -> Flow:
        names = self.session.setup.wires.names
        sizes: dict[tuple[int, int, str], int] = {}
        for sight, array in ours.seen.items():
            if sight.what == ACTIVATION and sight.sent and array is not None:
                place = (sight.producer, sight.consumer, sight.tensor)
                sizes[place] = sizes.get(place, 0) + array.nbytes
        edges = tuple(Edge(names[p], names[c], tensor, size) for (p, c, tensor), size in sorted(sizes.items()))
        return Flow(names, edges, self.session.steps.measured(self.batch, ours.result))

    def _report(self, report: Report, seconds: float) -> Report:
        first = min(
            ((judged.order, k) for k, judged in enumerate(self._judged) if judged.order is not None), default=None
        )
        order = (*CHECKS, *ALWAYS)
        return replace(
            report,
            rows=tuple(judged.row for judged in self._judged),
            checks=tuple(sorted(self._checks, key=lambda check: order.index(check.name))),
            first=None if first is None else deviation(self._judged[first[1]].row),
            seconds=seconds,
        )


def deviation(row: Row) -> Deviation:
    """What is wrong, in words."""
    if row.kind == "left as it was":
        where = f"stage {row.stage!r}" if row.stage else row.name
        return Deviation(row, row.stage, f"the verification did not put everything back in {where}: {row.where}")
    size = f"by {row.difference:.1e}, {row.relative:.1e} of the largest" if np.isfinite(row.difference) else row.verdict
    at = f" in {row.where}" if row.where else ""
    sentences = {
        "received activation": f"what stage {row.stage!r} received as {row.name!r}{at} is not what {row.peer!r} sent",
        "received output gradient": (
            f"the gradient for {row.name!r} that stage {row.stage!r} received{at} is not what {row.peer!r} sent"
        ),
        "activation": f"stage {row.stage!r} gives another {row.name!r}{at}",
        "output gradient": f"stage {row.stage!r} sends another dL/d{row.name} to {row.peer!r}{at}",
        "gradient": f"stage {row.stage!r} sums another dL/d{row.name}{at}",
    }
    owner = f"stage {row.stage!r}: " if row.stage else ""
    sentence = sentences.get(row.kind, f"{owner}{row.kind} {row.name!r} differs{at}")
    return Deviation(row, row.stage, f"{sentence} ({row.check}: {size})")


def _outputs(session: Session) -> dict[str, tuple[str, int]]:
    """{output label: (tensor, the stage that gives it)}."""
    return dict(zip(session.setup.wires.labels, session.setup.wires.outputs, strict=True))

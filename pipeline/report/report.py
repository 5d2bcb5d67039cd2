"""The report of a verification as plain data: rows, the checks that made them, the first deviation, the flow.

Nothing here computes: `pipeline.verify.verification` fills a report in; `pipeline.report.text`, `pipeline.report.html`
and `pipeline.report.figure` show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compare.rows import CHECKS, Check, Deviation, Flow, Row
from pipeline.compare.tolerance import Tolerance
from pipeline.errors import VerificationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """The report of a verification.

    Attributes:
        rows: All comparisons, in the order in which data flows: forward, backward, updates.
        checks: The ways of checking, those that could not be made too.
        loss: The pipeline's loss.
        reference_loss: The loss of one tape.
        tolerance: What gradients may differ by from one tape's.
        headline: What was compared.
        first: Where the flow first deviates; None if all is well.
        flow: Stages, cuts, timeline.
        seconds: What the verification took in all.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    loss: float
    reference_loss: float
    tolerance: Tolerance
    headline: str
    first: Deviation | None = None
    flow: Flow = field(default_factory=Flow)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether something was compared and everything agrees."""
        return bool(self.rows) and not self.missed and all(row.ok for row in self.rows)

    @property
    def missed(self) -> str:
        """Why none of the checks that were asked for could be made; "" if one was (or it is not known)."""
        some = [check for check in self.checks if check.name in CHECKS]
        asked = [check for check in some if check.name != "own"] or some  # "own" is made unasked
        if not asked or any(check.ran for check in asked):
            return ""
        return "; ".join(f"{check.name!r} could not be made: {check.reason}" for check in asked)

    @property
    def gradients(self) -> tuple[Row, ...]:
        """The comparisons of dL/dvariables with one tape; where none was made, with your own model's."""
        return self.of("gradient", check="tape") or self.of("gradient", check="own")

    def of(self, *kinds: str, check: str | None = None) -> tuple[Row, ...]:
        """The comparisons of some kinds.

        Args:
            *kinds: As `Row.kind` says them, for example ``"gradient"``.
            check: Of one check, for example ``"tape"``; None: of all.
        """
        return tuple(row for row in self.rows if row.kind in kinds and check in (None, row.check))

    @property
    def failed(self) -> tuple[Row, ...]:
        """The comparisons beyond their tolerance."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def worst(self) -> Row | None:
        """The gradient with the largest relative difference, one beyond its tolerance first."""
        return max(self.gradients, key=lambda row: (not row.ok, row.relative), default=None)

    def raise_if_failed(self) -> None:
        """Raise the report as an error unless it is ok.

        Raises:
            SingleTapeError: Something differs by more than its tolerance.
        """
        if not self.ok:
            raise SingleTapeError(f"the hand-off is not right: {self.summary()}\n{self}", self)

    def summary(self) -> str:
        """One line."""
        if self.first is not None:
            what = "your own model" if self.first.row.check == "own" else "one tape"
            return f"NOT equal to {what}: {self.first.sentence}"
        if not self.ok:
            return self.missed or ("NOT equal to one tape" if self.rows else "nothing was compared")
        worst = self.worst
        part = "" if worst is None else f", largest difference {worst.relative:.1e} of the largest |gradient|"
        part = ", all equal bits" if worst is not None and worst.relative == 0.0 else part
        bits = " (bit for bit)" if self.tolerance.relative == 0.0 else ""
        others = len(self.rows) - len(self.gradients)
        own = {check.ran for check in self.checks if check.name == "own"}
        model = ", and to your own model" if True in own else ""
        missing = "; not compared with your own model" if False in own else ""
        found = f"{len(self.gradients)} gradients{part}; {others} other comparisons{missing}"
        return f"equal to one tape{bits}{model}: {found}"

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; numbers that JSON has not (NaN, infinities) as strings: "nan", "inf", "-inf"."""
        timeline = self.flow.timeline
        found: dict[str, Any] = _plain(
            {
                "format": 1,
                "ok": self.ok,
                "summary": self.summary(),
                "headline": self.headline,
                "loss": self.loss,
                "reference_loss": self.reference_loss,
                "tolerance": asdict(self.tolerance),
                "seconds": self.seconds,
                "checks": [{**asdict(check), "about": check.about} for check in self.checks],
                "first": None if self.first is None else asdict(self.first),
                "rows": [asdict(row) for row in self.rows],
                "flow": {
                    "stages": self.flow.stages,
                    "edges": [asdict(edge) for edge in self.flow.edges],
                    "workers": 0 if timeline is None else timeline.workers,
                    "spans": [
                        {
                            "worker": span.worker,
                            "stage": span.action.stage,
                            "action": span.action.describe(),
                            "kind": span.action.kind.name.lower(),
                            "start": span.start,
                            "end": span.end,
                        }
                        for span in (() if timeline is None else timeline.spans)
                    ],
                },
            }
        )
        return found

    def to_json(self) -> str:
        """The report as JSON; see `as_dict`."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The report as one self-contained page: verdict, picture of the pipeline, table with a filter, timeline."""
        from pipeline.report.html import page

        return page(self)

    def save(self, path: str | Path) -> Path:
        """Write the report as its suffix says: ``.html``, ``.json``, ``.txt``, or a picture (``.png``, ``.svg``).

        Raises:
            VerificationError: Another suffix.
        """
        from pipeline.report.files import save_report

        return save_report(self, Path(path))

    def figure(self) -> Figure:
        """The pipeline with its deviations coloured, and the differences beside their tolerances."""
        from pipeline.report.figure import figure

        return figure(self)

    def table(self, every: bool | None = None) -> Table:
        """The report for a terminal, as a rich table.

        Args:
            every: List every row; None: unless they are so many that only those that deviate are worth reading.
        """
        from pipeline.report.text import table

        return table(self, every)

    def text(self, every: bool | None = None) -> str:
        """The report as lines of text without colours; argument as for `table`."""
        from pipeline.report.text import text

        return text(self, every)

    def __str__(self) -> str:
        return self.text()


class SingleTapeError(VerificationError):
    """A pipeline does not match one tape, or a check that was asked for by name could not be made.

    An AssertionError, so that test runners count a failure, not an error.

    Attributes:
        report: What the verification found.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[SingleTapeError], tuple[str, Report]]:
        return type(self), (str(self), self.report)


def allowances(rows: Iterable[Row]) -> list[str]:
    """The tolerances that applied to some rows, with their reasons, a line each; of many the largest stands for all."""
    reasons = dict.fromkeys((row.tolerance, row.why) for row in rows)
    if len(reasons) > _MANY:
        most, why = max(reasons)
        return [f"up to {most:.1e}: {why} ({len(reasons)} tolerances, each with its row)"]
    return [f"{allowed:.1e}: {why}" if allowed else f"0: {why}" for allowed, why in reasons]


_MANY = 3


def _plain(value: Any) -> Any:
    """Tuples as lists, and floats that JSON has not as strings."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value) if isinstance(value, float) and (value != value or value in (_INF, -_INF)) else value
    return [_plain(one) for one in value]


_INF = float("inf")

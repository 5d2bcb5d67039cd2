"""The data of an explanation: for each target and variable whether a gradient arrives, and if not, why and where.

    status           what it means
    connected        the gradient is there, finite, and not all zero
    zero             the gradient is there and all zero
    not finite       the gradient has an infinity or a NaN
    not connected    there is none: the tape gives None

TensorFlow is not needed here, so an explanation that was written as JSON can be read anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from stages.plain_text import harmless, plain_text, printable

CONNECTED = "connected"
ZERO = "zero"
NOT_FINITE = "not finite"
NOT_CONNECTED = "not connected"
STATUSES = (CONNECTED, ZERO, NOT_FINITE, NOT_CONNECTED)

MOST_BLOCKERS = 4
"""So many places are named for one variable in the table; the others are counted."""

_STYLES = {CONNECTED: "green", ZERO: "yellow", NOT_FINITE: "bold red", NOT_CONNECTED: "bold red"}


@dataclass(frozen=True)
class Blocker:
    """The place where a gradient ends, or goes wrong.

    Attributes:
        operation: TensorFlow's name of the operation, or the method that converted.
        layer: Path of the Keras layer; empty outside of any.
        stage: The stage; empty where there are none.
        line: The user's source line, "file:number: code"; empty where there is none.
        what: What it does to the gradient.
    """

    operation: str
    layer: str = ""
    stage: str = ""
    line: str = ""
    what: str = ""

    def __str__(self) -> str:
        parts = [self.operation]
        parts += [f"in layer {self.layer}"] if self.layer else []
        parts += [f"of stage {self.stage}"] if self.stage else []
        parts += [f"at {self.line}"] if self.line else []
        return " ".join(parts) + (f" ({self.what})" if self.what else "")


@dataclass(frozen=True)
class ExplanationRow:
    """One target and one variable or tensor.

    Attributes:
        name: The variable's path, behind the stage's name where there is one.
        target: What was differentiated.
        status: One of `STATUSES`.
        reason: A short name of the reason (`stages.explanation.reasons.ADVICE` has all); empty if connected.
        why: The reason in words.
        advice: What can be done.
        blockers: Where; the one that matters most comes first.
        norm: L2 norm of the gradient; None where there is none.
        frozen: Whether the variable is not to be trained (``trainable=False``), so that no gradient is right.
        certain: False where the way from the variable to the target could only be guessed.
        asked: The user's line that asked for the gradient; empty where we asked.
    """

    name: str
    target: str
    status: str
    reason: str = ""
    why: str = ""
    advice: str = ""
    blockers: tuple[Blocker, ...] = ()
    norm: float | None = None
    frozen: bool = False
    certain: bool = True
    asked: str = ""

    @property
    def ok(self) -> bool:
        """Whether the gradient is as one would want it."""
        return self.frozen or self.status == CONNECTED

    @property
    def blocker(self) -> Blocker | None:
        """The place that matters most, if there is one."""
        return self.blockers[0] if self.blockers else None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.status}" + (f", {self.reason}" if self.reason else "")]
        lines += [f"  {line}" for line in self._details()]
        return printable("\n".join(lines), breaks=True)

    def _details(self) -> Iterator[str]:
        if self.why:
            yield self.why + ("" if self.certain else " (a guess: the way cannot be followed)")
        for blocker in self.blockers[:MOST_BLOCKERS]:
            yield f"- {blocker}"
        if len(self.blockers) > MOST_BLOCKERS:
            yield f"- and {len(self.blockers) - MOST_BLOCKERS} more"
        if self.advice:
            yield f"-> {self.advice}"


@dataclass
class Explanation:
    """Rows for every target and variable; filled when the recorded block is left.

    Attributes:
        headline: What was explained.
        rows: In the order of targets, then variables.
        notes: What else was noticed.
    """

    headline: str = ""
    rows: tuple[ExplanationRow, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every variable that is to be trained has a finite gradient that is not all zero."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def of(self, name: str, target: str | None = None) -> ExplanationRow:
        """The row of a variable; if it was asked for more than once, the first that is not ok.

        Args:
            name: Its name, or the end of it from a "/" on.
            target: Which target, if there are several.

        Raises:
            KeyError: There is no such row, or several variables are called so.
        """
        rows = [row for row in self.rows if target is None or row.target == target]
        found = [r for r in rows if r.name == name] or [r for r in rows if r.name.endswith(f"/{name}")]
        if len({row.name for row in found}) != 1:
            known = ", ".join(dict.fromkeys(f"{row.name} (target {row.target})" for row in found or rows))
            problem = "several rows are" if found else "no row is"
            raise KeyError(f"{problem} called {name!r}; there are {known or 'none'}")
        return next((row for row in found if not row.ok), found[0])

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.plain(), indent=2)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        rows = [asdict(row) for row in self.rows]
        return {"ok": self.ok, "headline": self.headline, "notes": list(self.notes), "rows": rows}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Explanation:
        """The inverse of `plain`."""
        rows = tuple(
            ExplanationRow(**{**row, "blockers": tuple(Blocker(**blocker) for blocker in row["blockers"])})
            for row in data["rows"]
        )
        return cls(data["headline"], rows, tuple(data["notes"]))

    def summary(self) -> str:
        """One line."""
        counts = {status: sum(row.status == status and not row.frozen for row in self.rows) for status in STATUSES}
        parts = [f"{count} {status}" for status, count in counts.items() if count]
        frozen = sum(row.frozen for row in self.rows)
        parts += [f"{frozen} frozen"] if frozen else []
        return ", ".join(parts) or "no gradient was asked for"

    def _groups(self) -> Iterator[list[ExplanationRow]]:
        """Rows that follow each other and say the same; what is connected stands alone, with its norm."""
        for (_, reason, *_), rows in groupby(self.rows, key=_said):
            group = list(rows)
            yield from [group] if reason else [[row] for row in group]

    def __rich__(self) -> Group:
        several = len({row.target for row in self.rows}) > 1
        listed = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in (*(("target",) if several else ()), "variable", "gradient", "why"):
            listed.add_column(name, overflow="fold", vertical="top")
        for rows in self._groups():
            row = rows[0]
            status = Text(row.status, style="dim" if row.frozen else _STYLES[row.status])
            if row.frozen:
                status.append("\n(frozen)")
            norm = f"norm {row.norm:.3g}" if row.norm is not None and row.status == CONNECTED else ""
            why = "\n".join([*([row.reason] if row.reason else []), *row._details()]) or norm
            names = harmless("\n".join(one.name for one in rows), breaks=True)
            listed.add_row(*([harmless(row.target)] if several else []), names, status, harmless(why, breaks=True))
        top = Text(f"{self.headline}: {self.summary()}", style="bold green" if self.ok else "bold red")
        return Group(top, listed, *(harmless(f"note: {note}") for note in self.notes))

    def __str__(self) -> str:
        return plain_text(self.__rich__())


def _said(row: ExplanationRow) -> tuple[Any, ...]:
    return row.status, row.reason, row.target, row.why, row.blockers, row.frozen, row.certain


__all__ = ["CONNECTED", "NOT_CONNECTED", "NOT_FINITE", "STATUSES", "ZERO", "Blocker", "Explanation", "ExplanationRow"]

"""Compare two sets of gradients, variable by variable, and say so in a table.

The tolerance is relative to the largest |gradient| of the whole model: a gradient that is exactly zero on one side and
rounding noise on the other (a bias before a normalisation) must not fail for a meaningless ratio.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.errors import VerificationError

if TYPE_CHECKING:
    from pipeline.session import Session

_COMPILED = 1e-6
"""What fused operations may differ by, as a part of the largest |gradient|."""

Gradients = Mapping[str, np.ndarray[Any, Any] | None]


@dataclass(frozen=True)
class Tolerance:
    """How much two runs may differ.

    Attributes:
        relative: As a part of the largest |gradient|; 0 demands equal bits.
        why: Why this much.
    """

    relative: float
    why: str

    @classmethod
    def default(cls, run_eagerly: bool, rounding: float = 0.0) -> Tolerance:
        """0 for eager tapes; for compiled functions 1e-6, or what compiling alone changes where that is more.

        Args:
            run_eagerly: Whether stages run eager tapes.
            rounding: How far one compiled tape is from the same tape run eagerly, as a part of the largest |gradient|.
        """
        if run_eagerly:
            return cls(0.0, "eager: the same operations in the same order, bit for bit")
        if rounding <= _COMPILED:
            return cls(_COMPILED, "compiled: fused operations round differently")
        return cls(rounding, "compiled: what one tape over this model differs by between eager and compiled")


def verified(session: Session, x: Any, y: Any, sample_weight: Any, tolerance: float | None) -> Report:
    """Compare a running pipeline with one tape; see `Pipeline.verify`."""
    compiled = session.needs_compile("verify")
    batch = session.batch(x, y, sample_weight, compiled.judged)
    ours, gradients = session.gradients(batch)
    theirs, expected = session.one_tape(batch)
    default = Tolerance.default(compiled.run_eagerly, theirs.rounding)
    allowed = default if tolerance is None else Tolerance(tolerance, "as given")
    parts = [f"{len(session.segments)} stages", f"{session.microbatches} microbatches"]
    parts += [f"{len(batch.lengths)} windows"] if batch.lengths else []
    parts += [str(session.schedule), "eager" if compiled.run_eagerly else "compiled"]
    return compare(gradients, expected, ours.loss, theirs.loss, allowed, ", ".join(parts))


@dataclass(frozen=True)
class Row:
    """One variable's comparison.

    Attributes:
        name: ``<stage>/<variable path>``.
        shape: The gradient's shape.
        norm: L2 norm of the pipeline's gradient; NaN where there is none.
        difference: Largest absolute difference.
        relative: That, as a part of the largest |gradient| of the reference over all variables.
        ulps: Largest distance in units in the last place, for elements of at least that largest |gradient| times the
            tolerance's scale; see `ulp_distance`.
        ok: Whether it is within the tolerance.
        verdict: In words.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    difference: float
    relative: float
    ulps: int
    ok: bool
    verdict: str


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        rows: One per variable, in the order of stages and variables.
        loss: The pipeline's loss.
        reference_loss: The loss of one tape.
        tolerance: What was allowed.
        headline: What was compared.
    """

    rows: tuple[Row, ...]
    loss: float
    reference_loss: float
    tolerance: Tolerance
    headline: str

    @property
    def loss_ok(self) -> bool:
        """Whether the losses agree: equal when bit for bit is demanded, else within 1e-6 (NaN equals NaN)."""
        if math.isnan(self.loss) and math.isnan(self.reference_loss):
            return True
        if self.tolerance.relative == 0.0:
            return self.loss == self.reference_loss
        allowed = max(self.tolerance.relative, 1e-6) * max(abs(self.reference_loss), 1e-30)
        return abs(self.loss - self.reference_loss) <= allowed

    @property
    def ok(self) -> bool:
        """Whether every gradient and the loss agree."""
        return bool(self.rows) and self.loss_ok and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row with the largest relative difference, a failed one first."""
        return max(self.rows, key=lambda row: (not row.ok, row.relative), default=None)

    def raise_if_failed(self) -> None:
        """Raise the report as an error unless it is ok.

        Raises:
            VerificationError: Something differs by more than the tolerance.
        """
        if not self.ok:
            raise VerificationError(f"the hand-off does not match one tape\n{self}")

    def summary(self) -> str:
        """One line."""
        worst = self.worst
        verdict = "equal to one tape" if self.ok else "NOT equal to one tape"
        part = "" if worst is None else f", largest difference {worst.relative:.1e} of the largest |gradient|"
        bits = " (bit for bit)" if self.ok and self.tolerance.relative == 0.0 else ""
        return f"{verdict}{bits}: {len(self.rows)} gradients{part}"

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(
            {
                "ok": self.ok,
                "headline": self.headline,
                "loss": self.loss,
                "reference_loss": self.reference_loss,
                "tolerance": asdict(self.tolerance),
                "rows": [asdict(row) for row in self.rows],
            },
            indent=2,
        )

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=f"Verification against one tape: {self.headline}", title_justify="left")
        for name, justify in _COLUMNS:
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            style = None if row.ok else "bold red"
            table.add_row(
                row.name,
                "x".join(map(str, row.shape)) or "scalar",
                f"{row.norm:.4g}",
                f"{row.difference:.2e}",
                f"{row.relative:.1e}",
                str(row.ulps),
                row.verdict,
                style=style,
            )
        loss = "equal" if self.loss_ok else "DIFFERS"
        table.caption = (
            f"loss {self.loss:.9g}, one tape {self.reference_loss:.9g}: {loss}\n"
            f"tolerance {self.tolerance.relative:g} of the largest |gradient| ({self.tolerance.why})\n{self.summary()}"
        )
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self.table())
        return text.getvalue().rstrip()


_COLUMNS = (
    ("variable", "left"),
    ("shape", "right"),
    ("norm", "right"),
    ("max |diff|", "right"),
    ("relative", "right"),
    ("ULP", "right"),
    ("verdict", "left"),
)


def compare(
    ours: Gradients,
    theirs: Gradients,
    loss: float | None,
    reference_loss: float | None,
    tolerance: Tolerance,
    headline: str,
) -> Report:
    """Compare gradients under the same names.

    Args:
        ours: The pipeline's.
        theirs: The reference's.
        loss: The pipeline's loss.
        reference_loss: The reference's.
        tolerance: What is allowed.
        headline: What was compared.
    """
    largest = max((float(np.max(np.abs(g))) for g in theirs.values() if g is not None and g.size), default=0.0)
    names = [*ours, *(name for name in theirs if name not in ours)]
    rows = tuple(_row(name, ours.get(name), theirs.get(name), largest, tolerance) for name in names)
    nan = float("nan")
    return Report(
        rows, nan if loss is None else loss, nan if reference_loss is None else reference_loss, tolerance, headline
    )


def _row(
    name: str,
    ours: np.ndarray[Any, Any] | None,
    theirs: np.ndarray[Any, Any] | None,
    largest: float,
    tolerance: Tolerance,
) -> Row:
    if ours is None or theirs is None:
        there = ours if ours is not None else theirs
        shape = () if there is None else there.shape
        same = ours is None and theirs is None
        verdict = (
            "no gradient, as one tape" if same else f"gradient only in {'one tape' if ours is None else 'the pipeline'}"
        )
        size = 0.0 if same else float("inf")
        return Row(name, shape, float("nan"), size, size, 0, same, verdict)
    norm = float(np.linalg.norm(ours.astype(np.float64)))
    if ours.shape != theirs.shape:
        return Row(name, ours.shape, norm, float("inf"), float("inf"), 0, False, f"shape {theirs.shape} in one tape")
    if ours.tobytes() == theirs.tobytes():
        return Row(name, ours.shape, norm, 0.0, 0.0, 0, True, "equal bits")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return Row(name, ours.shape, norm, float("inf"), float("inf"), 0, False, "not finite on one side only")
    finite = np.isfinite(a)
    difference = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    relative = difference / largest if largest else (0.0 if difference == 0.0 else float("inf"))
    ulps = ulp_distance(ours[finite], theirs[finite])
    ok = relative <= tolerance.relative
    verdict = ("equal" if difference == 0.0 else "within tolerance") if ok else "DIFFERS"
    return Row(name, ours.shape, norm, difference, relative, ulps, ok, verdict)


def ulp_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    """The largest difference in units in the last place of the larger of the two elements.

    Args:
        a: Finite floats.
        b: The same shape and dtype.
    """
    if not a.size:
        return 0
    larger = np.maximum(np.abs(a), np.abs(b))
    unit = np.spacing(np.maximum(larger, np.finfo(larger.dtype).tiny)).astype(np.float64)
    return int(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)) / unit))

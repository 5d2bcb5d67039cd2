"""Compare two computations of one thing, in one or many parts, and say how far they are apart.

Differences are relative to the largest |value| of a group (for gradients: of the whole model): what is exactly zero on
one side and rounding noise on the other (a bias before a normalisation) must not fail for a meaningless ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.compare.rows import ALWAYS, Row
from pipeline.compare.tolerance import Tolerance

Array = np.ndarray[Any, Any]
FlowOrder = tuple[int, ...]
"""Where in the flow something happens; smaller is earlier."""


@dataclass(frozen=True)
class Pair:
    """One comparison of two arrays; None is "there is none".

    Attributes:
        ours: The pipeline's.
        theirs: The reference's.
        order: Where in the flow.
        where: In words: ``microbatch 3, window 1``; or "".
    """

    ours: Array | None
    theirs: Array | None
    order: FlowOrder = ()
    where: str = ""


@dataclass(frozen=True)
class Judged:
    """A row of the report, and where in the flow its first deviation is (None: it has none)."""

    row: Row
    order: FlowOrder | None


@dataclass(frozen=True)
class _Apart:
    """How far two arrays are apart; in words where that says more. Equal numbers may have other bits: -0.0 and 0.0."""

    difference: float = 0.0
    ulps: int = 0
    verdict: str = ""
    same_bits: bool = False


def largest(arrays: Iterable[Array | None]) -> float:
    """The largest finite |value|; 0 without any."""
    found = 0.0
    for array in arrays:
        if array is not None and array.size:
            values = np.abs(array.astype(np.float64))
            found = max(found, float(np.max(values, initial=0.0, where=np.isfinite(values))))
    return found


def judge(
    check: str,
    kind: str,
    stage: str,
    name: str,
    parts: Sequence[Pair],
    tolerance: Tolerance,
    *,
    scale: float | None = None,
    peer: str = "",
    zero_is_none: bool = False,
    repeated: bool = False,
) -> Judged:
    """Compare all parts of one tensor or variable.

    Args:
        check: As in `pipeline.report.report.Row`, like `kind`, `stage`, `name` and `peer`.
        parts: At least one.
        tolerance: What is allowed.
        scale: The largest |value| of the group that differences are relative to; default: of these parts.
        zero_is_none: Whether "no gradient" on one side and zeros on the other are the same.
        repeated: Whether the parts are the whole thing again and again; else they are slices of it.
    """
    scale = largest(part.theirs for part in parts) if scale is None else scale
    scale = scale or largest(part.ours for part in parts)
    found = []
    for part in parts:
        apart = _apart(part.ours, part.theirs, zero_is_none)
        ok = _relative(apart.difference, scale) <= tolerance.relative
        ok &= apart.same_bits or check not in ALWAYS
        found.append((not ok, apart, part))
    failed, worst, at = max(found, key=lambda one: (one[0], one[1].difference, one[1].ulps))
    first = min((part.order for wrong, _, part in found if wrong), default=None)
    where = next(part.where for part in parts if part.order == first) if failed else at.where
    shown = parts[-1:] if repeated else parts
    some = [part.ours if part.ours is not None else part.theirs for part in shown]
    arrays = [array for array in some if array is not None]
    row = Row(
        check=check,
        kind=kind,
        stage=stage,
        name=name,
        shape=_whole_shape(arrays),
        dtype=arrays[0].dtype.name if arrays else "",
        norm=_norm([part.ours for part in shown]),
        difference=worst.difference,
        relative=_relative(worst.difference, scale),
        ulps=worst.ulps,
        tolerance=tolerance.relative,
        why=tolerance.why,
        ok=not failed,
        verdict=_verdict(worst, failed),
        where=where if failed or worst.difference else "",
        peer=peer,
    )
    return Judged(row, first)


def _verdict(worst: _Apart, failed: bool) -> str:
    if not failed:
        return worst.verdict or "within tolerance"
    return "DIFFERS in sign of zero or kind of NaN" if worst.verdict == "equal" else worst.verdict or "DIFFERS"


def _relative(difference: float, scale: float) -> float:
    return difference / scale if scale else (0.0 if difference == 0.0 else math.inf)


def _apart(ours: Array | None, theirs: Array | None, zero_is_none: bool) -> _Apart:
    if ours is None or theirs is None:
        there = ours if ours is not None else theirs
        if there is None:
            return _Apart(verdict="none, as one tape", same_bits=True)
        if zero_is_none and not np.any(there):
            return _Apart(verdict="none, and zeros")
        return _Apart(math.inf, verdict=f"only in {'the reference' if ours is None else 'the pipeline'}")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return _Apart(math.inf, verdict=f"expected {theirs.dtype.name} {theirs.shape}")
    if ours.tobytes() == theirs.tobytes():
        return _Apart(verdict="equal bits", same_bits=True)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return _Apart(math.inf, verdict="not finite on one side only")
    finite = np.isfinite(a)
    difference = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return _Apart(difference, ulp_distance(ours[finite], theirs[finite]), "equal" if difference == 0.0 else "")


def ulp_distance(a: Array, b: Array) -> int:
    """The largest difference in units in the last place of the larger of the two elements; of integers 0.

    Args:
        a: Finite numbers.
        b: The same shape and dtype.
    """
    if not a.size or a.dtype.kind in "biu":
        return 0
    import ml_dtypes

    info = ml_dtypes.finfo(a.dtype)  # type: ignore[no-untyped-call]
    larger = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
    tiny = float(info.smallest_normal)
    unit = np.exp2(np.floor(np.log2(np.maximum(larger, tiny)))) * float(info.eps)
    return int(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)) / unit))


def _norm(arrays: Sequence[Array | None]) -> float:
    there = [array.astype(np.float64) for array in arrays if array is not None]
    return math.sqrt(sum(float(np.sum(np.square(array))) for array in there)) if there else math.nan


def _whole_shape(arrays: Sequence[Array]) -> tuple[int, ...]:
    """The shape of all parts joined along the first axis; of one part its own."""
    if not arrays:
        return ()
    if len(arrays) == 1 or not arrays[0].shape:
        return tuple(arrays[0].shape)
    return (sum(array.shape[0] for array in arrays if array.shape), *arrays[0].shape[1:])

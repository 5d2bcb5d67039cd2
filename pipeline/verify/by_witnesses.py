"""Judge a pipeline's step by the witnesses: the chain rule, finite differences, the whole batch under one tape.

Unlike one tape on the same microbatches, a witness adds the same numbers up in another order, so it never has the same
bits. What it may differ by is stated by `Tolerance.beside`. Where that is so much that it could not see a lost
microbatch (computing in bfloat16, say), the check is refused and not passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.compare.compare import Judged, Pair, judge, largest
from pipeline.compare.tolerance import Tolerance
from pipeline.reference.witness.results import Array, Differences, Size, WitnessGradients, direction
from pipeline.verify.tape import SUMS, Allowance, Names, Observed, flow_order, order_of_sum, where
from stages.worker.observers import GRADIENT, Sight


@dataclass(frozen=True)
class Outcome:
    """The verdict of a witness on a step.

    Attributes:
        judged: Its comparisons, in the order of the flow; () if it was refused.
        refusal: Why it says nothing; "" if it does.
    """

    judged: tuple[Judged, ...] = field(default=())
    refusal: str = ""


@dataclass(frozen=True)
class Yardstick:
    """The tolerances of a witness's comparisons.

    Attributes:
        allowed: What compiling alone changes.
        units: Microbatches times windows: a tolerance must be finer than what one of them is worth.
        given: The user's own tolerance.
    """

    allowed: Allowance
    units: int = 1
    given: float | None = None

    def of(self, size: Size, elements: int, model: float, kind: str = "gradient", error: float = 0.0) -> Tolerance:
        """The tolerance of a comparison.

        Args:
            size: How long the witness's sums are.
            elements: In how many places is compared.
            model: How far the model's own gradients are from those in float64.
            kind: Of `StepResult.roundings`.
            error: What the witness itself may be wrong by.
        """
        if self.given is not None:
            return Tolerance(self.given + error, "as given" + (", and the witness's own error" if error else ""))
        compiled = self.allowed.of(kind, size.dtype)
        return Tolerance.beside(size.dtype, size.terms, elements, compiled, model, error)

    def too_coarse(self, tolerance: Tolerance, size: Size) -> str:
        """Why a tolerance cannot tell a right gradient from one that lacks a microbatch; "" if it can."""
        if tolerance.relative * self.units < 1:
            return ""
        return (
            f"the model computes in {size.dtype}, and sums of {size.terms} terms of it may differ by "
            f"{tolerance.relative:.2g} of the largest |gradient|; one of {self.units} microbatches (and windows) is "
            f"worth {1 / self.units:.2g}, so this check could not fail; verify with smaller batches, or in float32"
        )


def by_gradients(check: str, ours: Observed, theirs: WitnessGradients, names: Names, yardstick: Yardstick) -> Outcome:
    """Judge a step by what a witness expects of all gradients: the check ``chain`` or ``batch``.

    Args:
        check: Which.
        ours: The pipeline's step; gradients without the loss scale.
        theirs: The witness's.
        names: Of stages and variables.
        yardstick: What they may differ by.
    """
    if theirs.refusal:
        return Outcome(refusal=theirs.refusal)
    expected = [g for each in theirs.gradients.values() for g in each]
    if reason := _not_finite(theirs.loss, expected):
        return Outcome(refusal=reason)
    scale, size = largest(expected), theirs.size
    most = max((g.size for g in expected if g is not None), default=1)
    if reason := yardstick.too_coarse(yardstick.of(size, most, theirs.rounding), size):
        return Outcome(refusal=reason)
    judged = [_loss(check, ours, theirs, names, yardstick)]
    judged += _at_cuts(check, ours.seen, theirs, names, yardstick)
    for (i, k), name in names.variables.items():
        mine, other = ours.gradients[i][k], theirs.gradients[i][k]
        part = Pair(mine, other, order_of_sum(names, i, k))
        tolerance = yardstick.of(size, 1 if other is None else other.size, theirs.rounding)
        stage = names.stages[i]
        judged.append(judge(check, "gradient", stage, name, [part], tolerance, scale=scale, zero_is_none=True))
    return Outcome(tuple(judged))


def by_differences(ours: Observed, theirs: Differences, names: Names, yardstick: Yardstick) -> Outcome:
    """Judge a step by finite differences; see `by_gradients`.

    A direction in which the loss has a kink, or in which the model's own gradient is not its derivative, decides
    nothing. A variable of which no direction decides is named as not checked.
    """
    if theirs.refusal:
        return Outcome(refusal=theirs.refusal)
    if reason := _not_finite(theirs.loss, [np.asarray(theirs.largest)]):
        return Outcome(refusal=reason)
    size, scale = theirs.size, theirs.largest or 1.0
    count = max(len(theirs.directions), 1)
    rounding = yardstick.of(size, count, theirs.rounding)
    if reason := yardstick.too_coarse(rounding, size):
        return Outcome(refusal=reason)
    judged = [_loss("differences", ours, theirs, names, yardstick)]
    checked = 0
    for (i, k), name in names.variables.items():
        mine = [one for one in theirs.directions if (one.stage, one.place) == (i, k)]
        if not mine:
            continue  # a copy of a shared variable
        decided, reason = [], ""
        for one in mine:
            error = one.error / scale
            if not error <= rounding.relative:
                reason = f"a kink, or too flat: its derivative is known to {error:.1g} of the largest |gradient| only"
            elif abs(one.own - one.derivative) / scale > rounding.relative + error:
                reason = "the model's own gradient is not its derivative (stop_gradient, a custom gradient, rounding)"
            else:
                decided.append(one)
        gradient = ours.gradients[i][k]
        parts = []
        for one in decided:
            live = 0.0
            if gradient is not None:
                along = direction(theirs.seed, i, k, one.number, gradient.shape)
                live = float(np.sum(gradient.astype(np.float64) * along))
            place = f"direction {one.number}"
            parts.append(Pair(np.asarray(live), np.asarray(one.derivative), order_of_sum(names, i, k), place))
        error = max((one.error / scale for one in decided), default=0.0)
        tolerance = yardstick.of(size, count, theirs.rounding, error=error)
        kind = "directional derivative"
        found = judge("differences", kind, names.stages[i], name, parts or [Pair(None, None)], tolerance, scale=scale)
        if not decided:
            found = replace(found, row=replace(found.row, verdict=f"not checked: {reason}"))
        checked += bool(decided)
        judged.append(found)
    if not checked:
        return Outcome(refusal="no direction of any variable decides anything: " + "; ".join(_verdicts(judged[1:])))
    return Outcome(tuple(judged))


def _verdicts(judged: Iterable[Judged]) -> list[str]:
    return list(dict.fromkeys(f"{one.row.name} {one.row.verdict}" for one in judged))[:3]


def _at_cuts(
    check: str, seen: Mapping[Sight, Array | None], theirs: WitnessGradients, names: Names, yardstick: Yardstick
) -> list[Judged]:
    """Every gradient that a stage sends back, by all its microbatches and windows."""
    groups: dict[tuple[int, str, int], dict[Sight, Array | None]] = {}
    for cut, gradient in theirs.boundary.items():
        sight = Sight(GRADIENT, True, cut.producer, cut.consumer, cut.tensor, cut.microbatch, cut.window)
        groups.setdefault((cut.producer, cut.tensor, cut.consumer), {})[sight] = gradient
    scale, found = largest(theirs.boundary.values()), []
    for (producer, tensor, consumer), sights in groups.items():
        parts = [Pair(seen.get(s), sights[s], flow_order(s), where(s)) for s in sorted(sights)]
        elements = sum(part.theirs.size for part in parts if part.theirs is not None)
        tolerance = yardstick.of(theirs.size, elements, theirs.rounding_at_cuts, f"{GRADIENT} at a cut")
        found.append(
            judge(
                check,
                "output gradient",
                names.stages[consumer],
                tensor,
                parts,
                tolerance,
                scale=scale,
                peer=names.stages[producer],
                zero_is_none=True,
            )
        )
    return found


def _loss(
    check: str, ours: Observed, theirs: WitnessGradients | Differences, names: Names, yardstick: Yardstick
) -> Judged:
    mine, order = ours.result.loss, (SUMS, 2)  # it has no stage: gradients, if they deviate too, tell which
    part = Pair(None if mine is None else np.asarray(mine, np.float64), np.asarray(theirs.loss, np.float64), order)
    return judge(check, "loss", "", "loss", [part], yardstick.of(theirs.size, 1, 0.0))


def _not_finite(loss: float, gradients: Sequence[Any]) -> str:
    bad = not np.isfinite(loss) or any(g is not None and not np.isfinite(g).all() for g in gradients)
    return "the loss or a gradient of this batch is not finite, so nothing can be compared with it" if bad else ""


__all__ = ["Outcome", "Yardstick", "by_differences", "by_gradients"]

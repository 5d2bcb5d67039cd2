"""The comparisons of the check "own": the pipeline beside the user's own objects, within a rule for rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.compare.compare import FlowOrder, Judged, Pair, judge, largest
from pipeline.compare.tolerance import PLAIN_EPS, TRIES, Tolerance
from pipeline.distance import distance
from stages.loss.precision import loss_number

Array = np.ndarray[Any, Any]
NumberKey = tuple[Any, ...]
Numbers = Mapping[NumberKey, Array | None]
"""{what: array; None where there is none}."""
OnceMore = Callable[[int | None, frozenset[str]], Numbers]
"""The own numbers once more, at least those of some kinds: as before (None), or with every variable changed by one
rounding drawn from a seed."""


@dataclass(frozen=True)
class OwnPair:
    """Something that the pipeline and the user's own objects both have.

    Attributes:
        key: What it is called in `Numbers`.
        kind: Of its row, like `stage` (its name; "" for none) and `name`.
        order: Where in the flow.
        group: Pairs of one group are judged by the largest |value| of them all.
    """

    key: NumberKey
    kind: str
    stage: str
    name: str
    order: FlowOrder
    group: NumberKey


class CannotJudgeError(Exception):
    """The user's own objects cannot say what is right; the message says why."""


class UnrepeatableError(CannotJudgeError):
    """They give other numbers each time."""


@dataclass(frozen=True)
class Rule:
    """The allowed differences.

    Attributes:
        precision: eps of what the model computes in.
        given: The user's own tolerance, or None.
        plain: What is allowed in any case, in eps.
    """

    precision: float
    given: float | None = None
    plain: int = PLAIN_EPS

    def of(self, changes: Sequence[float] = ()) -> Tolerance:
        """The tolerance, where one rounding of every variable changes so much."""
        if self.given is not None:
            return Tolerance(self.given, "as given")
        return Tolerance.elsewhere(self.precision, changes, self.plain)


def compared(pairs: Sequence[OwnPair], ours: Numbers, theirs: Numbers, again: OnceMore, rule: Rule) -> list[Judged]:
    """Compare all pairs; what rounding may do is measured only where something differs by more than plain rounding.

    It is measured until it explains all that differs, at most `TRIES` times: more tries only allow more.

    Raises:
        UnrepeatableError: Something differs, and the own objects do not give the same numbers twice.
    """
    scales = {pair.group: 0.0 for pair in pairs}
    for pair in pairs:
        scales[pair.group] = max(scales[pair.group], largest([theirs[pair.key]]))

    def apart(a: Numbers, b: Numbers, pair: OwnPair) -> float:
        x, y = a.get(pair.key), b.get(pair.key)
        if x is None or y is None:
            there = y if x is None else x
            same = there is None or (pair.kind == "gradient" and not np.any(there))
            return 0.0 if same else float("inf")
        return distance(x, y, scales[pair.group])

    changes: dict[NumberKey, list[float]] = {pair.key: [] for pair in pairs}
    far = {pair.key: by for pair in pairs if (by := apart(ours, theirs, pair)) > rule.of().relative}
    if rule.given is None and far:
        kinds = frozenset(str(key[0]) for key in far)
        repeated = again(None, kinds)
        if any(apart(repeated, theirs, pair) for pair in pairs if pair.key in repeated):
            raise UnrepeatableError("your own model gives other numbers each time it is run on this batch")
        seeds = iter(range(TRIES))
        while _may_be_rounding(far, changes, rule) and (seed := next(seeds, None)) is not None:
            disturbed = again(seed, kinds)
            for pair in pairs:
                if pair.key in disturbed:
                    changes[pair.key].append(apart(disturbed, theirs, pair))
    return [
        judge(
            "own",
            pair.kind,
            pair.stage,
            pair.name,
            [Pair(ours.get(pair.key), theirs[pair.key], pair.order)],
            rule.of(changes[pair.key]),
            scale=scales[pair.group],
            zero_is_none=pair.kind == "gradient",
        )
        for pair in pairs
    ]


def _may_be_rounding(far: Mapping[NumberKey, float], changes: Mapping[NumberKey, list[float]], rule: Rule) -> bool:
    """Whether something differs by more than is known to be rounding, and by no more than any rounding might."""
    return any(rule.of(changes[key]).relative < by < float("inf") for key, by in far.items())


def number(value: float | None) -> Array | None:
    """A loss as an array."""
    return None if value is None else np.asarray(loss_number(value))


__all__ = ["CannotJudgeError", "NumberKey", "Numbers", "OwnPair", "Rule", "UnrepeatableError", "compared", "number"]

"""The arguments of a verification, with their defaults and limits, in one place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from pipeline.compare.rows import CHECKS
from pipeline.errors import VerificationError
from pipeline.saying import is_whole, not_whole


@dataclass(frozen=True)
class Question:
    """The arguments of a verification; `Pipeline.verify` says what each means to a user.

    Attributes:
        checks: Keys of `pipeline.compare.rows.CHECKS`, in their order.
        steps: How many updates the check "steps" makes.
        tolerance: What may differ, as a part of the largest |value|; None: by the rules of
            `pipeline.compare.tolerance`. Below 0 nothing agrees, which shows what a failure looks like.
        memory_limit: Bytes that a Jacobian may take in the check "chain"; 2 GiB.
        seed: Of random directions.
    """

    checks: tuple[str, ...] = ("tape",)
    steps: int = 1
    tolerance: float | None = None
    memory_limit: int = 2 << 30
    seed: int = 0

    @classmethod
    def of(cls, checks: str | Sequence[str], **others: Any) -> Question:
        """From what `Pipeline.verify` takes.

        Raises:
            VerificationError: An unknown check, none, or a number that cannot be; the message names all of them.
        """
        question = cls(checks_named(checks), **others)
        faults = list(question._faults(checks))
        if faults:
            raise VerificationError("; ".join(faults))
        return cls(tuple(check for check in CHECKS if check in question.checks), **others)

    def _faults(self, given: Any) -> Iterator[str]:
        if not self.checks or not set(self.checks) <= set(CHECKS):
            yield f"checks must be 'all' or some of {', '.join(map(repr, CHECKS))}; received {given!r}"
        for name, least in (("steps", 1), ("memory_limit", 1), ("seed", 0)):
            if not is_whole(value := getattr(self, name), least):
                yield not_whole(name, value, least)
        known = self.tolerance is None or isinstance(self.tolerance, int | float)
        if not known or not math.isfinite(self.tolerance or 0.0):
            yield f"tolerance must be None or a finite number, received {self.tolerance!r}"


class Asked(TypedDict, total=False):
    """The keyword arguments of a function that hands them on to `Pipeline.verify`."""

    checks: str | Sequence[str]
    steps: int
    tolerance: float | None
    memory_limit: int
    seed: int


def checks_named(checks: str | Sequence[str]) -> tuple[str, ...]:
    """The checks, one by one."""
    return tuple(CHECKS) if checks == "all" else (checks,) if isinstance(checks, str) else tuple(checks)

"""What the tests of the matrix share: a running pipeline that verifies, and every fault in it found and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults.cases import CASES
from tests.faults.catalogue import FAULTS, NAMES
from tests.faults.live import Live
from tests.faults.matrix import outcomes, verified

HEALTHY = ("tape", "steps")


@contextmanager
def running(case: str, schedule: str, eager: bool) -> Iterator[Live]:
    """A started pipeline; it verifies before all faults, and again behind them."""
    live = Live(CASES[case], schedule, eager)
    try:
        verified(live, HEALTHY).raise_if_failed()
        yield live
        verified(live, HEALTHY).raise_if_failed()
    finally:
        live.close()


def prove(live: Live, name: str, most: int | None = None) -> None:
    """Every fault of a name, at all its places (or the first so many), is found and named.

    Raises:
        AssertionError: One is not; the message has all of them. Or there is no place, though there should be, or is.
    """
    found = list(outcomes(live, [fault for fault in FAULTS if fault.name == name], most))
    assert bool(found) != (name in live.case.lacks), f"{live.case.name} has {len(found)} places for {name!r}"
    wrong = [str(outcome) for outcome in found if not outcome.ok]
    assert not wrong, "\n".join(wrong)


__all__ = ["NAMES", "prove", "running"]

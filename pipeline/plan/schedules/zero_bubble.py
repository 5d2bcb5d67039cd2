"""Zero bubble: the halves that nobody waits for fill the time in which a worker would wait.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023. A backward is an input half I, which the stage before waits for,
and a weight half W, which nobody waits for. Workers then wait (p-1)(F+I-W) where 1F1B waits (p-1)(F+I+W), and not less
than (p-1)F: a step ends for all at once, and the last worker cannot begin earlier. ZB-H1 holds p tapes at most, as the
first worker of 1F1B does; ZB-H2, with 2p-1, gains where messages take long, since more work lies ready meanwhile.

    worker 0 │ F0 F1 F2 ·  ·  B0 ── F3 B1 ── B2 ── B3 ──
    worker 1 │ ·  F0 F1 ·  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    worker 2 │ ·  ·  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

The plan is what greedy workers do: of what one may start it takes a forward first, then an input half, then a weight
half (`pipeline.plan.schedules.greedy`). What the stages cost decides which of a few such plans is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import ScheduleError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules.common import check_numbers, refuse_windows
from pipeline.plan.schedules.greedy import Preference, best_plan, greedy_programs
from pipeline.plan.simulator import Cost, costs_of_stages
from pipeline.saying import is_whole, not_whole
from stages.actions import Kind

__all__ = ["EVEN", "zb_h1", "zb_h2", "zero_bubble"]

EVEN = Cost(forward=1.0, input_gradient=1.0, weight_gradient=1.0)
"""What stages cost if nothing is known."""
_ORDERS = (
    (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT),
    (Kind.BACKWARD_INPUT, Kind.FORWARD, Kind.BACKWARD_WEIGHT),
)


def zb_h1(
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    costs: Cost | Sequence[Cost] = EVEN,
) -> Plan:
    """The zero-bubble plan with at most p tapes on a worker, for stages of equal cost; see `zero_bubble`."""
    return zero_bubble(stages, microbatches, windows=windows, truncate=truncate, costs=costs)


def zb_h2(
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    costs: Cost | Sequence[Cost] = EVEN,
) -> Plan:
    """The zero-bubble plan with at most 2p-1 tapes on a worker, for stages of equal cost; see `zero_bubble`."""
    check_numbers(stages, microbatches, windows)
    return zero_bubble(stages, microbatches, windows=windows, truncate=truncate, tapes=2 * stages - 1, costs=costs)


def zero_bubble(
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    tapes: int | None = None,
    costs: Cost | Sequence[Cost] = EVEN,
) -> Plan:
    """The zero-bubble plan, stage i on worker i, for every wiring in which stages only feed higher numbers.

    Args:
        stages: number of stages p, at least 1.
        microbatches: number of microbatches m, at least 1.
        windows: must be 1.
        truncate: goes with windows.
        tapes: the most tapes that a worker holds, from p (the default, ZB-H1) to 2p-1 (ZB-H2). A tape is held until
            its weight half is done.
        costs: what the stages cost, one for each or one for all, in any unit.

    Returns:
        A plan with min(tapes, m) tapes in flight on every worker.

    Raises:
        ScheduleError: a number is no whole number of at least 1, `tapes` is out of range, or there are windows.
        TimelineError: there is not one cost for each stage.
    """
    check_numbers(stages, microbatches, windows)
    refuse_windows("zero bubble", windows)
    held = stages if tapes is None else tapes
    if not is_whole(held):
        raise ScheduleError(not_whole("`tapes`", held))
    if not stages <= held <= 2 * stages - 1:
        raise ScheduleError(
            f"`tapes` must be from {stages} to {2 * stages - 1} for {stages} stage(s), received {held}; with fewer a "
            "worker waits for its own weight halves, with more nothing is gained"
        )
    each, placement = costs_of_stages(stages, costs), tuple(range(stages))
    guesses = {each: None, tuple(replace(cost, transfer=0.0) for cost in each): None}
    # So many forwards come before the first backward: p-i of 1F1B, and a share of the tapes beyond p.
    ahead = tuple(stages - i + (held - stages) * (stages - 1 - i) // max(1, stages - 1) for i in range(stages))
    preferences = [Preference(tuple((kind, 0) for kind in order), ahead, Kind.BACKWARD_INPUT) for order in _ORDERS]
    plan = Plan(
        name="zb-h1" if held == stages else "zb-h2" if held == 2 * stages - 1 else f"zb with {held} tapes",
        stages=stages,
        microbatches=microbatches,
        programs=((),) * stages,
        in_flight=(min(held, microbatches),) * stages,
    )
    made = (
        greedy_programs(microbatches, held, guess, placement, preference)
        for guess in guesses
        for preference in (preferences[:1] if costs is EVEN else preferences)
    )
    return replace(plan, programs=next(made)) if costs is EVEN else best_plan(plan, made, each)

"""Training steps that are ordered before the answers to those in front of them have come.

    driver    step 1, update 1, step 2, update 2 ─►                     step 3, update 3 ─►
    workers              step 1 runs             │ step 2 runs: its batch is there already │ step 3 ...
    driver                                       ◄─ answers to 1                           ◄─ answers to 2

Nothing may have to be decided between two steps. A stage may be updated before another one has finished that step; so
where one fails or is interrupted, all steps of the call are undone in every stage, their updates included: each worker
holds what its stages had before the first one, a copy of their weights and slots, until the next step after them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pipeline.batch.step import Batch, StepResult, result_of
from pipeline.plan.plan import Plan
from pipeline.runtime.batch_messages import order_of
from pipeline.runtime.driver import Driver
from stages.worker.orders import Mode

_AHEAD: Final = 2
"""So many steps, at most, are ordered before the answers to the first of them are read: this bounds what waits."""


def run_ahead(
    driver: Driver,
    work: Sequence[tuple[Plan, Batch]],
    learning_rates: Mapping[int, float],
    attributes: Mapping[int, Mapping[str, Any]],
) -> list[StepResult]:
    """Steps with their updates.

    Args:
        driver: The workers.
        work: The plan and the batch of each step.
        learning_rates: As for `Driver.apply`, like `attributes`.
        attributes: Set before the first update.

    Raises:
        WorkerError: One of them failed; all are undone where it says so.
    """
    first, asked, found = driver.next_step, deque[tuple[int, Batch]](), list[StepResult]()
    with driver.going_on():
        for plan, batch in work:
            order = replace(order_of(plan, Mode.TRAIN, batch), undo_to=first)
            asked.append((driver.begin_step(order, plan, batch), batch))
            driver.apply(learning_rates, attributes=attributes)
            attributes = {}
            while len(asked) > (_AHEAD if len(found) + len(asked) < len(work) else 0):
                number, answered = asked.popleft()
                found.append(result_of(driver.answers(number), driver.specs, answered))
    return found


__all__ = ["run_ahead"]

"""One variable in several stages: the gradients of all its uses are summed, so that every copy stays the same.

    stage 2 (copy)   ── contributions per microbatch ──►  stage 0 (owner): adds them, stage after stage, then
    stage 2 (copy)   ◄── the sum ──────────────────────   microbatch after microbatch

Each stage then makes the same update from the same sum with an optimizer like the others': the copies stay equal to the
last bit, and so do their slots. Eagerly, every microbatch's contribution travels on its own, since one tape adds up a
variable's uses within a microbatch before microbatches are added; compiled, only their sum does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from stages.tape.accumulate import plus
from stages.worker.hosted_stage import HostedStage

Send = Callable[[int, int, str, int, Any | None], None]
"""(destination stage, source stage, tie, number, tensor or None)."""
Take = Callable[[int, int, str, int], Any | None]
"""(destination stage, source stage, tie, number) -> tensor or None."""


def join(hosted: Mapping[int, HostedStage], send: Send, take: Take) -> None:
    """Bring the accumulated gradients of tied variables together, after all actions of a step.

    Nobody waits before having sent what others wait for: all copies send first, then owners add up and answer, then
    copies take the answer.
    """
    for index, stage in hosted.items():
        for tie in stage.ties:
            if index != tie.stages[0]:
                for number, (value,) in enumerate(stage.stage.contributions([tie.place])):
                    send(tie.stages[0], index, tie.name, number, value)
    for index, stage in hosted.items():
        for tie in stage.ties:
            if index == tie.stages[0]:
                mine = [value for (value,) in stage.stage.contributions([tie.place])]
                others = [[take(index, other, tie.name, k) for k in range(len(mine))] for other in tie.stages[1:]]
                total = summed([mine, *others])
                stage.stage.replace([tie.place], [total])
                for other in tie.stages[1:]:
                    send(other, index, tie.name, 0, total)
    for index, stage in hosted.items():
        for tie in stage.ties:
            if index != tie.stages[0]:
                stage.stage.replace([tie.place], [take(index, tie.stages[0], tie.name, 0)])


def summed(contributions: Sequence[Sequence[Any | None]]) -> Any | None:
    """The sum over stages (later ones first, as a tape meets them), then over microbatches (ascending).

    Args:
        contributions: For each stage, ascending, one tensor or None per microbatch.
    """
    by_microbatch = [reduce(plus, reversed(uses)) for uses in zip(*contributions, strict=True)]
    return reduce(plus, by_microbatch, None)

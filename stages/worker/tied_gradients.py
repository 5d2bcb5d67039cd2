"""One variable in several stages: the gradients of all its uses are summed, so that every copy stays the same.

    stage 2 (copy)   ── contributions per microbatch ──►  stage 0 (owner): adds them, stage after stage, then
    stage 2 (copy)   ◄── the sum ──────────────────────   microbatch after microbatch

Each stage then makes the same update from the same sum with an optimizer like the others': the copies stay equal to the
last bit, and so do their slots. Eagerly, every microbatch's contribution travels on its own, since one tape adds up a
variable's uses within a microbatch before microbatches are added; compiled, only their sum does. What an embedding
contributes are rows and their places, two tensors; where all uses are embeddings, so is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from stages.tape.accumulate import plus
from stages.tape.embedding_rows import from_parts, parts_of
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
    shared = [(index, stage, tie) for index, stage in hosted.items() for tie in stage.ties]
    for index, stage, tie in shared:
        if index != tie.stages[0]:
            for number, (value,) in enumerate(stage.stage.contributions([tie.place])):
                _send_gradient(send, tie.stages[0], index, tie.name, number, value)
    for index, stage, tie in shared:
        if index == tie.stages[0]:
            shape = stage.stage.trainable_variables[tie.place].shape
            mine = [value for (value,) in stage.stage.contributions([tie.place])]
            others = [
                [_take_gradient(take, index, other, tie.name, k, shape) for k in range(len(mine))]
                for other in tie.stages[1:]
            ]
            total = summed_uses([mine, *others])
            stage.stage.replace([tie.place], [total])
            for other in tie.stages[1:]:
                _send_gradient(send, other, index, tie.name, 0, total)
    for index, stage, tie in shared:
        if index != tie.stages[0]:
            shape = stage.stage.trainable_variables[tie.place].shape
            stage.stage.replace([tie.place], [_take_gradient(take, index, tie.stages[0], tie.name, 0, shape)])


def _send_gradient(send: Send, to: int, by: int, tie: str, number: int, gradient: Any | None) -> None:
    """A gradient as two messages: its values, and the places of its rows where it is an embedding's."""
    for i, part in enumerate(parts_of(gradient)):
        send(to, by, tie, 2 * number + i, part)


def _take_gradient(take: Take, to: int, by: int, tie: str, number: int, shape: Sequence[int]) -> Any | None:
    values, places = (take(to, by, tie, 2 * number + i) for i in range(2))
    return from_parts(values, places, shape)


def summed_uses(contributions: Sequence[Sequence[Any | None]]) -> Any | None:
    """The sum over stages (later ones first, as a tape meets them), then over microbatches (ascending).

    Args:
        contributions: For each stage, ascending, one tensor or None per microbatch.
    """
    by_microbatch = [reduce(plus, reversed(uses)) for uses in zip(*contributions, strict=True)]
    return reduce(plus, by_microbatch, None)

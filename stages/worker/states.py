"""The table of legal orders: a row for each state of a worker, as h11 has for HTTP.

    new ──build──► built ──plan──► ready ──step──► stepped ──apply──► applied
                                     ▲               │                  │
                                     └───discard─────┘       step: stepped again

Rules:

1. A step leaves gradients, which are applied or discarded before the next step: nothing is ever added to gradients of
   another batch.
2. Values may be read and written in every state in which there are stages.
3. ``apply`` may come again, and then does nothing: the step's number tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from stages.errors import HandoffError


class WorkerState(StrEnum):
    """The state of a worker."""

    NEW = "new"
    BUILT = "built"
    READY = "ready"
    STEPPED = "stepped"
    APPLIED = "applied"


MEANING: Mapping[WorkerState, str] = {
    WorkerState.NEW: "it has no stages yet",
    WorkerState.BUILT: "it has stages and no plan yet",
    WorkerState.READY: "it has stages and a plan, and no gradients",
    WorkerState.STEPPED: "it holds the gradients of a step",
    WorkerState.APPLIED: "it has applied the gradients of its last step",
}

_VALUES = ("get", "set", "call", "keep", "put_back", "go_on_as", "write_down")
_LOOKS = ("seen", "witness", "explain")


def _stay(state: WorkerState, *commands: str) -> dict[str, WorkerState]:
    return dict.fromkeys(commands, state)


LEGAL: Mapping[WorkerState, Mapping[str, WorkerState]] = {
    WorkerState.NEW: {"connect": WorkerState.NEW, "build": WorkerState.BUILT},
    WorkerState.BUILT: {
        **_stay(WorkerState.BUILT, *_VALUES, "strips", "unmask", "optimizers"),
        "plan": WorkerState.READY,
    },
    WorkerState.READY: {
        **_stay(WorkerState.READY, *_VALUES, *_LOOKS, "optimizers", "plan", "forward"),
        "step": WorkerState.STEPPED,
    },
    WorkerState.STEPPED: {
        **_stay(WorkerState.STEPPED, *_VALUES, *_LOOKS),
        "apply": WorkerState.APPLIED,
        "discard": WorkerState.READY,
    },
    WorkerState.APPLIED: {
        **_stay(WorkerState.APPLIED, *_VALUES, *_LOOKS, "optimizers", "plan", "apply"),
        "forward": WorkerState.READY,
        "step": WorkerState.STEPPED,
    },
}
"""{state: {command: the state afterwards}}; what is not there is refused. A ``step`` leaves gradients, a ``forward`` is
a step without; ``optimizers``, ``witness`` and ``explain`` are the reference's."""

COMMANDS: tuple[str, ...] = tuple(dict.fromkeys(command for row in LEGAL.values() for command in row))
"""All commands of the table."""


def after(state: WorkerState, command: str, who: str) -> WorkerState:
    """The state that a command leads to.

    Args:
        state: The state now.
        command: The order's, as `Order.command` gives it.
        who: The worker's stages, for the message.

    Raises:
        HandoffError: It is not legal now; the message says what is.
    """
    legal = LEGAL[state]
    if command not in legal:
        raise HandoffError(
            f"the worker of stage {who} was ordered to {command!r} while it is {state.value!r} ({MEANING[state]}); "
            f"legal now: {', '.join(sorted(legal))}"
        )
    return legal[command]


__all__ = ["COMMANDS", "LEGAL", "MEANING", "WorkerState", "after"]

"""A message: one named array, or one small command, with everything that says where it belongs.

Every message carries the run's incarnation and the step, so that a receiver can tell what is stale. Its `Key` is what
a receiver waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

DRIVER: Final = -1
"""The stage index that means the driver."""

DATA_KINDS: Final = frozenset(
    {
        "activation",
        "gradient",
        "mask",
        "output",
        "sample_weight",
        "shared_gradient",
        "target",
    }
)
"""Kinds that belong to one step and are worthless after it."""

KINDS: Final = DATA_KINDS | {
    "abandon",
    "abandoned",
    "plan",
    "command",
    "variable",
    "reply",
    "hello",
    "error",
    "stop",
}
"""Every kind that may cross a wire."""


class Key(NamedTuple):
    """The key of a message. Two messages with one key arrive in the order in which they were sent."""

    kind: str
    step: int = 0
    stage: int = 0
    source: int = DRIVER
    tensor: str = ""
    microbatch: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message. Compare with `same`, since arrays have no single truth value.

    Args:
        kind: one of `KINDS`.
        incarnation: how often the run was restarted, from 0.
        step: optimizer step that the message belongs to.
        stage: destination stage, or `DRIVER`.
        source: sending stage, or `DRIVER`.
        tensor: name of the tensor, command or variable.
        microbatch: index of the microbatch.
        window: index of the window in time.
        value: small plain data: None, bool, int, float, str, list and dict with str keys.
        array: the tensor, any numeric dtype (bfloat16 and float8 included), any shape.
    """

    kind: str
    incarnation: int = 0
    step: int = 0
    stage: int = 0
    source: int = DRIVER
    tensor: str = ""
    microbatch: int = 0
    window: int = 0
    value: Plain = None
    array: np.ndarray[Any, Any] | None = None

    @property
    def key(self) -> Key:
        """The key under which a receiver waits for this message."""
        return Key(self.kind, self.step, self.stage, self.source, self.tensor, self.microbatch, self.window)

    def same(self, other: Message) -> bool:
        """Whether both say the same: equal fields, and arrays of one dtype, one shape and equal bytes."""
        if (self.key, self.incarnation) != (other.key, other.incarnation):
            return False
        if repr(self.value) != repr(other.value):  # repr: NaN equals itself, True is not 1, 0.0 is not -0.0
            return False
        if self.array is None or other.array is None:
            return self.array is other.array
        return (
            self.array.dtype == other.array.dtype
            and self.array.shape == other.array.shape
            and self.array.tobytes() == other.array.tobytes()
        )

    def __str__(self) -> str:
        parts = [f"{self.kind} {self.tensor!r}" if self.tensor else self.kind]
        parts.append(f"step {self.step} microbatch {self.microbatch}")
        if self.window:
            parts.append(f"window {self.window}")
        parts.append(f"{_place(self.source)} -> {_place(self.stage)}")
        if self.array is not None:
            parts.append(f"{self.array.dtype.name}{list(self.array.shape)}")
        return ", ".join(parts)


def _place(stage: int) -> str:
    return "driver" if stage == DRIVER else f"stage {stage}"

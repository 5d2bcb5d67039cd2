"""The orders that only the reference understands; for all others see `stages.worker.orders`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from stages.worker.orders import Order


@dataclass(frozen=True)
class MakeOptimizers(Order):
    """Make the optimizers anew; the reply is {first stage: what each of the optimizer's variables belongs to}."""

    do: ClassVar[str] = "optimizers"


@dataclass(frozen=True)
class Witness(Order):
    """Let a witness say what the gradients of the last batch should be; the reply is the result's `to_wire`.

    Attributes:
        check: ``"chain"``, ``"differences"`` or ``"batch"``.
        memory_limit: Bytes that the chain rule's Jacobians may take.
        seed: Of the directions of finite differences.
    """

    do: ClassVar[str] = "witness"
    check: str
    memory_limit: int
    seed: int


@dataclass(frozen=True)
class Explain(Order):
    """Say why the gradients of the last batch are what they are; the reply is `Explanation.plain`.

    Attributes:
        target: The loss, or the name of an output or state, to be differentiated.
        statuses: {"<stage>/<variable path>": what the pipeline's own gradient is}.
    """

    do: ClassVar[str] = "explain"
    target: str
    statuses: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """For the wire; statuses as one text, since a message's value has few entries and a model may have many."""
        return super().plain() | {"statuses": json.dumps(dict(self.statuses))}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        return cls(data["target"], json.loads(data["statuses"]))


__all__ = ["Explain", "MakeOptimizers", "Witness"]

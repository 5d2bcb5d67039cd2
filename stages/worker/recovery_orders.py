"""The orders by which a new worker becomes what another one was, for workers whose values outlive them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from stages.worker.orders import Order


@dataclass(frozen=True)
class GoOnAs(Order):
    """Be as another worker was, before its values come.

    Attributes:
        attributes: {stage: {name: value}} that its optimizer was given since it was built.
        examples: {stage: for each head (dtype, shape) of what its metrics were built from, or None}.
    """

    do: ClassVar[str] = "go_on_as"
    attributes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    examples: Mapping[int, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """From the wire."""
        return cls(*({int(stage): one for stage, one in data[name].items()} for name in ("attributes", "examples")))


@dataclass(frozen=True)
class WriteDown(Order):
    """Write all values down, so that a boundary is here."""

    do: ClassVar[str] = "write_down"


__all__ = ["GoOnAs", "WriteDown"]

"""A table of the possible cuts of a model: the tensors that cross, and the costs on either side.

calls     c0 ── c1 ── c2 ── c3          position 2: before c2. Crossing are the tensors that c0 and c1 make and that
             └────────────┘             c2 and c3 read, skip connections included.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pipeline.cutting.costs import CallCost, Costs
from stages.plain_text import harmless, plain_text, printable

__all__ = ["CutRow", "CutTable", "cut_table"]


@dataclass(frozen=True, slots=True)
class CutRow:
    """One possible cut.

    Attributes:
        position: Before which call of the model's order it lies.
        at: What an entry of `Pipeline.split(at=[...])` must name: a layer or tensor, or several. () where names cannot
            say it, since a layer is called on both sides.
        tensors: Names of the tensors that cross.
        bytes: Bytes per sample that cross in forward.
        gradient_bytes: Bytes per sample that come back in backward.
        parameters: Elements of the variables before and behind; those of a layer that is called on both sides count
            twice.
        forward: Seconds of the forward before and behind.
        backward: Seconds of the backward before and behind.
        shared: Names of layers with variables that are called on both sides.
    """

    position: int
    at: tuple[str, ...]
    tensors: tuple[str, ...]
    bytes: float
    gradient_bytes: float
    parameters: tuple[int, int]
    forward: tuple[float, float]
    backward: tuple[float, float]
    shared: tuple[str, ...]


@dataclass(frozen=True)
class CutTable:
    """All possible cuts of a model.

    Attributes:
        rows: In the model's order.
        model: The model's name.
        samples: Samples in the microbatch that the times are of.
    """

    rows: tuple[CutRow, ...]
    model: str
    samples: int

    @classmethod
    def of(cls, costs: Costs, model: str, allowed: Sequence[bool] | None = None) -> CutTable:
        """The table of measured costs; `allowed` says for each position, 0 to the number of calls, if it is listed."""
        positions = (p for p in range(1, len(costs.calls)) if allowed is None or allowed[p])
        return cls(tuple(_row(costs, position) for position in positions), model, costs.samples)

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> Table:
        """The table as a rich one."""
        table = Table()
        table.add_column("#", justify="right")
        table.add_column("at", overflow="fold")
        table.add_column("crossing", overflow="fold")
        for name in ("bytes/sample", "parameters", "forward ms", "backward ms"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                str(row.position),
                harmless(", ".join(row.at) or "(by position only)"),
                harmless(", ".join(row.tensors) or "nothing"),
                f"{row.bytes:,.0f}",
                f"{row.parameters[0]:,} | {row.parameters[1]:,}",
                f"{row.forward[0] * 1e3:.2f} | {row.forward[1] * 1e3:.2f}",
                f"{row.backward[0] * 1e3:.2f} | {row.backward[1] * 1e3:.2f}",
            )
        return table

    def __str__(self) -> str:
        headline = (
            f"Cuts of {printable(self.model)}, before | behind; times of a microbatch of {self.samples} sample(s)"
        )
        return f"{headline}\n{plain_text(self.table(), width=140)}"


def cut_table(
    model: Any,
    sample: Any,
    *,
    repeats: int = 5,
    threads: int | None = None,
    allowed: Sequence[bool] | None = None,
) -> CutTable:
    """Measure a model and list its possible cuts.

    Args:
        model: A built Sequential or Functional model; models inside it are dissolved.
        sample: One microbatch as `fit` takes it, (n, ...).
        repeats: How many runs to take medians of.
        threads: How many cores a worker will have; default: all that this process has.
        allowed: For each position, 0 to the number of calls, whether a cut there is possible; default: all are.

    Raises:
        SplitError: The model cannot be cut or measured.
        DataError: The sample does not fit the model.
    """
    from pipeline.cutting.measure import measure
    from pipeline.model.call_graph import read_graph

    costs = measure(read_graph(model), sample, repeats=repeats, threads=threads)
    return CutTable.of(costs, model.name, allowed)


def _row(costs: Costs, position: int) -> CutRow:
    before, behind = costs.calls[:position], costs.calls[position:]
    read = {tensor for call in behind for tensor in call.reads}
    alive = [tensor for call in before for tensor in call.makes if tensor in read]
    crossing = [costs.tensors[tensor] for tensor in alive]
    keys = [{weight.key for call in side for weight in call.weights} for side in (before, behind)]
    both = keys[0] & keys[1]
    return CutRow(
        position=position,
        at=_names(costs, position),
        tensors=tuple(tensor.name for tensor in crossing),
        bytes=math.fsum(tensor.bytes for tensor in crossing),
        gradient_bytes=math.fsum(tensor.bytes for tensor in crossing if tensor.differentiable),
        parameters=(_parameters(before), _parameters(behind)),
        forward=(math.fsum(call.forward for call in before), math.fsum(call.forward for call in behind)),
        backward=(math.fsum(call.backward for call in before), math.fsum(call.backward for call in behind)),
        shared=tuple(dict.fromkeys(call.name for call in before if both & {weight.key for weight in call.weights})),
    )


def _parameters(calls: Sequence[CallCost]) -> int:
    return sum({weight.key: weight.count for call in calls for weight in call.weights}.values())


def _names(costs: Costs, position: int) -> tuple[str, ...]:
    """Names that mean exactly the calls before a position: of those whose results no other of them reads.

    A layer's name stands for all its calls. So where one of them lies behind the cut, the call before it is named by
    its tensor, unless that is called as the layer is.
    """
    before = costs.calls[:position]
    read = {tensor for call in before for tensor in call.reads}
    behind = Counter(call.name for call in costs.calls[position:])
    layers = {call.name for call in costs.calls}
    names = []
    for call in before:
        if read & set(call.makes):
            continue
        by_tensor = [costs.tensors[tensor].name for tensor in call.makes]
        choices = [call.name] if not behind[call.name] else [name for name in by_tensor if name not in layers]
        if not choices:
            return ()
        names.append(choices[0])
    return tuple(dict.fromkeys(names))

"""An influence map: sizes in a table, in words, as JSON and as a picture.

    matrix         connected    flows    in the table    what it means
    a number > 0   True         True     0.125           a gradient flows; its size
    0              True         False    0               a path of operations leads there, but its derivative is zero
    0              False        False    none            no path: the tape's gradient is None

TensorFlow is not needed here, so a map that was written as JSON can be read and drawn anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table

from stages.plain_text import harmless, plain_text, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]

TITLE = "Influence: Frobenius norm of d output (row) / d source (column)"
LEGEND = "0: connected, but the derivative is zero    none: not connected"


@dataclass(frozen=True, slots=True, eq=False)
class InfluenceMap:
    """The influence of each source on each output, to first order at the given inputs.

    Attributes:
        outputs: one label a row.
        sources: one label a column.
        matrix: float64 (outputs, sources): the Frobenius norm of d output / d source, over the batch and all elements;
            0 where nothing flows. In units of the output by units of the source.
        connected: bool (outputs, sources): a path of differentiable operations leads from the source to the output.
    """

    outputs: tuple[str, ...]
    sources: tuple[str, ...]
    matrix: Array
    connected: Array

    def __post_init__(self) -> None:
        shape = (len(self.outputs), len(self.sources))
        if self.matrix.shape != shape or self.connected.shape != shape:
            raise ValueError(
                f"expected a matrix and connections of shape {shape}, one row an output and one column a source, "
                f"received {self.matrix.shape} and {self.connected.shape}"
            )
        if (self.matrix[~self.connected] != 0).any():
            raise ValueError("expected size 0 wherever output and source are not connected")

    @property
    def flows(self) -> Array:
        """Bool (outputs, sources): some entry of d output / d source is not zero (NaN counts as not zero)."""
        found: Array = self.connected & (self.matrix != 0)
        return found

    def size(self, output: str, source: str) -> float | None:
        """The size of one derivative; None where they are not connected.

        Args:
            output: One of `outputs`.
            source: One of `sources`.

        Raises:
            KeyError: There is no such label.
        """
        row, column = self._place(output, source)
        return float(self.matrix[row, column]) if self.connected[row, column] else None

    def explain(self, output: str, source: str) -> str:
        """One entry in a sentence; the arguments and errors of `size`."""
        size = self.size(output, source)
        output, source = printable(output), printable(source)
        if size is None:
            return (
                f"{output} is not connected to {source}: no differentiable operations lead from {source} to {output}."
            )
        if size == 0:
            return f"{output} is connected to {source}, but no gradient flows: the derivative is exactly zero here."
        return f"A gradient flows from {output} to {source}: the norm of the derivative is {size:.3g}."

    def table(self) -> Table:
        """The map as a table to print with rich."""
        drawn = Table()
        drawn.add_column("")
        for source in self.sources:
            drawn.add_column(harmless(source), justify="right", no_wrap=True)
        for row, output in enumerate(self.outputs):
            drawn.add_row(harmless(output), *(self._cell(row, column) for column in range(len(self.sources))))
        return drawn

    def __rich__(self) -> Group:
        return Group(TITLE, self.table(), LEGEND)

    def __str__(self) -> str:
        # As wide as it takes: a table that is cut or wrapped cannot be read.
        plain = Console(width=1_000_000, color_system=None)
        width = Measurement.get(plain, plain.options, self.table()).maximum
        return plain_text(self, width=max(width, len(LEGEND)))

    def to_json(self) -> str:
        """The map as JSON: labels, and sizes row by row, null where not connected ("nan", "inf" where not finite)."""
        cells = [[self._json(row, column) for column in range(len(self.sources))] for row in range(len(self.outputs))]
        found = {"outputs": list(self.outputs), "sources": list(self.sources), "sizes": cells}
        return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> InfluenceMap:
        """The map that `to_json` wrote. Raises ValueError if the text is something else."""
        try:
            found = json.loads(text)
            outputs, sources = tuple(map(str, found["outputs"])), tuple(map(str, found["sources"]))
            shape = (len(outputs), len(sources))
            sizes = np.array([[np.nan if s is None else float(s) for s in row] for row in found["sizes"]], np.float64)
            connected = np.array([[s is not None for s in row] for row in found["sizes"]], bool)
            return cls(outputs, sources, np.where(connected, sizes, 0.0).reshape(shape), connected.reshape(shape))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected what InfluenceMap.to_json wrote: {error}") from error

    def save(self, path: str | Path, *, title: str | None = None) -> Path:
        """Draw the map and save the picture.

        Args:
            path: where to; the suffix chooses the format (png, svg, pdf). Missing directories are made.
            title: the heading.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure(title=title).savefig(path, facecolor="white")
        return path

    def figure(self, *, title: str | None = None) -> Figure:
        """The matplotlib figure that `save` saves."""
        from stages.step_influence.picture import influence_figure

        return influence_figure(self, title)

    def cells(self) -> Sequence[Sequence[str]]:
        """The texts of the table, row by row."""
        return [[self._cell(row, column) for column in range(len(self.sources))] for row in range(len(self.outputs))]

    def _cell(self, row: int, column: int) -> str:
        if not self.connected[row, column]:
            return "none"
        size = self.matrix[row, column]
        return "0" if size == 0 else f"{size:.3g}"

    def _json(self, row: int, column: int) -> float | str | None:
        if not self.connected[row, column]:
            return None
        size = float(self.matrix[row, column])
        return size if np.isfinite(size) else str(size)

    def _place(self, output: str, source: str) -> tuple[int, int]:
        for label, known, what in ((output, self.outputs, "outputs"), (source, self.sources, "sources")):
            if label not in known:
                raise KeyError(f"{label!r} is none of the {what} of this map: {', '.join(known)}")
        return self.outputs.index(output), self.sources.index(source)

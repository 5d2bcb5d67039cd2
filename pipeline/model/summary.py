"""A pipeline as tables for a terminal: its stages with their layers and parameters, and what crosses each cut.

Columns and arguments are those of `keras.Model.summary`; a section per stage, and below them the tensors that cross.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import keras
import tensorflow as tf
from rich.table import Column, Table
from rich.text import Text

from pipeline.errors import DataError
from pipeline.model.wiring import Wires
from stages.plain_text import harmless, plain_text
from stages.recipe.segment import Segment
from transport.message import DRIVER

_WIDTH = 100
_POSITIONS = (0.16, 0.52, 0.82, 1.0)

TensorSpec = tuple[str, Sequence[int | None]]
"""(dtype, shape with None for the batch)."""


def summary_text(
    segments: Sequence[Segment],
    wires: Wires,
    given: Callable[[int, str], TensorSpec | None],
    parameters: tuple[int, int],
    *,
    line_length: int | None,
    positions: Sequence[float] | None,
    expand_nested: bool,
    show_trainable: bool,
    layer_range: Sequence[str] | None,
) -> str:
    """The tables as text.

    Args:
        segments: The stages' parts.
        wires: How they are connected.
        given: (stage, name of a tensor that it gives) -> its dtype and shape, or None where they are not known.
        parameters: All of them, and those that are trained.
        line_length: As `keras.Model.summary` takes it, like the others.
        positions: Where the columns end, as parts of the line.
        expand_nested: List the layers of models inside a stage too.
        show_trainable: Add a column that says whether a layer is trained.
        layer_range: (first, last) layer, names or regular expressions.
    """
    width = line_length or min(_WIDTH, shutil.get_terminal_size((_WIDTH + 4, 24)).columns - 4)
    layers = _columns(
        ["Stage", "Layer (type)", "Output Shape", "Param #"],
        positions or _POSITIONS,
        width,
        "Trainable",
        show_trainable,
    )
    rows = [
        (name, *row)
        for name, segment in zip(wires.names, segments, strict=True)
        for row in _rows(segment, expand_nested)
    ]
    for name, layer, text, shape, number in _within(rows, layer_range):
        extra = (
            [("Y" if layer.trainable else "N") if layer is not None and layer.weights else "-"]
            if show_trainable
            else []
        )
        layers.add_row(*map(harmless, (name, text, shape, number, *extra)))
    total, trained = parameters
    lines = Text(
        f" Total params: {total:,}\n Trainable params: {trained:,}\n Non-trainable params: {total - trained:,}"
    )
    return plain_text(layers, _crossing(wires, given, width), lines, width=width)


def _columns(names: list[str], positions: Sequence[float], width: int, more: str, wanted: bool) -> Table:
    if wanted:
        positions, names = [*(end * 0.88 for end in positions), 1.0], [*names, more]
    if len(positions) != len(names):
        raise DataError(f"positions says where {len(names) - wanted} columns end, received {len(positions)} numbers")
    ends = [0, *(int(end * width) if end <= 1 else int(end) for end in positions)]
    sizes = [max(4, after - before - 3) for before, after in pairwise(ends)]
    numbers = {"Param #": "right"}
    return Table(*(Column(n, width=size, justify=numbers.get(n, "left")) for n, size in zip(names, sizes, strict=True)))  # type: ignore[arg-type]


def _rows(segment: Segment, expand: bool) -> list[tuple[Any, str, str, str]]:
    """(layer, its name and type, output shape, parameters) of a stage's layers; one row for a part built elsewhere."""
    if segment.model is None:
        return [(None, f"built in its worker by {segment.build}", "", "")]
    found: list[tuple[Any, str, str, str]] = []

    def walk(layers: Sequence[Any], depth: int) -> None:
        for layer in layers:
            name = f"{'  ' * depth}{layer.name} ({type(layer).__name__})"
            found.append((layer, name, _shape_of(layer), f"{layer.count_params():,}" if layer.built else "0 (unbuilt)"))
            if expand and isinstance(layer, keras.Model):
                walk(layer.layers, depth + 1)

    walk(segment.model.layers, 0)
    return found


def _shape_of(layer: Any) -> str:
    """The shape of a layer's output in its first call; of several a list."""
    try:
        shapes = keras.tree.flatten(keras.tree.map_structure(lambda t: str(tuple(t.shape)), layer.output))
    except (AttributeError, ValueError):  # called several times, or only inside another layer
        return "?"
    return ", ".join(shapes)


def _within(rows: list[Any], layer_range: Sequence[str] | None) -> list[Any]:
    """The rows from the first layer that matches to the last."""
    if layer_range is None:
        return rows
    names = ["" if layer is None else layer.name for _, layer, *_ in rows]
    places = [[i for i, name in enumerate(names) if re.fullmatch(wanted, name)] for wanted in layer_range]
    if len(places) != 2 or not all(places):
        raise DataError(f"layer_range is (first, last) layer of the model, received {layer_range!r}")
    return rows[places[0][0] : places[1][-1] + 1]


def _crossing(wires: Wires, given: Callable[[int, str], TensorSpec | None], width: int) -> Table:
    """What crosses: every tensor that a stage gives to others, with its bytes per sample."""
    table = Table(
        "from", "to", "tensor", "shape", "dtype", Column("bytes a sample", justify="right"), title="What crosses"
    )
    table.width = width
    for i, gives in enumerate(wires.gives):
        for name, takers in gives:
            to = [wires.names[k] for k in takers if k != DRIVER]
            if not to:
                continue
            known = given(i, name)
            dtype, shape = known or ("?", ())
            table.add_row(
                *map(
                    harmless,
                    (
                        wires.names[i],
                        ", ".join(to),
                        name,
                        str(tuple(shape)) if known else "?",
                        dtype,
                        _bytes(dtype, shape),
                    ),
                )
            )
    return table


def _bytes(dtype: str, shape: Sequence[int | None]) -> str:
    """Bytes of one sample; "?" where a length is free."""
    sample = list(shape)[1:]
    return (
        "?"
        if dtype in ("?", "string") or None in sample
        else f"{math.prod(n for n in sample if n is not None) * tf.as_dtype(dtype).size:,}"
    )

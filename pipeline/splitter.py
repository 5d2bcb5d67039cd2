"""Cut a model into segments.

    calls   c0 c1 c2 | c3 c4 | c5 c6 c7
    stage        0   |   1   |     2

A cut lies between two calls of the model's order. Whatever is alive there, skip connections included, goes straight
from the stage that makes it to every stage that reads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.errors import SplitError
from pipeline.graph import Call, Graph, play, read_graph
from stages.segment import Segment


@dataclass(frozen=True, eq=False)
class Split:
    """A model in segments.

    Attributes:
        model: The model; the segments share its layers (and so its weights as they are now).
        segments: One per stage.
        cuts: Before which calls of the model's order the stages after the first begin.
        inputs: The names of the model's inputs, in the model's order.
    """

    model: Any
    segments: tuple[Segment, ...]
    cuts: tuple[int, ...]
    inputs: tuple[str, ...]


def split_model(
    model: Any, stages: int | None = None, at: Sequence[str] | None = None, cuts: Sequence[int] | None = None
) -> Split:
    """The segments of a model.

    Args:
        model: A built Sequential or Functional model; models inside it are dissolved.
        stages: How many stages; cuts are chosen so that parameters are spread evenly.
        at: Or: names of the layers behind which to cut, in the model's order.
        cuts: Or: the cuts of an earlier split of the same model.

    Raises:
        SplitError: Both or none of `stages` and `at`; a subclassed model; more stages than layers; a name that is not
            there; a cut that leaves an empty stage; a layer whose uses would land in different stages.
    """
    graph = read_graph(model)
    if cuts is None:
        if (stages is None) == (at is None):
            raise SplitError("say either how many stages (stages=3) or where to cut (at=['pool2'])")
        cuts = _even_cuts(graph, stages) if at is None else _named_cuts(graph, at)
    names = graph.tensor_names()
    segments = _segments(graph, [0, *cuts, len(graph.calls)])
    return Split(model, tuple(segments), tuple(cuts), tuple(names[tensor] for tensor in graph.inputs))


def _named_cuts(graph: Graph, at: Sequence[str]) -> list[int]:
    """Positions behind the named layers."""
    if isinstance(at, str):
        at = [at]
    positions = {call.name: i + 1 for i, call in enumerate(graph.calls)}
    cuts = []
    for name in at:
        if name not in positions:
            near = difflib.get_close_matches(name, positions, n=3, cutoff=0.3) or list(positions)[:5]
            raise SplitError(f"the model has no layer {name!r} to cut behind; nearest are {', '.join(map(repr, near))}")
        cuts.append(positions[name])
    if cuts != sorted(set(cuts)):
        order = [name for name, _ in sorted(positions.items(), key=lambda item: item[1]) if name in set(at)]
        raise SplitError(f"cuts must be named once each, in the model's order: at={order}")
    if cuts and cuts[-1] == len(graph.calls):
        raise SplitError(f"a cut behind the last layer {at[-1]!r} leaves an empty stage; leave it out")
    return cuts


def _even_cuts(graph: Graph, stages: int | None) -> list[int]:
    """Cuts that make the heaviest stage as light as possible; the weight of a call is its parameters, plus one."""
    assert stages is not None
    calls = len(graph.calls)
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise SplitError(f"the number of stages must be a whole number of at least 1, received {stages!r}")
    if stages > calls:
        raise SplitError(
            f"the model has {calls} layer(s) to give to stages, {stages} stages were asked for; ask for at most {calls}"
        )
    weights = [_parameters(call) + 1 for call in graph.calls]
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[k][i]: the lightest possible heaviest stage when the first i calls make k stages.
    best: list[list[tuple[int, int]]] = [[(0, 0)] + [(sums[-1] + 1, 0)] * calls]
    for _ in range(stages):
        previous = best[-1]
        row = [(sums[-1] + 1, 0)]
        for end in range(1, calls + 1):
            row.append(min((max(previous[i][0], sums[end] - sums[i]), i) for i in range(end)))
        best.append(row)
    cuts, end = [], calls
    for k in range(stages, 1, -1):
        end = best[k][end][1]
        cuts.append(end)
    return cuts[::-1]


def _parameters(call: Call) -> int:
    count = getattr(call.operation, "count_params", None)
    return int(count()) if count is not None and getattr(call.operation, "built", False) else 0


def _segments(graph: Graph, bounds: Sequence[int]) -> list[Segment]:
    names = graph.tensor_names()
    parts = [graph.calls[a:b] for a, b in pairwise(bounds)]
    _refuse_shared_layers(parts)
    made_in = {tensor: i for i, part in enumerate(parts) for call in part for tensor in call.makes}
    segments = []
    for i, part in enumerate(parts):
        reads = [tensor for call in part for tensor in call.reads]
        inputs = list(dict.fromkeys(tensor for tensor in reads if made_in.get(tensor, -1) != i))
        later = {tensor for other in parts[i + 1 :] for call in other for tensor in call.reads}
        made = [tensor for call in part for tensor in call.makes]
        outputs = [tensor for tensor in made if tensor in later and tensor not in graph.outputs]
        outputs += [tensor for tensor in dict.fromkeys(graph.outputs) if tensor in made]  # in the model's order
        model = play(graph, part, inputs, outputs, f"stage{i}")
        segments.append(
            Segment(
                model=model,
                inputs=tuple(names[tensor] for tensor in inputs),
                outputs=tuple(names[tensor] for tensor in outputs),
                name=f"stage{i}",
            )
        )
    return segments


def _refuse_shared_layers(parts: Sequence[Sequence[Call]]) -> None:
    """Refuse a layer with weights that two stages would use: each would train a copy of its own."""
    home: dict[int, int] = {}
    for i, part in enumerate(parts):
        for call in part:
            if not getattr(call.operation, "variables", None):
                continue
            if home.setdefault(id(call.operation), i) != i:
                raise SplitError(
                    f"the layer {call.name!r} is used in the stages {home[id(call.operation)]} and {i}: each would "
                    "train its own copy of the weights. Cut elsewhere, so that all its uses are in one stage"
                )

"""Cut a model into segments.

    calls   c0 c1 c2 | c3 c4 | c5 c6 c7
    stage        0   |   1   |     2

A cut is a set of layers or tensors: they, and all they need, come before it. Whatever is alive there, skip connections
included, goes straight from the stage that makes it to every stage that reads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from pipeline.errors import SplitError
from pipeline.graph import Call, Graph, play, read_graph
from pipeline.sharing import changes_by_itself
from stages.segment import Segment

Cut = str | Iterable[str]
"""The name of a layer or tensor, or several that one cut lies behind."""


@dataclass(frozen=True, eq=False)
class Split:
    """A model in segments.

    Attributes:
        model: The model; the segments share its layers (and so its weights as they are now).
        segments: One per stage.
        stage_of: For each call of the model's order its stage.
        inputs: The names of the model's inputs, in the model's order.
        outputs: The names of the tensors that the model gives, in the model's order.
        labels: What Keras calls these outputs.
    """

    model: Any
    segments: tuple[Segment, ...]
    stage_of: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    labels: tuple[str, ...]

    def pack(self, outputs: Sequence[Any]) -> Any:
        """Flat outputs in the nesting in which the model gives them."""
        functional = getattr(self.model, "_functional", None) or self.model
        return keras.tree.pack_sequence_as(functional._outputs_struct, list(outputs))


def split_model(
    model: Any,
    stages: int | None = None,
    at: Sequence[Cut] | None = None,
    *,
    cuts: Sequence[int] | None = None,
    stage_of: Sequence[int] | None = None,
) -> Split:
    """The segments of a model.

    Args:
        model: A built Sequential or Functional model; models inside it are dissolved.
        stages: How many stages; cuts are chosen so that parameters are spread evenly.
        at: Or: where to cut, in the order of the stages. Each entry is the name of a layer or tensor, or a list of
            names: these and all they need come before the cut.
        cuts: Or: before which calls of the model's order the stages after the first begin.
        stage_of: Or: the stage of every call, as an earlier split of the same model had it.

    Raises:
        SplitError: Not exactly one way to cut; a subclassed model; more stages than layers; a name that is not there; a
            cut that leaves an empty stage; a layer that changes its own state used in two stages.
    """
    graph = read_graph(model)
    if stage_of is None:
        if cuts is None:
            if (stages is None) == (at is None):
                raise SplitError("say either how many stages (stages=3) or where to cut (at=['pool2'])")
            stage_of = _stages_behind(graph, at) if at is not None else in_order(graph, _even_cuts(graph, stages))
        else:
            stage_of = in_order(graph, cuts)
    names = graph.tensor_names()
    segments = _segments(graph, stage_of)
    return Split(
        model,
        tuple(segments),
        tuple(stage_of),
        tuple(names[tensor] for tensor in graph.inputs),
        tuple(names[tensor] for tensor in graph.outputs),
        graph.labels,
    )


def in_order(graph: Graph, cuts: Sequence[int]) -> list[int]:
    """The stage of every call, where stages are stretches of the model's order that begin at `cuts`."""
    return [sum(i >= cut for cut in cuts) for i in range(len(graph.calls))]


def can_cut(graph: Graph) -> list[bool]:
    """For each position before a call, 0 to their number: whether a cut there leaves every layer's state in one stage.

    A layer that changes its own variables (statistics, random numbers) and is called several times must have all its
    calls on one side.
    """
    allowed = [True] * (len(graph.calls) + 1)
    calls: dict[int, list[int]] = {}
    for i, call in enumerate(graph.calls):
        calls.setdefault(id(call.operation), []).append(i)
    for uses in calls.values():
        layer = graph.calls[uses[0]].operation
        if len(uses) > 1 and isinstance(layer, keras.Layer) and changes_by_itself(layer):
            for position in range(uses[0] + 1, uses[-1] + 1):
                allowed[position] = False
    return allowed


def _stages_behind(graph: Graph, at: Sequence[Cut]) -> list[int]:
    """The stage of every call, for cuts behind named layers or tensors."""
    wanted = [at] if isinstance(at, str) else list(at)
    makers = {tensor: i for i, call in enumerate(graph.calls) for tensor in call.makes}
    stage_of = [len(wanted)] * len(graph.calls)
    for stage, cut in enumerate(wanted):
        names = [cut] if isinstance(cut, str) else list(cut)
        before = [i for name in names for i in _calls_named(graph, name)]
        new = 0
        while before:
            i = before.pop()
            if stage_of[i] == len(wanted):
                stage_of[i] = stage
                new += 1
                before += [makers[tensor] for tensor in graph.calls[i].reads if tensor in makers]
        if not new:
            raise SplitError(
                f"a cut behind {_quoted(names)} leaves stage {stage} empty: all it needs is in the stages before. Cuts "
                f"must be named once each, in the model's order{_in_model_order(graph, wanted)}"
            )
    if len(wanted) not in stage_of and wanted:
        last = [wanted[-1]] if isinstance(wanted[-1], str) else wanted[-1]
        raise SplitError(f"a cut behind the last layer {_quoted(last)} leaves an empty stage; leave it out")
    return stage_of


def _calls_named(graph: Graph, name: str) -> list[int]:
    """The calls of a layer, or the one that makes a tensor of this name."""
    by_layer = [i for i, call in enumerate(graph.calls) if call.name == name]
    if by_layer:
        return by_layer
    tensors = {tensor_name: tensor for tensor, tensor_name in graph.tensor_names().items()}
    found = [i for i, call in enumerate(graph.calls) if tensors.get(name) in call.makes]
    if found:
        return found
    known = list(dict.fromkeys(call.name for call in graph.calls))
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3) or known[:5]
    raise SplitError(f"the model has no layer {name!r} to cut behind; nearest are {', '.join(map(repr, near))}")


def _in_model_order(graph: Graph, wanted: Sequence[Cut]) -> str:
    """The same names as a call that works, where each cut is one name."""
    if not all(isinstance(cut, str) for cut in wanted):
        return ""
    order = [call.name for call in graph.calls if call.name in set(wanted)]
    return f": at={list(dict.fromkeys(order))}"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


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
    allowed = can_cut(graph)
    # best[k][i]: the lightest possible heaviest stage when the first i calls make k stages.
    best: list[list[tuple[int, int]]] = [[(0, 0)] + [(sums[-1] + 1, 0)] * calls]
    for _ in range(stages):
        previous = best[-1]
        row = [(sums[-1] + 1, 0)]
        for end in range(1, calls + 1):
            choices = [(max(previous[i][0], sums[end] - sums[i]), i) for i in range(end) if allowed[i]]
            row.append(min(choices, default=(sums[-1] + 1, 0)))
        best.append(row)
    if best[-1][-1][0] > sums[-1]:
        raise SplitError(f"the model cannot be cut into {stages} stages so that every layer's state is in one of them")
    cuts, end = [], calls
    for k in range(stages, 1, -1):
        end = best[k][end][1]
        cuts.append(end)
    return cuts[::-1]


def _parameters(call: Call) -> int:
    count = getattr(call.operation, "count_params", None)
    return int(count()) if count is not None and getattr(call.operation, "built", False) else 0


def _segments(graph: Graph, stage_of: Sequence[int]) -> list[Segment]:
    _refuse_shared_state(graph, stage_of)
    names = graph.tensor_names()
    parts = [[c for c, s in zip(graph.calls, stage_of, strict=True) if s == i] for i in range(max(stage_of) + 1)]
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


def _refuse_shared_state(graph: Graph, stage_of: Sequence[int]) -> None:
    """Refuse a layer with a state of its own that two stages would use: in one process each use sees the one before."""
    home: dict[int, int] = {}
    for call, stage in zip(graph.calls, stage_of, strict=True):
        if not isinstance(call.operation, keras.Layer) or not changes_by_itself(call.operation):
            continue
        if home.setdefault(id(call.operation), stage) != stage:
            raise SplitError(
                f"the layer {call.name!r} is used in the stages {home[id(call.operation)]} and {stage}, and every use "
                "changes its state (statistics or random numbers), which cannot be in two processes at once. Cut "
                "elsewhere, so that all its uses are in one stage"
            )

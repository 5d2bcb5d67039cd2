"""Cut a model into segments.

    calls   c0 c1 c2 | c3 c4 | c5 c6 c7
    stage        0   |   1   |     2

A cut is a set of layers or tensors: they, and all they need, come before it. Whatever is alive there, skip connections
included, goes straight from the stage that makes it to every stage that reads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import keras

from pipeline.cutting.auto_schedule import AutoSchedule, choose_schedule, in_windows
from pipeline.cutting.choose import balance, predicted
from pipeline.cutting.cores import default_threads
from pipeline.cutting.cut_table import CutTable, cut_table
from pipeline.cutting.prediction import Prediction
from pipeline.errors import SplitError
from pipeline.model.call_graph import CallGraph, play, read_graph
from pipeline.model.shared_variables import changes_by_itself
from pipeline.model.stateful import converted, refuse_states_kept_by_some, refuse_what_mixes_time
from pipeline.plan.schedules import TunedSchedule
from pipeline.saying import is_whole, not_whole
from stages.keras_internals import graph_model, output_structure
from stages.recipe.overrides import why_training_would_differ
from stages.recipe.segment import Segment
from stages.recipe.unbuilt import build_rest
from transport.registry import AUTO

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})

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
        prediction: What a step should cost, where that was measured.
        chosen: The schedule, where it was not named; None where it was.
        why: Why that one, in one line.
    """

    model: Any
    segments: tuple[Segment, ...]
    stage_of: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    prediction: Prediction | None = None
    chosen: TunedSchedule | None = None
    why: str = ""

    def pack(self, outputs: Sequence[Any]) -> Any:
        """Flat outputs in the nesting in which the model gives them; as from Keras, a list of one is that one."""
        found = keras.tree.pack_sequence_as(output_structure(graph_model(self.model)), list(outputs))
        return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found


def split_model(
    model: Any,
    stages: int | None = None,
    at: Sequence[Cut] | None = None,
    *,
    balance: str = "parameters",
    sample: Any = None,
    options: Mapping[str, Any] = _NO_OPTIONS,
    cuts: Sequence[int] | None = None,
    stage_of: Sequence[int] | None = None,
) -> Split:
    """The segments of a model.

    Args:
        model: A built Sequential or Functional model; models inside it are dissolved.
        stages: How many stages, balanced by `balance`.
        at: Or: where to cut, in the order of the stages. Each entry is the name of a layer or tensor, or a list of
            names: these and all they need come before the cut.
        balance: ``"parameters"``, ``"time"`` or ``"memory"``; see `pipeline.cutting.optimise`.
        sample: One microbatch to measure on; only ``"parameters"`` can do without.
        options: How the pipeline will run, as `Pipeline` takes it.
        cuts: Or: before which calls of the model's order the stages after the first begin.
        stage_of: Or: the stage of every call, as an earlier split of the same model had it.

    Raises:
        SplitError: Not exactly one way to cut; a subclassed model; more stages than layers; a name that is not there; a
            cut that leaves an empty stage; a layer that changes its own state used in two stages; a `train_step` or
            the like of the model's own, which its stages would not call.
    """
    graph, prediction = read_graph(model), None
    if (why := why_training_would_differ(model)) is not None:
        raise SplitError(why)
    build_rest(model)
    if stage_of is None and cuts is not None:
        stage_of = in_order(graph, cuts)
    elif stage_of is None:
        if (stages is None) == (at is None):
            raise SplitError("say either how many stages (stages=3) or where to cut (at=['pool2'])")
        if at is not None:
            if balance != "parameters":
                raise SplitError("balance= chooses the cuts for stages=; with at= they are chosen already")
            stage_of = _stages_behind(graph, at)
            if sample is not None:
                prediction = predicted(graph, stage_of, sample, **_how(options, 1 + max(stage_of)))
        else:
            stage_of, prediction = _balanced(graph, stages, balance, sample, options)
    prediction, chosen, why = _schedule(prediction, options)
    names = graph.tensor_names()
    carries = options.get("windows", 1) > 1 or bool(options.get("keep_state"))
    segments = _segments(graph, stage_of, carries)
    if carries and (options.get("windows", 1) > 1 or any(segment.states for segment in segments)):
        refuse_what_mixes_time(graph)
    if options.get("keep_state"):
        refuse_states_kept_by_some(graph)
    return Split(
        model,
        tuple(segments),
        tuple(stage_of),
        tuple(names[tensor] for tensor in graph.inputs),
        tuple(names[tensor] for tensor in graph.outputs),
        graph.labels,
        prediction,
        chosen,
        why,
    )


def in_order(graph: CallGraph, cuts: Sequence[int]) -> list[int]:
    """The stage of every call, where stages are stretches of the model's order that begin at `cuts`."""
    return [sum(i >= cut for cut in cuts) for i in range(len(graph.calls))]


def can_cut(graph: CallGraph) -> list[bool]:
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


def _stages_behind(graph: CallGraph, at: Sequence[Cut]) -> list[int]:
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


def _calls_named(graph: CallGraph, name: str) -> list[int]:
    """All calls of a layer, or the one that makes a tensor of this name (``name:1`` is a layer's first)."""
    by_layer = [i for i, call in enumerate(graph.calls) if call.name == name]
    if by_layer:
        return by_layer
    tensors = {tensor_name: tensor for tensor, tensor_name in graph.tensor_names().items()}
    wanted = tensors.get(name.removesuffix(":1"))
    found = [i for i, call in enumerate(graph.calls) if wanted in call.makes]
    if found:
        return found
    known = list(dict.fromkeys(call.name for call in graph.calls))
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3) or known[:5]
    raise SplitError(f"the model has no layer {name!r} to cut behind; nearest are {', '.join(map(repr, near))}")


def _in_model_order(graph: CallGraph, wanted: Sequence[Cut]) -> str:
    """The same names as a call that works, where each cut is one name."""
    if not all(isinstance(cut, str) for cut in wanted):
        return ""
    order = [call.name for call in graph.calls if call.name in set(wanted)]
    return f": at={list(dict.fromkeys(order))}"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _balanced(
    graph: CallGraph, stages: int | None, by: str, sample: Any, options: Mapping[str, Any]
) -> tuple[list[int], Prediction | None]:
    """The stage of every call, the slowest (or largest) stage as small as it can be; what a step should cost."""
    calls = len(graph.calls)
    if stages is None or not is_whole(stages):
        raise SplitError(not_whole("the number of stages", stages))
    if stages > calls:
        raise SplitError(
            f"the model has {calls} layer(s) to give to stages, {stages} stages were asked for; ask for at most {calls}"
        )
    found = balance(graph, stages, by, sample, allowed=can_cut(graph), **_how(options, stages))
    return in_order(graph, found.cuts), found.prediction


def _how(options: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """The options that matter to costs."""
    given = {name: options[name] for name in ("microbatches", "schedule", "recompute") if name in options}
    wanted, transport = AutoSchedule.of(options.get("schedule")), options.get("transport", "auto")
    if wanted is not None:
        del given["schedule"]  # it is to be chosen by these costs
        stages = max(1, stages // wanted.stages_per_worker)
    threads = options.get("threads") or default_threads(stages)
    return given | {"transport": AUTO if transport == "auto" else transport, "threads": threads}


def _schedule(
    prediction: Prediction | None, options: Mapping[str, Any]
) -> tuple[Prediction | None, TunedSchedule | None, str]:
    """The schedule where it is to be chosen, and why; with what a step should cost under it."""
    wanted = AutoSchedule.of(options.get("schedule"))
    if wanted is None:
        return prediction, None, ""
    if is_whole(windows := options.get("windows", 1), 2):
        return prediction, *in_windows(wanted, windows)
    if prediction is None:
        raise SplitError(
            "schedule='auto' chooses by what this model costs, which is measured: give one microbatch, sample=x[:32]"
        )
    found = choose_schedule(wanted, prediction)
    assert isinstance(found.schedule, TunedSchedule)
    return found, found.schedule, found.why


def _segments(graph: CallGraph, stage_of: Sequence[int], carries: bool) -> list[Segment]:
    """The parts as models; with `carries`, recurrent layers take and give their states."""
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
        if carries:
            found = converted(graph, part, inputs, outputs, f"stage{i}")
            model, states = found.model, found.states
        else:
            model, states = play(graph, part, inputs, outputs, f"stage{i}"), ()
        segments.append(
            Segment(
                model=model,
                inputs=tuple(names[tensor] for tensor in inputs),
                outputs=tuple(names[tensor] for tensor in outputs),
                name=f"stage{i}",
                states=states,
            )
        )
    return segments


def _refuse_shared_state(graph: CallGraph, stage_of: Sequence[int]) -> None:
    """Refuse a layer with a state of its own that two stages would use: in one process each use sees the one before."""
    home: dict[int, int] = {}
    for call, stage in zip(graph.calls, stage_of, strict=True):
        layer = call.operation
        apart = home.setdefault(id(layer), stage) != stage
        if apart and isinstance(layer, keras.Layer) and changes_by_itself(layer):
            raise SplitError(
                f"the layer {call.name!r} is used in the stages {home[id(call.operation)]} and {stage}, and every use "
                "changes its state (statistics or random numbers), which cannot be in two processes at once. Cut "
                "elsewhere, so that all its uses are in one stage"
            )


def cuts(model: Any, sample: Any) -> CutTable:
    """The places where a model can be cut, with what crosses there and what is on either side.

    Args:
        model: Sequential or Functional.
        sample: One microbatch of inputs, as `fit` takes them; times and sizes are measured on it.

    Returns:
        One row per cut: ``print`` shows a table, ``.rows`` has the figures, ``row.at`` is an entry for `split`.
    """
    return cut_table(model, sample, threads=default_threads(2), allowed=can_cut(read_graph(model)))

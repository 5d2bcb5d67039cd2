"""The backward part of a traced function cut once more: dL/dinputs first, dL/dvariables whenever there is time.

      kept tensors, seeds ──► input half ──► dL/dinputs          others wait for it
                                 │ what the weight half reads
                                 ▼
                              weight half ──► dL/dvariables      nobody waits for it

Both halves are parts of one graph, so together they are the whole backward to the last bit (`stages.tape.graph_split`).

Rules:

1. An operation of the backward part belongs to the input half if an input gradient needs it, or if it has an effect
   and no gradient needs it; to the weight half if only gradients of variables need it. Nothing is computed twice.
2. Between the halves exactly those tensors are held that the weight half reads: kept ones, seeds, results of the input
   half. Gradients of variables that the input half happens to compute (a scale beside dL/dx, a loop's sums) are among
   them.
3. Only the weight half adds to sums.
4. Where no input is differentiated there is no input half: all is in the second. Where the second reads nothing but
   finished gradients (recurrent layers), it only adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stages.tape.direct_calls import portable
from stages.tape.graph_split import GraphPart, JointGraph, Traced, needed_for

Finish = Callable[[Sequence[Any | None]], Sequence[Any]]


@dataclass(frozen=True)
class Halves:
    """Two functions of which the second takes up what the first left.

    Attributes:
        first: From some of the values to `results` tensors and what is handed over; None: there is nothing to compute.
        takes: Which of the values `first` takes.
        results: How many tensors come first.
        leaves: Which of the values the second takes, before what is handed over.
        second: From these to its own results; None: it would have nothing to do.
        source: What the functions need to live.
    """

    first: Callable[..., list[Any]] | None
    takes: tuple[int, ...]
    results: int
    leaves: tuple[int, ...]
    second: Callable[..., list[Any]] | None
    source: Any = None

    def run_first(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The first half's results, and all that the second half reads."""
        found = [] if self.first is None else self.first(*(values[i] for i in self.takes))
        return found[: self.results], [*(values[i] for i in self.leaves), *found[self.results :]]

    def run_second(self, left: Sequence[Any]) -> list[Any]:
        """The second half's results, from what the first one left."""
        return [] if self.second is None else self.second(*left)


@dataclass(frozen=True)
class ForwardAndHalves:
    """A forward function, and the halves of its backward, whose values are what forward kept and then the seeds."""

    forward: Callable[..., list[Any]]
    halves: Halves


def split_in_three(joint: Callable[..., Traced], signature: Sequence[Any], finish: Finish) -> ForwardAndHalves:
    """Trace a forward and its backward and cut it twice.

    Args:
        joint: As `stages.tape.graph_split.split_functions` takes it, like `signature`.
        finish: Called in the second half's trace with the gradients of variables (None where there is none); what it
            returns is what the second half returns.
    """
    graph = JointGraph(joint, signature)
    inputs = graph.traced.inputs
    of_inputs = [g for g in graph.traced.gradients[:inputs] if g is not None]
    cut = _Cut(graph, of_inputs, graph.traced.gradients[inputs:])
    first = graph.part(cut.first, [*of_inputs, *cut.handed])
    seeds = {seed.name for seed in graph.traced.seeds}
    reads = {t.name: t for t in (*first.reads, *cut.left) if t.name not in seeds}
    values = [*reads.values(), *graph.traced.seeds]
    takes = _places(first.reads, values)
    results = [*of_inputs, *cut.handed]
    function = graph.function(first, [values[i] for i in takes], results, _all_portable) if results else None
    halves = Halves(
        function, takes, len(of_inputs), _places(cut.left, values), cut.second_function(finish), graph.source
    )
    return ForwardAndHalves(graph.forward_function(signature, list(reads.values())), halves)


def split_off_weights(joint: Callable[..., Traced], signature: Sequence[Any], finish: Finish) -> Halves:
    """Trace a function that goes forward and backward, and take the weight half out of it.

    Args:
        joint: From the values to its results (`outputs`), dL/dinputs included, and dL/dvariables (`gradients`); its
            seeds are among the values.
        signature: `tf.TensorSpec` of the values.
        finish: As `split_in_three` takes it.
    """
    graph = JointGraph(joint, signature)
    outputs, arguments = graph.traced.outputs, graph.arguments
    if not outputs:
        whole = _Cut(graph, [], graph.traced.gradients, second=graph.forward | graph.backward - graph.seeds)
        return Halves(None, (), 0, _places(whole.left, arguments), whole.second_function(finish, True), graph.source)
    cut = _Cut(graph, outputs, graph.traced.gradients, first=graph.forward)
    results = [*outputs, *cut.handed]
    first = graph.part(cut.first, results)
    takes = _places(first.reads, arguments)
    function = graph.function(first, [arguments[i] for i in takes], results, _all_portable, True)
    leaves = _places(cut.left, arguments)
    return Halves(function, takes, len(outputs), leaves, cut.second_function(finish, True), graph.source)


class _Cut:
    """The assignment of a graph's operations to two halves.

    Args:
        graph: The trace.
        results: The tensors that are wanted of the first half.
        gradients: Those that are wanted of the second, and None where there is none.
        first: Names of operations outside of the backward part that are in the first half.
        second: Names of all operations of the second half, where there is no first one.
    """

    def __init__(
        self,
        graph: JointGraph,
        results: Sequence[Any],
        gradients: Sequence[Any | None],
        first: Collection[str] = (),
        second: Collection[str] | None = None,
    ) -> None:
        self._graph, self._gradients = graph, gradients
        backward = graph.backward - graph.seeds
        self._wanted = [gradient for gradient in gradients if gradient is not None]
        self.first: set[str] = set()
        if second is None:
            needed = needed_for([*results, *self._wanted], backward)
            effects = [op for op in graph.operations if op.name in backward - needed and op.op_def.is_stateful]
            inputs = [tensor for op in effects for tensor in op.inputs]
            self.first = {*first, *needed_for([*results, *inputs], backward), *(op.name for op in effects)}
            second = needed_for(self._wanted, backward) - self.first
        self._second: GraphPart = graph.part(second, self._wanted)
        self.handed = [tensor for tensor in self._second.reads if tensor.op.name in self.first]
        """What the second half reads of the first."""
        self.left = [tensor for tensor in self._second.reads if tensor.op.name not in self.first]
        """What it reads besides."""

    def second_function(self, finish: Finish, inputs_as_they_are: bool = False) -> Callable[..., list[Any]] | None:
        """The second half; it takes `left`, then `handed`. None if there is no gradient to add."""
        if not self._wanted:
            return None

        def finish_all(found: Sequence[Any]) -> list[Any]:
            each = iter(found)
            return list(finish([None if g is None else next(each) for g in self._gradients]))

        takes = [*self.left, *self.handed]
        return self._graph.function(self._second, takes, self._wanted, finish_all, inputs_as_they_are)


def _places(tensors: Sequence[Any], values: Sequence[Any]) -> tuple[int, ...]:
    place = {tensor.name: i for i, tensor in enumerate(values)}
    return tuple(place[tensor.name] for tensor in tensors)


def _all_portable(tensors: Sequence[Any]) -> list[Any]:
    return [portable(tensor) for tensor in tensors]

"""Tapes that stay open between forward and backward: the compiled way.

One trace per signature (dtypes and shapes with a free batch dimension) gives a forward and a backward function that
hand the tape's intermediates over (`stages.tape.graph_split`). Where no other stage takes an output, forward, losses
and backward are one function (*fused*): the loss's output gradient exists as soon as the loss does. With `recompute`,
only the inputs are kept and backward runs the forward pass again, from the same states.

Where a plan takes backwards in halves (`halves`), the backward is cut once more (`stages.tape.backward_halves`); of a
fused or recomputed one, the input half is what remains once the weight half is taken out of it.

Gradients are added to accumulator variables inside the backward function (or the weight half), in the order of the
calls: a schedule that goes backward in ascending order sums in ascending order. An embedding's, which are rows
(`tf.IndexedSlices`), are given out and kept in that order. The optimizer runs as one function over the accumulators and
the rows. What is traced is in `stages.tape.traces`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, dense, plus
from stages.tape.compiled_layout import (
    FunctionPair,
    HalfPass,
    Layout,
    OpenPass,
    flat_arguments,
    scalar,
    scalar_spec,
    signature_of,
)
from stages.tape.contract import Blocks, Opened, PassInputs, PassKey, Tapes
from stages.tape.direct_calls import direct
from stages.tape.embedding_rows import Rows, is_sparse, parts_of, sparse
from stages.tape.model_call import Part
from stages.tape.optimizer_update import rescaled, update
from stages.tape.traces import Traces
from stages.tape.trained import Trained
from stages.tensorflow_internals import sizes_of


@dataclass
class CompiledTapes(Tapes):
    """Compiled forward and backward of one part.

    Args:
        part: The model.
        heads: The objectives of its outputs.
        recompute: Keep only inputs and run the forward pass again in backward.
        ends: Whether no other stage takes an output, so that forward, loss and backward can be one function.
    """

    part: Part
    heads: Heads = field(default_factory=Heads)
    recompute: bool = False
    ends: bool = True
    loss_scale: float = 1.0
    blocks: Blocks = field(default_factory=Blocks)
    halves: bool = False
    _functions: dict[Any, Any] = field(default_factory=dict)
    _open: dict[PassKey, OpenPass] = field(default_factory=dict)
    _halfway: dict[PassKey, HalfPass | None] = field(default_factory=dict)
    _accumulators: list[Any] = field(default_factory=list)
    _reached: list[bool] = field(default_factory=list)
    _rows: Rows = field(default_factory=Rows)
    _trained: Trained = field(default_factory=Trained)
    _settled: tuple[int, ...] | None = None
    _traced: int = 0

    @property
    def traces(self) -> int:
        """How many functions were traced so far."""
        return self._traced

    def __post_init__(self) -> None:
        self._traces = Traces(self.part, self.heads, self._accumulators)

    def forward(self, key: PassKey, given: PassInputs) -> Opened:
        """Run the compiled forward; what its backward needs is kept under `key`."""
        inputs, share, masked, objective = given
        if objective is not None and self.ends and not self.heads.counts_at_once:
            return self._all_at_once(key, inputs, share, masked, objective)
        traces = self._traces
        trace = traces.recomputing if self.recompute else traces.pair
        name = "pair in halves" if self.halves else "pair"
        pair: FunctionPair = self._function(name, inputs, masked, objective, trace, key.window)
        outputs, own, losses, kept = pair.layout.results(pair.forward(*flat_arguments(inputs, objective)))
        self._open[key] = OpenPass(pair, tuple(kept), outputs, share)
        own = None if own is None else own * scalar(share)
        return Opened(pair.layout.structure, outputs, own, losses, pair.layout.masked)

    def _all_at_once(
        self, key: PassKey, inputs: Sequence[Any], share: float, masked: Sequence[int], objective: Objective
    ) -> Opened:
        """Forward, losses, metrics and backward as one function; `backward` hands the result out."""
        name = "fused in halves" if self.halves else "fused"
        functions, layout = self._function(name, inputs, masked, objective, self._traces.fused, key.window)
        results, left = functions.run_first(
            (*flat_arguments(inputs, objective), scalar(share), scalar(self.loss_scale))
        )
        _, own, losses, gradients = layout.results(results)
        way = layout.way_back(None)
        half = HalfPass(functions, layout, left, way.variables)
        if not self.halves:
            self._collected(left, layout, way.variables)
        input_gradients = tuple([None if n is None else gradients[n] for n in way.inputs])
        self._open[key] = OpenPass(None, (), (), share, input_gradients, half if self.halves else None)
        return Opened(None, (), own, losses)

    def infer(self, given: PassInputs, window: int = 0) -> Opened:
        """Run the compiled evaluation: no gradients, `training=False`."""
        inputs, share, masked, objective = given
        run, layout = self._function("infer", inputs, masked, objective, self._traces.inference, window)
        outputs, own, losses, _ = layout.results(run(*flat_arguments(inputs, objective), scalar(share)))
        return Opened(layout.structure, outputs, own, losses, layout.masked)

    def backward_input(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Run the compiled backward, or its input half, and return dL/dinputs."""
        opened = self._open.pop(key)
        if opened.pair is None:
            assert opened.input_gradients is not None
            self._halfway[key] = opened.half
            return opened.input_gradients
        layout, functions = opened.pair.layout, opened.pair.backward
        way = layout.way_back(tuple([gradient is not None for gradient in output_gradients]))
        seeds = [output_gradients[i] if there else tf.zeros_like(opened.outputs[i]) for i, there in way.seeds]
        if layout.own:
            seeds.append(scalar(opened.share * self.loss_scale))
        if layout.weighted is not None:
            seeds.append(scalar(self.loss_scale))
        results, left = functions.run_first([*opened.kept, *seeds])
        half = HalfPass(functions, layout, left, way.variables)
        if not opened.pair.halved:
            self._collected(left, layout, half.reached)
        self._halfway[key] = half if opened.pair.halved else None
        return tuple([None if n is None else results[n] for n in way.inputs])

    def backward_weight(self, key: PassKey) -> None:
        """Run the weight half, which accumulates dL/dvariables, unless the input half was the whole backward."""
        half = self._halfway.pop(key)
        if half is not None:
            self._collected(half.functions.run_second(half.left), half.layout, half.reached)

    def _collected(self, rows: Sequence[Any], layout: Layout, reached: Sequence[bool]) -> None:
        """Note which variables an objective reaches and keep the rows of embeddings.

        Args:
            rows: Their values and places.
            layout: Of the function that gave them.
            reached: For each variable, whether its gradient depends on a seed that was given.
        """
        for n, i in enumerate(layout.rows):
            if reached[i]:
                values, places = rows[2 * n : 2 * n + 2]
                gradient = sparse(values, places, layout.variables[i].shape)
                self._rows.add(layout.places[i], gradient, i in layout.fixed_rows)
        for i, (place, there) in enumerate(zip(layout.places, reached, strict=True)):
            self._reached[place] = self._reached[place] or (there and i not in layout.rows)

    def as_given(self) -> list[Any | None]:
        """The same; of an embedding that is no more than that, all rows (`tf.IndexedSlices`)."""
        return [
            plus(self._accumulators[i].read_value() if self._reached[i] else None, self._rows.of(i))
            for i in self._prepare()
        ]

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What all microbatches together added to some variables, as one entry."""
        found = self.as_given()
        return [[found[place] for place in places]]

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some accumulated ones."""
        self._prepare()
        for place, total in zip(places, totals, strict=True):
            if is_sparse(total):
                self._rows.replace(place, total)
            elif total is not None:
                self._rows.replace(place, None)
                self._accumulators[place].assign(total)
                self._reached[place] = True

    def apply(self, optimizer: Any, scale: float | None, divisor: float | None = None) -> None:
        """Update the variables from the accumulators (over `divisor`, times `scale`) and clear them, in one call."""
        trained = self._prepare()
        self._forget_open()
        for i in self._rows.variables():
            if self._reached[i]:  # rows beside a dense gradient are dense
                self._accumulators[i].assign_add(dense(self._rows.of(i)))
                self._rows.replace(i, None)
        rows = tuple(i for i in self._rows.variables() if i in trained)
        reached = tuple(i for i in trained if self._reached[i])
        flat = [part for i in rows for part in parts_of(self._rows.of(i))]
        order = tuple(i for i in trained if i in reached or i in rows)
        name = ("apply", optimizer, order, rows, scale is not None, divisor is not None)
        if name not in self._functions:
            trace = self._trace_apply(optimizer, order, rows, scale is not None, divisor is not None)
            self._functions[name] = direct(trace, [scalar_spec(), scalar_spec(), *map(signature_of, flat)])
        self._functions[name](scalar(float(scale or 0.0)), scalar(float(divisor or 1.0)), *flat)
        self._zero(kept=reached)

    def forget_updates(self) -> None:
        """Trace updates anew: numbers in the optimizer were changed."""
        self._functions = {name: found for name, found in self._functions.items() if name[0] != "apply"}

    def forget_traces(self) -> None:
        """Trace forwards and backwards anew: settings of layers or losses were changed."""
        self._functions = {name: found for name, found in self._functions.items() if name[0] == "apply"}

    def clear(self, failed: bool = False) -> None:
        """Drop what is open and set the sums to zero; a function that failed half way may have added to any of them."""
        self._forget_open()
        if failed:
            self._reached = [True] * len(self._reached)
        self._zero()

    def _forget_open(self) -> None:
        self._open.clear()
        self._halfway.clear()

    def _zero(self, kept: Sequence[int] = ()) -> None:
        """Forget all sums; those of some places are zero already."""
        self._rows.clear()
        for i, there in enumerate(self._reached):
            if there and i not in kept:
                self._accumulators[i].assign(tf.zeros_like(self._accumulators[i]))
        self._reached = [False] * len(self._reached)

    def _prepare(self) -> tuple[int, ...]:
        """The places of what is trained at present; a variable that is new gets an accumulator."""
        if self._settled is not None:
            return self._settled
        places = self._trained.places(self.part.trainable_variables)
        if self.part.settled:
            self._settled = places
        for variable in self._trained.variables[len(self._accumulators) :]:
            self._accumulators.append(tf.Variable(tf.zeros_like(variable.value), trainable=False))
            self._reached.append(False)
        return places

    def _function(
        self,
        name: str,
        inputs: Sequence[Any],
        masked: Sequence[int],
        objective: Objective | None,
        trace: Callable[..., Any],
        window: int,
    ) -> Any:
        """The function for tensors like these; traced once per dtype and shape without the batch."""
        later = int(window > 0 and self.part.regularised > 0)
        tensors = inputs if objective is None else (*inputs, *objective.tensors())
        weighted = None if objective is None else objective.weighted
        shapes = [(t.dtype, sizes_of(t)[1:] or len(sizes_of(t))) for t in tensors]
        heads = None if objective is None else objective.heads
        places = self._prepare()
        counting = self.heads.counts_at_once
        key = (name, places, self.part.modes(), tuple(masked), weighted, heads, later, counting, *shapes)
        found = self._functions.get(key)
        if found is None:
            specs = [signature_of(tensor) for tensor in tensors] + [scalar_spec()] * len(weighted or ())
            variables = tuple(self._trained.variables[place] for place in places)
            layout = Layout(len(inputs), tuple(masked), weighted, heads, later, variables, places)
            found = self._functions[key] = trace(layout, specs, self.halves)
            self._traced += 1
        return found

    def _trace_apply(
        self, optimizer: Any, order: Sequence[int], with_rows: Sequence[int], scaled: bool, divided: bool
    ) -> Callable[..., list[Any]]:
        """An update of the variables of some places, from their accumulators, or from rows where they have some."""
        variables = self._trained.variables
        reached = [i for i in order if i not in with_rows]

        def apply(scale: Any, divisor: Any, *flat: Any) -> list[Any]:
            found = {i: tf.convert_to_tensor(self._accumulators[i]) for i in reached}
            for n, i in enumerate(with_rows):
                found[i] = sparse(flat[2 * n], flat[2 * n + 1], variables[i].shape)
            gradients = rescaled([found[i] for i in order], scale if scaled else None, divisor if divided else None)
            update(optimizer, gradients, [variables[i] for i in order])
            for i in reached:
                self._accumulators[i].assign(tf.zeros_like(self._accumulators[i]))
            return [tf.constant(True)]

        return apply

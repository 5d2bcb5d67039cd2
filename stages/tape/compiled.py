"""Tapes that stay open between forward and backward: the compiled way.

One trace per signature (dtypes and shapes with a free batch dimension) gives a forward and a backward function that
hand the tape's intermediates over (`stages.tape.graph_split`). Where no other stage takes an output, forward, losses
and backward are one function (*fused*): the loss's output gradient exists as soon as the loss does. With `recompute`,
only the inputs are kept and backward runs the forward pass again, from the same states.

Gradients are added to accumulator variables inside the backward function, in the order of the calls: a schedule that
goes backward in ascending order sums in ascending order. An embedding's, which are rows (`tf.IndexedSlices`), are
given out and kept in that order. The optimizer runs as one function over the accumulators and the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import tensorflow as tf

from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, dense, plus
from stages.tape.compiled_layout import (
    SCALAR,
    FunctionPair,
    Layout,
    OpenPass,
    flat_arguments,
    scalar,
    scalar_seeds,
    signature_of,
)
from stages.tape.contract import Blocks, Opened, PassInputs, PassKey, Tapes
from stages.tape.direct_calls import direct, portable, portable_dtype, unportable
from stages.tape.embedding_rows import Rows, is_sparse, parts_of, sparse
from stages.tape.graph_split import Traced, depends_on, split_functions
from stages.tape.model_call import CallState, Part, spread, watch
from stages.tape.optimizer_update import rescaled, update
from stages.tape.tensors import is_differentiable
from stages.tape.trained import Trained


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
    _functions: dict[Any, Any] = field(default_factory=dict)
    _open: dict[PassKey, OpenPass] = field(default_factory=dict)
    _accumulators: list[Any] = field(default_factory=list)
    _reached: list[bool] = field(default_factory=list)
    _rows: Rows = field(default_factory=Rows)
    _trained: Trained = field(default_factory=Trained)

    def forward(self, key: PassKey, given: PassInputs) -> Opened:
        """Run the compiled forward; what its backward needs is kept under `key`."""
        inputs, share, masked, objective = given
        if objective is not None and self.ends and not self.heads.counts_at_once:
            return self._all_at_once(key, inputs, share, masked, objective)
        trace = self._trace_recomputing if self.recompute else self._trace_pair
        pair: FunctionPair = self._function("pair", inputs, masked, objective, trace, key.window)
        outputs, own, losses, kept = pair.layout.results(pair.forward(*flat_arguments(inputs, objective)))
        self._open[key] = OpenPass(pair, tuple(kept), outputs, share)
        return Opened(None, outputs, None if own is None else own * scalar(share), losses, pair.layout.masked)

    def _all_at_once(
        self, key: PassKey, inputs: Sequence[Any], share: float, masked: Sequence[int], objective: Objective
    ) -> Opened:
        """Forward, losses, metrics and backward as one function; `backward` hands the result out."""
        run, layout = self._function("fused", inputs, masked, objective, self._trace_fused, key.window)
        scalars = (scalar(share), scalar(self.loss_scale))
        _, own, losses, gradients = layout.results(run(*flat_arguments(inputs, objective), *scalars))
        reached = layout.reached(frozenset((0,)))
        found = iter(self._collected(gradients, layout, reached[sum(layout.wanted) :]))
        inside = [next(found) if there else None for there in reached[: sum(layout.wanted)]]
        self._open[key] = OpenPass(None, (), (), share, spread(layout.wanted, inside))
        return Opened(None, (), own, losses)

    def infer(self, given: PassInputs, window: int = 0) -> Opened:
        """Run the compiled evaluation: no gradients, `training=False`."""
        inputs, share, masked, objective = given
        run, layout = self._function("infer", inputs, masked, objective, self._trace_inference, window)
        outputs, own, losses, _ = layout.results(run(*flat_arguments(inputs, objective), scalar(share)))
        return Opened(None, outputs, own, losses, layout.masked)

    def backward(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Run the compiled backward, which accumulates dL/dvariables, and return dL/dinputs."""
        opened = self._open.pop(key)
        if opened.pair is None:
            assert opened.input_gradients is not None
            return opened.input_gradients
        layout = opened.pair.layout
        given = dict(enumerate(output_gradients))
        places = [i for i, output in enumerate(opened.outputs) if is_differentiable(output.dtype)]
        seeds = [tf.zeros_like(opened.outputs[i]) if given.get(i) is None else given[i] for i in places]
        alive = {n for n, i in enumerate(places) if given.get(i) is not None}
        alive |= set(range(len(places), len(places) + layout.own + (layout.weighted is not None)))
        seeds += [scalar(opened.share * self.loss_scale)] * layout.own
        seeds += [scalar(self.loss_scale)] * (layout.weighted is not None)
        reached = layout.reached(frozenset(alive))
        count = sum(layout.wanted)
        found = iter(self._collected(opened.pair.backward(*opened.kept, *seeds), layout, reached[count:]))
        exists = [seeds_ is not None for seeds_ in layout.depends[:count]]
        results = [next(found) if there else None for there in exists]
        return spread(layout.wanted, [r if there else None for r, there in zip(results, reached, strict=False)])

    def _collected(self, results: Sequence[Any], layout: Layout, reached: Sequence[bool]) -> Sequence[Any]:
        """Note which variables an objective reaches and keep the rows of embeddings; the rest of a backward's results.

        Args:
            results: dL/dinputs, then values and places of the rows.
            layout: Of the function that gave them.
            reached: For each variable, whether its gradient depends on a seed that was given.
        """
        end = len(results) - 2 * len(layout.rows)
        for n, i in enumerate(layout.rows):
            if reached[i]:
                values, rows = results[end + 2 * n : end + 2 * n + 2]
                gradient = sparse(values, rows, layout.variables[i].shape)
                self._rows.add(layout.places[i], gradient, i in layout.fixed_rows)
        for i, (place, there) in enumerate(zip(layout.places, reached, strict=True)):
            self._reached[place] = self._reached[place] or (there and i not in layout.rows)
        return results[:end]

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
        self._open.clear()
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
            self._functions[name] = direct(trace, [SCALAR, SCALAR, *map(signature_of, flat)])
        self._functions[name](scalar(float(scale or 0.0)), scalar(float(divisor or 1.0)), *flat)
        self._zero(kept=reached)

    def forget_updates(self) -> None:
        """Trace updates anew: numbers in the optimizer were changed."""
        self._functions = {name: found for name, found in self._functions.items() if name[0] != "apply"}

    def clear(self, failed: bool = False) -> None:
        """Drop what is open and set the sums to zero; a function that failed half way may have added to any of them."""
        self._open.clear()
        if failed:
            self._reached = [True] * len(self._reached)
        self._zero()

    def _zero(self, kept: Sequence[int] = ()) -> None:
        """Forget all sums; those of some places are zero already."""
        self._rows.clear()
        for i, there in enumerate(self._reached):
            if there and i not in kept:
                self._accumulators[i].assign(tf.zeros_like(self._accumulators[i]))
        self._reached = [False] * len(self._reached)

    def _prepare(self) -> tuple[int, ...]:
        """The places of what is trained at present; a variable that is new gets an accumulator."""
        places = self._trained.places(self.part.trainable_variables)
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
        shapes = ((t.dtype, t.shape[1:] if t.shape.rank else None) for t in tensors)
        heads = None if objective is None else objective.heads
        places = self._prepare()
        counting = self.heads.counts_at_once
        key = (name, places, self.part.modes(), tuple(masked), weighted, heads, later, counting, *shapes)
        found = self._functions.get(key)
        if found is None:
            specs = [signature_of(tensor) for tensor in tensors] + [SCALAR] * len(weighted or ())
            variables = tuple(self._trained.variables[place] for place in places)
            layout = Layout(len(inputs), tuple(masked), weighted, heads, later, variables, places)
            found = self._functions[key] = trace(layout, *specs)
        return found

    def _trace_pair(self, layout: Layout, *specs: Any) -> FunctionPair:
        """Forward and backward that hand the tape's intermediates over."""

        def joint(*arguments: Any) -> Traced:
            results, differentiable, differentiate = self._taped(arguments, layout)
            seeds = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in differentiable]
            seeds += [tf.compat.v1.placeholder(tf.float32, ()) for _ in range(scalar_seeds(layout))]
            gradients = differentiate(seeds)
            layout.depends = depends_on(gradients[: len(gradients) - len(layout.rows)], seeds)
            return Traced(results, seeds, gradients)

        functions = split_functions(joint, specs, lambda gradients: self._finish(gradients, layout))
        return FunctionPair(functions.forward, functions.backward, layout, functions.source)

    def _trace_recomputing(self, layout: Layout, *specs: Any) -> FunctionPair:
        """A forward that keeps arguments and states, and a backward that runs it again from them."""
        states = CallState(self.part.model)

        def forward(*arguments: Any) -> list[Any]:
            before = states.read()
            inputs, objective = layout.unpack(arguments)
            _, outputs, _, own = self.part.call(inputs, True, layout.takes, layout.window)
            results = [portable(tensor) for tensor in outputs]
            results += [tf.add_n(own)] if own else []
            if objective is not None:
                results += self.heads.values(outputs, objective)
                self._count(outputs, objective)
            return [*results, *(portable(tensor) for tensor in (*arguments, *before))]

        def backward(*tensors: Any) -> list[Any]:
            arguments = [unportable(t, spec.dtype) for t, spec in zip(tensors, specs)]  # noqa: B905 - a prefix
            before, seeds = tensors[len(specs) :][: len(states)], tensors[len(specs) + len(states) :]
            now = states.read()
            states.write(before)
            _, _, differentiate = self._taped(arguments, layout, counts=False)
            found = differentiate(seeds)
            layout.depends = depends_on(found[: len(found) - len(layout.rows)], seeds)
            gradients = self._finish(found, layout)
            states.write(now)
            return gradients

        # Tracing forward first tells the layout, and with it the seeds' signature.
        scratch = tf.function(
            lambda *arguments: self._taped(arguments, layout, counts=False)[1], input_signature=specs, autograph=False
        )
        outputs = scratch.get_concrete_function().structured_outputs
        seeds = [tf.TensorSpec(t.shape, t.dtype) for t in outputs] + [SCALAR] * scalar_seeds(layout)
        kept = [tf.TensorSpec(spec.shape, portable_dtype(spec.dtype)) for spec in specs]
        kept += [tf.TensorSpec(value.shape, portable_dtype(value.dtype)) for value in states.read()]
        return FunctionPair(direct(forward, specs), direct(backward, [*kept, *seeds]), layout)

    def _taped(
        self, arguments: Sequence[Any], layout: Layout, counts: bool = True
    ) -> tuple[list[Any], list[Any], Callable[..., list[Any | None]]]:
        """Run the part under a tape.

        Args:
            arguments: Inputs and what the objective needs.
            layout: Says which are which, and learns what comes out.
            counts: Whether the metrics count this pass.

        Returns:
            Outputs, own loss and heads' losses; the outputs that take a seed; the function from seeds to gradients.
        """
        inputs, objective = layout.unpack(arguments)
        layout.wanted = self.part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, layout.wanted, layout.variables)
            _, outputs, layout.masked, own = self.part.call(inputs, True, layout.takes, layout.window)
            values = [] if objective is None else self.heads.values(outputs, objective)
            terms = [] if objective is None else self.heads.terms(values, objective.heads)
        if objective is not None and counts:
            self._count(outputs, objective)
        layout.outputs, layout.own = tuple(tensor.dtype for tensor in outputs), bool(own)
        targets = [tensor for tensor in outputs if is_differentiable(tensor.dtype)]

        def differentiate(seeds: Sequence[Any]) -> list[Any | None]:
            scalars = iter(seeds[len(targets) :])
            shares = [tf.cast(share, term.dtype) for share in islice(scalars, layout.own) for term in own]
            scales = [tf.cast(scale, term.dtype) for scale in scalars for term in terms]
            output_gradients = [*seeds[: len(targets)], *shares, *scales]
            found = tape.gradient([*targets, *own, *terms], sources, output_gradients=output_gradients)
            return layout.flat(found, sum(layout.wanted))

        return [*outputs, *([tf.add_n(own)] if own else []), *values], targets, differentiate

    def _count(self, outputs: Sequence[Any], objective: Objective) -> None:
        """Let the metrics count a microbatch, unless they count whole batches."""
        if not self.heads.counts_at_once:
            self.heads.update(outputs, objective)

    def _finish(self, gradients: Sequence[Any | None], layout: Layout) -> list[Any]:
        """Accumulate dL/dvariables; return the dL/dinputs that exist, then values and places of embeddings' rows."""
        inputs = sum(layout.wanted)
        end = inputs + len(layout.variables)
        of_variables, indices = gradients[inputs:end], gradients[end:]
        for i, (place, gradient) in enumerate(zip(layout.places, of_variables, strict=True)):
            if gradient is not None and i not in layout.rows:
                self._accumulators[place].assign_add(gradient)
        found = [gradient for gradient in gradients[:inputs] if gradient is not None]
        for i, places in zip(layout.rows, indices, strict=True):
            found += [of_variables[i], tf.cast(places, tf.int64)]
        return found

    def _trace_fused(self, layout: Layout, *specs: Any) -> tuple[Callable[..., list[Any]], Layout]:
        def fused(*arguments: Any) -> list[Any]:
            *given, share, scale = arguments
            inputs, objective = layout.unpack(given)
            assert objective is not None
            layout.wanted = self.part.wanted(inputs)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                sources = watch(tape, inputs, layout.wanted, layout.variables)
                _, outputs, _, own = self.part.call(inputs, True, layout.takes, layout.window)
                values = self.heads.values(outputs, objective)
                terms = self.heads.terms(values, objective.heads)
            self.heads.update(outputs, objective)
            seeds = [tf.cast(scale, term.dtype) for term in terms]
            seeds += [tf.cast(share * scale, term.dtype) for term in own]
            found: list[Any | None] = [None] * len(sources)
            if seeds:
                found = tape.gradient([*terms, *own], sources, output_gradients=seeds)
            layout.own = bool(own)
            layout.depends = tuple(None if gradient is None else frozenset((0,)) for gradient in found)
            total = [tf.add_n(own) * share] if own else []
            return [*total, *values, *self._finish(layout.flat(found, sum(layout.wanted)), layout)]

        return direct(fused, [*specs, SCALAR, SCALAR]), layout

    def _trace_inference(self, layout: Layout, *specs: Any) -> tuple[Callable[..., list[Any]], Layout]:
        def infer(*arguments: Any) -> list[Any]:
            *given, share = arguments
            inputs, objective = layout.unpack(given)
            _, outputs, layout.masked, own = self.part.call(inputs, False, layout.takes, layout.window)
            layout.outputs, layout.own = tuple(output.dtype for output in outputs), bool(own)
            results = [portable(output) for output in outputs]
            results += [tf.add_n(own) * share] if own else []
            if objective is not None:
                results += self.heads.values(outputs, objective)
                self._count(outputs, objective)
            return results

        return direct(infer, [*specs, SCALAR]), layout

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

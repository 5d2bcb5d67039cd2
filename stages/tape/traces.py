"""The traces of a part's compiled functions: forward and backward apart, or in one, the backward whole or in halves.

    pair          forward ──► kept ──► backward                      (`stages.tape.graph_split`)
    recomputing   forward ──► arguments, states ──► forward again and backward
    fused         forward, losses and backward in one
    inference     forward with training=False

In halves, the weight half is taken out of each of the first three (`stages.tape.backward_halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import keras
import tensorflow as tf

from stages.loss.heads import Heads, Objective
from stages.loss.precision import float_of_losses
from stages.tape.backward_halves import Halves, split_in_three, split_off_weights
from stages.tape.compiled_layout import FunctionPair, Layout, scalar_seeds, scalar_spec
from stages.tape.direct_calls import direct, portable, portable_dtype, unportable
from stages.tape.graph_split import Traced, depends_on, split_functions
from stages.tape.model_call import CallState, Part, watch
from stages.tape.tensors import is_differentiable


class Traces:
    """The tracing of one part.

    Args:
        part: The model.
        heads: The objectives of its outputs.
        accumulators: The sums of dL/dvariables, by place; there are more of them later.
    """

    def __init__(self, part: Part, heads: Heads, accumulators: Sequence[Any]) -> None:
        self._part, self._heads, self._accumulators = part, heads, accumulators

    def pair(self, layout: Layout, specs: Sequence[Any], halved: bool) -> FunctionPair:
        """Forward and backward that hand the tape's intermediates over."""

        def joint(*arguments: Any) -> Traced:
            results, differentiable, differentiate = self._taped(arguments, layout)
            seeds = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in differentiable]
            seeds += [tf.compat.v1.placeholder(float_of_losses(), ()) for _ in range(scalar_seeds(layout))]
            gradients = differentiate(seeds)
            layout.depends = depends_on(gradients[: len(gradients) - len(layout.rows)], seeds)
            return Traced(results, seeds, gradients, inputs=sum(layout.wanted))

        def finish(found: Sequence[Any | None]) -> list[Any]:
            count = sum(layout.wanted)
            return [*_existing(found[:count]), *self._finish(found[count:], layout)]

        if halved:
            made = split_in_three(joint, specs, lambda found: self._finish(found, layout))
            return FunctionPair(made.forward, made.halves, layout, halved)
        whole = split_functions(joint, specs, finish)
        backward = _whole(whole.backward, len(whole.kept) + whole.seeds, _inputs_reached(layout), whole.source)
        return FunctionPair(whole.forward, backward, layout, halved)

    def recomputing(self, layout: Layout, specs: Sequence[Any], halved: bool) -> FunctionPair:
        """A forward that keeps arguments and states, and a backward that runs it again from them."""
        states = CallState(self._part.model)

        def forward(*arguments: Any) -> list[Any]:
            before = states.read()
            inputs, objective = layout.unpack(arguments)
            _, outputs, _, own = self._part.call(inputs, True, layout.takes, layout.window)
            results = [portable(tensor) for tensor in outputs]
            results += [tf.add_n(own)] if own else []
            if objective is not None:
                results += self._heads.values(outputs, objective)
                self._count(outputs, objective)
            return [*results, *(portable(tensor) for tensor in (*arguments, *before))]

        def again(*tensors: Any) -> Traced:
            arguments = [unportable(t, spec.dtype) for t, spec in zip(tensors, specs)]  # noqa: B905 - a prefix
            before, seeds = tensors[len(specs) :][: len(states)], tensors[len(specs) + len(states) :]
            now = states.read()
            states.write(before)
            _, _, differentiate = self._taped(arguments, layout, counts=False)
            found = differentiate(seeds)
            layout.depends = depends_on(found[: len(found) - len(layout.rows)], seeds)
            states.write(now)
            count = sum(layout.wanted)
            return Traced(_existing(found[:count]), seeds, found[count:])

        def backward(*tensors: Any) -> list[Any]:
            traced = again(*tensors)
            return [*traced.outputs, *self._finish(traced.gradients, layout)]

        # Tracing forward first tells the layout, and with it the seeds' signature.
        scratch = tf.function(
            lambda *arguments: self._taped(arguments, layout, counts=False)[1], input_signature=specs, autograph=False
        )
        outputs = scratch.get_concrete_function().structured_outputs
        seeds = [tf.TensorSpec(t.shape, t.dtype) for t in outputs] + [scalar_spec()] * scalar_seeds(layout)
        kept = [tf.TensorSpec(spec.shape, portable_dtype(spec.dtype)) for spec in specs]
        kept += [tf.TensorSpec(value.shape, portable_dtype(value.dtype)) for value in states.read()]
        first = direct(forward, specs)
        if halved:
            halves = split_off_weights(again, [*kept, *seeds], lambda found: self._finish(found, layout))
            return FunctionPair(first, halves, layout, halved)
        whole = direct(backward, [*kept, *seeds])
        return FunctionPair(first, _whole(whole, len(kept) + len(seeds), _inputs_reached(layout)), layout, halved)

    def fused(self, layout: Layout, specs: Sequence[Any], halved: bool) -> tuple[Halves, Layout]:
        """Forward, losses, metrics and backward in one; the weight half apart from it if it is `halved`."""

        def joint(*arguments: Any) -> Traced:
            *given, share, scale = arguments
            inputs, objective = layout.unpack(given)
            assert objective is not None
            layout.wanted = self._part.wanted(inputs)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                sources = watch(tape, inputs, layout.wanted, layout.variables)
                _, outputs, _, own = self._part.call(inputs, True, layout.takes, layout.window)
                values = self._heads.values(outputs, objective)
                terms = self._heads.terms(values, objective.heads)
            self._heads.update(outputs, objective)
            seeds = [tf.cast(scale, term.dtype) for term in terms]
            seeds += [tf.cast(share * scale, term.dtype) for term in own]
            found: list[Any | None] = [None] * len(sources)
            if seeds:
                found = tape.gradient([*terms, *own], sources, output_gradients=seeds)
            layout.own = bool(own)
            layout.depends = tuple(None if gradient is None else frozenset((0,)) for gradient in found)
            total = [tf.add_n(own) * share] if own else []
            count = sum(layout.wanted)
            flat = layout.flat(found, count)
            return Traced([*total, *values, *_existing(flat[:count])], [share, scale], flat[count:])

        results = 0

        def fused(*arguments: Any) -> list[Any]:
            nonlocal results
            traced = joint(*arguments)
            results = len(traced.outputs)
            return [*traced.outputs, *self._finish(traced.gradients, layout)]

        signature = [*specs, scalar_spec(), scalar_spec()]
        if halved:
            return split_off_weights(joint, signature, lambda found: self._finish(found, layout)), layout
        run = direct(fused, signature)
        return _whole(run, len(signature), results), layout

    def inference(self, layout: Layout, specs: Sequence[Any], halved: bool) -> tuple[Callable[..., list[Any]], Layout]:
        """The forward pass of an evaluation, with its losses."""

        def infer(*arguments: Any) -> list[Any]:
            *given, share = arguments
            inputs, objective = layout.unpack(given)
            structure, outputs, layout.masked, own = self._part.call(inputs, False, layout.takes, layout.window)
            layout.structure = _nesting(structure)
            layout.outputs, layout.own = tuple(output.dtype for output in outputs), bool(own)
            results = [portable(output) for output in outputs]
            results += [tf.add_n(own) * share] if own else []
            if objective is not None:
                results += self._heads.values(outputs, objective)
                self._count(outputs, objective)
            return results

        return direct(infer, [*specs, scalar_spec()]), layout

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
        layout.wanted = self._part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, layout.wanted, layout.variables)
            structure, outputs, layout.masked, own = self._part.call(inputs, True, layout.takes, layout.window)
            layout.structure = _nesting(structure)
            values = [] if objective is None else self._heads.values(outputs, objective)
            terms = [] if objective is None else self._heads.terms(values, objective.heads)
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
        if not self._heads.counts_at_once:
            self._heads.update(outputs, objective)

    def _finish(self, gradients: Sequence[Any | None], layout: Layout) -> list[Any]:
        """Accumulate dL/dvariables; return values and places of embeddings' rows."""
        end, found = len(layout.variables), []
        for i, (place, gradient) in enumerate(zip(layout.places, gradients[:end], strict=True)):
            if gradient is not None and i not in layout.rows:
                self._accumulators[place].assign_add(gradient)
        for i, places in zip(layout.rows, gradients[end:], strict=True):
            found += [gradients[i], tf.cast(places, tf.int64)]
        return found


def _whole(run: Callable[..., list[Any]], values: int, results: int, source: Any = None) -> Halves:
    """A whole backward: it takes so many values, and what it gives behind `results` tensors is left as it is."""
    return Halves(run, tuple(range(values)), results, (), None, source)


def _nesting(structure: Any) -> Any:
    """A nesting without its tensors, which belong to the trace."""
    return keras.tree.map_structure(lambda _: 0, structure)


def _existing(gradients: Sequence[Any | None]) -> list[Any]:
    return [gradient for gradient in gradients if gradient is not None]


def _inputs_reached(layout: Layout) -> int:
    """How many inputs have a gradient."""
    return len(_existing(layout.depends[: sum(layout.wanted)]))

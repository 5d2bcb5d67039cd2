"""Tapes that stay open between forward and backward: the compiled way.

One trace per signature (dtypes and shapes with a free batch dimension) gives a forward and a backward function that
hand the tape's intermediates over (`stages.graph_split`). Where no other stage takes an output, forward, losses and
backward are one function (*fused*): the loss's output gradient exists as soon as the loss does. With `recompute`, only
the inputs are kept and backward runs the forward pass again, from the same states.

Gradients are added to accumulator variables inside the backward function, in the order of the calls: a schedule that
goes backward in ascending order sums in ascending order. The optimizer runs as one function over the accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any

import tensorflow as tf

from stages.loss.heads import Heads, Objective
from stages.tape.accumulate import Contribution, dense
from stages.tape.direct_calls import direct, portable, portable_dtype, restore
from stages.tape.eager import Blocks, Key, Masked, Opened, rescaled, update
from stages.tape.graph_split import Traced, depends_on, split_functions
from stages.tape.model_call import Part, States, spread, watch
from stages.tape.tensors import is_differentiable

_SCALAR = tf.TensorSpec((), tf.float32)


@lru_cache(maxsize=256)
def _scalar(value: float) -> Any:
    return tf.constant(value, tf.float32)


@dataclass
class _Layout:
    """What arguments a function takes, and what its trace learned.

    Attributes:
        inputs: How many input tensors there are, masks included.
        takes: Which inputs have a mask.
        weighted: With an objective: which heads have sample weights; None without one.
        heads: With an objective: which heads it is for; None: all.
        window: 0, or 1 for any later window, which has no regularisers of weights.
        wanted: Which inputs are differentiated.
        outputs: Dtypes of the outputs, masks included.
        masked: Which outputs have a mask.
        own: Whether the part has losses of its own.
        depends: For each wanted input and then each variable, the seeds its gradient depends on; None if it has none.
    """

    inputs: int
    takes: tuple[int, ...] = ()
    weighted: tuple[bool, ...] | None = None
    heads: tuple[int, ...] | None = None
    window: int = 0
    wanted: tuple[bool, ...] = ()
    outputs: tuple[Any, ...] = ()
    masked: tuple[int, ...] = ()
    own: bool = False
    depends: tuple[frozenset[int] | None, ...] = ()

    def unpack(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Objective | None]:
        """Inputs, and the objective that stands behind them."""
        if self.weighted is None:
            return arguments, None
        end = len(arguments) - len(self.weighted)
        tensors, weights = arguments[:end], arguments[end:]
        return tensors[: self.inputs], Objective.of_tensors(tensors[self.inputs :], self.weighted, weights, self.heads)

    def results(self, found: Sequence[Any]) -> tuple[tuple[Any, ...], Any | None, tuple[Any, ...], list[Any]]:
        """Outputs, own loss, the heads' losses, and what is kept for backward."""
        ends = list(accumulate((len(self.outputs), self.own, len(self.weighted or ())), initial=0))
        outputs = tuple(restore(t, dtype) for t, dtype in zip(found, self.outputs))  # noqa: B905 - a prefix
        own = found[ends[1]] if self.own else None
        return outputs, own, tuple(found[ends[2] : ends[3]]), list(found[ends[3] :])

    def reached(self, alive: frozenset[int]) -> tuple[bool, ...]:
        """For each wanted input and variable, whether its gradient depends on one of these seeds."""
        return tuple(seeds is not None and not seeds.isdisjoint(alive) for seeds in self.depends)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Forward and backward of one signature; `source` is what they need to live (`stages.graph_split`)."""

    forward: Callable[..., list[Any]]
    backward: Callable[..., list[Any]]
    layout: _Layout
    source: Any = None


@dataclass(frozen=True, slots=True)
class _Open:
    """A finished forward whose backward is still to come."""

    pair: _Pair | None
    kept: tuple[Any, ...]
    outputs: tuple[Any, ...]
    share: float
    input_gradients: tuple[Any | None, ...] | None = None


@dataclass
class CompiledTapes:
    """Compiled forward and backward of one part; the contract of `stages.tapes`.

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
    _open: dict[Key, _Open] = field(default_factory=dict)
    _accumulators: list[Any] = field(default_factory=list)
    _reached: list[bool] = field(default_factory=list)
    _variables: tuple[Any, ...] = ()

    def forward(
        self,
        key: Key,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
    ) -> Opened:
        """Run the compiled forward; what its backward needs is kept under `key`."""
        if objective is not None and self.ends:
            return self._all_at_once(key, inputs, share, masked, objective)
        trace = self._trace_recomputing if self.recompute else self._trace_pair
        pair: _Pair = self._function("pair", inputs, masked, objective, trace, key.window)
        outputs, own, losses, kept = pair.layout.results(pair.forward(*_arguments(inputs, objective)))
        self._open[key] = _Open(pair, tuple(kept), outputs, share)
        return Opened(None, outputs, None if own is None else own * _scalar(share), losses, pair.layout.masked)

    def _all_at_once(
        self, key: Key, inputs: Sequence[Any], share: float, masked: Masked, objective: Objective
    ) -> Opened:
        """Forward, losses, metrics and backward as one function; `backward` hands the result out."""
        run, layout = self._function("fused", inputs, masked, objective, self._trace_fused, key.window)
        scalars = (_scalar(share), _scalar(self.loss_scale))
        _, own, losses, gradients = layout.results(run(*_arguments(inputs, objective), *scalars))
        reached = layout.reached(frozenset((0,)))
        self._mark(reached[sum(layout.wanted) :])
        found = iter(gradients)
        inside = [next(found) if there else None for there in reached[: sum(layout.wanted)]]
        self._open[key] = _Open(None, (), (), share, spread(layout.wanted, inside))
        return Opened(None, (), own, losses)

    def infer(
        self,
        inputs: Sequence[Any],
        share: float,
        masked: Masked = (),
        objective: Objective | None = None,
        window: int = 0,
    ) -> Opened:
        """Run the compiled evaluation: no gradients, `training=False`."""
        run, layout = self._function("infer", inputs, masked, objective, self._trace_inference, window)
        outputs, own, losses, _ = layout.results(run(*_arguments(inputs, objective), _scalar(share)))
        return Opened(None, outputs, own, losses, layout.masked)

    def backward(self, key: Key, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
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
        seeds += [_scalar(opened.share * self.loss_scale)] * layout.own
        seeds += [_scalar(self.loss_scale)] * (layout.weighted is not None)
        found = iter(opened.pair.backward(*opened.kept, *seeds))
        reached = layout.reached(frozenset(alive))
        count = sum(layout.wanted)
        self._mark(reached[count:])
        exists = [seeds_ is not None for seeds_ in layout.depends[:count]]
        results = [next(found) if there else None for there in exists]
        return spread(layout.wanted, [r if there else None for r, there in zip(results, reached, strict=False)])

    def _mark(self, reached: Sequence[bool]) -> None:
        """Note which variables an objective reaches."""
        for i, there in enumerate(reached):
            self._reached[i] = self._reached[i] or there

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables; None for a variable that no objective reaches."""
        self._prepare()
        return [
            accumulator.read_value() if reached else None
            for accumulator, reached in zip(self._accumulators, self._reached, strict=True)
        ]

    def as_given(self) -> list[Any | None]:
        """The same: compiled sums are dense."""
        return self.gradients()

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What all microbatches together added to some variables, as one entry."""
        found = self.gradients()
        return [[found[place] for place in places]]

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some accumulated ones."""
        self._prepare()
        for place, total in zip(places, totals, strict=True):
            if total is not None:
                self._accumulators[place].assign(total)
                self._reached[place] = True

    def apply(self, optimizer: Any, scale: float | None, divisor: float | None = None) -> None:
        """Update the variables from the accumulators (over `divisor`, times `scale`) and clear them, in one call."""
        self._prepare()
        self._open.clear()
        reached = tuple(self._reached)
        name = ("apply", optimizer, reached, scale is not None, divisor is not None)
        if name not in self._functions:
            trace = self._trace_apply(optimizer, scale is not None, divisor is not None)
            self._functions[name] = direct(trace, [_SCALAR, _SCALAR])
        self._functions[name](_scalar(float(scale or 0.0)), _scalar(float(divisor or 1.0)))

    def clear(self) -> None:
        """Drop what is open and set the sums to zero."""
        self._open.clear()
        for accumulator in self._accumulators:
            accumulator.assign(tf.zeros_like(accumulator))

    def _prepare(self) -> None:
        """Make the accumulators, anew if the set of trainable variables has changed."""
        variables = tuple(self.part.trainable_variables)
        if [id(variable) for variable in variables] == [id(variable) for variable in self._variables]:
            return
        self._variables = variables
        self._functions.clear()
        self._accumulators = [tf.Variable(tf.zeros_like(v.value), trainable=False) for v in variables]
        self._reached = [False] * len(variables)

    def _function(
        self,
        name: str,
        inputs: Sequence[Any],
        masked: Masked,
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
        key = (name, tuple(masked), weighted, heads, later, *shapes)
        found = self._functions.get(key)
        if found is None:
            self._prepare()
            specs = [_spec(tensor) for tensor in tensors] + [_SCALAR] * len(weighted or ())
            layout = _Layout(len(inputs), tuple(masked), weighted, heads, later)
            found = self._functions[key] = trace(layout, *specs)
        return found

    def _trace_pair(self, layout: _Layout, *specs: Any) -> _Pair:
        """Forward and backward that hand the tape's intermediates over."""

        def joint(*arguments: Any) -> Traced:
            results, differentiable, differentiate = self._taped(arguments, layout)
            seeds = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in differentiable]
            seeds += [tf.compat.v1.placeholder(tf.float32, ()) for _ in range(_scalars(layout))]
            gradients = differentiate(seeds)
            layout.depends = depends_on(gradients, seeds)
            return Traced(results, seeds, gradients)

        functions = split_functions(joint, specs, lambda gradients: self._finish(gradients, layout))
        return _Pair(functions.forward, functions.backward, layout, functions.source)

    def _trace_recomputing(self, layout: _Layout, *specs: Any) -> _Pair:
        """A forward that keeps arguments and states, and a backward that runs it again from them."""
        states = States(self.part.model)

        def forward(*arguments: Any) -> list[Any]:
            before = states.read()
            inputs, objective = layout.unpack(arguments)
            _, outputs, _, own = self.part.call(inputs, True, layout.takes, layout.window)
            results = [portable(tensor) for tensor in outputs]
            results += [tf.add_n(own)] if own else []
            if objective is not None:
                results += self.heads.values(outputs, objective)
                self.heads.update(outputs, objective)
            return [*results, *(portable(tensor) for tensor in (*arguments, *before))]

        def backward(*tensors: Any) -> list[Any]:
            arguments = [restore(t, spec.dtype) for t, spec in zip(tensors, specs)]  # noqa: B905 - a prefix
            before, seeds = tensors[len(specs) :][: len(states)], tensors[len(specs) + len(states) :]
            now = states.read()
            states.write(before)
            _, _, differentiate = self._taped(arguments, layout, counts=False)
            found = differentiate(seeds)
            layout.depends = depends_on(found, seeds)
            gradients = self._finish(found, layout)
            states.write(now)
            return gradients

        # Tracing forward first tells the layout, and with it the seeds' signature.
        scratch = tf.function(
            lambda *arguments: self._taped(arguments, layout, counts=False)[1], input_signature=specs, autograph=False
        )
        outputs = scratch.get_concrete_function().structured_outputs
        seeds = [tf.TensorSpec(t.shape, t.dtype) for t in outputs] + [_SCALAR] * _scalars(layout)
        kept = [tf.TensorSpec(spec.shape, portable_dtype(spec.dtype)) for spec in specs]
        kept += [tf.TensorSpec(value.shape, portable_dtype(value.dtype)) for value in states.read()]
        return _Pair(direct(forward, specs), direct(backward, [*kept, *seeds]), layout)

    def _taped(
        self, arguments: Sequence[Any], layout: _Layout, counts: bool = True
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
            sources = watch(tape, inputs, layout.wanted, self._variables)
            _, outputs, layout.masked, own = self.part.call(inputs, True, layout.takes, layout.window)
            values = [] if objective is None else self.heads.values(outputs, objective)
            terms = [] if objective is None else self.heads.terms(values, objective.heads)
        if objective is not None and counts:
            self.heads.update(outputs, objective)
        layout.outputs, layout.own = tuple(tensor.dtype for tensor in outputs), bool(own)
        targets = [tensor for tensor in outputs if is_differentiable(tensor.dtype)]

        def differentiate(seeds: Sequence[Any]) -> list[Any | None]:
            scalars = iter(seeds[len(targets) :])
            shares = [tf.cast(share, term.dtype) for share in islice(scalars, layout.own) for term in own]
            scales = [tf.cast(scale, term.dtype) for scale in scalars for term in terms]
            output_gradients = [*seeds[: len(targets)], *shares, *scales]
            found = tape.gradient([*targets, *own, *terms], sources, output_gradients=output_gradients)
            return [dense(gradient) for gradient in found]

        return [*outputs, *([tf.add_n(own)] if own else []), *values], targets, differentiate

    def _finish(self, gradients: Sequence[Any | None], layout: _Layout) -> list[Any]:
        """Accumulate dL/dvariables; return the dL/dinputs that exist."""
        inputs = len(gradients) - len(self._variables)
        for accumulator, gradient in zip(self._accumulators, gradients[inputs:], strict=True):
            if gradient is not None:
                accumulator.assign_add(gradient)
        return [gradient for gradient in gradients[:inputs] if gradient is not None]

    def _trace_fused(self, layout: _Layout, *specs: Any) -> tuple[Callable[..., list[Any]], _Layout]:
        def fused(*arguments: Any) -> list[Any]:
            *given, share, scale = arguments
            inputs, objective = layout.unpack(given)
            assert objective is not None
            layout.wanted = self.part.wanted(inputs)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                sources = watch(tape, inputs, layout.wanted, self._variables)
                _, outputs, _, own = self.part.call(inputs, True, layout.takes, layout.window)
                values = self.heads.values(outputs, objective)
                terms = self.heads.terms(values, objective.heads)
            self.heads.update(outputs, objective)
            seeds = [tf.cast(scale, term.dtype) for term in terms]
            seeds += [tf.cast(share * scale, term.dtype) for term in own]
            found: list[Any | None] = [None] * len(sources)
            if seeds:
                found = [dense(g) for g in tape.gradient([*terms, *own], sources, output_gradients=seeds)]
            layout.own = bool(own)
            layout.depends = tuple(None if gradient is None else frozenset((0,)) for gradient in found)
            total = [tf.add_n(own) * share] if own else []
            return [*total, *values, *self._finish(found, layout)]

        return direct(fused, [*specs, _SCALAR, _SCALAR]), layout

    def _trace_inference(self, layout: _Layout, *specs: Any) -> tuple[Callable[..., list[Any]], _Layout]:
        def infer(*arguments: Any) -> list[Any]:
            *given, share = arguments
            inputs, objective = layout.unpack(given)
            _, outputs, layout.masked, own = self.part.call(inputs, False, layout.takes, layout.window)
            layout.outputs, layout.own = tuple(output.dtype for output in outputs), bool(own)
            results = [portable(output) for output in outputs]
            results += [tf.add_n(own) * share] if own else []
            if objective is not None:
                results += self.heads.values(outputs, objective)
                self.heads.update(outputs, objective)
            return results

        return direct(infer, [*specs, _SCALAR]), layout

    def _trace_apply(self, optimizer: Any, scaled: bool, divided: bool) -> Callable[..., list[Any]]:
        reached = list(zip(self._variables, self._accumulators, self._reached, strict=True))

        def apply(scale: Any, divisor: Any) -> list[Any]:
            pairs = [(accumulator, variable) for variable, accumulator, there in reached if there]
            gradients = [tf.convert_to_tensor(accumulator) for accumulator, _ in pairs]
            gradients = rescaled(gradients, scale if scaled else None, divisor if divided else None)
            update(optimizer, gradients, [variable for _, variable in pairs])
            for accumulator, _ in pairs:
                accumulator.assign(tf.zeros_like(accumulator))
            return [tf.constant(True)]

        return apply


def _spec(tensor: Any) -> Any:
    """The signature of tensors like this one: any batch size."""
    if tensor.shape.rank:
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _arguments(inputs: Sequence[Any], objective: Objective | None) -> tuple[Any, ...]:
    if objective is None:
        return tuple(inputs)
    return (*inputs, *objective.tensors(), *(_scalar(weight) for weight in objective.weights))


def _scalars(layout: _Layout) -> int:
    """How many seeds are scalars: one for own losses, one for the heads' losses."""
    return layout.own + (layout.weighted is not None)

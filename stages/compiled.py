"""Tapes that stay open between forward and backward: the compiled way.

One trace per signature (dtypes and shapes with a free batch dimension) gives a forward and a backward function that
hand the tape's intermediates over (`stages.graph_split`). At the last stage forward, loss and backward are one function
(*fused*): the loss's output gradient exists as soon as the loss does. With `recompute`, only the inputs are
kept and backward runs the forward pass again, from the same states.

Gradients are added to accumulator variables inside the backward function, in the order of the calls: a schedule that
goes backward in ascending order sums in ascending order. The optimizer runs as one function over the accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import tensorflow as tf

from stages.accumulate import dense
from stages.calls import direct, portable, portable_dtype, restore
from stages.graph_split import Traced, split_functions
from stages.loss import Head
from stages.part import Part, States, spread, watch
from stages.tapes import Key, Masked, Objective, Opened
from stages.tensors import is_differentiable

_SCALAR = tf.TensorSpec((), tf.float32)


@lru_cache(maxsize=256)
def _scalar(value: float) -> Any:
    return tf.constant(value, tf.float32)


@dataclass
class _Layout:
    """What a trace learned of a function.

    Attributes:
        wanted: Which inputs are differentiated.
        takes: Which inputs have a mask.
        outputs: Dtypes of the outputs, masks included.
        masked: Which outputs have a mask.
        own: Whether the part has losses of its own.
        gradients: For each wanted input, whether a gradient exists.
    """

    takes: tuple[int, ...] = ()
    wanted: tuple[bool, ...] = ()
    outputs: tuple[Any, ...] = ()
    masked: tuple[int, ...] = ()
    own: bool = False
    gradients: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pair:
    """Forward and backward of one signature."""

    forward: Callable[..., list[Any]]
    backward: Callable[..., list[Any]]
    layout: _Layout


@dataclass(frozen=True, slots=True)
class _Open:
    """A finished forward whose backward is still to come."""

    pair: _Pair | None
    kept: tuple[Any, ...]
    outputs: tuple[Any, ...]
    share: Any
    input_gradients: tuple[Any | None, ...] | None = None


@dataclass
class CompiledTapes:
    """Compiled forward and backward of one part; the contract of `stages.tapes`.

    Args:
        part: The model.
        head: The objective, for the last stage.
        recompute: Keep only inputs and run the forward pass again in backward.
    """

    part: Part
    head: Head | None = None
    recompute: bool = False
    _functions: dict[Any, Any] = field(default_factory=dict)
    _open: dict[Key, _Open] = field(default_factory=dict)
    _accumulators: list[Any] = field(default_factory=list)
    _reached: list[bool] = field(default_factory=list)
    _variables: tuple[Any, ...] = ()

    def forward(self, key: Key, inputs: Sequence[Any], share: float, masked: Masked = ()) -> Opened:
        """Run the compiled forward; what its backward needs is kept under `key`."""
        trace = self._trace_recomputing if self.recompute else self._trace_pair
        pair: _Pair = self._function("pair", inputs, masked, trace)
        layout = pair.layout
        results = pair.forward(*inputs)
        outputs = _outputs(results, layout)
        end = len(layout.outputs) + layout.own
        weight = _scalar(share)
        own = results[end - 1] * weight if layout.own else None
        self._open[key] = _Open(pair, tuple(results[end:]), outputs, weight)
        return Opened(None, outputs, own, None, layout.masked)

    def objective(
        self, key: Key, inputs: Sequence[Any], share: float, objective: Objective, masked: Masked = ()
    ) -> Opened:
        """Run forward, loss, metrics and backward as one function; `backward` hands the result out."""
        arguments = _with_objective(inputs, objective)
        run, layout = self._function("fused", arguments, masked, partial(self._trace_fused, len(inputs)))
        loss, own, *gradients = run(*arguments, _scalar(objective.weight), _scalar(share))
        differentiable = iter(gradients)
        found = spread(layout.wanted, [next(differentiable) if there else None for there in layout.gradients])
        self._open[key] = _Open(None, (), (), None, found)
        return Opened(None, (), own if layout.own else None, loss)

    def infer(self, inputs: Sequence[Any], share: float, objective: Objective | None, masked: Masked = ()) -> Opened:
        """Run the compiled evaluation: no gradients, `training=False`."""
        arguments = tuple(inputs) if objective is None else _with_objective(inputs, objective)
        with_loss = objective is not None
        run, layout = self._function(
            f"infer{with_loss}", arguments, masked, partial(self._trace_inference, len(inputs), with_loss)
        )
        scalars = (_scalar(objective.weight if objective is not None else 1.0), _scalar(share))
        results = run(*arguments, *scalars)
        own = results[-1] if layout.own else None
        loss = results[len(layout.outputs)] if with_loss else None
        return Opened(None, _outputs(results, layout), own, loss, layout.masked)

    def backward(self, key: Key, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Run the compiled backward, which accumulates dL/dvariables, and return dL/dinputs."""
        opened = self._open.pop(key)
        if opened.pair is None:
            assert opened.input_gradients is not None
            return opened.input_gradients
        seeds = [
            tf.zeros_like(output) if gradient is None else gradient
            for output, gradient in zip(opened.outputs, output_gradients, strict=True)
            if is_differentiable(output.dtype)
        ]
        if opened.pair.layout.own:
            seeds.append(opened.share)
        found = iter(opened.pair.backward(*opened.kept, *seeds))
        layout = opened.pair.layout
        return spread(layout.wanted, [next(found) if there else None for there in layout.gradients])

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables; None for a variable that no objective reaches."""
        self._prepare()
        return [
            accumulator.read_value() if reached else None
            for accumulator, reached in zip(self._accumulators, self._reached, strict=True)
        ]

    def apply(self, optimizer: Any, scale: float | None) -> None:
        """Update the variables from the accumulators (times `scale`) and clear them, in one function."""
        self._prepare()
        self._open.clear()
        reached = tuple(self._reached)
        if not any(reached):
            return
        name = ("apply", optimizer, reached, scale is not None)
        if name not in self._functions:
            self._functions[name] = direct(self._trace_apply(optimizer, scale is not None), [_SCALAR])
        self._functions[name](_scalar(1.0 if scale is None else float(scale)))

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

    def _function(self, name: str, tensors: Sequence[Any], masked: Masked, trace: Callable[..., Any]) -> Any:
        """The function for tensors like these; traced once per dtype and shape without the batch."""
        key = (name, tuple(masked), *((t.dtype, t.shape[1:] if t.shape.rank else None) for t in tensors))
        found = self._functions.get(key)
        if found is None:
            self._prepare()
            found = self._functions[key] = trace(_Layout(takes=tuple(masked)), *[_spec(tensor) for tensor in tensors])
        return found

    def _trace_pair(self, layout: _Layout, *specs: Any) -> _Pair:
        """Forward and backward that hand the tape's intermediates over."""

        def joint(*inputs: Any) -> Traced:
            outputs, own, differentiate = self._taped(inputs, layout)
            seeds = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in outputs if is_differentiable(t.dtype)]
            if own:
                seeds.append(tf.compat.v1.placeholder(tf.float32, ()))
            return Traced([*outputs, tf.add_n(own)] if own else outputs, seeds, differentiate(seeds))

        functions = split_functions(joint, specs, lambda gradients: self._finish(gradients, layout))
        return _Pair(functions.forward, functions.backward, layout)

    def _trace_recomputing(self, layout: _Layout, *specs: Any) -> _Pair:
        """A forward that keeps inputs and states, and a backward that runs it again from them."""
        states = States(self.part.model)

        def forward(*inputs: Any) -> list[Any]:
            before = states.read()
            _, outputs, _, own = self.part.call(inputs, True, layout.takes)
            results = [portable(tensor) for tensor in outputs]
            results += [tf.add_n(own)] if own else []
            return [*results, *(portable(tensor) for tensor in (*inputs, *before))]

        def backward(*tensors: Any) -> list[Any]:
            inputs = [restore(t, spec.dtype) for t, spec in zip(tensors, specs)]  # noqa: B905 - a prefix
            before, seeds = tensors[len(specs) :][: len(states)], tensors[len(specs) + len(states) :]
            now = states.read()
            states.write(before)
            _, _, differentiate = self._taped(inputs, layout)
            gradients = self._finish(differentiate(seeds), layout)
            states.write(now)
            return gradients

        # Tracing forward first tells the layout, and with it the seeds' signature.
        scratch = tf.function(lambda *inputs: self._taped(inputs, layout)[0], input_signature=specs, autograph=False)
        outputs = scratch.get_concrete_function().structured_outputs
        seeds = [tf.TensorSpec(t.shape, t.dtype) for t in outputs if is_differentiable(t.dtype)]
        kept = [tf.TensorSpec(spec.shape, portable_dtype(spec.dtype)) for spec in specs]
        kept += [tf.TensorSpec(value.shape, portable_dtype(value.dtype)) for value in states.read()]
        return _Pair(direct(forward, specs), direct(backward, [*kept, *seeds, *[_SCALAR] * layout.own]), layout)

    def _taped(self, inputs: Sequence[Any], layout: _Layout) -> tuple[list[Any], Sequence[Any], Callable[..., Any]]:
        """Run the part under a tape: outputs, own losses, and the function from seeds to gradients."""
        layout.wanted = self.part.wanted(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            sources = watch(tape, inputs, layout.wanted, self._variables)
            _, outputs, layout.masked, own = self.part.call(inputs, True, layout.takes)
        layout.outputs, layout.own = tuple(tensor.dtype for tensor in outputs), bool(own)
        targets = [tensor for tensor in outputs if is_differentiable(tensor.dtype)]

        def differentiate(seeds: Sequence[Any]) -> list[Any | None]:
            output_gradients = list(seeds[: len(targets)]) + [tf.cast(seeds[-1], term.dtype) for term in own]
            found = tape.gradient([*targets, *own], sources, output_gradients=output_gradients)
            return [dense(gradient) for gradient in found]

        return list(outputs), own, differentiate

    def _finish(self, gradients: Sequence[Any | None], layout: _Layout) -> list[Any]:
        """Accumulate dL/dvariables; return the dL/dinputs that exist, and note which do."""
        inputs = len(gradients) - len(self._variables)
        layout.gradients = tuple(gradient is not None for gradient in gradients[:inputs])
        for i, gradient in enumerate(gradients[inputs:]):
            if gradient is not None:
                self._reached[i] = True
                self._accumulators[i].assign_add(gradient)
        return [gradient for gradient in gradients[:inputs] if gradient is not None]

    def _trace_fused(self, count: int, layout: _Layout, *specs: Any) -> tuple[Callable[..., list[Any]], _Layout]:
        assert self.head is not None
        head = self.head

        def fused(*arguments: Any) -> list[Any]:
            *tensors, weight, share = arguments
            inputs, (target, *sample_weight) = tensors[:count], tensors[count:]
            weights = sample_weight[0] if sample_weight else None
            layout.wanted = self.part.wanted(inputs)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                sources = watch(tape, inputs, layout.wanted, self._variables)
                structure, _, _, own = self.part.call(inputs, True, layout.takes)
                value = head.value(target, structure, weights)
                loss = value * tf.cast(weight, value.dtype)
            head.update(target, structure, weights)
            seeds = [tf.ones_like(loss), *(tf.cast(share, term.dtype) for term in own)]
            found = [dense(g) for g in tape.gradient([loss, *own], sources, output_gradients=seeds)]
            layout.own = bool(own)
            total = tf.add_n(own) * share if own else tf.zeros(())
            return [loss, total, *self._finish(found, layout)]

        return direct(fused, [*specs, _SCALAR, _SCALAR]), layout

    def _trace_inference(
        self, count: int, with_loss: bool, layout: _Layout, *specs: Any
    ) -> tuple[Callable[..., list[Any]], _Layout]:
        def infer(*arguments: Any) -> list[Any]:
            *tensors, weight, share = arguments
            structure, outputs, layout.masked, own = self.part.call(tensors[:count], False, layout.takes)
            layout.outputs, layout.own = tuple(output.dtype for output in outputs), bool(own)
            results = [portable(output) for output in outputs]
            if with_loss:
                assert self.head is not None
                target, *sample_weight = tensors[count:]
                weights = sample_weight[0] if sample_weight else None
                value = self.head.value(target, structure, weights)
                self.head.update(target, structure, weights)
                results.append(value * tf.cast(weight, value.dtype))
            return [*results, tf.add_n(own) * share] if own else results

        return direct(infer, [*specs, _SCALAR, _SCALAR]), layout

    def _trace_apply(self, optimizer: Any, scaled: bool) -> Callable[..., list[Any]]:
        reached = list(zip(self._variables, self._accumulators, self._reached, strict=True))

        def apply(scale: Any) -> list[Any]:
            pairs = [(accumulator, variable) for variable, accumulator, there in reached if there]
            gradients = [tf.convert_to_tensor(accumulator) for accumulator, _ in pairs]
            if scaled:
                gradients = [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients]
            optimizer.apply(gradients, [variable for _, variable in pairs])
            for accumulator, _ in pairs:
                accumulator.assign(tf.zeros_like(accumulator))
            return [tf.constant(True)]

        return apply


def _outputs(results: Sequence[Any], layout: _Layout) -> tuple[Any, ...]:
    return tuple(restore(t, dtype) for t, dtype in zip(results, layout.outputs))  # noqa: B905 - a prefix


def _spec(tensor: Any) -> Any:
    """The signature of tensors like this one: any batch size."""
    if tensor.shape.rank:
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _with_objective(inputs: Sequence[Any], objective: Objective) -> tuple[Any, ...]:
    weights = () if objective.sample_weight is None else (objective.sample_weight,)
    return (*inputs, objective.target, *weights)

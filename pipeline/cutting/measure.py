"""Measure what every call of a model costs, without leaving a trace in the model.

The whole model becomes **one** traced function that makes its calls one by one, reads a clock between them, and then
goes backward call by call, each with a tape of its own:

    t0 │ call 0 │ t1 │ call 1 │ t2 │ ... │ I of call 1 │ t │ W of call 1 │ t │ I of call 0 │ t │ W of call 0 │ t

I is what dL/dinputs of the call need, W what only dL/dvariables need: the halves of `stages.tape.backward_halves`.

Why so, and not one function or one eager tape per call: an eager call of a small layer takes its 200-1000 us mostly in
Python, which a compiled stage does not pay; a function for each call costs a trace each (a hundred for MobileNetV2) and
a call each that a stage does not make. Here operations run as they do inside a compiled stage, after one trace.

Rules:

1. An operation of a call runs after the clock before it and before the clock behind it: control dependencies on both
   sides. Whatever is measured is also read at the very end, since TensorFlow removes operations that only a control
   dependency needs.
2. The values are real: the sample's own activations, and the gradients that flow back from a seed that is an argument,
   so that nothing can be computed ahead.
3. The halves of a call's backward are one set of gradients, asked for once: nothing is computed twice.
4. All variables of the model have the same bits afterwards as before, and no layer holds on to a loss of the trace.
5. A worker has its share of the cores, this process all: with `threads`, it is kept to so many meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.batch.data import make_batch
from pipeline.cutting.cores import few_cores
from pipeline.cutting.costs import CallCost, Costs, TensorCost, Weight
from pipeline.errors import SplitError
from pipeline.model.batch_sizes import only_size
from pipeline.model.call_graph import Call, CallGraph
from stages.put_back import values_put_back
from stages.tape.accumulate import dense
from stages.tape.graph_split import depending_on, needed_for
from stages.tape.tensors import flatten, is_differentiable
from stages.tensorflow_internals import run_behind

__all__ = ["measure", "weigh"]

REPEATS = 5
_ALIASES = {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"}
"""Operations whose result is the memory of what they take."""
_FREE = {"Const", "ReadVariableOp"}
"""Operations whose result costs no memory of its own: it is there anyway."""


def measure(graph: CallGraph, sample: Any, *, repeats: int = REPEATS, threads: int | None = None) -> Costs:
    """Run the calls of a model on real data, forward and backward in training mode, and time each.

    Args:
        graph: The model.
        sample: One microbatch as `fit` takes it: array (n, ...), or a list or dict of them in the order of the model's
            inputs.
        repeats: How many runs to take medians of, after one that is not counted.
        threads: How many cores a worker will have (`Pipeline.threads`). Default: all that this process has.

    Returns:
        The costs, for microbatches of n samples.

    Raises:
        DataError: The sample does not fit the model's inputs.
        SplitError: A call cannot be traced as a TensorFlow function, so that its time in one cannot be told; or fewer
            than one repeat.
    """
    if repeats < 1:
        raise SplitError(f"a measurement needs at least one repeat, received {repeats}")
    names = graph.tensor_names()
    symbols = [(names[tensor], graph.symbols[tensor]) for tensor in graph.inputs]
    free = only_size(graph.model) is None
    specs = {
        name: (
            keras.backend.standardize_dtype(symbol.dtype),
            (None, *symbol.shape[1:]) if free else tuple(symbol.shape),
        )
        for name, symbol in symbols
    }
    arrays = make_batch(sample, None, None, inputs=specs, microbatches=1).inputs
    inputs = [tf.convert_to_tensor(arrays[name]) for name, _ in symbols]
    with _undisturbed(graph):
        return _measured(graph, inputs, names, repeats, threads)


def weigh(graph: CallGraph) -> Costs:
    """The costs that are known without running anything: parameters. Seconds and bytes are 0."""
    names = graph.tensor_names()
    calls = tuple(CallCost(call.name, call.reads, call.makes, weights=_weights(call)) for call in graph.calls)
    tensors = {
        tensor: TensorCost(names[tensor], 0.0, is_differentiable(graph.symbols[tensor].dtype))
        for tensor in (*graph.inputs, *(tensor for call in graph.calls for tensor in call.makes))
    }
    return Costs(calls, tensors, graph.inputs, graph.outputs)


def _measured(
    graph: CallGraph, inputs: Sequence[Any], names: dict[int, str], repeats: int, threads: int | None
) -> Costs:
    run = _Run(graph)
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    function = tf.function(run.trace, autograph=False).get_concrete_function(tf.TensorSpec((), tf.float32), *signature)
    seed, laps = tf.constant(1e-3), []
    with few_cores(threads) as others:
        for _ in range(repeats + 1):
            others()
            times, sizes, _ = function(seed, *inputs)
            laps.append(np.diff(times.numpy()))
    seconds = np.maximum(np.median(laps[1:], axis=0), 0.0)
    found = run.sizes | {name: int(size) for name, size in zip(run.unknown, sizes, strict=True)}
    calls, count, samples = [], len(graph.calls), int(inputs[0].shape[0])
    for position, call in enumerate(graph.calls):
        halves = seconds[3 * count - 2 * position - 2 :][:2]
        calls.append(
            CallCost(
                name=call.name,
                reads=call.reads,
                makes=call.makes,
                forward=float(seconds[position]),
                backward=float(halves[0] + halves[1]),
                weight_half=float(halves[1]),
                weights=_weights(call),
                kept=tuple((name, found[name]) for name in run.kept[position] if found[name]),
                left=tuple((name, found[name]) for name in run.left[position] if found[name]),
            )
        )
    tensors = {
        tensor: TensorCost(
            names[tensor], found[source] / samples, is_differentiable(graph.symbols[tensor].dtype), source
        )
        for tensor, source in run.sources.items()
    }
    return Costs(tuple(calls), tensors, graph.inputs, graph.outputs, samples)


def _weights(call: Call) -> tuple[Weight, ...]:
    layer = call.operation
    trained = {id(variable) for variable in getattr(layer, "trainable_variables", ())}
    return tuple(
        Weight(
            id(variable),
            int(np.prod(variable.shape)),
            int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size,
            id(variable) in trained,
        )
        for variable in getattr(layer, "weights", ())
    )


@contextmanager
def _undisturbed(graph: CallGraph) -> Iterator[None]:
    """Put back, bit for bit, what running the model's layers changes: statistics, seed generators, losses."""
    layers = {id(call.operation): call.operation for call in graph.calls}.values()
    variables = {id(v): v for layer in layers for v in getattr(layer, "variables", ())}
    try:
        with values_put_back(variables.values()):
            yield
    finally:
        for layer in layers:
            _Training(layer)(tf.zeros(()))  # entering a layer makes Keras forget the losses of those inside


class _Training(keras.Layer):  # type: ignore[misc]
    """Keras hands `training` down from a layer to those that it calls; this layer calls one, on any arguments."""

    def __init__(self, inner: Any) -> None:
        super().__init__(name="measured", autocast=False)
        self.inner = inner
        self.play: Any = None
        self.built = True

    def call(self, nothing: Any, training: bool = True) -> Any:
        return nothing if self.play is None else self.play()


@dataclass
class _Played:
    """One call's forward, with its tape."""

    tape: Any
    wanted: list[int]
    sources: list[Any]
    variables: list[Any]
    outputs: list[Any]
    own: list[Any]


@dataclass
class _Run:
    """The traced function, and what the trace tells of sizes.

    Attributes:
        sizes: {tensor in the trace: its bytes}.
        unknown: The same for tensors whose size depends on the data; symbolic while tracing.
        sources: {tensor of the model: tensor in the trace}.
        kept: For each call the tensors in the trace that its backward reads.
        left: The same of the weight half: all that is held between the halves.
    """

    graph: CallGraph
    sizes: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    kept: list[list[str]] = field(default_factory=list)
    left: list[list[str]] = field(default_factory=list)

    def trace(self, seed: Any, *inputs: Any) -> tuple[Any, list[Any], list[Any]]:
        """Play all calls forward, then backward.

        Returns:
            The clock's readings, one more than three times the number of calls; the sizes of `unknown`; what keeps the
            measured operations from being removed.
        """
        tensors = dict(zip(self.graph.inputs, inputs, strict=True))
        played, times = [], [_clock(())]
        for call in self.graph.calls:
            with tf.control_dependencies(times[-1:]):
                played.append(self._forward(call, tensors, seed))
            times.append(_clock([*played[-1].outputs, *times[-1:]]))
        self.sources = {tensor: self._note(_owner(value)) for tensor, value in tensors.items()}
        scope = tf.compat.v1.get_default_graph()
        flowing: dict[int, Any] = {}
        results: list[Any] = []
        operations: list[tuple[list[Any], set[str], Any]] = []
        for call, part in zip(reversed(self.graph.calls), reversed(played), strict=True):
            begin = len(scope.get_operations())
            with tf.control_dependencies(times[-1:]):
                flows, sums = self._backward(call, part, flowing, seed)
            made = scope.get_operations()[begin:]
            times.append(_clock([*flows, *times[-1:]]))
            names = {operation.name for operation in made}
            second = needed_for(sums, names) - needed_for(flows, names)
            times.append(_clock([*sums, *times[-1:]]))
            results += [*flows, *sums]
            operations.append((made, second, times[-2].op))
        late = depending_on([seed.op])  # a loop's backward also makes operations that its forward needs
        for made, second, between in reversed(operations):
            backward = [operation for operation in made if operation.name in late]
            weights = [operation for operation in backward if operation.name in second]
            for operation in weights:
                run_behind(operation, between)
            self.kept.append(self._read(backward, late))
            self.left.append(self._read(weights, second))
        used = [*results, *(output for part in played for output in part.outputs)]
        with tf.control_dependencies(times[-1:]):
            touched = [_touch(value) for value in used]
        return tf.stack(times), list(self.unknown.values()), touched

    def _forward(self, call: Call, tensors: dict[int, Any], seed: Any) -> _Played:
        wanted = [
            tensor
            for tensor in dict.fromkeys(call.reads)
            if tensor not in self.graph.inputs and is_differentiable(tensors[tensor].dtype)
        ]
        sources = [tensors[tensor] for tensor in wanted]
        variables = [variable.value for variable in getattr(call.operation, "trainable_variables", ())]
        layer = _Training(call.operation)
        args, kwargs = call.arguments
        if "training" in kwargs:  # noted when the model was built; a model's call overrules it
            call = replace(call, arguments=(args, kwargs | {"training": True}))
        layer.play = lambda: call.play(tensors)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for source in (*sources, *variables):
                tape.watch(source)
            try:
                outputs = list(flatten(layer(seed, training=True)))
            except Exception as error:
                raise SplitError(
                    f"the layer {call.name!r} cannot be measured, since its call cannot be traced as a TensorFlow "
                    f"function ({type(error).__name__}: {error}); balance by 'parameters', or name the cuts: at=[...]"
                ) from error
            own = [tf.reduce_sum(loss) for loss in layer.losses]
        tensors |= zip(call.makes, outputs, strict=True)
        return _Played(tape, wanted, sources, variables, outputs, own)

    def _backward(self, call: Call, part: _Played, flowing: dict[int, Any], seed: Any) -> tuple[list[Any], list[Any]]:
        """The gradients of one call: of its inputs, which are added to `flowing`, and of its variables."""
        targets, seeds = list(part.own), [tf.cast(seed, loss.dtype) for loss in part.own]
        for tensor, output in zip(call.makes, part.outputs, strict=True):
            if is_differentiable(output.dtype):
                targets.append(output)
                given = flowing.pop(tensor, None)
                seeds.append(tf.fill(tf.shape(output), tf.cast(seed, output.dtype)) if given is None else given)
        if not targets or not (part.sources or part.variables):
            return [], []
        found = part.tape.gradient(targets, [*part.sources, *part.variables], output_gradients=seeds)
        gradients = [dense(gradient) for gradient in found]
        flows, sums = [], []
        for tensor, gradient in zip(part.wanted, gradients, strict=False):
            if gradient is not None:
                flowing[tensor] = flowing[tensor] + gradient if tensor in flowing else gradient
                flows.append(flowing[tensor])
        for variable, gradient in zip(part.variables, gradients[len(part.wanted) :], strict=True):
            if gradient is not None:
                sums.append(gradient + tf.cast(variable, gradient.dtype))  # as long as adding to the sum takes
        return flows, sums

    def _read(self, operations: Sequence[Any], own: set[str]) -> list[str]:
        """Names of what operations read and do not compute, by memory: rule 2 of `stages.tape.graph_split`."""
        found = {}
        for tensor in (tensor for operation in operations for tensor in operation.inputs):
            if tensor.op.name in own or tensor.dtype == tf.resource:
                continue
            tensor = _owner(tensor)
            if tensor.op.type not in _FREE:
                found[self._note(tensor)] = True
        return list(found)

    def _note(self, tensor: Any) -> str:
        """Remember how many bytes a tensor has, under its name."""
        name = str(tensor.name)
        if name in self.sizes or name in self.unknown:
            return name
        if tensor.dtype == tf.variant:
            size = _list_bytes(tensor)
        elif tensor.shape.is_fully_defined():
            size = tensor.shape.num_elements() * tensor.dtype.size
        else:
            size = tf.size(tensor, tf.int64) * tensor.dtype.size
        if isinstance(size, int):
            self.sizes[name] = size
        else:
            self.unknown[name] = size
        return name


def _clock(after: Sequence[Any]) -> Any:
    with tf.control_dependencies([tensor for tensor in after if tensor is not None]):
        return tf.timestamp()


def _owner(tensor: Any) -> Any:
    """The tensor whose memory it is."""
    while tensor.op.type in _ALIASES:
        tensor = tensor.op.inputs[0]
    return tensor


def _touch(tensor: Any) -> Any:
    """Something small that cannot be had without the tensor."""
    return tf.reshape(tensor, (-1,))[:1]


def _list_bytes(handle: Any) -> Any:
    """Bytes of what a loop (a recurrent layer) stored for its backward: one list per tensor, one element per turn.

    The list goes into the loop empty, with the element's shape, at the place at which it comes out. The weights that
    every turn reads are one buffer, however often they are stored.
    """
    loop = handle.op
    if loop.type not in ("While", "StatelessWhile"):
        return 0
    start = loop.inputs[handle.value_index].op
    if start.type != "EmptyTensorList" or "ReadVariableOp" in start.name:
        return 0
    shape, dtype = tf.get_static_value(start.inputs[0]), tf.as_dtype(start.get_attr("element_dtype"))
    if shape is None or np.any(np.asarray(shape) < 0):
        return 0
    length = tf.cast(tf.raw_ops.TensorListLength(input_handle=handle), tf.int64)
    return length * (int(np.prod(shape)) * dtype.size)

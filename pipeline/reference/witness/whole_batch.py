"""The whole batch under one natural tape, as one would write it with Keras: no cuts, no microbatches, no windows.

    out  = the segments called one after the other on all samples (and all time steps)
    L    = Keras's own loss on all targets, with the sample weights, times the loss weight; plus model.losses, once

Nothing is weighed here: Keras handles masks, sample weights and reductions. So a wrong rule of what a microbatch weighs
in its batch, which every comparison on the same microbatches would share, is found.

It says nothing of models in which samples see each other or numbers are drawn: there a batch in microbatches *is*
something else than the whole batch. Which layers do so is found by looking: what a call changes (statistics, seeds,
`stages.tape.model_call.changed_by_calls`), whether a microbatch alone gets the outputs that it gets within the batch,
and whether a segment's own losses are means over samples. Then the witness is refused, with the layer's name.

Cost: one tape over the whole batch, so the activations of all samples at once, and one forward pass besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.compare.tolerance import Tolerance
from pipeline.reference.one_tape.batch import Whole, state_names
from pipeline.reference.witness.batch_loss import Rounding, rounding
from pipeline.reference.witness.flow import (
    Tensors,
    WitnessRefusedError,
    call_model,
    heads_of,
    initial_states,
    inputs_of,
    objective,
    own_losses,
    refusing,
    riding,
    run_flow,
    shared_sums,
    size_of,
    undisturbed,
)
from pipeline.reference.witness.results import Size, WitnessGradients
from stages.keras_internals import layers_of, own_added_losses, own_seed_generators, wrap_call
from stages.loss.precision import float_of_losses, rounded_once
from stages.tape.accumulate import dense
from stages.tape.model_call import changed_by_calls, states_of_layers
from stages.tape.tensors import flatten, is_differentiable
from stages.worker.hosted_stage import HostedStage

CallsSeen = list[tuple[Any, list[Any], list[Any]]]
"""(layer, its inputs, its outputs) of every call, inner ones first."""


def batch_at_once(hosted: Sequence[HostedStage], batch: Whole) -> WitnessGradients:
    """Gradients of a batch by one tape over the joined segments on all samples.

    Args:
        hosted: The stages, in the order of the flow, with the values set; left as they are.
        batch: The batch, with targets.

    Returns:
        Gradients of all variables (nothing at cuts), or the refusal.
    """
    try:
        measured = rounding(hosted, batch)
        with undisturbed(hosted):
            return _gradients(hosted, batch, measured)
    except WitnessRefusedError as error:
        return WitnessGradients(refusal=str(error))


def _gradients(hosted: Sequence[HostedStage], batch: Whole, measured: Rounding) -> WitnessGradients:
    if batch.truncate is not None and batch.truncate < batch.grid.windows:
        raise WitnessRefusedError(
            f"gradients are truncated after {batch.truncate} of {batch.grid.windows} windows, so they are not those of "
            "the whole sequence"
        )
    heads = [heads_of(stage) for stage in hosted]
    variables = [[v.value for v in stage.stage.trainable_variables] for stage in hosted]
    own: list[list[Any]] = [[] for _ in hosted]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([variable for some in variables for variable in some])

        def call(i: int, taken: list[Any]) -> Sequence[Any]:
            with refusing(hosted[i], "its forward pass on the whole batch"), _nothing_changes(hosted[i]):
                outputs = call_model(hosted[i].stage.model, taken)
                own[i] = own_losses(hosted[i].stage.model, 0, float_of_losses())
            return outputs

        tensors = run_flow(hosted, call, {**inputs_of(hosted, batch, None), **_all_states(hosted, batch)})
        loss = objective(hosted, heads, batch, tensors, float_of_losses())
        loss += sum(term for terms in own for term in terms)
    size = size_of(hosted, batch)
    _check_independence(hosted, batch, tensors, own, size)
    flat = tape.gradient(
        loss, [v for some in variables for v in some], output_gradients=rounded_once(batch.loss_scale, loss.dtype)
    )
    found = iter(None if g is None else dense(g) for g in flat)
    sums = shared_sums(hosted, [[next(found) for _ in some] for some in variables], batch.loss_scale)
    note = f"one tape over {batch.grid.samples} samples"
    return WitnessGradients(sums, {}, size, *measured, float(loss), note=note)


def _all_states(hosted: Sequence[HostedStage], batch: Whole) -> Tensors:
    """The states in front of the sequence, of all samples."""
    parts = [initial_states(hosted, batch, k) for k in range(len(batch.grid.sizes))]
    return {name: tf.concat([part[name] for part in parts], 0) for name in parts[0]}


@contextmanager
def _nothing_changes(stage: HostedStage) -> Iterator[None]:
    """Refuse a forward pass that changes variables: it draws numbers, or keeps statistics of its batch."""
    model = stage.stage.model
    variables, states = changed_by_calls(model), {id(state) for state in states_of_layers(model)}
    before = [np.array(variable.value.read_value()) for variable in variables]
    yield
    for variable, value in zip(variables, before, strict=True):
        if np.asarray(variable.value.read_value()).tobytes() != value.tobytes():
            kind = "draws numbers" if "seed" in variable.path.rsplit("/", 1)[-1] else "keeps statistics of its batch"
            kind = "keeps its state for the next batch" if id(variable) in states else kind
            raise WitnessRefusedError(
                f"stage {stage.spec.name!r}, layer {_layer_of(model, variable)!r} {kind} in training (its call changes "
                f"{variable.path!r}), so microbatches are not the whole batch"
            )


def _layer_of(model: Any, variable: Any) -> str:
    """The innermost layer that has a variable."""
    having = [
        layer
        for layer in layers_of(model)
        if any(v is variable for v in (*layer.variables, *_seeds(layer), *states_of_layers(layer)))
    ]
    return str(having[-1].name) if having else str(model.name)


def _seeds(layer: Any) -> list[Any]:
    return [generator.state for generator in own_seed_generators(layer)]


def _check_independence(
    hosted: Sequence[HostedStage], batch: Whole, whole: Tensors, own: Sequence[Sequence[Any]], size: Size
) -> None:
    """Refuse layers that look across samples: a microbatch alone gets other outputs, or own losses are no means.

    Each segment gets, in microbatches, what it got in the whole batch, so the first that differs is the one.
    """
    if len(batch.grid.sizes) < 2:
        return
    parts: list[float] = [0.0] * len(hosted)
    starts = np.cumsum([0, *batch.grid.sizes])
    states = {name for stage in hosted for name in state_names(stage)}
    first = {**whole, **_all_states(hosted, batch)}
    for k, count in enumerate(batch.grid.sizes):
        rows = slice(int(starts[k]), int(starts[k + 1]))
        given = {**inputs_of(hosted, batch, None), **{name: first[name] for name in states}}
        mine = {name: _rows(tensor, rows) for name, tensor in given.items()}

        def call(i: int, taken: list[Any], k: int = k, rows: slice = rows, count: int = count) -> Sequence[Any]:
            stage = hosted[i]
            with refusing(stage, "its forward pass on a microbatch"):
                outputs = call_model(stage.stage.model, taken)
                parts[i] += count / batch.grid.samples * float(sum(own_losses(stage.stage.model, 0, float_of_losses())))
            for (name, _), output in zip(stage.spec.outputs, outputs, strict=False):
                if not _agree(output, _rows(whole[name], rows), size):
                    layer = _first_to_differ(stage.stage.model, [whole[n] for n, _ in stage.spec.inputs], rows, size)
                    raise WitnessRefusedError(
                        f"stage {stage.spec.name!r}, layer {layer!r} looks across the samples of its batch: "
                        f"microbatch {k} alone gets another {name!r} than within the whole batch"
                    )
            return [_rows(whole[name], rows) for name, _ in stage.spec.outputs] + list(
                outputs[len(stage.spec.outputs) :]
            )

        run_flow(hosted, call, mine)
    for stage, terms, part in zip(hosted, own, parts, strict=True):
        total = float(sum(terms))
        allowed = Tolerance.reordered(size.dtype, size.terms).relative * max(abs(total), abs(part))
        if abs(total - part) > allowed:
            layer = next((layer.name for layer in layers_of(stage.stage.model) if own_added_losses(layer)), "?")
            raise WitnessRefusedError(
                f"stage {stage.spec.name!r}, layer {layer!r} adds a loss that is no mean over samples: {total:.6g} of "
                f"the whole batch, {part:.6g} of its microbatches; divide it by the number of samples"
            )


def _rows(tensor: Any, rows: slice) -> Any:
    """Some samples of a tensor, with what rides on it."""
    return riding([tensor], lambda parts: parts[0][rows])


def _agree(ours: Any, theirs: Any, size: Size) -> bool:
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or not is_differentiable(ours.dtype):
        return bool(a.shape == b.shape and np.array_equal(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    allowed = Tolerance.reordered(size.dtype, size.terms, a.size).relative
    return bool(np.max(np.abs(a - b), initial=0.0) <= allowed * np.max(np.abs(b), initial=0.0))


def _first_to_differ(model: Any, inputs: Sequence[Any], rows: slice, size: Size) -> str:
    """The layer whose inputs are those of the whole batch and whose outputs are not."""
    with _watched(model) as whole:
        call_model(model, inputs)
    with _watched(model) as part:
        call_model(model, [_rows(tensor, rows) for tensor in inputs])
    samples = {int(tensor.shape[0]) for tensor in inputs}

    def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
        return all(
            _agree(b, a[rows], size) if a.shape.rank and int(a.shape[0]) in samples else _agree(b, a, size)
            for a, b in zip(some, others, strict=False)
        )

    for (layer, a_in, a_out), (_, b_in, b_out) in zip(whole, part, strict=False):
        if same(a_in, b_in) and not same(a_out, b_out):
            return str(layer.name)
    return str(model.name)


@contextmanager
def _watched(model: Any) -> Iterator[CallsSeen]:
    """Note what every layer inside a model takes and gives."""
    seen: CallsSeen = []

    def watching(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            tensors = [t for t in keras.tree.flatten(args) if isinstance(t, tf.Tensor)]
            seen.append((layer, tensors, [t for t in flatten(outputs) if isinstance(t, tf.Tensor)]))
            return outputs

        return watched

    with ExitStack() as stack:
        for layer in layers_of(model, include_self=False):
            stack.callback(wrap_call(layer, partial(watching, layer)))
        yield seen


__all__ = ["batch_at_once"]

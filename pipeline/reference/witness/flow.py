"""Helpers of all witnesses: the segments called in the order of the flow, their states, the batch's own loss.

None of it is the hand-off's code: segments are called as Keras models, losses are asked of Keras, and what a forward
pass changes by itself is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.reference.one_tape.batch import Whole, owner, state_names
from pipeline.reference.witness.results import Array, Size
from stages.keras_internals import layers_of, logits_of, set_logits, set_mask
from stages.loss.head import Head
from stages.loss.heads import Heads
from stages.masks import mask_of, with_mask
from stages.put_back import random_numbers_put_back, values_put_back
from stages.recipe.by_value import copied
from stages.tape.accumulate import plus
from stages.tape.model_call import changed_by_calls, packer
from stages.tape.tensors import flatten
from stages.worker.hosted_stage import HostedStage
from transport.message import DRIVER

Tensors = dict[str, Any]
CallStage = Callable[[int, list[Any]], Sequence[Any]]
"""(position of the stage, its inputs and states) -> its outputs and states, flat."""


class WitnessRefusedError(Exception):
    """A witness cannot be made; the message names the stage and the layer."""


@contextmanager
def undisturbed(hosted: Sequence[HostedStage]) -> Iterator[None]:
    """Put back what forward passes and the making of models change: statistics, seeds, random numbers."""
    changed = [variable for stage in hosted for variable in changed_by_calls(stage.stage.model)]
    with random_numbers_put_back(), values_put_back(changed):
        yield


@contextmanager
def refusing(stage: HostedStage, what: str) -> Iterator[None]:
    """Turn any failure into a refusal that names the stage."""
    try:
        yield
    except WitnessRefusedError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise WitnessRefusedError(f"stage {stage.spec.name!r}: {what}: {type(error).__name__}: {line}") from error


def tensor_names(stage: HostedStage) -> tuple[list[str], list[str]]:
    """Names of what a stage takes and gives, states behind the rest."""
    states = state_names(stage)
    return [*(name for name, _ in stage.spec.inputs), *states], [*(name for name, _ in stage.spec.outputs), *states]


def run_flow(hosted: Sequence[HostedStage], call: CallStage, given: Mapping[str, Any]) -> Tensors:
    """Call all segments, one after the other.

    A mask that a segment takes off its input is off for those after it, as in one process.

    Args:
        hosted: The stages in the order of the flow.
        call: Runs one of them.
        given: The pipeline's inputs and the states in front of the window, by name.

    Returns:
        All tensors by name; a state as it is behind the window.
    """
    tensors = dict(given)
    behind: Tensors = {}
    for i, stage in enumerate(hosted):
        takes, gives = tensor_names(stage)
        taken = [with_mask(tensors[name], mask_of(tensors[name])) for name in takes]
        outputs = call(i, taken)
        for name, copy in zip(takes, taken, strict=True):
            if mask_of(tensors[name]) is not None and mask_of(copy) is None:
                set_mask(tensors[name], None)
        states = set(state_names(stage))
        for name, output in zip(gives, outputs, strict=True):
            (behind if name in states else tensors)[name] = output
    return tensors | behind


def call_model(model: Any, taken: Sequence[Any], training: bool = True) -> tuple[Any, ...]:
    """One model on flat tensors; its flat outputs."""
    return flatten(model(packer(model)(taken), training=training))


def own_losses(model: Any, window: int, dtype: str) -> list[Any]:
    """What a model adds to the objective, float scalars; regularisers of weights, which Keras lists last, once."""
    losses = list(model.losses)
    count = len(losses) - (sum(v.regularizer is not None for v in model.trainable_weights) if window else 0)
    return [tf.reduce_sum(tf.cast(loss, dtype)) for loss in losses[:count]]


def inputs_of(hosted: Sequence[HostedStage], batch: Whole, k: int | None, window: int = 0) -> Tensors:
    """The pipeline's inputs: a window of a microbatch, or (k None) all there is."""
    found: Tensors = {}
    for stage in hosted:
        for place, (name, source) in enumerate(stage.spec.inputs):
            if source == DRIVER:
                whole, over = batch.inputs[name], stage.takes_over_time(place)
                found[name] = tf.constant(whole if k is None else batch.grid.part(whole, k, window, over))
    return found


def initial_states(hosted: Sequence[HostedStage], batch: Whole, k: int) -> Tensors:
    """Every stage's states in front of window 0 of a microbatch: zeros, or what the batch before left."""
    found: Tensors = {}
    for stage in hosted:
        carried, names = stage.stage.carried, state_names(stage)
        if carried is None:
            continue
        kept = carried.kept.get(k) if carried.persists else None
        shapes = [tuple(tensor.shape[1:]) for tensor in stage.stage.model.inputs[-len(names) :]]
        types = [tensor.dtype for tensor in stage.stage.model.inputs[-len(names) :]]
        zeros = [tf.zeros((batch.grid.sizes[k], *s), t) for s, t in zip(shapes, types, strict=True)]
        found |= dict(zip(names, zeros if kept is None else kept, strict=True))
    return found


def heads_of(stage: HostedStage, floats: str | None = None) -> list[Head]:
    """New objectives like the stage's, without metrics: what they count belongs to nobody.

    Args:
        stage: The stage.
        floats: What they compute in; None: as the stage's.
    """
    names = [name for name, _ in stage.spec.outputs]
    losses = [
        copied(one.loss, "the loss", keep=stage.stage.model.variables, floats=floats) for one in stage.objects.judging
    ]
    found = [
        Head(loss, place=names.index(one.output), weight=head.weight)
        for loss, one, head in zip(losses, stage.spec.heads, stage.heads, strict=True)
    ]
    Heads(found).go([head.ways for head in stage.heads])
    return found


def joined_riding(parts: Sequence[Any], axis: int) -> Any:
    """Tensors one behind the other, with what rides on them."""
    return parts[0] if len(parts) == 1 else riding(parts, lambda some: tf.concat(list(some), axis))


def riding(parts: Sequence[Any], make: Callable[[Sequence[Any]], Any]) -> Any:
    """A tensor made of others, with what rides on them: masks, and the logits that Keras's losses look for."""
    masks = [mask_of(part) for part in parts]
    logits = [logits_of(part) for part in parts]
    found = with_mask(make(parts), None if masks[0] is None else make(masks))
    if logits[0] is not None:
        set_logits(found, make(logits))
    return found


def objective(
    hosted: Sequence[HostedStage],
    heads: Sequence[Sequence[Head]],
    batch: Whole,
    predictions: Mapping[str, Any],
    dtype: str,
) -> Any:
    """The loss of the whole batch as Keras itself computes it: every output's loss on all samples at once.

    This is what microbatches' losses must sum up to, whatever they are weighed with.

    Args:
        hosted: The stages.
        heads: Each stage's, as `heads_of` gives them.
        batch: The batch.
        predictions: {tensor name: the whole batch's}.
        dtype: What it is added up in.

    Returns:
        A scalar.
    """
    total = tf.zeros((), dtype)
    for stage, some in zip(hosted, heads, strict=True):
        for head, label in zip(some, stage.labels, strict=True):
            if head.loss is None:
                continue
            prediction = predictions[stage.spec.outputs[head.place][0]]
            weight = batch.sample_weights.get(label)
            value = head.judge.compute_loss(  # Keras's own, of a model without layers: not what a stage calls
                None,
                _floats_as(batch.targets[label], dtype),
                prediction,
                None if weight is None else _floats_as(weight, dtype),
            )
            total += tf.cast(tf.reduce_sum(value), dtype) * (1.0 if head.weight is None else head.weight)
    return total


def _floats_as(array: Any, dtype: str) -> Any:
    tensor = tf.convert_to_tensor(array)
    return tf.cast(tensor, dtype) if tensor.dtype.is_floating and dtype == "float64" else tensor


def shared_sums(
    hosted: Sequence[HostedStage], totals: Sequence[Sequence[Any]], loss_scale: float
) -> dict[int, list[Array | None]]:
    """Each stage's gradients, where every copy of a shared variable has the sum of all its uses.

    Args:
        hosted: The stages.
        totals: For each, each trainable variable's own uses.
        loss_scale: Factor that is in them, and taken out.
    """
    stage = {one.spec.index: one for one in hosted}
    owners: dict[int, int] = {}
    sums: dict[int, Any] = {}
    for one, values in zip(hosted, totals, strict=True):
        ties = {tie.place: tie for tie in one.ties}
        for place, variable in enumerate(one.stage.trainable_variables):
            first = owner(ties[place], stage) if place in ties else variable
            owners[id(variable)] = id(first)
            sums[id(first)] = plus(sums.get(id(first)), values[place])

    def found(variable: Any) -> Array | None:
        total = sums[owners[id(variable)]]
        if total is None:
            return None
        unscaled = np.asarray(total).astype(np.float64) / loss_scale
        return unscaled.astype(tf.as_dtype(variable.dtype).as_numpy_dtype)

    return {i: [found(variable) for variable in one.stage.trainable_variables] for i, one in stage.items()}


def dtype_of(model: Any) -> str:
    """The floating dtype with the fewest digits that a model computes in."""
    found = {layer.compute_dtype for layer in layers_of(model) if layer.compute_dtype is not None}
    floating = [name for name in found if tf.as_dtype(name).is_floating]
    return str(min(floating, key=lambda name: _DIGITS.get(name, 0), default=keras.config.floatx()))


def sum_lengths(model: Any) -> int:
    """How many numbers a model's forward pass adds up on its longest way, at most: the fan-in of every weight."""
    return 1 + sum(int(math.prod(tuple(v.shape)[:-1])) for v in model.trainable_weights if len(v.shape) > 1)


def size_of(hosted: Sequence[HostedStage], batch: Whole, rows: int = 0) -> Size:
    """How long the sums on the way from the inputs to the loss and back are.

    Args:
        hosted: The stages.
        batch: Sums over its samples and places (pixels, time steps) make the gradients of variables.
        rows: Numbers that the witness's own sums have besides.
    """
    models = [stage.stage.model for stage in hosted]
    rows += batch.grid.samples * max(_places(model, batch) for model in models)
    lowest = min((dtype_of(model) for model in models), key=lambda name: _DIGITS.get(name, 0))
    return Size(rows + sum(sum_lengths(model) for model in models), lowest)


def _places(model: Any, batch: Whole) -> int:
    """Pixels or time steps of one sample, at most: of what a model's layers give, all axes but the last."""
    steps = max([1, *(np.shape(a)[1] for a in batch.inputs.values() if np.ndim(a) > 1)])
    shapes = [tensor.shape for op in getattr(model, "operations", []) for tensor in flatten(op.output)]
    return max((int(math.prod(steps if n is None else n for n in s[1:-1])) for s in shapes), default=int(steps))


_DIGITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


__all__ = ["WitnessRefusedError", "run_flow", "undisturbed"]

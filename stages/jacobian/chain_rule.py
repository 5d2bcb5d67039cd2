"""The chain rule written out: gradients of a chain of segments from full Jacobians, each part differentiated alone.

Why: it is the definition that the hand-off computes without ever forming a Jacobian. It needs nothing from the
hand-off's code, so it is an independent witness for it, and it shows what is being passed down. With Out(s) the output
of segment s and W(s) its variables, from the top down (docs/gradients.md, section 2):

    dL/dOut(S)     one plain tape over the loss
    dL/dW(s)     = dL/dOut(s) . dOut(s)/dW(s)         by `jacobian`
    dL/dOut(s-1) = dL/dOut(s) . dOut(s)/dOut(s-1)     by `batch_jacobian` where samples are independent, else `jacobian`

Jacobians explode with size, so their memory is checked before any is evaluated, and they can be evaluated in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.jacobian.memory import (
    JacobianEstimate,
    MemoryLimitExceeded,
    SegmentJacobians,
    common_batch,
    group_sizes,
    jacobian_bytes,
    per_segment,
    readable_bytes,
)
from stages.jacobian.record import Recorded, SegmentLike, record, segment_name
from stages.jacobian.rows import Contraction, connected, contract_blocked, contract_whole
from stages.jacobian.sample_independence import samples_are_independent
from stages.keras_internals import logits_of
from stages.tape.accumulate import dense

__all__ = ["ChainRule", "JacobianEstimate", "MemoryLimitExceeded", "SegmentGradients", "chain_rule", "jacobian_bytes"]

JACOBIAN_LIMIT = 2 << 30
"""Bytes that a Jacobian may take unless told otherwise: 2 GiB."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentGradients:
    """The chain rule's gradients of one segment.

    Attributes:
        name: the segment's name.
        gradients: variable path -> dL/dvariable, shape and dtype of the variable; None where L does not depend on it.
        output_gradients: dL/dOut, one array an output in flat order; None where L does not depend on it. Where a Keras
            cross-entropy looks behind the softmax or sigmoid of the last segment, dL/dLogits stands in its place.
        input_gradients: dL/dIn likewise; None also for what cannot have a gradient (integers, strings) and, in the
            first segment, unless `input_gradient` was asked for.
        independent: whether dOut/dIn was evaluated per sample; None if it was not needed.
        jacobians: the sizes of its Jacobians.
        blocks: how many blocks of rows were evaluated; 0 if all Jacobians were whole.
    """

    name: str
    gradients: dict[str, Array | None]
    output_gradients: tuple[Array | None, ...]
    input_gradients: tuple[Array | None, ...]
    independent: bool | None
    jacobians: SegmentJacobians
    blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class ChainRule:
    """The gradients of a chain of segments.

    Attributes:
        loss: L, the loss and every segment's own losses.
        segments: one entry a segment, bottom first.
    """

    loss: float
    segments: tuple[SegmentGradients, ...]

    def gradients(self) -> dict[str, Array | None]:
        """All gradients by `<segment name>/<variable path>`."""
        return {
            f"{segment.name}/{path}": value for segment in self.segments for path, value in segment.gradients.items()
        }


def chain_rule(
    segments: Sequence[SegmentLike],
    inputs: Any,
    loss: Callable[[Any], Any],
    *,
    training: bool = True,
    independent_samples: bool | Sequence[bool | None] | None = None,
    memory_limit: int | None = JACOBIAN_LIMIT,
    blocked: bool | Literal["auto"] = False,
    input_gradient: bool = False,
) -> ChainRule:
    """Differentiate a chain of segments by the chain rule with full Jacobians.

    Every segment runs forward once. L is `loss(outputs)` plus every segment's own losses (regularisers, `add_loss`).

    Args:
        segments: Keras models or layers, or callables of tensors, bottom first; each takes what the one below returns.
            A callable's variables are the trainable `tf.Variable`s that it reads.
        inputs: the first segment's input, (batch, ...): a tensor, an array or a structure of them.
        loss: from the last segment's outputs to a scalar; targets are bound in it: ``lambda out: mse(y, out)``.
        training: passed to Keras segments.
        independent_samples: whether each sample of a segment's output depends on the same sample of its input alone,
            for all segments or one answer a segment. None tests it on this forward pass, which is right also for
            BatchNormalization; True trusts you, and is silently wrong if you err.
        memory_limit: bytes that the evaluation of a Jacobian may take beside the forward pass; None for no limit.
        blocked: True evaluates every Jacobian in blocks of rows that stay within `memory_limit`; "auto" does so only
            where the whole one exceeds it; False refuses then.
        input_gradient: whether to evaluate dL/dInput of the first segment too.

    Returns:
        The loss and, for every segment, the gradients. They equal those of a single tape up to the order of summation:
        to about 1e-6 of the largest gradient in float32, 1e-12 in float64.

    Raises:
        MemoryLimitExceeded: a Jacobian (or, if blocked, one row of it) would take more than `memory_limit`. It has not
            been evaluated.
        HandoffError: the loss is no scalar or does not depend on the outputs, or a segment that `independent_samples`
            declares independent has no common batch axis.
        ValueError: an argument is out of range.

    After any failure the non-trainable variables of Keras segments (moving statistics, random seeds) are back at their
    old values. After success they have moved once, as one forward pass moves them.
    """
    forced = per_segment(independent_samples, segments)
    if blocked not in (True, False, "auto"):
        raise ValueError(f"blocked: expected True, False or 'auto', received {blocked!r}")
    if memory_limit is not None and memory_limit <= 0:
        raise ValueError(f"memory_limit: expected a positive number of bytes or None, received {memory_limit!r}")
    before = _state(segments)
    try:
        records = _forward(segments, inputs, training)
        value, records[-1], seeds = _loss_gradients(loss, records[-1])
        jobs = [
            _job(segment_name(segment, index), recorded, forced[index], index > 0 or input_gradient)
            for index, (segment, recorded) in enumerate(zip(segments, records, strict=True))
        ]
        whole = [_fits(job, memory_limit, blocked) for job in jobs]
        done: list[SegmentGradients] = []
        for job, at_once in zip(reversed(jobs), reversed(whole), strict=True):
            done.append(_segment_gradients(job, seeds, None if at_once else _Blocks(memory_limit)))
            seeds = [None if g is None else tf.constant(g) for g in done[-1].input_gradients]
    except BaseException:
        for variable, old in before:
            variable.assign(old)
        raise
    own = sum(float(tf.add_n(recorded.losses)) for recorded in records if recorded.losses)
    return ChainRule(float(value) + own, tuple(reversed(done)))


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    name: str
    recorded: Recorded
    wants_inputs: bool
    independent: bool | None
    sizes: SegmentJacobians


class _Blocks:
    """The limit of a blocked evaluation, and how many blocks it has come to."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0


def _forward(segments: Sequence[SegmentLike], inputs: Any, training: bool) -> list[Recorded]:
    value = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    records = []
    for segment in segments:
        records.append(record(segment, value, training))
        value = records[-1].structure
    return records


def _loss_gradients(loss: Callable[[Any], Any], top: Recorded) -> tuple[Any, Recorded, list[Any]]:
    """Differentiate the loss alone.

    Returns:
        Its value; the last segment with the outputs that the loss is a function of; dL/dOut for each of these.
    """
    # Keras's cross-entropies look behind a softmax or sigmoid and use its argument, which Keras keeps on the output
    # tensor. To the chain rule that argument is simply another output of the last segment.
    behind = [(i, logits) for i, out in enumerate(top.outputs) if (logits := logits_of(out)) is not None]
    outputs = [*top.outputs, *(logits for _, logits in behind)]
    floating = [out for out in outputs if out.dtype.is_floating]
    with tf.GradientTape() as tape:
        tape.watch(floating)
        value = tf.convert_to_tensor(loss(top.structure))
    if value.shape.rank != 0:
        raise HandoffError(
            f"loss: expected a scalar, received shape {tuple(value.shape)}; reduce it, e.g. with tf.reduce_mean"
        )
    found = iter(tape.gradient(value, floating))
    pairs = [(out, dense(next(found)) if out.dtype.is_floating else None) for out in outputs]
    if all(seed is None for _, seed in pairs):
        raise HandoffError(
            f"loss: it does not depend on the outputs {[t.dtype.name for t in top.outputs]} of the last segment in a "
            "differentiable way; compute it from its floating outputs, with TensorFlow operations"
        )
    visible, hidden = pairs[: len(top.outputs)], pairs[len(top.outputs) :]
    for (i, _), (logits, seed) in zip(behind, hidden, strict=True):
        if seed is not None and visible[i][1] is None:
            visible[i] = (logits, seed)
        elif seed is not None:
            visible.append((logits, seed))
    return value, replace(top, outputs=[out for out, _ in visible]), [seed for _, seed in visible]


def _job(name: str, recorded: Recorded, forced: bool | None, wants_inputs: bool) -> _Job:
    """Decide how dOut/dIn is to be evaluated, and size the segment's Jacobians."""
    outputs = recorded.float_outputs()
    inputs = recorded.float_inputs() if wants_inputs else []
    independent = None
    if outputs and inputs:
        independent = samples_are_independent(recorded.tape, outputs, inputs) if forced is None else forced
        if independent and common_batch([*outputs, *inputs]) is None:
            raise HandoffError(
                f"segment {name!r}: independent_samples=True expects inputs and outputs with the same batch axis, "
                f"received {[tuple(t.shape) for t in inputs]} -> {[tuple(t.shape) for t in outputs]}; leave it None "
                "or say False"
            )
    sizes = group_sizes(outputs, list(recorded.variables.values()), inputs)
    return _Job(name, recorded, wants_inputs, independent, SegmentJacobians(name, *sizes, independent))


def _fits(job: _Job, limit: int | None, blocked: bool | Literal["auto"]) -> bool:
    """Tell whether the segment's Jacobians are evaluated whole. Raises if they must but cannot be."""
    if blocked is True:
        return False
    estimate = JacobianEstimate((job.sizes,))
    if limit is None or estimate.needed <= limit:
        return True
    if blocked == "auto":
        return False
    raise MemoryLimitExceeded(
        f"segment {job.name!r}: its Jacobians hold {readable_bytes(estimate.held)} and take "
        f"{readable_bytes(estimate.needed)} ({estimate.needed} bytes) to build, more than memory_limit = "
        f"{readable_bytes(limit)}; pass blocked=True to evaluate them in blocks within the limit, raise memory_limit, "
        "use a smaller batch, or use the hand-off (Stage), which needs no Jacobian",
        estimate.needed,
        limit,
    )


def _segment_gradients(job: _Job, seeds: list[Any], blocks: _Blocks | None) -> SegmentGradients:
    recorded = job.recorded
    paths, variables = list(recorded.variables), list(recorded.variables.values())
    places = [i for i, t in enumerate(recorded.inputs) if job.wants_inputs and t.dtype.is_floating]
    inputs = [recorded.inputs[i] for i in places]
    of_variables = _own_losses(recorded, variables)
    of_inputs = _own_losses(recorded, inputs)
    for output, seed in zip(recorded.outputs, seeds, strict=True):
        if seed is not None:
            where = f"segment {job.name!r}, d outputs / d"
            work = Contraction(recorded.tape, output, seed, variables, False, f"{where} weights")
            of_variables = _add(of_variables, _contract(work, blocks))
            work = Contraction(recorded.tape, output, seed, inputs, bool(job.independent), f"{where} inputs")
            of_inputs = _add(of_inputs, _contract(work, blocks))
    input_gradients: list[Array | None] = [None] * len(recorded.inputs)
    for place, gradient in zip(places, of_inputs, strict=True):
        input_gradients[place] = _array(gradient)
    return SegmentGradients(
        name=job.name,
        gradients={path: _array(gradient) for path, gradient in zip(paths, of_variables, strict=True)},
        output_gradients=tuple(_array(seed) for seed in seeds),
        input_gradients=tuple(input_gradients),
        independent=job.independent,
        jacobians=job.sizes,
        blocks=0 if blocks is None else blocks.count,
    )


def _contract(work: Contraction, blocks: _Blocks | None) -> list[Any]:
    """Contract dL/dOut with dOut/dSource for every source; None for a source that the output does not depend on."""
    reached = connected(work)
    if not any(reached):
        return [None] * len(reached)
    work = replace(work, sources=[source for source, yes in zip(work.sources, reached, strict=True) if yes])
    if blocks is None:
        found = iter(contract_whole(work))
    else:
        gradients, count = contract_blocked(work, blocks.limit)
        blocks.count += count
        found = iter(gradients)
    return [next(found) if yes else None for yes in reached]


def _own_losses(recorded: Recorded, sources: list[Any]) -> list[Any]:
    """Differentiate the segment's own losses: scalars, so that their Jacobian is their gradient."""
    if not recorded.losses or not sources:
        return [None] * len(sources)
    return [dense(gradient) for gradient in recorded.tape.gradient(recorded.losses, sources)]


def _add(totals: list[Any], parts: list[Any]) -> list[Any]:
    return [b if a is None else a if b is None else a + b for a, b in zip(totals, parts, strict=True)]


def _array(tensor: Any) -> Array | None:
    return None if tensor is None else np.array(tensor)


def _state(segments: Sequence[SegmentLike]) -> list[tuple[Any, Array]]:
    return [
        (variable, variable.numpy())
        for segment in segments
        if isinstance(segment, keras.Layer)
        for variable in segment.non_trainable_variables
    ]

"""The Jacobian chain rule, stage by stage: what the hand-off must give, from explicit rows of Jacobians.

    dL/dOut(S)     one plain tape over the loss alone
    dL/dIn(s)    = dL/dOut(s) . dOut(s)/dIn(s)        what stage s must send back
    dL/dW(s)     = dL/dOut(s) . dOut(s)/dW(s)         what its optimizer must get

Every segment runs forward once per microbatch and window under a tape of its own, so that random layers draw once and
statistics move once, as in the pipeline. From the top down each Jacobian is made row by row
(`pipeline.reference.witness.rows`) and contracted with dL/dOut. Nothing of the hand-off is used: no output gradient is
ever given to a tape except one-hot rows. What a tensor gets from several consumers is summed, and so are the uses of a
shared variable.

Cost: of every microbatch and window of a segment one backward pass for each element of its outputs (samples times
features), in a traced loop. That is 10 to 10^5 times a step: for small models.
Memory: the tapes of a microbatch (of the batch, where a loss couples samples), and one row, within `memory_limit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.reference.one_tape.batch import Weights, Whole, state_names, weight_part
from pipeline.reference.one_tape.single_tape import SingleTape
from pipeline.reference.witness.batch_loss import Rounding, rounding
from pipeline.reference.witness.flow import (
    WitnessRefusedError,
    call_model,
    heads_of,
    initial_states,
    inputs_of,
    joined_riding,
    own_losses,
    refusing,
    run_flow,
    shared_sums,
    size_of,
    tensor_names,
    undisturbed,
)
from pipeline.reference.witness.results import Array, CutPlace, WitnessGradients
from pipeline.reference.witness.rows import contract_by_rows
from stages.jacobian.memory import MemoryLimitExceeded, readable_bytes
from stages.jacobian.rows import Contraction, connected
from stages.keras_internals import logits_of
from stages.loss.heads import Heads, Objective
from stages.loss.precision import float_of_losses
from stages.tape.accumulate import dense, plus
from stages.tape.tensors import is_differentiable
from stages.worker.hosted_stage import HostedStage
from transport.message import DRIVER

ROW_LIMIT = 1 << 28
"""Bytes that a row may take unless told otherwise: 256 MiB."""

Unit = tuple[int, int]
"""(microbatch, window)."""
TensorPlace = tuple[str, int, int]
"""(tensor name, microbatch, window it is from); a state in front of window w is from window w - 1."""


@dataclass
class _Record:
    """One segment's forward pass.

    Attributes:
        stage: Position.
        unit: Which.
        tape: Persistent.
        takes: What the inputs are.
        gives: What the outputs are.
        inputs: Tensors.
        outputs: Tensors.
        own: Own losses.
        seeds: (tensor, what the stage's own heads send into it).
    """

    stage: int
    unit: Unit
    tape: Any
    takes: list[TensorPlace]
    gives: list[TensorPlace]
    inputs: list[Any]
    outputs: tuple[Any, ...]
    own: list[Any]
    seeds: list[tuple[Any, Any]] = field(default_factory=list)


def by_chain_rule(
    hosted: Sequence[HostedStage], batch: Whole, memory_limit: int | None = ROW_LIMIT
) -> WitnessGradients:
    """Gradients of a batch by the chain rule.

    Args:
        hosted: The stages, in the order of the flow, with the values set; left as they are.
        batch: The batch, with targets.
        memory_limit: Bytes that a row of a Jacobian may take; None: no limit.

    Returns:
        Gradients of all variables and at all cuts, or the refusal.
    """
    try:
        measured = rounding(hosted, batch)
        with undisturbed(hosted):
            return _Chain(hosted, batch, memory_limit).run(measured)
    except (WitnessRefusedError, MemoryLimitExceeded) as error:
        return WitnessGradients(refusal=str(error))


class _Chain:
    def __init__(self, hosted: Sequence[HostedStage], batch: Whole, limit: int | None) -> None:
        self.hosted, self.batch, self.limit = hosted, batch, limit
        self.heads = [Heads(heads_of(stage)) for stage in hosted]
        self.totals: list[list[Any]] = [[None] * len(stage.stage.trainable_variables) for stage in hosted]
        self.arriving: dict[TensorPlace, list[Any]] = {}
        self.boundary: dict[CutPlace, Array | None] = {}
        self.rows = [0] * len(hosted)
        self.loss = 0.0
        weights = SingleTape(hosted).weights(batch)
        self.weights: Weights = weights

    def run(self, measured: Rounding) -> WitnessGradients:
        """All microbatches: each forward, its loss, backward; or all at once where a loss couples samples."""
        microbatches = range(len(self.batch.grid.sizes))
        couples = any(heads.couples_samples for heads in self.heads)
        if couples and self.batch.grid.windows > 1:
            raise WitnessRefusedError("a loss that couples samples is not made over several windows")
        for group in [list(microbatches)] if couples else [[k] for k in microbatches]:
            records = [record for k in group for record in self._forward(k)]
            if couples:
                self._whole_losses(records)
            for record in reversed(records):
                with refusing(self.hosted[record.stage], "its Jacobian"):
                    self._backward(record)
            self.arriving.clear()
        limit = "none" if self.limit is None else readable_bytes(self.limit)
        return WitnessGradients(
            shared_sums(self.hosted, self.totals, self.batch.loss_scale),
            self.boundary,
            size_of(self.hosted, self.batch, sum(self.rows)),
            *measured,
            self.loss,
            note=f"{sum(self.rows)} rows of Jacobians for each microbatch and window, memory limit {limit}",
        )

    def _forward(self, k: int) -> Iterator[_Record]:
        """The windows of a microbatch, ascending."""
        states = initial_states(self.hosted, self.batch, k)
        all_states = {name for stage in self.hosted for name in state_names(stage)}
        for w in range(self.batch.grid.windows):
            records: list[_Record] = []
            given = {**inputs_of(self.hosted, self.batch, k, w), **states}
            call = partial(self._call, (k, w), records)
            tensors = run_flow(self.hosted, call, given)
            states = {name: tensors[name] for name in all_states}
            yield from records

    def _call(self, unit: Unit, records: list[_Record], i: int, taken: list[Any]) -> Sequence[Any]:
        stage, (k, w) = self.hosted[i], unit
        takes, gives = tensor_names(stage)
        states = set(state_names(stage))
        with (
            refusing(stage, "its forward pass"),
            tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape,
        ):
            tape.watch([tensor for tensor in taken if is_differentiable(tensor.dtype)])
            tape.watch([variable.value for variable in stage.stage.trainable_variables])
            outputs = call_model(stage.stage.model, taken)
            own = own_losses(stage.stage.model, w, float_of_losses())
        record = _Record(
            i,
            unit,
            tape,
            [(name, k, w - 1 if name in states else w) for name in takes],
            [(name, k, w) for name in gives],
            taken,
            outputs,
            own,
        )
        if not self.heads[i].couples_samples:
            self._losses(record)
        share = self.batch.grid.sizes[k] / self.batch.grid.samples
        self.loss += share * sum(float(loss) for loss in own)
        records.append(record)
        return outputs

    def _losses(self, record: _Record) -> None:
        """What the stage's heads send into its outputs; the loss alone is differentiated."""
        objective = self._objective(record.stage, record.unit)
        if objective is not None:
            outputs = {place: record.outputs[place] for place in {head.place for head in self.heads[record.stage]}}
            record.seeds += self._differentiate(record.stage, objective, outputs, list(outputs.values()))

    def _whole_losses(self, records: Sequence[_Record]) -> None:
        """The same where a loss couples samples: predictions of all microbatches joined."""
        for i, heads in enumerate(self.heads):
            if heads.couples_samples:
                mine = [record for record in records if record.stage == i]
                places = sorted({head.place for head in heads})
                parts = [record.outputs[place] for record in mine for place in places]
                objective = self._objective(i, None)
                assert objective is not None
                seeds = {id(t): g for t, g in self._differentiate(i, objective, (mine, places), parts)}
                for record in mine:
                    record.seeds += [(t, seeds[id(t)]) for t in record.outputs if id(t) in seeds]

    def _differentiate(
        self, i: int, objective: Objective, predictions: Any, tensors: Sequence[Any]
    ) -> list[tuple[Any, Any]]:
        """(tensor, dL/dtensor) of tensors that the heads' losses read, or of the logits behind them."""
        logits = [logits for t in tensors if (logits := logits_of(t)) is not None]
        sources = [t for t in [*tensors, *logits] if is_differentiable(t.dtype)]
        with refusing(self.hosted[i], "its loss"), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            if isinstance(predictions, tuple):
                records, places = predictions
                predictions = {
                    place: joined_riding([record.outputs[place] for record in records], 0) for place in places
                }
            values = self.heads[i].values(predictions, objective)
            terms = self.heads[i].terms(values, objective.heads)
        self.loss += sum(float(term) for term in terms)
        if not terms:
            return []
        seed = tf.cast(self.batch.loss_scale, terms[0].dtype)
        found = tape.gradient(terms, sources, output_gradients=[seed])
        return [(t, dense(g)) for t, g in zip(sources, found, strict=True) if g is not None]

    def _objective(self, i: int, unit: Unit | None) -> Objective | None:
        """What a stage's heads need for a unit, or (None) for the whole batch."""
        stage, batch = self.hosted[i], self.batch
        over = [stage.gives_over_time(head.place) for head in self.heads[i]]
        which = [h for h in range(len(over)) if unit is None or over[h] or batch.grid.is_last(unit[1])]
        if not which or not batch.targets:
            return None
        labels = [stage.labels[h] for h in which]
        if unit is None:
            targets = [batch.targets[label] for label in labels]
            given = [batch.sample_weights.get(label) for label in labels]
            weights: list[float] = [1.0] * len(which)
        else:
            targets = [batch.grid.part(batch.targets[b], *unit, over[h]) for h, b in zip(which, labels, strict=True)]
            given = [weight_part(batch, label, unit, over[h]) for h, label in zip(which, labels, strict=True)]
            weights = [self.weights[i, h][unit] for h in which]
        return Objective(
            tuple(tf.convert_to_tensor(target) for target in targets),
            tuple(None if weight is None else tf.convert_to_tensor(weight) for weight in given),
            tuple(weights),
            tuple(which),
        )

    def _backward(self, record: _Record) -> None:
        """Contract what arrives at a segment's outputs with its Jacobians."""
        stage, k = self.hosted[record.stage], record.unit[0]
        variables = stage.stage.trainable_variables
        places = [p for p in range(len(record.inputs)) if self._is_wanted(stage, record, p)]
        sources = [record.inputs[p] for p in places] + [variable.value for variable in variables]
        pairs = list(record.seeds)
        for place, output in zip(record.gives, record.outputs, strict=True):
            parts = self.arriving.pop(place, [])
            if parts and is_differentiable(output.dtype):
                pairs.append((output, reduce(plus, parts)))
        found: list[Any] = [None] * len(sources)
        rows = 0
        for output, seed in pairs:
            rows += int(output.shape.num_elements())
            found = [plus(a, b) for a, b in zip(found, self._contract(record, output, seed, sources), strict=True)]
        self.rows[record.stage] = max(self.rows[record.stage], rows)
        if record.own:  # scalars: their Jacobian is their gradient
            share = self.batch.loss_scale * self.batch.grid.sizes[k] / self.batch.grid.samples
            for loss in record.own:
                mine = record.tape.gradient(loss, sources)
                found = [plus(a, None if g is None else dense(g) * share) for a, g in zip(found, mine, strict=True)]
        self._hand_down(record, dict(zip(places, found[: len(places)], strict=True)))
        totals = self.totals[record.stage]
        for p, gradient in enumerate(found[len(places) :]):
            if gradient is not None:
                value = np.asarray(gradient).astype(np.float64)
                totals[p] = value if totals[p] is None else totals[p] + value
        del record.tape

    def _is_wanted(self, stage: HostedStage, record: _Record, p: int) -> bool:
        """Whether anybody wants dL/d(input p)."""
        if not is_differentiable(record.inputs[p].dtype):
            return False
        if p < len(stage.spec.inputs):
            return stage.spec.inputs[p][1] != DRIVER
        return record.unit[1] > 0 and not self.batch.begins_block(record.unit[1])

    def _hand_down(self, record: _Record, found: dict[int, Any]) -> None:
        stage, (k, w) = self.hosted[record.stage], record.unit
        for p, gradient in found.items():
            if gradient is not None:
                self.arriving.setdefault(record.takes[p], []).append(gradient)
        for p, (name, source) in enumerate(stage.spec.inputs):
            if source != DRIVER and is_differentiable(record.inputs[p].dtype):
                value = found.get(p)
                self.boundary[CutPlace(source, name, stage.spec.index, k, w)] = (
                    None if value is None else np.array(value)
                )

    def _contract(self, record: _Record, output: Any, seed: Any, sources: Sequence[Any]) -> list[Any]:
        """dL/dsource of every source through one output; None where the output does not depend on it."""
        where = f"stage {self.hosted[record.stage].spec.name!r}, microbatch {record.unit[0]}, window {record.unit[1]}"
        work = Contraction(record.tape, output, tf.cast(seed, output.dtype), list(sources), False, where)
        reached = connected(work)
        if not any(reached):
            return [None] * len(reached)
        work = replace(work, sources=[source for source, yes in zip(sources, reached, strict=True) if yes])
        each = iter(contract_by_rows(work, self.limit))
        return [next(each) if yes else None for yes in reached]


__all__ = ["ROW_LIMIT", "by_chain_rule"]

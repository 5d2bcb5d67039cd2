"""The reference: the joined model under one tape, in a process of its own.

It hosts all segments, calls them one after the other under a single `tf.GradientTape`, and asks that tape for all
gradients at once. No activation or gradient is handed over, no output gradient is passed: what the pipeline must equal.
It runs in a worker process, since results of convolutions depend on the size of TensorFlow's thread pools, which is set
once per process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import tensorflow as tf

from stages.hosted import HostedStage, makes_masks
from stages.part import mask_of, with_mask
from stages.worker import Worker, serve
from transport.message import DRIVER, Key

Values = Sequence[Any]


class SingleTape:
    """One tape over all stages.

    Args:
        hosted: The stages, in the order of the data flow.
    """

    def __init__(self, hosted: Sequence[HostedStage]) -> None:
        self.hosted = hosted

    @property
    def variables(self) -> list[Any]:
        """All trainable variables, stage after stage."""
        return [variable for hosted in self.hosted for variable in hosted.stage.trainable_variables]

    def run(
        self,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        target: np.ndarray[Any, Any] | None,
        sample_weight: np.ndarray[Any, Any] | None,
        sizes: Sequence[int],
    ) -> tuple[dict[str, list[float | None]], list[Any | None]]:
        """Gradients of the whole batch on the same microbatches.

        Args:
            inputs: {name: (n, ...)}.
            target: (n, ...).
            sample_weight: As the loss takes it, or None.
            sizes: Samples per microbatch.

        Returns:
            {stage: [objective, own losses]} as workers report them, and dL/dvariables summed in ascending order.
        """
        slices = [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
        whole = next((h.head for h in self.hosted if h.head is not None and h.head.couples_samples), None)
        head = next((h.head for h in self.hosted if h.head is not None), None)
        weights: Sequence[float] = (1.0,) * len(sizes)
        if head is not None and target is not None:
            parts = None if sample_weight is None else [sample_weight[s] for s in slices]
            masks = self._prediction_masks(inputs, slices)
            weights = head.weights(sizes, [target[s] for s in slices], parts, masks)
        if whole is not None:
            return self._coupled(inputs, target, sample_weight, sizes, slices)
        total: list[Any | None] | None = None
        losses: dict[str, list[Any]] = {str(h.spec.index): [None, None] for h in self.hosted}
        for k, part in enumerate(slices):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                for variable in self.variables:
                    tape.watch(variable.value)
                weight = None if sample_weight is None else tf.constant(sample_weight[part])
                targets, seeds, found = self._objective(
                    {name: tf.constant(array[part]) for name, array in inputs.items()},
                    None if target is None else tf.constant(target[part]),
                    weight,
                    weights[k],
                    sizes[k] / sum(sizes),
                )
            gradients = tape.gradient(targets, [v.value for v in self.variables], output_gradients=seeds)
            dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
            total = dense if total is None else [_add(a, b) for a, b in zip(total, dense, strict=True)]
            _count(losses, found)
        assert total is not None
        return _plain(losses), total

    def _prediction_masks(
        self, inputs: Mapping[str, np.ndarray[Any, Any]], slices: Sequence[slice]
    ) -> list[np.ndarray[Any, Any]] | None:
        """The masks of the predictions per microbatch, from a forward pass of the joined model; None without any."""
        if not any(makes_masks(hosted.stage.model) for hosted in self.hosted):
            return None
        found = []
        for part in slices:
            tensors = {name: tf.constant(array[part]) for name, array in inputs.items()}
            prediction = None
            for hosted in self.hosted:
                outputs = self._call(hosted, tensors, training=False)
                if hosted.head is not None:
                    prediction = tf.nest.flatten(outputs)[0]
            mask = mask_of(prediction)
            if mask is None:
                return None
            found.append(np.array(mask))
        return found

    def _objective(
        self, tensors: dict[str, Any], target: Any, sample_weight: Any, weight: float, share: float
    ) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """All that is differentiated for one microbatch: the weighted loss, and every stage's own losses."""
        targets, seeds, found = [], [], {}
        loss, prediction_of = None, None
        for hosted in self.hosted:
            outputs = self._call(hosted, tensors)
            own = [tf.reduce_sum(tf.cast(term, "float32")) for term in hosted.stage.model.losses]
            if hosted.head is not None and target is not None:
                value = hosted.head.value(target, outputs, sample_weight)
                loss, prediction_of = value * tf.cast(weight, value.dtype), str(hosted.spec.index)
            found[str(hosted.spec.index)] = [None, _scaled_sum(own, share)]
            targets += own
            seeds += [tf.cast(share, term.dtype) for term in own]
        if loss is not None and prediction_of is not None:
            found[prediction_of][0] = loss
            targets, seeds = [loss, *targets], [tf.ones_like(loss), *seeds]
        return targets, seeds, found

    def _call(self, hosted: HostedStage, tensors: dict[str, Any], training: bool = True) -> Any:
        """One segment's model, its inputs by name; its outputs join the tensors.

        Each input is a tensor of its own, so that a segment's several uses of it are summed before those of other
        segments are: sums of three numbers depend on the order, and this is the cut model's. A mask that the segment
        takes off is off for those after it.
        """
        given = [tensors[name] for name, _ in hosted.spec.inputs]
        taken = [with_mask(tensor, mask_of(tensor)) for tensor in given]
        outputs = hosted.stage.model(taken[0] if len(taken) == 1 else taken, training=training)
        for tensor, copy in zip(given, taken, strict=True):
            if mask_of(tensor) is not None and mask_of(copy) is None:
                tensor._keras_mask = None
        flat = tf.nest.flatten(outputs)
        tensors |= {name: tensor for (name, _), tensor in zip(hosted.spec.outputs, flat, strict=True)}
        return outputs

    def _coupled(
        self, inputs: Mapping[str, Any], target: Any, sample_weight: Any, sizes: Sequence[int], slices: Sequence[slice]
    ) -> tuple[dict[str, list[float | None]], list[Any | None]]:
        """A loss over the whole batch: all microbatches under one tape, their predictions joined."""
        losses: dict[str, list[Any]] = {str(h.spec.index): [None, None] for h in self.hosted}
        predictions, own, head_of = [], [], self.hosted[-1]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in self.variables:
                tape.watch(variable.value)
            for k, part in enumerate(slices):
                tensors = {name: tf.constant(array[part]) for name, array in inputs.items()}
                targets, seeds, found = self._objective(tensors, None, None, 1.0, sizes[k] / sum(sizes))
                own += list(zip(targets, seeds, strict=True))
                predictions.append(tensors[head_of.spec.outputs[0][0]])
                _count(losses, found)
            assert head_of.head is not None
            weight = None if sample_weight is None else tf.constant(sample_weight)
            loss = head_of.head.value(tf.constant(target), tf.concat(predictions, axis=0), weight)
        losses[str(head_of.spec.index)][0] = [loss]
        gradients = tape.gradient(
            [loss, *(t for t, _ in own)],
            [v.value for v in self.variables],
            output_gradients=[tf.ones_like(loss), *(s for _, s in own)],
        )
        return _plain(losses), [None if g is None else tf.convert_to_tensor(g) for g in gradients]


class ReferenceWorker(Worker):
    """A worker that hosts all stages and computes a step's gradients under one tape."""

    def _do_step(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        hosted = [self.hosted[index] for index in sorted(self.hosted)]
        inputs, target, sample_weight = {}, None, None
        for stage in hosted:
            for name, source in stage.spec.inputs:
                if source == DRIVER:
                    key = Key("activation", order["step"], stage.spec.index, DRIVER, name)
                    inputs[name] = self._take(key).array
            if stage.head is not None and stage.head.loss is not None and order["mode"] != "masks":
                target = self._take(Key("target", order["step"], stage.spec.index)).array
                if order["sample_weight"]:
                    sample_weight = self._take(Key("sample_weight", order["step"], stage.spec.index)).array
        if order["mode"] == "masks":
            return {"losses": {}, "masked": False}  # the joined model looks for itself
        losses, gradients = SingleTape(hosted).run(inputs, target, sample_weight, order["sizes"])  # type: ignore[arg-type]
        self._found = gradients
        return {"losses": losses, "metrics": {}}

    def _gradients_of(self, index: int) -> list[np.ndarray[Any, Any] | None]:
        """The part of the one tape's gradients that belongs to a stage."""
        begin = sum(len(self.hosted[i].stage.trainable_variables) for i in sorted(self.hosted) if i < index)
        count = len(self.hosted[index].stage.trainable_variables)
        return [None if g is None else np.array(g) for g in self._found[begin : begin + count]]


def main(spec: Mapping[str, Any], board: np.ndarray[Any, Any]) -> None:
    """Entry of the reference's process; the arguments are a worker's."""
    serve(ReferenceWorker, spec, board)


def _add(a: Any | None, b: Any | None) -> Any | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _scaled_sum(terms: Sequence[Any], share: float) -> Any | None:
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * tf.cast(share, total.dtype)


def _count(losses: dict[str, list[Any]], found: Mapping[str, Sequence[Any]]) -> None:
    for index, pair in found.items():
        for i, value in enumerate(pair):
            if value is not None:
                losses[index][i] = [*(losses[index][i] or []), value]


def _plain(losses: Mapping[str, Sequence[Any]]) -> dict[str, list[float | None]]:
    return {index: [_total(values) for values in pair] for index, pair in losses.items()}


def _total(values: Sequence[Any] | None) -> float | None:
    if not values:
        return None
    total = np.asarray(values[0])
    for value in values[1:]:
        total = total + np.asarray(value)
    return float(total)


__all__ = ["ReferenceWorker", "SingleTape", "main"]

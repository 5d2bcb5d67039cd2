"""The user's own model and loss on one batch, in the user's process: nothing here is a copy or a recipe.

    values of the stages ──► the user's own variables ──► own model, own loss, one tape ──► own values put back

What it leaves is `pipeline.own.lent`'s business: afterwards every bit of the user's objects is as it was.

The model is the object that was split, or the models that the pipeline was put together from. Keras's own trainer
resolves the loss (a Keras model without layers, compiled with it), on the outputs of the *whole* batch. The model is
called once per microbatch, as the pipeline calls its stages, so that statistics and random numbers are the same; over
the whole length, whatever `windows` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.batch.step import Batch
from pipeline.compare.tolerance import eps
from pipeline.compiled.compiled import Compiled
from pipeline.model.merge import StageValues
from pipeline.model.wiring import Wires
from stages.keras_internals import layers_of, let_inner_layers_mask, own_other_variables, own_seed_generators
from stages.loss.head import LossModel
from stages.loss.precision import rounded_once
from stages.masks import joined_with_masks
from stages.recipe.segment import Segment
from stages.tape.accumulate import dense
from stages.tape.eagerly import eagerly
from stages.tape.model_call import packer, states_of_layers
from stages.worker import snapshot
from transport.dtypes import DTYPES

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OwnResult:
    """The loss, outputs and gradients of the user's own objects for one batch.

    Attributes:
        loss: The objective: losses by their weights, and own losses (regularisers, `add_loss`); None without a loss.
        outputs: {tensor name: array (n, ...)} of the model's outputs.
        gradients: {id of a trainable variable: its gradient, or None}; empty if none were asked for.
        losses: {output label: its loss, unweighted}, of those that have one; empty without a loss.
        tensors: The outputs with their masks.
        metrics: Of the workers: {name in the logs: value}.
    """

    loss: float | None
    outputs: Mapping[str, Array]
    gradients: Mapping[int, Array | None]
    losses: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartResults:
    """The outputs of the model's parts, one after the other: where a difference begins.

    Attributes:
        tensors: {tensor name: array (n, ...)} of all that a part gives.
        own_losses: {stage: its own losses (regularisers, `add_loss`) as they count in the batch}, of those with any.
    """

    tensors: Mapping[str, Array]
    own_losses: Mapping[int, float]


class OwnModel:
    """The user's own model and loss.

    Args:
        segments: The pipeline's segments; each holds a model whose variables are the user's.
        wires: How they are connected.
        original: The model that was split; None if the pipeline was put together from models.
        compiled: What `compile` was given.
    """

    def __init__(self, segments: Sequence[Segment], wires: Wires, original: Any | None, compiled: Compiled | None):
        self._parts = [segment.model for segment in segments]
        self.wires, self._original, self._compiled = wires, original, compiled
        self._layer_states: StageValues = {}
        self._judge: Any = None
        self._judges: dict[str, Any] = {}

    @property
    def variables(self) -> list[Any]:
        """All variables that a run may change, each once: weights, statistics, seeds, metrics of layers."""
        models = self._parts if self._original is None else [self._original, *self._parts]
        found = [v for m in models for v in (*m.variables, *m.metrics_variables, *states_of_layers(m))]
        return list({id(variable): variable for variable in found}.values())

    @property
    def layers(self) -> list[Any]:
        """All layers at any depth, each once."""
        models = self._parts if self._original is None else [self._original, *self._parts]
        return list({id(layer): layer for model in models for layer in layers_of(model)}.values())

    @property
    def precision(self) -> float:
        """eps of the coarsest dtype that a layer computes in."""
        dtypes = {str(getattr(layer, "compute_dtype", None)) for layer in self.layers}
        return max([eps(dtype) for dtype in dtypes if dtype in DTYPES], default=0.0) or eps("float32")

    @property
    def in_model_order(self) -> list[Any]:
        """The trainable variables, each once, as one optimizer of the whole model has them."""
        models = self._parts if self._original is None else [self._original]
        return list({id(v): v for model in models for v in model.trainable_variables}.values())

    @property
    def trainable(self) -> list[list[Any]]:
        """For each stage its trainable variables, in order: the user's own objects."""
        return [list(part.trainable_variables) for part in self._parts]

    def begin_with(self, layer_states: StageValues) -> None:
        """From now on let `assign` give stateful layers these states."""
        self._layer_states = layer_states

    def assign(self, values: StageValues) -> None:
        """Give the user's variables the values of the stages; see `pipeline.own.lent`."""
        for stage, part in enumerate(self._parts):
            snapshot.write(part.variables, values[stage], f"stage {self.wires.names[stage]!r}")
            if self._layer_states:
                snapshot.write(states_of_layers(part), self._layer_states[stage], f"states of {part.name!r}")

    def values(self) -> dict[int, list[Array]]:
        """What the user's variables have now, by stage."""
        return {stage: snapshot.read(part.variables) for stage, part in enumerate(self._parts)}

    def changed_by_calls(self, before: StageValues) -> dict[str, str]:
        """{layer: path of a variable of its own that no gradient trains} of layers that changed it in a run.

        Not of BatchNormalization, which every user knows, nor of generators of random numbers.

        Args:
            before: What the variables had before the run.
        """
        changed = set()
        for stage, part in enumerate(self._parts):
            pairs = zip(part.variables, before[stage], snapshot.read(part.variables), strict=True)
            changed |= {id(variable) for variable, old, new in pairs if old.tobytes() != new.tobytes()}
        found = {}
        for layer in self.layers:
            seeds = {id(generator.state) for generator in own_seed_generators(layer)}
            some = [v for v in own_other_variables(layer) if id(v) in changed and id(v) not in seeds]
            if some and not isinstance(layer, keras.layers.BatchNormalization):
                found[layer.name] = snapshot.path_of(some[0])
        return found

    def disturb(self, seed: int) -> None:
        """Change every floating variable by at most one rounding of what the model computes in, at random.

        What this changes in a result is what rounding may change: the measure of "differs by more than rounding".
        """
        draw, coarsest = np.random.default_rng(seed), self.precision
        for variable in self.variables:
            value = variable.value.read_value()
            if value.dtype.is_floating:
                by = max(eps(value.dtype.name), coarsest)
                noise = 1 + by * draw.uniform(-1, 1, tuple(value.shape))
                variable.value.assign(tf.cast(tf.cast(value, tf.float64) * noise, value.dtype))

    def run(self, batch: Batch, training: bool, gradients: bool = False, loss_scale: float | None = None) -> OwnResult:
        """One batch through the user's own objects, eagerly.

        Args:
            batch: Inputs, targets and sample weights by name, and the sizes of the microbatches.
            training: Whether layers run as in training.
            gradients: Whether to differentiate the loss.
            loss_scale: Factor on the loss while it is differentiated, which the gradients are divided by again.

        Returns:
            Losses, outputs and gradients. Variables that the run itself changed (statistics, seeds) stay changed.
        """
        wanted = {id(v): v for part in self.trainable for v in part} if gradients else {}
        judged = None if self._compiled is None or not batch.targets else self._compiled
        with eagerly(), tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in wanted.values():
                tape.watch(variable.value)
            runs = [self._call(rows, training) for rows in _microbatches(batch)]
            outputs = {name: _joined([run[name] for run, _ in runs]) for name, _ in self.wires.outputs}
            loss = None
            if judged is not None:
                shares = [size / sum(batch.sizes) for size in batch.sizes]
                loss = tf.reduce_sum(self._loss(outputs, batch, judged))  # without a reduction it has many
                for share, (_, own) in zip(shares, runs, strict=True):
                    for one in own:
                        loss = loss + tf.cast(tf.reduce_sum(one) * rounded_once(share, one.dtype), loss.dtype)
                target = loss if loss_scale is None else loss * rounded_once(loss_scale, loss.dtype)
        found: dict[int, Array | None] = {}
        if gradients and loss is not None:
            values = tape.gradient(target, [variable.value for variable in wanted.values()])
            found = {key: _unscaled(g, loss_scale) for key, g in zip(wanted, values, strict=True)}
        arrays = {name: np.asarray(tensor) for name, tensor in outputs.items()}
        with eagerly():
            each = {} if judged is None else self._losses(outputs, batch, judged)
        return OwnResult(None if loss is None else float(loss), arrays, found, each, outputs)

    def parts(self, batch: Batch, training: bool) -> PartResults:
        """What every part of the model gives for a batch that is not cut in time."""
        found: dict[str, list[Any]] = {}
        own_losses: dict[int, float] = {}
        with eagerly():
            for size, rows in zip(batch.sizes, _microbatches(batch), strict=True):
                tensors, own = self._through_parts(rows, training)
                for name, tensor in tensors.items():
                    found.setdefault(name, []).append(tensor)
                for stage, losses in own.items():
                    share = sum(float(tf.reduce_sum(one)) for one in losses) * size / sum(batch.sizes)
                    own_losses[stage] = own_losses.get(stage, 0.0) + share
        return PartResults({name: np.asarray(_joined(tensors)) for name, tensors in found.items()}, own_losses)

    def _call(self, rows: Mapping[str, Any], training: bool) -> tuple[dict[str, Any], list[Any]]:
        """The outputs by tensor name, and own losses, of one microbatch."""
        if self._original is None:
            found, own = self._through_parts(rows, training)
            return found, [one for losses in own.values() for one in losses]
        tensors = [tf.convert_to_tensor(rows[name]) for name in self.wires.inputs]
        given = packer(self._original)(tensors)
        outputs = keras.tree.flatten(self._original(given, training=training))
        return {name: tensor for (name, _), tensor in zip(self.wires.outputs, outputs, strict=True)}, list(
            self._original.losses
        )

    def _through_parts(self, rows: Mapping[str, Any], training: bool) -> tuple[dict[str, Any], dict[int, list[Any]]]:
        """What each part gives, by tensor name, and its own losses, by stage."""
        tensors = {name: tf.convert_to_tensor(array) for name, array in rows.items()}
        losses: dict[int, list[Any]] = {}
        for i, part in enumerate(self._parts):
            taken = [tensors[name] for name, _ in self.wires.takes[i]]
            given = packer(part)(taken)
            with _handing_masks_on(part):
                outputs = keras.tree.flatten(part(given, training=training))
            tensors |= {name: tensor for (name, _), tensor in zip(self.wires.gives[i], outputs, strict=True)}
            if own := list(part.losses):
                losses[i] = own
        return {name: tensors[name] for gives in self.wires.gives for name, _ in gives}, losses

    def _losses(self, outputs: Mapping[str, Any], batch: Batch, compiled: Compiled) -> dict[str, float]:
        """Each output's loss by itself, unweighted, as Keras computes it from the user's own loss object."""
        names = {label: name for name, label in self.wires.labelled}
        found = {}
        for one in compiled.objectives:
            if one.loss is None:
                continue
            if one.label not in self._judges:
                self._judges[one.label] = LossModel()
                self._judges[one.label].compile(optimizer=None, loss=one.loss)
            target, weight = as_tensors(batch, one.label)
            value = self._judges[one.label].compute_loss(None, target, outputs[names[one.label]], weight)
            found[one.label] = float(tf.reduce_sum(value))
        return found

    def _loss(self, outputs: Mapping[str, Any], batch: Batch, compiled: Compiled) -> Any:
        """The compiled loss of the whole batch, as Keras's trainer computes it from the user's own loss objects."""
        names = {label: name for name, label in self.wires.labelled}
        objectives = [one for one in compiled.objectives if one.loss is not None]
        if not objectives:
            return tf.zeros((), keras.config.floatx())
        labels = [one.label for one in objectives]
        if self._judge is None:
            self._judge = LossModel()
            several = len(labels) > 1
            weights = {one.label: 1.0 if one.weight is None else float(one.weight) for one in objectives}
            weighed = any(one.weight is not None for one in objectives)
            self._judge.compile(
                optimizer=None,
                loss={one.label: one.loss for one in objectives} if several else objectives[0].loss,
                loss_weights=(weights if several else [weights[labels[0]]]) if weighed else None,
            )
        predicted = {label: outputs[names[label]] for label in labels}
        given_with = {label: as_tensors(batch, label) for label in labels}
        targets = {label: target for label, (target, _) in given_with.items()}
        weighted = {label: weight for label, (_, weight) in given_with.items() if weight is not None}
        if len(labels) == 1:
            (label,) = labels
            return self._judge.compute_loss(None, targets[label], predicted[label], weighted.get(label))
        given = {label: weighted.get(label) for label in labels} if weighted else None
        return self._judge.compute_loss(None, targets, predicted, given)


def as_tensors(batch: Batch, label: str) -> tuple[Any, Any | None]:
    """The targets (n, ...) of an output and its sample weights, or None, as tensors: so Keras's `fit` gives them."""
    weight = batch.sample_weights.get(label)
    return tf.convert_to_tensor(batch.targets[label]), None if weight is None else tf.convert_to_tensor(weight)


def _microbatches(batch: Batch) -> Iterator[dict[str, Any]]:
    begin = 0
    for size in batch.sizes:
        yield {name: array[begin : begin + size] for name, array in batch.inputs.items()}
        begin += size


@contextmanager
def _handing_masks_on(part: Any) -> Iterator[None]:
    """A part hands masks on, as it does in its worker, for a while."""
    before = part.supports_masking
    let_inner_layers_mask(part)
    try:
        yield
    finally:
        if not before:
            part.supports_masking = before
            del part.compute_mask


def _unscaled(gradient: Any, loss_scale: float | None) -> Array | None:
    if gradient is None:
        return None
    found = np.asarray(dense(gradient))
    return found if loss_scale is None else found / found.dtype.type(loss_scale)


def _joined(tensors: Sequence[Any]) -> Any:
    """Microbatches as one batch, their masks too; a single one as it is, with all that Keras has put on it."""
    return tensors[0] if len(tensors) == 1 else joined_with_masks(tensors)

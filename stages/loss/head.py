"""The objective at the end of a pipeline: Keras's loss and metrics, and what a microbatch weighs in its batch.

Keras reduces a loss over the batch it is called on. Over microbatches the batch's loss is

    L = sum over k of (D_k / D) * L_k,        D = sum over k of D_k,

where L_k is Keras's own value on microbatch k and D_k is the denominator it used: elements for the mean
(``sum_over_batch_size``), valid elements where a class is ignored, the sum of the sample weights for
``mean_with_sample_weight``. A sum has no denominator: every weight is 1. Dividing by the number of microbatches is
right only where all D_k are equal.

Loss and metrics are resolved by Keras itself (names, functions, objects, "accuracy"), in a model without layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.loss.ways import Way, Ways, known_loss, known_metrics

_SUMS = ("sum", "none", None)


class Head:
    """Loss and metrics of one output, as its stage applies them.

    Args:
        loss: What `keras.Model.compile` takes for one output: a name, function, `keras.losses.Loss`, or None.
        metrics: A list of names, functions or metric objects.
        weighted_metrics: The same, updated with the sample weights.
        place: Which of its stage's outputs it judges.
        label: The output's name among several; metrics are called after it, as in Keras. None: there is one output.
        weight: What the loss weighs among several (`loss_weights`): a number or a variable; None: 1.

    Attributes:
        known: The ways of losses and metrics that are Keras's own; None for what must be tried.
        ways: How its loss and metrics are made of microbatches; settable.
        example: Once metrics have counted, [dtype, shape] of target, prediction and sample weight (or None), with 1 in
            the place of a free size: what another process can build the same variables from.
    """

    def __init__(
        self,
        loss: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *,
        place: int = 0,
        label: str | None = None,
        weight: Any | None = None,
    ) -> None:
        self.place, self.label, self.weight = place, label, weight
        self.judge = LossModel()
        self.judge.compile(optimizer=None, loss=loss, metrics=metrics, weighted_metrics=weighted_metrics)
        self.loss = None if loss is None else keras.losses.get(loss)
        self._counts = bool(metrics) or bool(weighted_metrics)
        self._built = False
        self.example: list[Any] | None = None
        self.known = (known_loss(self.loss), known_metrics([*_listed(metrics), *_listed(weighted_metrics)]))
        self.ways = Ways(self.known[0] or Way.PARTS, self.known[1] or Way.PARTS)

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a sample depends on other samples, so that it needs the whole batch at once."""
        return self.ways.loss is Way.WHOLE

    def build(self, target: Any, prediction: Any, sample_weight: Any | None) -> None:
        """Create the metrics' variables from one example, without counting it."""
        if self._built:
            return
        self.judge.compute_metrics(None, target, prediction, sample_weight=sample_weight)
        self.reset()
        self._built = True

    @property
    def built(self) -> bool:
        """Whether the metrics' variables exist."""
        return self._built

    @property
    def is_mean(self) -> bool:
        """Whether the loss has a denominator, so that a mask on the predictions changes what a microbatch weighs."""
        if self.loss is None or self.ways.loss is not Way.PARTS:
            return False
        return getattr(self.loss, "reduction", "sum_over_batch_size") not in _SUMS

    @property
    def has_metrics(self) -> bool:
        """Whether there is anything to update besides the loss."""
        return self._counts

    def value(self, target: Any, prediction: Any, sample_weight: Any | None) -> Any:
        """Keras's loss of one microbatch: a float scalar, or zero where there is no loss."""
        if self.loss is None:
            return tf.zeros((), keras.config.floatx())
        value = self.judge.compute_loss(None, target, prediction, sample_weight)
        return tf.reduce_sum(value)

    def update(self, target: Any, prediction: Any, sample_weight: Any | None) -> None:
        """Let the metrics count one microbatch."""
        if self.has_metrics:
            self.example = self.example or [_kind(one) for one in (target, prediction, sample_weight)]
            self.judge.compute_metrics(None, target, prediction, sample_weight=sample_weight)

    def results(self) -> dict[str, Any]:
        """The metrics' values so far, by name, in Keras's order: floats, or lists of them (a value per class)."""
        found = self.judge.get_metrics_result()
        prefix = "" if self.label is None else f"{self.label}_"
        return {f"{prefix}{name}": np.asarray(value).tolist() for name, value in found.items() if name != "loss"}

    def reset(self) -> None:
        """Start counting anew."""
        self.judge.reset_metrics()

    @property
    def variables(self) -> list[Any]:
        """The metrics' state."""
        return [variable for metric in self.judge.metrics for variable in metric.variables]

    def weights(
        self,
        sizes: Sequence[int],
        targets: Sequence[np.ndarray[Any, Any]],
        sample_weights: Sequence[np.ndarray[Any, Any]] | None,
        masks: Sequence[np.ndarray[Any, Any]] | None = None,
    ) -> tuple[float, ...]:
        """What each microbatch's loss weighs in the batch's (D_k / D, see the module).

        Args:
            sizes: Samples per microbatch.
            targets: Targets per microbatch, (n_k, ...).
            sample_weights: Sample weights per microbatch, (n_k,) or the loss's shape, or None.
            masks: The Keras masks of the predictions per microbatch, or None if they have none.

        Returns:
            One weight per microbatch. They sum to 1, except for a sum, where each is 1.
        """
        reduction = getattr(self.loss, "reduction", "sum_over_batch_size")
        if reduction in _SUMS or self.ways.loss is Way.SUM:
            return (1.0,) * len(sizes)
        shares = [float(size) for size in sizes]
        ignored = getattr(self.loss, "ignore_class", None)
        weighted = reduction == "mean_with_sample_weight" and sample_weights is not None
        if ignored is not None or weighted or masks is not None:
            shares = [
                _denominator(
                    _valid(target, ignored, None if masks is None else masks[k]),
                    sample_weights[k] if weighted and sample_weights is not None else None,
                )
                for k, target in enumerate(targets)
            ]
        total = sum(shares)
        return tuple(share / total if total else 0.0 for share in shares)


class LossModel(keras.Model):  # type: ignore[misc]
    """A Keras model without layers: it resolves and applies losses and metrics exactly as Keras's trainer does."""

    def __init__(self) -> None:
        super().__init__(name="objective")
        self.built = True

    def call(self, prediction: Any) -> Any:
        """The prediction itself; Keras wants a model to have a call."""
        return prediction


def _kind(tensor: Any | None) -> list[Any] | None:
    """A tensor's dtype and shape, 1 where it is free."""
    if tensor is None:
        return None
    sizes = () if tensor.shape.rank is None else tensor.shape
    return [tensor.dtype.name, [1 if size is None else int(size) for size in sizes]]


def _listed(metrics: Any) -> Sequence[Any]:
    """One metric, a list of them or None as a flat list."""
    return [] if metrics is None else list(keras.tree.flatten(metrics))


def _valid(
    target: np.ndarray[Any, Any], ignored: int | None, mask: np.ndarray[Any, Any] | None
) -> np.ndarray[Any, Any] | None:
    """Which elements count: not of an ignored class, not masked out. None: all."""
    valid = None if ignored is None else np.asarray(target) != ignored
    if mask is None:
        return valid
    mask = np.asarray(mask, dtype=bool)
    return mask if valid is None else _ranked(mask, valid.ndim) & valid


def _denominator(valid: np.ndarray[Any, Any] | None, sample_weight: np.ndarray[Any, Any] | None) -> float:
    """What Keras divides by: counted (weighted) elements."""
    if valid is None:
        return float(np.sum(np.asarray(sample_weight), dtype=np.float64))
    if sample_weight is None:
        return float(np.count_nonzero(valid))
    weight = np.asarray(sample_weight)
    rank = max(weight.ndim, valid.ndim)
    return float(np.sum(_ranked(valid, rank) * _ranked(weight, rank), dtype=np.float64))


def _ranked(array: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    """The array with axes of size 1 behind, up to a rank."""
    return array.reshape(array.shape + (1,) * (rank - array.ndim))


def check_targets(target: Any, inputs_size: int, stage: str) -> None:
    """Refuse targets whose first dimension is not the batch.

    Raises:
        HandoffError: The number of targets differs from the number of samples.
    """
    if target.shape and target.shape[0] != inputs_size:
        raise HandoffError(
            f"stage {stage!r}: expected one target per sample, received {target.shape[0]} target(s) for "
            f"{inputs_size} sample(s)"
        )

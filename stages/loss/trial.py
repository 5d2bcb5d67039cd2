"""Try a loss or metric of the user's own on a batch and its parts: is the batch's value made of theirs?

    p, drawn p  ──►  L(whole), dL/dp   against   sum of w_k L(part k), w_k dL/dp      for several cuts

Mathematics alone does not tell a mean from a root of a mean, so values and gradients are compared: on the predictions
of the real batch and on drawn ones like them, under the batch's own cut and under unequal ones. What agrees may be
computed microbatch by microbatch; what does not needs the whole batch. An error in a part is such a disagreement.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from stages.grid import Grid
from stages.loss.head import Head
from stages.loss.ways import Way, Ways
from stages.masks import with_mask

Array = np.ndarray[Any, Any]
ELEMENTS = 2**20
"""So many elements of predictions are tried at most, in rows from all over the batch."""
APART = 1e-5
"""Values and gradients that are farther apart, as a part of the largest, are not the same."""


class Example(NamedTuple):
    """A batch of one output.

    Attributes:
        target: (n, ...).
        prediction: (n, ...).
        sample_weight: Or None.
        grid: How the batch is cut.
        over_time: Whether windows cut the output.
        masked: Whether the model may send a mask along with the predictions.
    """

    target: Array
    prediction: Array
    sample_weight: Array | None
    grid: Grid
    over_time: bool = False
    masked: bool = False


def tried(head: Head, example: Example) -> Ways | None:
    """How the head's loss and metrics are made of microbatches.

    Args:
        head: Of its own; its metrics count nothing afterwards.
        example: What it is tried on.

    Returns:
        The ways; None if nothing finite came out, so that nothing can be said.

    Raises:
        Exception: What the loss or a metric raises on the whole batch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that are unusually small; training will say what it has to
        return _tried(head, example)


def _tried(head: Head, example: Example) -> Ways | None:
    rows, cuts = _fewer(example), []
    for sizes in _cuts(example.grid, len(rows.target)):
        cuts.append(Grid(sizes, example.grid.lengths))
    trials = [
        _Trial(head, rows._replace(prediction=p), mask, cuts)
        for p in (rows.prediction, _drawn(rows.prediction))
        for mask in _masks(rows)
    ]
    loss, metrics = head.known
    if loss is None:
        found = [ways for trial in trials if (ways := trial.loss()) is not None]
        if not found:
            return None
        loss = next((way for way in (Way.PARTS, Way.SUM) if all(way in ways for ways in found)), Way.WHOLE)
    if metrics is None:
        head.build(tf.constant(rows.target[:1]), tf.constant(rows.prediction[:1]), None)
        metrics = Way.PARTS if all(trial.counts_parts() for trial in trials) else Way.WHOLE
        head.reset()
    return Ways(loss, metrics)


class _Trial:
    """One set of predictions under several cuts."""

    def __init__(self, head: Head, rows: Example, mask: Array | None, cuts: Sequence[Grid]) -> None:
        self.head, self.rows, self.mask, self.cuts = head, rows, mask, cuts

    def loss(self) -> list[Way] | None:
        """In which ways the batch's loss is that of its parts; None if it is not finite."""
        whole, whole_gradient = self._differentiated(self.rows.target, self.rows.prediction, self._weight, self.mask)
        if not (np.isfinite(whole) and np.isfinite(whole_gradient).all()):
            return None
        left = [Way.PARTS, Way.SUM]
        for grid in self.cuts:
            try:
                parts = [self._differentiated(*part) for part in self._parts(grid)]
            except Exception:  # a loss that wants pairs, or a fixed number of samples
                return []
            left = [way for way in left if self._agree(way, grid, parts, whole, whole_gradient)]
        return left

    def counts_parts(self) -> bool:
        """Whether metrics that count the parts are where they are after counting the whole."""
        whole = self._counted([(self.rows.target, self.rows.prediction, self._weight, self.mask)])
        for grid in self.cuts:
            try:
                parts = self._counted(list(self._parts(grid)))
            except Exception:
                return False
            if not all(_same(a, b) for a, b in zip(whole, parts, strict=True)):
                return False
        return True

    @property
    def _weight(self) -> Array | None:
        return self.rows.sample_weight

    def _parts(self, grid: Grid) -> Iterator[tuple[Array, Array, Array | None, Array | None]]:
        """Target, prediction, sample weight and mask of each part."""
        over_time, weight, mask = self.rows.over_time, self._weight, self.mask
        for unit in grid.units(over_time):
            yield (
                grid.part(self.rows.target, *unit, over_time),
                grid.part(self.rows.prediction, *unit, over_time),
                None if weight is None else grid.part(weight, *unit, over_time and weight.ndim > 1),
                None if mask is None else grid.part(mask, *unit, over_time),
            )

    def _agree(self, way: Way, grid: Grid, parts: Sequence[tuple[float, Array]], whole: float, gradient: Array) -> bool:
        over_time, head = self.rows.over_time, self.head
        cut, units = list(self._parts(grid)), list(grid.units(over_time))
        before, head.ways = head.ways, head.ways._replace(loss=way)
        weights = head.weights(
            [grid.elements(*unit, over_time) for unit in units],
            [target for target, *_ in cut],
            None if self._weight is None else [np.asarray(weight) for _, _, weight, _ in cut],
            None if self.mask is None else [np.asarray(mask) for *_, mask in cut],
        )
        head.ways = before
        joined = np.empty_like(gradient)
        for unit, weight, (_, found) in zip(units, weights, parts, strict=True):
            grid.part(joined, *unit, over_time)[...] = weight * found
        terms = [weight * value for weight, (value, _) in zip(weights, parts, strict=True)]
        size = max(abs(whole), *map(abs, terms))
        return abs(sum(terms) - whole) <= APART * size and _same(joined, gradient)

    def _differentiated(
        self, target: Array, prediction: Array, weight: Array | None, mask: Array | None
    ) -> tuple[float, Array]:
        """The loss, and its gradient with respect to the predictions; zeros where there is none."""
        tensor = tf.constant(prediction)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensor)
            judged = with_mask(tf.identity(tensor), None if mask is None else tf.constant(mask))
            value = self.head.value(tf.constant(target), judged, None if weight is None else tf.constant(weight))
        found = tape.gradient(value, tensor) if tensor.dtype.is_floating else None
        return float(value), np.zeros_like(prediction) if found is None else np.asarray(tf.convert_to_tensor(found))

    def _counted(self, parts: Sequence[tuple[Array, Array, Array | None, Array | None]]) -> list[Array]:
        """The metrics' variables and values after they counted some parts."""
        self.head.reset()
        for target, prediction, weight, mask in parts:
            judged = with_mask(tf.constant(prediction), None if mask is None else tf.constant(mask))
            self.head.update(tf.constant(target), judged, None if weight is None else tf.constant(weight))
        values = [np.asarray(value) for value in self.head.results().values()]
        return [*(np.asarray(variable.numpy()) for variable in self.head.variables), *values]


def _same(a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    size = float(np.abs(b).max(initial=0.0)) if b.dtype.kind in "fiub" else 0.0
    return bool(np.allclose(a, b, rtol=0, atol=APART * size, equal_nan=True))


def _fewer(example: Example) -> Example:
    """The example with as many rows as are tried, and predictions in float32."""
    prediction = example.prediction
    if prediction.dtype.kind not in "iub" and prediction.dtype != np.float64:
        prediction = prediction.astype(np.float32)
    samples = len(prediction)
    wanted = max(2 * len(example.grid.sizes), ELEMENTS // max(1, prediction[0].size))
    rows = np.arange(samples) if wanted >= samples else np.linspace(0, samples - 1, wanted).astype(int)
    weight = example.sample_weight
    return example._replace(
        target=example.target[rows],
        prediction=prediction[rows],
        sample_weight=None if weight is None else weight[rows],
    )


def _cuts(grid: Grid, samples: int) -> list[tuple[int, ...]]:
    """The sizes of parts: as many as the batch has, one sample apart, and a third against the rest."""
    parts, more = min(len(grid.sizes), samples), samples % min(len(grid.sizes), samples)
    found = [tuple(samples // parts + (k < more) for k in range(parts))]
    if samples > 1:
        found += [(1, samples - 1), (samples - samples // 3, samples // 3)]
    return [sizes for sizes in found if all(sizes)]


def _masks(example: Example) -> list[Array | None]:
    """No mask, and one with holes of different sizes where the model may send one."""
    shape = example.prediction.shape
    if not example.masked or len(shape) < 3:
        return [None]
    mask = np.random.default_rng(1).random(shape[:2]) < np.linspace(0.4, 0.9, shape[0])[:, None]
    mask[:, 0] = True
    return [None, mask]


def _drawn(prediction: Array) -> Array:
    """Random predictions where those of a model that is not trained may be all alike: of the same kind."""
    if prediction.dtype.kind != "f" or not np.isfinite(prediction).all():
        return prediction
    found: Any
    draw, low, high = np.random.default_rng(0), float(prediction.min()), float(prediction.max())
    rows = prediction.reshape(-1, prediction.shape[-1]) if prediction.ndim > 1 else prediction[:, None]
    if low >= 0 and high <= 1:
        found = draw.uniform(0.05, 0.95, prediction.shape)
        if rows.shape[1] > 1 and np.allclose(rows.sum(axis=1), 1, atol=1e-3):
            found /= found.sum(axis=-1, keepdims=True)
    elif low >= 0:
        found = draw.uniform(0.1, 1, prediction.shape) * high
    elif rows.shape[1] > 1 and np.allclose((rows**2).sum(axis=1), 1, atol=1e-3):
        found = draw.normal(size=prediction.shape)
        found /= np.linalg.norm(found, axis=-1, keepdims=True)
    elif low >= -1 and high <= 1:
        found = draw.uniform(-0.95, 0.95, prediction.shape)
    else:
        found = prediction.mean() + draw.normal(size=prediction.shape) * max(1.0, float(prediction.std()))
    return np.asarray(found, prediction.dtype)


__all__ = ["Example", "tried"]

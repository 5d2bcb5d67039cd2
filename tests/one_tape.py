"""What exactness is measured against: one `tf.GradientTape` over the joined model and one Keras optimizer.

Written from TensorFlow and Keras alone. It shares no code with the packages, `pipeline.reference.worker` least of all,
so that both can be wrong only independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Gradients = list[np.ndarray | None]


class OneTape:
    """The segments joined, trained on the same microbatches.

    Args:
        parts: Keras models, called one after the other.
        loss: A Keras loss whose value is a mean over samples.
        optimizer: One Keras optimizer for all variables.
    """

    def __init__(self, parts: Sequence[Any], loss: Any, optimizer: Any = None) -> None:
        self.parts, self.loss, self.optimizer = list(parts), loss, optimizer
        if optimizer is not None:
            optimizer.build(self.variables)

    @property
    def variables(self) -> list[Any]:
        """All trainable variables, part after part."""
        return [variable for part in self.parts for variable in part.trainable_variables]

    def weights(self) -> list[np.ndarray]:
        """All weights, part after part, as `Pipeline.get_weights` orders them."""
        return [weight for part in self.parts for weight in part.get_weights()]

    def train(self, x: Any, y: Any, microbatches: int) -> np.float32:
        """One update; the loss before it."""
        loss, gradients = self._differentiate(x, y, microbatches)
        pairs = [(g, v) for g, v in zip(gradients, self.variables, strict=True) if g is not None]
        self.optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])
        return loss

    def gradients(self, x: Any, y: Any, microbatches: int) -> tuple[np.float32, Gradients]:
        """The loss and its gradients; statistics and seeds are put back."""
        states = [variable for part in self.parts for variable in part.non_trainable_variables]
        before = [variable.numpy() for variable in states]
        loss, gradients = self._differentiate(x, y, microbatches)
        for variable, value in zip(states, before, strict=True):
            variable.assign(value)
        return loss, [None if g is None else tf.convert_to_tensor(g).numpy() for g in gradients]

    def _differentiate(self, x: Any, y: Any, microbatches: int) -> tuple[np.float32, list[Any]]:
        """Microbatches in ascending order, each under a tape of the whole model; sums in that order."""
        samples = len(y)
        loss, own = np.float32(0), [np.float32(0)] * len(self.parts)
        total: list[Any] = [None] * len(self.variables)
        for rows in np.array_split(np.arange(samples), min(microbatches, samples)):
            share = np.float32(len(rows) / samples)
            with tf.GradientTape() as tape:
                h = tf.constant(x[rows])
                terms = []
                for part in self.parts:
                    h = part(h, training=True)
                    terms.append(part.losses)
                value = self.loss(tf.constant(y[rows]), h) * share
            own_terms = [term for losses in terms for term in losses]
            seeds = [tf.ones(()), *(tf.fill((), share) for _ in own_terms)]
            found = tape.gradient([value, *own_terms], self.variables, output_gradients=seeds)
            total = [plus(a, b) for a, b in zip(total, found, strict=True)]
            loss += value.numpy()
            own = [a + tf.add_n(found).numpy() * share if found else a for a, found in zip(own, terms, strict=True)]
        for term in own:
            loss += term
        return loss, total


def plus(a: Any, b: Any) -> Any:
    """The sum; an embedding's rows stay as the tapes gave them, one behind the other, as the optimizer gets them."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values, indices = tf.concat([a.values, b.values], 0), tf.concat([a.indices, b.indices], 0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)


def reported(loss: np.float32, samples: int) -> float:
    """What `train_on_batch` says of a loss: a mean over samples so far, as of `keras.metrics.Mean`."""
    return float(np.float32(loss * np.float32(samples)) / np.float32(samples))


def assert_same_bits(ours: Sequence[Any], theirs: Sequence[Any], what: str) -> None:
    """Equal dtypes, shapes and bits, one by one; None only beside None."""
    assert len(ours) == len(theirs), what
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), f"{what} {i}: one of the two does not exist"
        if a is None or b is None:
            continue
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what} {i}"
        assert np.isfinite(a).all(), f"{what} {i} is not finite"
        assert a.tobytes() == b.tobytes(), f"{what} {i} {a.shape}: differs by up to {np.abs(a - b).max():.3g}"


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest difference as a part of the largest |value| of all of `theirs`."""
    assert [a is None for a in ours] == [b is None for b in theirs]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    assert all(np.isfinite(a).all() and np.isfinite(b).all() for a, b in pairs)
    largest = max(float(np.abs(b).max()) for _, b in pairs if b.size)
    assert largest > 0.0
    return max(float(np.abs(a.astype("float64") - b).max()) for a, b in pairs if a.size) / largest

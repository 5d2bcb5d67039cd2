"""The objective: what a microbatch weighs in its batch, which losses need all of it, metrics over microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages.errors import HandoffError
from stages.loss.head import Head, check_targets
from stages.loss.heads import Heads, whole_batch
from stages.recipe.describe import create, describe

losses = keras.losses
SIZES = (3, 2)
SPARSE = losses.SparseCategoricalCrossentropy


def weights(loss: Any, targets: Sequence[Any], sample_weights: Sequence[Any] | None = None) -> list[float]:
    arrays = [np.asarray(target) for target in targets]
    given = None if sample_weights is None else [np.asarray(w, "float32") for w in sample_weights]
    return list(Head(loss).weights([len(a) for a in arrays], arrays, given))


LABELS = ([0, 1, 2], [2, 2])
WEIGHTS = ([1.0, 2.0, 3.0], [0.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "sample_weights", "expected"),
    [
        (SPARSE(), None, [3 / 5, 2 / 5]),
        (SPARSE(), WEIGHTS, [3 / 5, 2 / 5]),
        (SPARSE(reduction="mean"), WEIGHTS, [3 / 5, 2 / 5]),
        (SPARSE(reduction="sum"), WEIGHTS, [1, 1]),
        (SPARSE(reduction="none"), None, [1, 1]),
        (SPARSE(reduction=None), None, [1, 1]),
        (SPARSE(reduction="mean_with_sample_weight"), None, [3 / 5, 2 / 5]),
        (SPARSE(reduction="mean_with_sample_weight"), WEIGHTS, [6 / 8, 2 / 8]),
        (SPARSE(ignore_class=2), None, [1, 0]),
        (SPARSE(ignore_class=0), None, [1 / 2, 1 / 2]),
        (SPARSE(ignore_class=0), WEIGHTS, [1 / 2, 1 / 2]),
        (SPARSE(ignore_class=0, reduction="mean_with_sample_weight"), WEIGHTS, [5 / 7, 2 / 7]),
        (SPARSE(ignore_class=0, reduction="sum"), WEIGHTS, [1, 1]),
        ("sparse_categorical_crossentropy", None, [3 / 5, 2 / 5]),
    ],
)
def test_a_microbatch_weighs_its_part_of_the_denominator(
    loss: Any, sample_weights: Any, expected: Sequence[float]
) -> None:
    """Samples for a mean, valid elements where a class is ignored, weights for a weighted mean, 1 for a sum."""
    assert weights(loss, LABELS, sample_weights) == pytest.approx(expected)


def test_nothing_to_count_weighs_nothing() -> None:
    """All ignored, or all weights zero: no division by zero."""
    assert weights(SPARSE(ignore_class=2), ([2, 2], [2])) == [0.0, 0.0]
    zero = ([0.0, 0.0], [0.0])
    assert weights(SPARSE(reduction="mean_with_sample_weight"), ([0, 1], [1]), zero) == [0.0, 0.0]


def test_elements_are_counted_where_targets_have_a_time_axis() -> None:
    """Ignored steps, and weights per step or per sample beside them."""
    targets = ([[0, 1], [2, 0]], [[1, 1]])
    assert weights(SPARSE(ignore_class=0), targets) == pytest.approx([2 / 4, 2 / 4])
    per_step = ([[9, 1], [2, 9]], [[3, 1]])
    loss = SPARSE(ignore_class=0, reduction="mean_with_sample_weight")
    assert weights(loss, targets, per_step) == pytest.approx([3 / 7, 4 / 7])
    per_sample = ([[1], [2]], [[3]])
    assert weights(loss, targets, per_sample) == pytest.approx([3 / 9, 6 / 9])


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("ignored", [None, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_microbatches_add_up_to_keras_value(reduction: str, ignored: int | None, weighted: bool) -> None:
    """The sum of weight times value over microbatches is Keras's value of the batch."""
    rng = np.random.default_rng(0)
    loss = SPARSE(reduction=reduction, ignore_class=ignored, from_logits=True)
    y, prediction = rng.integers(0, 3, 5), rng.normal(size=(5, 3)).astype("float32")
    w = rng.uniform(size=5).astype("float32") if weighted else None
    head = Head(loss)
    parts = [slice(0, 3), slice(3, 5)]
    share = head.weights(SIZES, [y[p] for p in parts], None if w is None else [w[p] for p in parts])
    found = sum(
        s * float(head.value(tf.constant(y[p]), tf.constant(prediction[p]), None if w is None else tf.constant(w[p])))
        for s, p in zip(share, parts, strict=True)
    )
    assert found == pytest.approx(float(loss(y, prediction, sample_weight=w)), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "coupled"),
    [
        (losses.Dice(), True),
        (losses.Dice(axis=(1, 2)), False),
        (losses.Dice(axis=(0, 1)), True),
        (losses.Tversky(), True),
        (losses.Tversky(axis=1), False),
        (losses.Circle(), True),
        (losses.CosineSimilarity(axis=0), True),
        (losses.CosineSimilarity(), False),
        (losses.BinaryCrossentropy(axis=0), True),
        (losses.dice, True),
        ("tversky", True),
        ("mse", False),
        (None, False),
    ],
)
def test_losses_that_need_the_whole_batch(loss: Any, coupled: bool) -> None:
    """Those that reduce over the samples' axis, or over all."""
    assert Head(loss).couples_samples is coupled


@pytest.mark.parametrize(
    "loss",
    [
        losses.Huber(delta=0.1),
        losses.CosineSimilarity(axis=1),
        losses.SparseCategoricalCrossentropy(axis=1),
        losses.Tversky(alpha=0.2, beta=0.8, axis=(1, 2)),
        losses.BinaryFocalCrossentropy(gamma=3.0, apply_class_balancing=True),
        losses.CategoricalGeneralizedCrossEntropy(q=0.2),
        keras.metrics.CosineSimilarity(axis=1),
    ],
    ids=lambda loss: loss.name,
)
def test_a_worker_gets_the_arguments_that_keras_forgets(loss: Any) -> None:
    """A copy made from the recipe calls the same function with the same arguments, by JSON's lists for tuples."""
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in loss._fn_kwargs.items()}
    copy = create(describe(loss, "it"))
    assert type(copy) is type(loss)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in copy._fn_kwargs.items()} == plain


def test_a_worker_gets_what_an_optimizer_was_told() -> None:
    """Names excluded from weight decay travel; variable objects cannot."""
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    copy = create(describe(optimizer, "the optimizer"))
    bias, kernel = keras.Variable([1.0], name="bias"), keras.Variable([1.0], name="kernel")
    copy.build([bias, kernel])
    copy.apply([tf.zeros(1), tf.zeros(1)], [bias, kernel])
    assert float(bias.numpy()[0]) == 1.0
    assert float(kernel.numpy()[0]) == pytest.approx(0.95)
    optimizer.exclude_from_weight_decay(var_list=[bias])
    again = create(describe(optimizer, "the optimizer"))  # objects are of one process: `StageSpec.undecayed` has them
    again.build([bias, kernel])
    assert not optimizer._use_weight_decay(bias) and again._use_weight_decay(bias)


def test_metrics_count_over_microbatches() -> None:
    """Results are those of the whole batch, weighted where asked for; building and resetting count nothing."""
    rng = np.random.default_rng(0)
    y, prediction = rng.integers(0, 3, 5), rng.uniform(size=(5, 3)).astype("float32")
    w = rng.uniform(size=5).astype("float32")
    head = Head(SPARSE(), ["accuracy"], [keras.metrics.SparseCategoricalCrossentropy(name="entropy")])
    assert head.has_metrics and not Head(SPARSE()).has_metrics
    head.build(tf.constant(y[:3]), tf.constant(prediction[:3]), tf.constant(w[:3]))
    for _ in range(2):
        for p in (slice(0, 3), slice(3, 5)):
            head.update(tf.constant(y[p]), tf.constant(prediction[p]), tf.constant(w[p]))
        accuracy, entropy = keras.metrics.SparseCategoricalAccuracy(), keras.metrics.SparseCategoricalCrossentropy()
        accuracy.update_state(y, prediction)
        entropy.update_state(y, prediction, sample_weight=w)
        found = {name: float(value) for name, value in head.results().items()}
        assert found == pytest.approx({"accuracy": float(accuracy.result()), "entropy": float(entropy.result())})
        head.reset()


def test_a_loss_over_the_whole_batch_is_differentiated_scaled() -> None:
    """Every gradient comes times the loss scale: in half precision it would be zero by the time it is multiplied."""
    rng = np.random.default_rng(1)
    y, prediction = (rng.standard_normal((5, 2)).astype("float32") for _ in range(2))
    heads = Heads([Head(lambda y, p: keras.ops.sqrt(keras.ops.mean(keras.ops.square(y - p))))])
    parts = [{0: tf.constant(prediction[:3])}, {0: tf.constant(prediction[3:])}]
    plain, scaled = (whole_batch(heads, parts, heads.objective(y, None, 1.0), True, s).gradients for s in (1.0, 8.0))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(other[0], 8.0 * one[0].numpy())


def test_no_loss_is_zero() -> None:
    """A pipeline may have only own losses."""
    assert float(Head().value(tf.zeros((2, 1)), tf.zeros((2, 1)), None)) == 0.0


def test_one_target_a_sample() -> None:
    """Other counts are refused with both numbers."""
    check_targets(np.zeros((3, 1)), 3, "top")
    with pytest.raises(HandoffError, match=r"'top'.*received 2 target\(s\) for 3 sample\(s\)"):
        check_targets(np.zeros((2, 1)), 3, "top")

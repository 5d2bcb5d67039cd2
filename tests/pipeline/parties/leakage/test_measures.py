"""Measures of leakage have their published values, say everything of what leaks and nothing of what does not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import DataError
from pipeline.parties.leakage.distance_correlation import (
    chance_of_independence,
    distance_correlation,
    unbiased_distance_correlation,
)
from pipeline.parties.leakage.inversion import inversion_leaks, peak_signal_to_noise, structural_similarity
from pipeline.parties.leakage.labels import area_under_curve, by_chance, embedding_leaks, gradient_leaks, norm_scores

RANDOM = np.random.default_rng(0)


def of_a_normal(rho):
    """Székely, Rizzo and Bakirov 2007, theorem 7: the distance correlation of a bivariate normal distribution."""
    half = rho / 2
    above = rho * np.arcsin(rho) + np.sqrt(1 - rho**2) - rho * np.arcsin(half) - np.sqrt(4 - rho**2) + 1
    return np.sqrt(above / (1 + np.pi / 3 - np.sqrt(3)))


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75, 0.9])
def test_distance_correlation_of_a_bivariate_normal_is_the_published_one(rho):
    rows = np.random.default_rng(1).multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=1500)
    assert distance_correlation(rows[:, 0], rows[:, 1]) == pytest.approx(of_a_normal(rho), abs=0.05)
    assert unbiased_distance_correlation(rows[:, 0], rows[:, 1]) == pytest.approx(of_a_normal(rho) ** 2, abs=0.05)


def test_rows_that_are_turned_moved_and_scaled_tell_everything():
    rows = RANDOM.normal(size=(32, 6))
    turn = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
    assert distance_correlation(rows, 3.0 * rows @ turn + 5.0) == pytest.approx(1.0, abs=1e-9)
    assert unbiased_distance_correlation(rows, -0.2 * rows @ turn) == pytest.approx(1.0, abs=1e-9)
    assert chance_of_independence(rows, rows @ turn) == pytest.approx(1 / 201)


def test_of_independent_rows_only_the_corrected_one_is_nothing_at_the_size_of_a_batch():
    biased, corrected = [], []
    for _ in range(60):
        a, b = RANDOM.normal(size=(32, 30)), RANDOM.normal(size=(32, 8))
        biased.append(distance_correlation(a, b))
        corrected.append(unbiased_distance_correlation(a, b))
    assert np.mean(biased) > 0.7
    assert abs(np.mean(corrected)) < 0.03 and np.std(corrected) < 0.1
    assert chance_of_independence(RANDOM.normal(size=(32, 30)), RANDOM.normal(size=(32, 8))) > 0.01


def test_distances_are_those_of_a_double_loop():
    a, b = RANDOM.normal(size=(7, 3)), RANDOM.normal(size=(7, 2))
    x, y = (np.array([[np.linalg.norm(p - q) for q in rows] for p in rows]) for rows in (a, b))
    n = len(a)

    def u(d):
        return np.array(
            [
                [
                    0.0
                    if i == j
                    else d[i, j] - d[i].sum() / (n - 2) - d[:, j].sum() / (n - 2) + d.sum() / ((n - 1) * (n - 2))
                    for j in range(n)
                ]
                for i in range(n)
            ]
        )

    x, y = u(x), u(y)
    assert unbiased_distance_correlation(a, b) == pytest.approx(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))


def test_an_area_is_the_share_of_pairs_in_order():
    scores, positive = RANDOM.integers(0, 4, 40), RANDOM.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert area_under_curve(scores, positive) == pytest.approx(np.mean(pairs))
    with pytest.raises(DataError, match="only one kind"):
        area_under_curve(scores, np.ones(40, bool))


def at_a_linear_head(chances, labels):
    """dL/dz = (p - y) w of a binary cross-entropy behind a linear head."""
    return (chances - labels)[:, None] * RANDOM.normal(size=8)


def test_behind_a_linear_head_the_angle_tells_every_label_at_the_size_of_a_batch():
    labels = (np.arange(32) % 3 == 0).astype(float)
    found = gradient_leaks(at_a_linear_head(RANDOM.uniform(0.05, 0.95, 32), labels), labels)
    assert found["cosine"] == found["spectral"] == 1.0
    assert found["norm"] < 0.9


@pytest.mark.parametrize(("chance", "area"), [(0.1, 1.0), (0.37, 1.0), (0.6, 0.0)])
def test_the_norm_tells_the_rarer_class_of_a_constant_predictor(chance, area):
    labels = (np.arange(32) % 4 == 0).astype(float)
    gradients = at_a_linear_head(np.full(32, chance), labels)
    assert area_under_curve(norm_scores(gradients), labels == 1) == area
    assert gradient_leaks(gradients, labels)["norm"] == 1.0


def test_gradients_that_do_not_know_the_label_tell_nothing():
    areas = []
    for _ in range(40):
        areas.append(gradient_leaks(RANDOM.normal(size=(256, 8)), RANDOM.integers(0, 2, 256)))
    for attack in ("norm", "cosine", "spectral"):
        assert np.mean([found[attack] for found in areas]) < 0.56  # either way round: a little over a half


def test_labels_may_be_one_hot_and_rows_without_a_gradient_score_nothing():
    labels = np.arange(30) % 3
    gradients = np.eye(3)[labels] + 0.01 * RANDOM.normal(size=(30, 3))
    gradients[0] = 0.0
    one_hot, numbers = gradient_leaks(gradients, np.eye(3)[labels]), gradient_leaks(gradients, labels[:, None])
    assert one_hot == numbers and one_hot["cosine"] > 0.99
    assert gradient_leaks(gradients, np.zeros(30)) == {}
    with pytest.raises(DataError, match="labels must be classes"):
        gradient_leaks(gradients, RANDOM.normal(size=30))


@pytest.mark.parametrize(("rows", "classes"), [(32, 2), (64, 10)])
def test_what_is_read_where_nothing_leaks_is_measured_beside_it(rows, classes):
    found, floor = [], []
    for k in range(12):
        gradients, labels = RANDOM.normal(size=(rows, 8)), RANDOM.integers(0, classes, rows)
        found.append(gradient_leaks(gradients, labels))
        floor.append(by_chance(gradient_leaks, gradients, labels, k, 8))
    for attack in ("norm", "cosine", "spectral"):
        assert np.mean([one[attack] for one in floor]) > 0.54
        assert np.mean([a[attack] - b[attack] for a, b in zip(found, floor, strict=True)]) == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize(
    "labels",
    [np.array([[5, 7], [9, 2], [1, 1], [2, 2]]), RANDOM.normal(size=(4, 2)), np.array([1, None, 2, 1], object)],
)
def test_what_is_no_class_is_not_taken_for_one(labels):
    with pytest.raises(DataError, match=r"one-hot or chances|numbers or text"):
        gradient_leaks(RANDOM.normal(size=(4, 3)), labels)


def test_a_small_column_that_leaks_is_not_lost_among_large_ones():
    secret = RANDOM.integers(0, 2, (128, 1)).astype(float)
    told = inversion_leaks(secret, np.concatenate([RANDOM.normal(scale=1000, size=(128, 1)), secret], axis=1))
    assert told["column"] > 0.99 and told["ridge"] > 0.3


def test_embeddings_tell_labels_only_where_they_hold_them():
    labels = RANDOM.integers(0, 2, 256)
    apart, mixed = RANDOM.normal(size=(256, 4)) + 4.0 * labels[:, None], RANDOM.normal(size=(256, 4))
    told = embedding_leaks(apart, labels)
    assert told["logistic"] > 0.99 and told["clusters"] > 0.95 and told["commonest"] < 0.6
    assert np.mean([embedding_leaks(mixed, RANDOM.permutation(labels), k)["logistic"] for k in range(10)]) < 0.6


def test_inputs_are_drawn_again_from_what_holds_them_and_not_from_noise():
    x = RANDOM.normal(size=(64, 5)) * [1, 2, 3, 4, 5]
    told = inversion_leaks(x @ RANDOM.normal(size=(5, 8)), x)
    assert told["ridge"] > 0.999 and told["psnr"] > 40
    untold = inversion_leaks(RANDOM.normal(size=(64, 8)), x)
    assert untold["ridge"] < 0.1 and untold["nearest"] < 0.1
    assert inversion_leaks(x, np.ones((64, 3))) == {}
    with pytest.raises(DataError, match="at least 8 rows"):
        inversion_leaks(x[:7], x[:7])


def test_likeness_of_images_is_one_of_the_same_and_by_hand_of_flat_ones():
    images = RANDOM.random((4, 9, 9))
    assert structural_similarity(images, images) == pytest.approx(1.0)
    assert structural_similarity(images, RANDOM.random((4, 9, 9))) < 0.3
    true = np.concatenate([np.full((1, 9, 9), 0.2), np.full((1, 9, 9), 0.8)])
    a, b, c1 = true[:, 0, 0], np.array([0.3, 0.7]), (0.01 * 0.6) ** 2
    by_hand = np.mean((2 * a * b + c1) / (a * a + b * b + c1))
    drawn = np.broadcast_to(b[:, None, None], (2, 9, 9))
    assert structural_similarity(true, drawn) == pytest.approx(by_hand)
    assert peak_signal_to_noise([0.0, 1.0], [0.1, 0.9]) == pytest.approx(20.0)
    assert peak_signal_to_noise([0.0, 1.0], [0.0, 1.0]) == np.inf


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="the same number twice, received 5 and 6"):
        distance_correlation(np.ones((5, 2)), np.ones((6, 2)))
    with pytest.raises(DataError, match="must be finite"):
        unbiased_distance_correlation(np.full((5, 2), np.nan), np.ones((5, 2)))
    with pytest.raises(DataError, match="must be numbers"):
        distance_correlation(np.array(["a", "b"]), np.ones(2))

"""Inversion: how much of the inputs a receiver of activations can draw again, once some pairs are known to him.

Half of the rows teach an attacker who maps z to x, by ridge regression or by the nearest known rows; the other half
judges. R² is 0 for who draws the mean of all rows, 1 for a perfect drawing. PSNR = 20 log10(range) - 10 log10(MSE), in
decibels. SSIM: Wang et al., "Image quality assessment", 2004 (Gaussian window of 1.5 pixels, K1 0.01, K2 0.03).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.parties.leakage.distance_correlation import flat_rows
from pipeline.parties.leakage.optional import scikit_learn, scipy

Array = np.ndarray[Any, Any]
LEAST_ROWS = 8


def inversion_leaks(activations: Any, inputs: Any, seed: int = 0) -> dict[str, float]:
    """How well inputs are drawn again from activations; of both attackers the better one.

    Args:
        activations: z of the rows at a cut (n, ...), n >= 8.
        inputs: x of the same rows (n, ...); images are (n, height, width) or (n, height, width, channels).
        seed: Of the halves.

    Returns:
        {"ridge", "nearest": R², the mean of all columns, below 0 where the columns' means would be better; "column":
        R² of the column that is drawn best; "psnr": decibels; "ssim": of images of at least 7 x 7, -1 to 1}. Columns of
        x that never change are left out of R². Empty where no column changes.

    Raises:
        DataError: Rows do not fit each other, are fewer than 8 or not finite; scikit-learn is not installed.
    """
    learn = scikit_learn("linear_model", "neighbors", "pipeline", "preprocessing")
    z, x, shape = flat_rows(activations, "activations"), flat_rows(inputs, "inputs"), np.shape(inputs)
    if len(z) != len(x) or len(z) < LEAST_ROWS:
        raise DataError(f"an inversion takes at least {LEAST_ROWS} rows of both, received {len(z)} and {len(x)}")
    order = np.random.default_rng(seed).permutation(len(z))
    known, asked = order[: len(z) // 2], order[len(z) // 2 :]
    changing = (np.ptp(x[known], axis=0) > 0.0) & (np.ptp(x[asked], axis=0) > 0.0)
    if not changing.any():
        return {}
    middle, spread = x[known].mean(axis=0), x[known].std(axis=0)
    spread[spread == 0.0] = 1.0
    attackers = {
        "ridge": learn.linear_model.RidgeCV(np.logspace(-6, 3, 10)),
        "nearest": learn.neighbors.KNeighborsRegressor(min(3, len(known)), weights="distance"),
    }
    drawn = {}
    for name, attacker in attackers.items():
        scaled = learn.pipeline.make_pipeline(learn.preprocessing.StandardScaler(), attacker)
        image = np.asarray(scaled.fit(z[known], (x[known] - middle) / spread).predict(z[asked]))
        drawn[name] = image.reshape(x[asked].shape) * spread + middle
    columns = {name: _r_squared(x[asked][:, changing], image[:, changing]) for name, image in drawn.items()}
    found = {name: float(each.mean()) for name, each in columns.items()}
    best = drawn[max(found, key=lambda name: found[name])]
    found["column"] = float(max(each.max() for each in columns.values()))
    found["psnr"] = peak_signal_to_noise(x[asked], best)
    if len(shape) in (3, 4) and min(shape[1:3]) >= 7 and (len(shape) == 3 or shape[3] <= 4):
        images = (len(asked), *shape[1:])
        found["ssim"] = structural_similarity(x[asked].reshape(images), best.reshape(images))
    return found


def peak_signal_to_noise(true: Any, drawn: Any) -> float:
    """PSNR in decibels, the range being that of the true values; infinite for a perfect drawing."""
    true, drawn = np.asarray(true, np.float64), np.asarray(drawn, np.float64)
    error, reach = np.mean((true - drawn) ** 2), np.ptp(true)
    return float("inf") if error == 0.0 else float(20.0 * np.log10(reach) - 10.0 * np.log10(error))


def structural_similarity(true: Any, drawn: Any) -> float:
    """Mean SSIM of images.

    Args:
        true: (n, height, width) or (n, height, width, channels), at least 7 x 7.
        drawn: The same shape.
    """
    gaussian_filter = scipy("ndimage").gaussian_filter
    true, drawn = np.asarray(true, np.float64), np.asarray(drawn, np.float64)
    sigma = (0.0, 1.5, 1.5) + (0.0,) * (true.ndim - 3)

    def mean(images: Array) -> Array:
        return np.asarray(gaussian_filter(images, sigma, truncate=3.5))

    c1, c2 = (0.01 * np.ptp(true)) ** 2, (0.03 * np.ptp(true)) ** 2
    a, b = mean(true), mean(drawn)
    aa, bb, ab = mean(true * true) - a * a, mean(drawn * drawn) - b * b, mean(true * drawn) - a * b
    found = ((2 * a * b + c1) * (2 * ab + c2)) / ((a * a + b * b + c1) * (aa + bb + c2))
    edge = min(5, min(true.shape[1:3]) // 2 - 1)  # where the window leaves the image
    return float(found[:, edge : true.shape[1] - edge, edge : true.shape[2] - edge].mean())


def _r_squared(true: Array, drawn: Array) -> Array:
    """Of each column, so that one with small numbers counts like one with large ones."""
    left, whole = np.sum((true - drawn) ** 2, axis=0), np.sum((true - true.mean(axis=0)) ** 2, axis=0)
    return np.asarray(1.0 - left / whole)

"""Label leakage: how well whoever receives gradients, or holds activations, can tell one class from the others.

Each attack gives every row a score; the area under the ROC curve says how well scores order the rows by class: 1/2 is
nothing, 1 everything. A receiver who gets it the wrong way round only has to turn it, so an area a counts as
max(a, 1 - a).

Behind a linear head with a binary cross-entropy, dL/dz of a row is (p - y) w: the angle between two rows says whether
their labels are equal, always. The norm alone may say nothing at the same time, so the largest of the three counts.

Sources: Li et al., "Label leakage and protection in two-party split learning", 2022 (norm, cosine, spectral); Sun et
al., 2022, and Zheng et al., 2024 (embeddings).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.parties.leakage.distance_correlation import flat_rows
from pipeline.parties.leakage.optional import scikit_learn, scipy

Array = np.ndarray[Any, Any]
MOST_CLASSES = 64


def area_under_curve(scores: Any, positive: Any) -> float:
    """The area under the ROC curve: the chance that a positive row scores above another one, ties counting half.

    Args:
        scores: (n,).
        positive: (n,) booleans, both values among them.

    Raises:
        DataError: There are no rows of one kind, or scores are not finite.
    """
    scores, positive = flat_rows(scores, "scores")[:, 0], np.asarray(positive, bool).ravel()
    count = int(positive.sum())
    if count in (0, len(positive)):
        raise DataError("an area under the curve needs rows of the class and others, received only one kind")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[place]
    return float((ranks[positive].sum() - count * (count + 1) / 2.0) / (count * (len(positive) - count)))


def norm_scores(gradients: Any) -> Array:
    """|g| of each row: rows of the rarer class have the larger gradients while the model is unsure of them."""
    return np.asarray(np.linalg.norm(flat_rows(gradients, "gradients"), axis=1))


def cosine_scores(gradients: Any, known: int) -> Array:
    """The cosine of each row's gradient with that of one row whose class is known; 0 of a row without a gradient.

    Args:
        gradients: (n, ...).
        known: The number of the row.
    """
    rows = flat_rows(gradients, "gradients")
    sizes = np.linalg.norm(rows, axis=1)
    scale = np.where(sizes > 0.0, sizes, 1.0)
    unit = rows / scale[:, None]
    return np.asarray(unit @ unit[known])


def spectral_scores(gradients: Any) -> Array:
    """Each row along the main direction of all: their first right singular vector, not centred. Nothing is known."""
    rows = flat_rows(gradients, "gradients")
    return np.asarray(rows @ np.linalg.svd(rows, full_matrices=False)[2][0])


def gradient_leaks(gradients: Any, labels: Any) -> dict[str, float]:
    """How well each attack on gradients tells the classes apart, the worst class of each.

    Args:
        gradients: dL/dz of the rows at a cut (n, ...).
        labels: (n,) or (n, 1) classes, or (n, classes) one-hot or probabilities, of which the largest counts.

    Returns:
        {"norm", "cosine", "spectral": area under the curve, 0.5 to 1}; empty where fewer than two classes have two
        rows, which no attack can be tried on.

    Raises:
        DataError: Labels are no classes, or the rows do not fit each other.
    """
    rows, classes = flat_rows(gradients, "gradients"), classes_of(labels)
    _same_rows(rows, classes)
    norms, spectral = norm_scores(rows), spectral_scores(rows)
    found: dict[str, float] = {}
    for positive in _each_class(classes):
        known = int(np.flatnonzero(positive & (norms > 0.0))[0]) if (positive & (norms > 0.0)).any() else None
        others = np.arange(len(rows)) != known  # the known row would be right by itself
        cosine = 0.5
        if known is not None:
            cosine = _either_way(cosine_scores(rows, known)[others], positive[others])
        areas = {"norm": _either_way(norms, positive), "cosine": cosine, "spectral": _either_way(spectral, positive)}
        found = {name: max(area, found.get(name, 0.5)) for name, area in areas.items()}
    return found


def by_chance(
    attack: Callable[[Any, Any], dict[str, float]], rows: Any, labels: Any, seed: int, draws: int
) -> dict[str, float]:
    """What an attack reads where nothing leaks: its mean over labels that are dealt out anew among the rows.

    With few rows or many classes that is well above a half, since the worst class, either way round, is what counts.

    Args:
        attack: `gradient_leaks` or `embedding_leaks`.
        rows: As it takes them.
        labels: Likewise.
        seed: Of the dealing.
        draws: How often they are dealt.
    """
    random, truth = np.random.default_rng(seed), np.asarray(labels)
    found = [attack(rows, truth[random.permutation(len(truth))]) for _ in range(draws)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def embedding_leaks(activations: Any, labels: Any, seed: int = 0, clusters: bool = True) -> dict[str, float]:
    """How well activations alone tell the classes, as their receiver may ask at prediction time too.

    Half of the rows, drawn by `seed`, teach a logistic regression, which is asked about the other half; two-means (as
    many means as classes) knows no label at all.

    Args:
        activations: z of the rows at a cut (n, ...).
        labels: As for `gradient_leaks`.
        seed: Of the halves and of the means.
        clusters: Whether to look for clusters, too.

    Returns:
        {"logistic": area under the curve, 0.5 to 1, the worst class; "clusters": accuracy of the best way to name the
        clusters, beside which stands "commonest", that of naming all rows alike}; empty where fewer than two classes
        have four rows.

    Raises:
        DataError: As for `gradient_leaks`; scikit-learn is not installed.
    """
    learn = scikit_learn("cluster", "linear_model", "pipeline", "preprocessing")
    rows, classes = flat_rows(activations, "activations"), classes_of(labels)
    _same_rows(rows, classes)
    names, counts = np.unique(classes, return_counts=True)
    names = names[counts >= 4]
    if len(names) < 2:
        return {}
    kept = np.isin(classes, names)
    rows, classes = rows[kept], classes[kept]
    random = np.random.default_rng(seed)
    taught = np.zeros(len(rows), bool)
    for name in names:
        members = random.permutation(np.flatnonzero(classes == name))
        taught[members[: len(members) // 2]] = True
    steps = learn.preprocessing.StandardScaler(), learn.linear_model.LogisticRegression(max_iter=1000)
    model = learn.pipeline.make_pipeline(*steps).fit(rows[taught], classes[taught])
    told = model.predict_proba(rows[~taught])
    areas = [_either_way(told[:, k], classes[~taught] == name) for k, name in enumerate(model.classes_)]
    if not clusters:
        return {"logistic": max(areas)}
    means = learn.cluster.KMeans(len(names), n_init=4, random_state=seed).fit_predict(model[0].transform(rows))
    table = np.array([[np.sum((means == k) & (classes == name)) for name in names] for k in range(len(names))])
    return {
        "logistic": max(areas),
        "clusters": float(_best_naming(table) / len(rows)),
        "commonest": float(max(np.sum(classes == name) for name in names) / len(rows)),
    }


def classes_of(labels: Any) -> Array:
    """Classes (n,) of labels as Keras takes them.

    Raises:
        DataError: They are no classes: fractions in one column, or more than `MOST_CLASSES` values.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] > 1:
        chances = array.dtype.kind in "biuf" and bool(np.all(array >= 0))
        if not chances or not np.allclose(array.sum(axis=1), 1.0, atol=1e-3):
            raise DataError(
                f"labels of shape {array.shape} must be one-hot or chances, each row of which sums to 1, not others"
            )
        return np.asarray(array.argmax(axis=1))
    flat = array.reshape(len(array), -1) if array.ndim else array
    if array.ndim == 0 or flat.shape[1] != 1:
        raise DataError(f"labels must be (n,), (n, 1) or (n, classes), received {array.shape}")
    values = flat[:, 0]
    if values.dtype.kind not in "biufUS":
        raise DataError(f"labels must be numbers or text, received {values.dtype}")
    distinct = np.unique(values)
    whole = values.dtype.kind in "biuUS" or bool(np.all(values == np.round(values.astype(np.float64))))
    if not whole or len(distinct) > MOST_CLASSES:
        raise DataError(
            f"labels must be classes, at most {MOST_CLASSES} of them, received {len(distinct)} different values of "
            f"{values.dtype}"
        )
    return np.asarray(values)


def _each_class(classes: Array) -> list[Array]:
    """One class against the rest, of those with two rows inside and outside; of two classes once."""
    names, counts = np.unique(classes, return_counts=True)
    inside = [name for name, count in zip(names, counts, strict=True) if 2 <= count <= len(classes) - 2]
    return [classes == name for name in (inside[-1:] if len(names) == 2 else inside)]


def _either_way(scores: Array, positive: Array) -> float:
    area = area_under_curve(scores, positive)
    return max(area, 1.0 - area)


def _best_naming(table: Array) -> int:
    """The most rows that are right when every cluster gets the name of one class."""
    rows, columns = scipy("optimize").linear_sum_assignment(-table)
    return int(table[rows, columns].sum())


def _same_rows(rows: Array, classes: Array) -> None:
    if len(rows) != len(classes):
        raise DataError(f"expected a label for each of {len(rows)} rows, received {len(classes)}")

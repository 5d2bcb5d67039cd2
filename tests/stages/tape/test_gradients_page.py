"""docs/gradients.md shows what the code prints, and what it says of Keras's reductions is what Keras does."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

NAME = "docs/gradients.md"
PAGE = (Path(__file__).parents[3] / NAME).read_text()
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def test_every_block_prints_what_stands_below_it() -> None:
    names: dict[str, Any] = {}
    checked = 0
    for (language, text), (below, shown) in pairwise(BLOCKS):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, NAME, "exec"), names)
            assert below == "text" and out.getvalue() == shown
            checked += 1
    assert checked == sum(language == "python" for language, _ in BLOCKS) >= 4


VALUES = np.random.default_rng(0).normal(size=(5, 3, 1)).astype("float32")
WEIGHTS = np.array([1.0, 3.0, 0.5, 2.0, 0.0], "float32")
MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
PARTS = (slice(0, 1), slice(1, 4), slice(4, 5))
ONES = np.ones((5, 3))
DENOMINATORS: dict[tuple[str, bool], Any] = {  # (reduction, masked) -> D of each element, as in the page's table
    ("sum_over_batch_size", False): ONES,
    ("mean", False): ONES,
    ("sum_over_batch_size", True): MASK,
    ("mean_with_sample_weight", False): ONES * WEIGHTS[:, None],
    ("mean_with_sample_weight", True): MASK * WEIGHTS[:, None],
}


@pytest.mark.parametrize(("reduction", "masked"), DENOMINATORS)
def test_equation_3_gives_the_loss_of_the_whole_batch(reduction: str, masked: bool) -> None:
    loss = keras.losses.MeanSquaredError(reduction=reduction)

    def value(part: slice) -> float:
        prediction = keras.ops.convert_to_tensor(VALUES[part])
        if masked:
            prediction._keras_mask = keras.ops.convert_to_tensor(MASK[part])
        # One weight an element: Keras takes (batch,) too, but not together with a mask over time.
        weights = np.repeat(WEIGHTS[part, None], 3, axis=1)
        return float(loss(np.zeros_like(VALUES[part]), prediction, sample_weight=weights))

    share = DENOMINATORS[reduction, masked]
    weighted = sum(value(part) * share[part].sum() / share.sum() for part in PARTS)
    assert weighted == pytest.approx(value(slice(None)), rel=1e-6)
    plain = sum(value(part) for part in PARTS) / len(PARTS)
    assert plain != pytest.approx(value(slice(None)), rel=0.05)  # these microbatches do tell the difference

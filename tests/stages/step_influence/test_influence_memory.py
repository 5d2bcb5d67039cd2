"""Above the memory limit influence says the figure and evaluates nothing; below it blocks of rows follow it."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import MemoryLimitExceeded, influence
from stages.step_influence import influence as influence_module

layers = keras.layers


# -- memory --------------------------------------------------------------------------------------------------------


def test_above_the_limit_the_figure_is_said_and_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = keras.Sequential([keras.Input((64,)), layers.Dense(32, name="wide")])
    x = np.ones((2, 64), "float32")
    needed = 64 * 32 * 4 + 64 * 32 * influence_module._NORM_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(influence_module._Derivatives, "__call__", lambda *_: pytest.fail("evaluated"))
        with pytest.raises(
            MemoryLimitExceeded, match=rf"takes 72.0 KiB, more than .* at least {needed} bytes"
        ) as error:
            influence(dense, x, sources="wide/kernel", memory_limit=needed - 1)
    assert (error.value.needed, error.value.limit) == (needed, needed - 1)
    found = influence(dense, x, sources="wide/kernel", memory_limit=needed)
    # d out[n, i] / d kernel[:, i] = x[n]: 64 ones for each of 2 x 32 outputs.
    assert found.matrix == pytest.approx(math.sqrt(2 * 32 * 64))


def test_blocks_of_rows_follow_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_module, "FEW_ROWS", 0)
    lengths: list[int] = []
    real = influence_module.stacked_rows
    monkeypatch.setattr(
        influence_module, "stacked_rows", lambda f, i, s: lengths.append(int(i.shape[0])) or real(f, i, s)
    )
    dense = keras.Sequential([keras.Input((6, 8)), layers.Dense(8, name="wide")])
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    whole = influence(dense, x, sources=["input", "wide/kernel"], memory_limit=None)
    assert lengths == [16]  # 6 steps of 2 x 8 elements, one trace
    lengths.clear()
    blocks = influence(dense, x, sources=["input", "wide/kernel"], memory_limit=30_000)
    assert len(lengths) > 0 and max(lengths) < 16
    np.testing.assert_allclose(blocks.matrix, whole.matrix, rtol=1e-12)


def test_rows_are_never_vectorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's batched products corrupted the heap where rows were: attention, one head, more rows than a few."""
    monkeypatch.setattr(tf, "vectorized_map", lambda *_, **__: pytest.fail("vectorised"))
    x = keras.Input((5, 4))
    model = keras.Model(x, layers.MultiHeadAttention(1, 4)(x, x))
    given = np.random.default_rng(0).normal(size=(1, 5, 4)).astype("float32")
    assert math.prod(model(given).shape) <= influence_module.FEW_ROWS < 60
    many = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    found = influence(model, many)
    expected = np.sqrt(sum(influence(model, many[i : i + 1]).matrix ** 2 for i in range(3)))
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-5)

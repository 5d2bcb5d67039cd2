"""States that go from batch to batch, masks, windows, several stages a worker: they go on after a death as without."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.dying_workers import left, plan_faults
from tests.pipeline.runtime.recovery.mortal import GROUPS, let_die

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore::UserWarning")]
layers = keras.layers


def tagger():
    """An output for each of eight words; sentences are padded, so that losses are masked means."""
    return keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True, name="embed"),
            layers.LSTM(4, return_sequences=True, dropout=0.2, name="lstm"),
            layers.GRU(3, return_sequences=True, name="gru"),
            layers.Dense(1, name="out"),
        ]
    )


def stack():
    """Eight layers, each with chance in it."""
    parts = [one for _ in range(4) for one in (layers.Dense(6, activation="tanh"), layers.Dropout(0.2))]
    return keras.Sequential([keras.Input((8,)), *parts, layers.Dense(1)])


MODELS = {
    "masks": (tagger, {"at": ["embed", "lstm"]}),
    "kept states": (tagger, {"at": ["lstm"], "keep_state": True}),
    "windows": (tagger, {"at": ["lstm"], "windows": 2, "truncate": 2}),
    "several stages a worker": (stack, {"stages": 4, "schedule": "interleaved"}),
    "recomputed": (stack, {"stages": 2, "recompute": True}),
    "over tcp": (stack, {"stages": 2, "transport": "tcp"}),
}


def trained(name, path=None, **options):
    """All bits after each of three steps and a prediction, and how many repairs it took."""
    keras.utils.set_random_seed(4)
    make, given = MODELS[name]
    model, random = make(), np.random.default_rng(2)
    x = random.integers(1, 7, (6, 8))
    x[0, 5:] = x[4, 6:] = 0
    y = random.normal(size=(6, 8, 1) if make is tagger else (6, 1)).astype("float32")
    found = []
    with Pipeline.split(model, microbatches=2, check_first_batch=False, **given, **options) as pipe:
        pipe.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"], run_eagerly=True)
        for place in ("backward 1", "updated", "behind train"):
            if path is not None:
                plan_faults(path, ("stage1", place, "kill"))
            found.append(pipe.train_on_batch(x, y))
            found.append(pipe.predict(x, verbose=0).tobytes())
            driver = pipe.session.workers.driver()
            found += [[a.tobytes() for some in driver.get(group).values() for a in some] for group in GROUPS]
            if path is not None:
                assert not left(path), place
        return found, len(pipe.repairs)


@pytest.mark.parametrize("name", MODELS)
def test_it_goes_on_after_a_death_as_without(monkeypatch, tmp_path, name):
    undisturbed, _ = trained(name)
    let_die(monkeypatch, tmp_path / "faults")
    found, repairs = trained(name, tmp_path / "faults", recovery=True)
    assert repairs == 3
    assert found == undisturbed

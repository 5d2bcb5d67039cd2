"""A worker that carries out an order is busy, not stalled, however long that takes."""

import keras
import numpy as np

from pipeline import Pipeline
from pipeline.runtime import crew
from tests import failing_parts


def test_a_slow_update_is_no_stall(monkeypatch):
    """The first update of a large stage is traced; meanwhile its neighbour waits for the next step's activation."""
    looks = []

    def counting(boards):
        looks.append(boards)
        if len(looks) >= 6:
            failing_parts.LOOKED_OFTEN.set()
        return right(boards)

    right = crew.stalled
    monkeypatch.setattr(crew, "stalled", counting)
    failing_parts.LOOKED_OFTEN.clear()
    bottom = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3, use_bias=False)])
    top = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with Pipeline([bottom, top], microbatches=2, transport="inproc") as pipe:
        pipe.compile(failing_parts.SlowUpdate(0.1), "mse", run_eagerly=True)
        x, y = np.ones((4, 1), "float32"), np.ones((4, 2), "float32")
        pipe.predict_on_batch(x)
        monkeypatch.setattr(pipe.session.workers.driver()._crew, "_look_seconds", 0.02)
        losses = [pipe.train_on_batch(x, y) for _ in range(2)]
    assert len(looks) >= 6
    assert losses[1] < losses[0]

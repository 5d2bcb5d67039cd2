"""States that a batch leaves for the next one: moved by the batches that count, once each, and by nothing else."""

import keras
import numpy as np
import pytest

from pipeline import Pipeline, WorkerError
from stages.worker.orders import Mode
from stages.worker.worker import Worker
from tests.pipeline.reference.twins import SEED

layers = keras.layers
HALF = 3


def tagger():
    """An output for each word of a padded sentence."""
    return keras.Sequential(
        [
            keras.Input((2 * HALF,), dtype="int32", name="words"),
            layers.Embedding(7, 3, mask_zero=True, name="embed"),
            layers.LSTM(4, return_sequences=True, name="lstm"),
            layers.Dense(1, name="out"),
        ]
    )


def sentences():
    random = np.random.default_rng(0)
    words = random.integers(1, 7, (4, 2 * HALF))
    words[0, 4:] = words[3, 5:] = 0  # padding, as much in no two microbatches
    return words, random.normal(size=(4, 2 * HALF, 1)).astype("float32")


def kept(pipe):
    """The bits of all states that the next batch begins with."""
    return [state.tobytes() for states in pipe.session.values.read("kept states").values() for state in states]


@pytest.fixture
def pipe():
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(tagger(), stages=1, microbatches=2, keep_state=True, transport="inproc") as made:
        made.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
        yield made


def test_every_batch_moves_the_states_once_though_its_masks_are_looked_at_first(pipe, monkeypatch):
    """Halves of a sentence give what Keras gives for the whole; questions and failed steps move nothing."""
    x, y = sentences()
    first, second = (x[:, :HALF], y[:, :HALF]), (x[:, HALF:], y[:, HALF:])
    errors = np.square(pipe.merge().predict(x, verbose=0) - y)[..., 0]
    expected = [float(errors[:, part][x[:, part] > 0].mean()) for part in (slice(HALF), slice(HALF, None))]
    for step in (pipe.test_on_batch, pipe.train_on_batch):
        pipe.reset_state()
        assert [step(*half) for half in (first, second)] == pytest.approx(expected, rel=1e-5)

    pipe.reset_state()
    pipe.test_on_batch(*first)
    before = kept(pipe)
    assert before
    pipe.gradients(*second)
    assert kept(pipe) == before
    right = Worker.step

    def failing(self, order):
        reply = right(self, order)
        if order.mode is Mode.TRAIN:
            raise ValueError("at the very end of the step")
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "step", failing)
        with pytest.raises(WorkerError, match="at the very end"):
            pipe.train_on_batch(*second)
    assert kept(pipe) == before
    assert pipe.test_on_batch(*second) == pytest.approx(expected[1], rel=1e-5)


def test_reset_states_are_reset_for_the_reference_and_others_outlive_compile(pipe):
    x, y = sentences()
    whole = pipe.merge().predict(x, verbose=0)
    pipe.predict_on_batch(x[:, :HALF])
    pipe.verify(x[:, HALF:], y[:, HALF:]).raise_if_failed()
    pipe.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)  # in the middle of a sentence
    np.testing.assert_allclose(pipe.predict_on_batch(x[:, HALF:]), whole[:, HALF:], rtol=1e-5, atol=1e-6)
    pipe.reset_state()
    pipe.verify(x[:, :HALF], y[:, :HALF]).raise_if_failed()
    np.testing.assert_allclose(pipe.predict_on_batch(x[:, :HALF]), whole[:, :HALF], rtol=1e-5, atol=1e-6)

"""What stages keep at once is what was predicted from plan and cuts, counted tensor by tensor in running workers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import memory
from pipeline import Pipeline
from pipeline.cutting.stage_prediction import peak_bytes
from stages.worker.step_program import Program
from tests.levels import in_turn

layers = keras.layers
SAMPLES, MICROBATCHES = 32, 6
WAYS = [
    ("zb-h1", False),
    ("gpipe", True),
    ("zb-h2", True),
    ("1f1b", False),
    ("zb-h1", True),
    ("gpipe", False),
    ("1f1b", True),
    ("zb-h2", False),
]


def attention():
    given = keras.Input((6, 8))
    out = layers.Dense(8, activation="gelu")(given)
    out = layers.LayerNormalization()(out + layers.MultiHeadAttention(2, 4)(out, out))
    out = layers.Dropout(0.1)(layers.Dense(16, activation="relu")(out))
    out = layers.GlobalAveragePooling1D()(out)
    return keras.Model(given, layers.Dense(1)(layers.Dense(8, activation="tanh")(out)))


def address(tensor):
    return tensor.__array_interface__["data"][0]


def kept_by(stage):
    """Bytes of all tensors that a compiled stage's open microbatches hold, by memory; variables are there anyway."""
    tapes = stage._tapes
    half = [opened.half for opened in tapes._open.values()] + list(tapes._halfway.values())
    held = [t for o in tapes._open.values() for t in (*o.kept, *o.outputs, *(o.input_gradients or ()))]
    held += [tensor for one in half if one is not None for tensor in one.left]
    arrays = [np.asarray(t) for t in held if t is not None and t.dtype not in (tf.variant, tf.resource)]
    variables = {address(np.asarray(v.value.read_value())) for v in stage.model.variables}
    return sum({address(a): a.nbytes for a in arrays if address(a) not in variables}.values())


@pytest.mark.parametrize(("schedule", "recompute"), in_turn(WAYS, 1, 3, several=True))
def test_stages_keep_what_was_predicted(monkeypatch, schedule, recompute):
    peaks = {}

    def counted(plain):
        def act(self, action):
            plain(self, action)
            for stage, hosted in self.hosted.items():
                peaks[stage] = max(peaks.get(stage, 0), kept_by(hosted.stage))

        return act

    for name in ("_forward", "_backward", "_backward_input", "_backward_weight"):
        monkeypatch.setattr(Program, name, counted(getattr(Program, name)))
    x = np.random.default_rng(0).normal(size=(SAMPLES * MICROBATCHES, 6, 8)).astype("float32")
    options = {"microbatches": MICROBATCHES, "schedule": schedule, "recompute": recompute, "transport": "inproc"}
    with Pipeline.split(attention(), 3, sample=x[:SAMPLES], check_first_batch=False, **options) as pipe:
        pipe.compile("sgd", "mse")
        pipe.train_on_batch(x, x[:, 0, :1])
        prediction = pipe.prediction
    predicted = [peak_bytes(prediction.stages, program, between=True) for program in prediction.plan.programs]
    assert predicted == pytest.approx([peaks[stage] for stage in range(3)], rel=0.02)


@pytest.mark.soak
@pytest.mark.parametrize("way", memory.WAYS_PREDICTED, ids=str)
def test_workers_grow_by_what_was_predicted(way):
    """Resident memory, so with what the allocator rounds up: the whole pipeline, not each worker, within a quarter."""
    predicted = sum(memory.predicted(memory.FULL, way))
    grown, _ = memory.growths(memory.FULL, way, eager=False)
    assert predicted == pytest.approx(sum(grown), rel=0.25)

"""A meter of leaks changes no bit of the training, and reads off a cut what crosses it."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

from pipeline import CompileError, DataError, Pipeline
from pipeline.parties.leakage.labels import gradient_leaks
from pipeline.parties.leakage.leak import INPUTS, LABELS
from pipeline.parties.leakage.leak_meter import LeakMeter
from tests.sources import ROOT

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(60, 6)).astype("float32")
Y = (X[:, 0] + X[:, 1] > 0).astype("float32")


def model():
    keras.utils.set_random_seed(0)
    parts = [keras.layers.Dense(8, "relu"), keras.layers.Dense(4, name="cut"), keras.layers.Dense(1, "sigmoid")]
    return keras.Sequential([keras.Input((6,)), *parts])


def fitted(callbacks, **options):
    made = model()
    with Pipeline.split(made, at=["cut"], microbatches=2, transport="inproc", **options) as pipe:
        pipe.compile("sgd", "binary_crossentropy", run_eagerly=True)
        history = pipe.fit(X, Y, epochs=3, batch_size=20, shuffle=False, verbose=0, callbacks=callbacks).history
        return history, pipe.get_weights(), made


def test_training_is_that_without_it_and_the_leaks_are_those_of_one_tape(tmp_path):
    meter = LeakMeter(every=2)
    with_it, without = fitted([meter]), fitted([])
    assert with_it[0] == without[0]
    assert [a.tobytes() for a in with_it[1]] == [b.tobytes() for b in without[1]]

    import tensorflow as tf

    own, gradients = model(), []
    own.compile("sgd", "binary_crossentropy", run_eagerly=True)
    for at in range(0, 60, 20):  # the first epoch, as the meter saw it
        x, y = X[at : at + 20], Y[at : at + 20, None]
        with tf.GradientTape() as tape:
            z = own.layers[1](own.layers[0](x))
            tape.watch(z)
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(y, own.layers[2](z)))
        gradients.append(tape.gradient(loss, z).numpy())
        own.train_on_batch(x, y)
    by_hand = gradient_leaks(np.concatenate(gradients), Y)
    first = {leak.measure.name: leak for leak in meter.leaks if leak.epoch == 1 and leak.measure.about == LABELS}
    assert {name: first[name].value for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert {leak.epoch for leak in meter.leaks} == {1, 3} and {leak.rows for leak in meter.leaks} == {60}
    assert (first["cosine"].crossing.sender, first["cosine"].crossing.receiver) == ("stage1", "stage0")

    assert meter.worst(LABELS).value == 1.0 and meter.worst(INPUTS).value > 0.5
    assert "labels leak most through dL/dcut to 'stage0'" in str(meter)
    assert meter.save(tmp_path / "new" / "leaks.svg").read_text().count("dL/dcut") >= 3


@pytest.mark.gate
def test_the_page_s_program_reads_every_label_off_the_gradients(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/leakage.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(block, "docs/leakage.md", "exec"), found)
    last = {leak.measure.name: leak.value for leak in found["meter"].leaks if leak.epoch == 5}
    assert last["cosine"] > 0.99 and last["norm"] < 0.9 and 0.3 < last["dcor²"] < 1.0
    assert (tmp_path / "leaks.png").stat().st_size > 10_000


def test_what_cannot_be_measured_is_said():
    made = model()
    meter = LeakMeter(rows=20)
    with Pipeline.split(made, at=["cut"], transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.fit(X, RANDOM.normal(size=60), batch_size=20, verbose=0, callbacks=[meter])
    assert {leak.rows for leak in meter.leaks} == {20} and {leak.measure.about for leak in meter.leaks} == {INPUTS}
    assert any("labels must be classes" in said for said in meter.left_out) and "not measured" in str(meter)
    with pytest.raises(DataError, match="no leak of labels was measured"):
        meter.worst(LABELS)
    for wrong in ({"every": 0}, {"rows": 7}, {"inputs": False, "labels": False}):
        with pytest.raises(CompileError):
            LeakMeter(**wrong)

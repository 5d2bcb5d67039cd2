"""Parties train what one tape over the joined table trains, bit for bit: weights, statistics, seeds, every topology.

The right values are computed with plain Keras (`tests.pipeline.parties.meeting.one_tape`): several microbatches, a last
batch that is smaller, BatchNormalization, dropout, regularisers, an optimizer a party.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Party
from tests.one_tape import assert_same_bits
from tests.pipeline.parties.meeting import VANILLA, bits, bottom, data, met, one_tape, plan_with_keys, top

CROSS_ENTROPY = keras.losses.BinaryCrossentropy
ADAM, SGD = (lambda: keras.optimizers.Adam(0.01)), (lambda: keras.optimizers.SGD(0.1, momentum=0.9))


def test_two_parties_equal_one_tape(tmp_path):
    plan, folders = plan_with_keys({**VANILLA, "grants": {"loss": ["hospital"]}}, tmp_path)
    x, y, ids = data(21, 5)
    ours, theirs = (bottom(), top()), (bottom(), top())
    found = met(
        plan,
        {
            "hospital": Party(ours[0], x=x, ids=ids, optimizer=ADAM()),
            "lab": Party(ours[1], y=y, ids=ids, optimizer=SGD(), loss=CROSS_ENTROPY(), metrics=["accuracy"]),
        },
        folders,
    )

    def joined(rows, training):
        return theirs[1](theirs[0](x[rows], training=training), training=training)

    losses = one_tape(joined, [([theirs[0]], ADAM()), ([theirs[1]], SGD())], y, plan, CROSS_ENTROPY())
    assert_same_bits(bits(*ours), bits(*theirs), "variable")
    assert found["lab"].history["loss"] == losses == found["hospital"].history["loss"]
    assert list(found["lab"].history) == ["loss", "accuracy"] and list(found["hospital"].history) == ["loss"]
    assert found["lab"].steps == 6
    assert found["lab"].sent == found["lab"].received == 2 * 21 * 4 * 4  # epochs x rows x values x bytes: the formula


@pytest.mark.gate
def test_labels_never_leave_in_a_u(tmp_path):
    table = {
        **VANILLA,
        "stages": {
            "bottom": {"owner": "hospital", "x": True},
            "middle": {"owner": "lab"},
            "head": {"owner": "hospital", "y": True},
        },
        "edges": [
            {"tensor": "z", "from": "bottom", "to": "middle", "shape": [4], "dtype": "float32"},
            {"tensor": "h", "from": "middle", "to": "head", "shape": [3], "dtype": "float32"},
        ],
        "grants": {"outputs": ["lab"]},
    }
    plan, folders = plan_with_keys(table, tmp_path)
    x, y, ids = data(21, 5)

    def models():
        return {"bottom": bottom(), "middle": bottom(4, 3, seed=20), "head": top(3)}

    ours, theirs = models(), models()
    parties = {
        "hospital": Party(
            {name: ours[name] for name in ("bottom", "head")}, x, y, ids, ADAM(), loss=CROSS_ENTROPY()
        ),
        "lab": Party(ours["middle"], optimizer=SGD()),
    }  # fmt: skip
    found = met(plan, parties, folders)

    def joined(rows, training):
        h = x[rows]
        for model in theirs.values():
            h = model(h, training=training)
        return h

    groups = [([theirs["bottom"], theirs["head"]], ADAM()), ([theirs["middle"]], SGD())]
    losses = one_tape(joined, groups, y, plan, CROSS_ENTROPY())
    assert_same_bits(bits(*ours.values()), bits(*theirs.values()), "variable")
    assert found["hospital"].history["loss"] == losses and found["lab"].history == {}
    predicted = met(plan, parties, folders, "predict")
    assert_same_bits([predicted["lab"].predictions], [predicted["hospital"].predictions], "prediction")
    np.testing.assert_allclose(predicted["lab"].predictions, joined(np.arange(21), False), rtol=1e-6)


VERTICAL = {
    **VANILLA,
    "parties": {"clinic": {}, "hospital": {}, "lab": {}},
    "stages": {
        "a": {"owner": "clinic", "x": True},
        "b": {"owner": "hospital", "x": True},
        "top": {"owner": "lab", "x": True, "y": True},
    },
    "edges": [
        {"tensor": "za", "from": "a", "to": "top", "shape": [4], "dtype": "float32"},
        {"tensor": "zb", "from": "b", "to": "top", "shape": [2], "dtype": "float32"},
    ],
    "grants": {"outputs": ["clinic"], "loss": ["clinic", "hospital"]},
}


def concatenating():
    """Takes the lab's own two columns and the tensors of both others."""
    own, za, zb = (keras.Input((width,)) for width in (2, 4, 2))
    return keras.Model([own, za, zb], top(8)(keras.layers.Concatenate()([own, za, zb])))


@pytest.mark.gate
def test_parties_with_different_columns_equal_one_tape_over_the_joined_table(tmp_path):
    plan, folders = plan_with_keys(VERTICAL, tmp_path)
    xa, xb, own, y, ids = data(19, 5, 3, 2)

    def models():
        return bottom(5, 4), bottom(3, 2, seed=30), concatenating()

    ours, theirs = models(), models()
    parties = {
        "clinic": Party(ours[0], x=xa, ids=ids, optimizer=ADAM()),
        "hospital": Party(ours[1], x=xb, ids=ids, optimizer=SGD()),
        "lab": Party(ours[2], own, y, ids, ADAM(), CROSS_ENTROPY(), ["accuracy"]),
    }
    found = met(plan, parties, folders)

    def joined(rows, training):
        a, b, merged = theirs
        return merged(
            [tf.constant(own[rows]), a(xa[rows], training=training), b(xb[rows], training=training)], training=training
        )

    groups = [([theirs[0]], ADAM()), ([theirs[1]], SGD()), ([theirs[2]], ADAM())]
    losses = one_tape(joined, groups, y, plan, CROSS_ENTROPY())
    assert_same_bits(bits(*ours), bits(*theirs), "variable")
    assert found["clinic"].history == {"loss": losses} == found["hospital"].history
    before = bits(*ours)
    judged = met(plan, parties, folders, "evaluate")
    seen = met(plan, parties, folders, "predict")
    assert_same_bits(bits(*ours), before, "variable after evaluation and prediction")
    expected = joined(np.arange(19), False)
    assert judged["clinic"].history["loss"][0] == pytest.approx(float(CROSS_ENTROPY()(y, expected)), rel=1e-6)
    assert list(judged["lab"].history) == ["loss", "accuracy"]
    np.testing.assert_allclose(seen["clinic"].predictions, expected, rtol=1e-5)
    assert seen["hospital"].predictions is None and seen["lab"].predictions.shape == (19, 1)


def averaging():
    """An optimizer whose averages take the weights' place at the end."""
    return keras.optimizers.AdamW(use_ema=True)


@pytest.mark.soak
@pytest.mark.parametrize("microbatches", [1, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_other_batches_equal_one_tape(tmp_path, microbatches, drop_last):
    training = {"batch": 8, "microbatches": microbatches, "epochs": 2, "drop_last": drop_last}
    plan, folders = plan_with_keys({**VANILLA, "training": training}, tmp_path)
    x, y, ids = data(21, 5)
    ours, theirs = (bottom(), top()), (bottom(), top())
    loss = keras.losses.MeanSquaredError
    parties = {
        "hospital": Party(ours[0], x=x, ids=ids, optimizer=ADAM()),
        "lab": Party(ours[1], y=y, ids=ids, optimizer=averaging(), loss=loss()),
    }
    met(plan, parties, folders)
    kept = slice(0, 16) if drop_last else slice(0, 21)

    def joined(rows, training):
        return theirs[1](theirs[0](x[rows], training=training), training=training)

    averaged = averaging()
    one_tape(joined, [([theirs[0]], ADAM()), ([theirs[1]], averaged)], y[kept], plan, loss())
    averaged.finalize_variable_values(theirs[1].trainable_variables)  # as Keras does when a training ends
    assert_same_bits(bits(*ours), bits(*theirs), "variable")

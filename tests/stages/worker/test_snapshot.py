"""Every variable of a stage has its place: read, written, and optimizer slots found for the variable they belong to."""

import keras
import numpy as np
import pytest

from stages.errors import HandoffError
from stages.variable_names import unique_names
from stages.worker import snapshot
from stages.worker.snapshot import OptimizerSlot

OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"use_ema": True},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adamax": {},
    "Ftrl": {},
    "Lamb": {},
    "Lion": {},
    "Nadam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "ScheduleFreeAdamW": {},
}


def variables(count):
    return [keras.Variable(np.full((2, i + 3), 1.0), name="kernel") for i in range(count)]


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_slots_belong_to_the_variable_they_were_made_for(name, accumulate, count):
    """All variables have one path here; their shapes tell whose a slot is."""
    trainable = variables(count)
    optimizer = getattr(keras.optimizers, name)(0.1, gradient_accumulation_steps=accumulate, **OPTIMIZERS[name])
    optimizer.build(trainable)
    slots = snapshot.optimizer_slots(optimizer, trainable)
    assert len(slots) == len(optimizer.variables)
    assert len(set(slots)) == len(slots)
    own = [slot.name for slot in slots if slot.variable < 0]
    assert own[:2] == ["iterations", "learning_rate"] and set(own[2:]) <= {"u_product"}
    for slot, variable in zip(slots, optimizer.variables, strict=True):
        if slot.variable >= 0 and len(variable.shape) == 2:
            assert tuple(variable.shape) == tuple(trainable[slot.variable].shape)
    wanted = {"SGD": 1, "Lion": 1, "Adagrad": 1}.get(name, 2)
    for i in range(count):
        assert sum(slot.variable == i for slot in slots) >= wanted + (accumulate is not None)


def test_plain_sgd_has_no_slots():
    trainable = variables(2)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(trainable)
    assert snapshot.optimizer_slots(optimizer, trainable) == [
        OptimizerSlot(-1, "iterations"),
        OptimizerSlot(-1, "learning_rate"),
    ]


def test_names_are_unique():
    assert unique_names([variable.path for variable in variables(3)]) == ["kernel", "kernel#2", "kernel#3"]


def test_what_was_read_is_a_copy_and_what_is_written_is_read_again():
    some = [keras.Variable(np.ones(2)), keras.Variable(np.ones(3), dtype="bfloat16")]
    before = snapshot.read(some)
    snapshot.write(some, [np.zeros(2, "float32"), np.full(3, 2, before[1].dtype)], "here")
    assert before[0].tolist() == [1, 1] and before[1].dtype.name == "bfloat16"
    after = snapshot.read(some)
    assert after[0].tolist() == [0, 0] and after[1].astype("float32").tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([np.zeros(2)], r"here: expected 2 array\(s\), received 1"),
        ([np.zeros(2), np.zeros(2)], r"'\w+' has the shape \(3,\), received \(2,\)"),
    ],
)
def test_a_write_that_does_not_fit_writes_nothing(values, match):
    some = [keras.Variable(np.ones(2), name="v"), keras.Variable(np.ones(3), name="w")]
    with pytest.raises(HandoffError, match=match):
        snapshot.write(some, values, "here")
    assert [value.tolist() for value in snapshot.read(some)] == [[1, 1], [1, 1, 1]]

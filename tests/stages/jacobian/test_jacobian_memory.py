"""The memory of Jacobians is said before, refused above a limit, and kept within it by blocks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages.errors import StageError
from stages.jacobian import rows
from stages.jacobian.chain_rule import MemoryLimitExceeded, chain_rule, jacobian_bytes
from stages.jacobian.memory import BUILD_FACTOR, readable_bytes, row_bytes

layers = keras.layers
MIB = 1 << 20
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(7)


def chain(batch: int = 4) -> tuple[list[Any], np.ndarray, Callable[[Any], Any]]:
    segments = [
        keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3, activation="relu")], name="bottom"),
        keras.Sequential([keras.Input((4, 4, 3)), layers.BatchNormalization(), layers.Flatten()], name="middle"),
        keras.Sequential([keras.Input((48,)), layers.Dropout(0.5), layers.Dense(5)], name="top"),
    ]
    x = np.random.normal(size=(batch, 6, 6, 2)).astype("float32")
    return segments, x, lambda out: tf.reduce_mean(out**2)


def state(segments: list[Any]) -> list[np.ndarray]:
    return [variable.numpy() for segment in segments for variable in segment.non_trainable_variables]


def test_the_estimate_equals_the_jacobians_that_tensorflow_returns() -> None:
    segments, x, loss = chain()
    estimate = jacobian_bytes(segments, x, input_gradient=True)
    result = chain_rule(segments, x, loss, input_gradient=True)
    value = tf.constant(x)
    for segment, said, done in zip(segments, estimate.segments, result.segments, strict=True):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(value)
            out = segment(value, training=True)
        variables = [v.value for v in segment.trainable_variables]
        assert said.outputs == math.prod(out.shape)
        assert said.weights == sum(j.numpy().nbytes for j in tape.jacobian(out, variables))
        assert said.inputs_dependent == tape.jacobian(out, value).numpy().nbytes
        assert said.inputs_independent == tape.batch_jacobian(out, value).numpy().nbytes
        assert said.independent is None and done.independent is not None
        assert (said.outputs, said.weights, said.inputs_dependent) == (
            done.jacobians.outputs,
            done.jacobians.weights,
            done.jacobians.inputs_dependent,
        )
        value = out


def test_the_estimate_runs_nothing() -> None:
    segments, x, _ = chain()
    before = state(segments)
    executed: list[str] = []

    def spy(h: Any) -> Any:
        tf.py_function(lambda: executed.append("ran"), [], [])
        return h

    with_spec = jacobian_bytes([spy, *segments], tf.TensorSpec((4, 6, 6, 2), tf.float32))
    assert with_spec.segments[1:] == jacobian_bytes([tf.identity, *segments], x).segments[1:]
    assert not executed
    assert all(np.array_equal(a, b) for a, b in zip(before, state(segments), strict=True))
    spy(tf.zeros(()))
    assert executed == ["ran"]  # the spy would have noticed


def test_the_estimate_can_be_made_where_the_jacobians_never_could() -> None:
    wide = keras.Sequential([keras.Input((224, 224, 3)), layers.Conv2D(64, 3)], name="wide")
    estimate = jacobian_bytes([wide], tf.TensorSpec((256, 224, 224, 3), tf.float32))
    outputs = 256 * 222 * 222 * 64
    assert estimate.held == outputs * (3 * 3 * 3 * 64 + 64) * 4
    assert int(estimate) == BUILD_FACTOR * estimate.held
    assert f"{outputs} outputs" in str(estimate) and "TiB" in str(estimate)


def test_the_range_narrows_to_one_figure_once_independence_is_known() -> None:
    segments, x, _ = chain()
    unknown = jacobian_bytes(segments, x)
    independent = jacobian_bytes(segments, x, independent_samples=True)
    dependent = jacobian_bytes(segments, x, independent_samples=False)
    assert unknown.least_needed == independent.needed == independent.least_needed
    assert unknown.needed == dependent.needed == dependent.least_needed
    assert independent.needed < dependent.needed
    assert " to " in str(unknown) and " to " not in str(independent)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="known shape"):
        jacobian_bytes([tf.identity], tf.TensorSpec((None, 3), tf.float32))


def test_above_the_limit_nothing_is_evaluated_and_the_figure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, x, loss = chain()
    needed = jacobian_bytes(segments, x, independent_samples=[None, False, True]).needed
    before = state(segments)
    assert len(before) == 3

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a Jacobian was evaluated")

    with monkeypatch.context() as patch:
        patch.setattr(tf.GradientTape, "jacobian", forbidden)
        patch.setattr(tf.GradientTape, "batch_jacobian", forbidden)
        with pytest.raises(MemoryLimitExceeded) as refused:
            chain_rule(segments, x, loss, memory_limit=needed - 1)
    assert isinstance(refused.value, StageError)
    assert (refused.value.needed, refused.value.limit) == (needed, needed - 1)
    message = str(refused.value)
    assert "'middle'" in message and str(needed) in message and readable_bytes(needed) in message
    assert "blocked=True" in message and "Stage" in message
    assert all(np.array_equal(a, b) for a, b in zip(before, state(segments), strict=True))
    result = chain_rule(segments, x, loss, memory_limit=needed)
    assert [segment.blocks for segment in result.segments] == [0, 0, 0]


def test_auto_blocks_only_what_exceeds_the_limit() -> None:
    segments, x, loss = chain()
    limit = jacobian_bytes(segments, x, independent_samples=[None, False, True]).needed - 1
    result = chain_rule(segments, x, loss, memory_limit=limit, blocked="auto")
    assert [segment.blocks > 0 for segment in result.segments] == [False, True, False]


def test_a_limit_below_one_row_is_refused_with_the_figure_that_would_do() -> None:
    segments, x, loss = chain()
    before = state(segments)
    with pytest.raises(MemoryLimitExceeded, match="one row") as refused:
        chain_rule(segments, x, loss, memory_limit=2000, blocked=True)
    assert all(np.array_equal(a, b) for a, b in zip(before, state(segments), strict=True))
    # What the messages ask for is enough in the end, one group of Jacobians after the other.
    limit = refused.value.needed
    for _ in range(6):
        try:
            result = chain_rule(segments, x, loss, memory_limit=limit, blocked=True)
            break
        except MemoryLimitExceeded as again:
            assert again.needed > limit
            limit = again.needed
    assert max(segment.blocks for segment in result.segments) > 10


def recorded_dense(elements: int) -> rows.Contraction:
    w = tf.Variable(np.random.normal(size=(40, 30)).astype("float32"))
    x = tf.constant(np.random.normal(size=(elements // 30, 40)).astype("float32"))
    with tf.GradientTape(persistent=True) as tape:
        y = tf.tanh(x @ w)
    return rows.Contraction(tape, y, tf.ones_like(y), [w], False, "here")


@pytest.mark.parametrize("limit", [1 << 17, 1 << 19, 1 << 22])
def test_no_tensor_of_a_block_is_larger_than_the_limit(limit: int) -> None:
    """Every tensor in the graph of a block, and the block's Jacobian among them."""
    work = recorded_dense(600)
    row = rows.row_function(work.tape, work.output, work.sources, work.per_sample)
    length = rows.rows_that_fit(work, row, limit)
    block = tf.function(rows._block_function(work, row), autograph=False)
    graph = block.get_concrete_function(tf.TensorSpec((length,), tf.int32)).graph
    sizes = [
        t.shape.num_elements() * t.dtype.size
        for op in graph.get_operations()
        for t in op.outputs
        if t.dtype != tf.resource
    ]
    assert length * 40 * 30 * 4 in sizes  # the block of the Jacobian itself
    assert max(sizes) <= limit
    assert length == 600 or 2 * row_bytes(graph) > limit  # and no smaller than it need be


def test_the_limit_counts_the_row_three_times_and_the_sum_twice() -> None:
    """A row, stacked with others, and turned for the product; the running sum and the block's contribution to it."""
    work = recorded_dense(600)
    row = rows.row_function(work.tape, work.output, work.sources, work.per_sample)
    with pytest.raises(MemoryLimitExceeded) as refused:
        rows.rows_that_fit(work, row, 1)
    needed = refused.value.needed
    width = 40 * 30 * 4
    one = row_bytes(tf.function(row).get_concrete_function(tf.TensorSpec((), tf.int32)).graph)
    assert one > width and needed == one + 4 * width
    assert rows.rows_that_fit(work, row, needed) == 1
    assert rows.rows_that_fit(work, row, needed + one + 2 * width) == 2


def test_tensors_inside_called_functions_are_counted() -> None:
    def plain(x: Any) -> Any:
        return tf.sin(x) * 2.0

    called = tf.function(plain)
    spec = tf.TensorSpec((100,), tf.float32)
    inline = row_bytes(tf.function(plain).get_concrete_function(spec).graph)
    nested = row_bytes(tf.function(lambda x: called(x)).get_concrete_function(spec).graph)
    assert inline >= 800  # sin and the product
    assert nested >= inline


MEASURE = """
import re
import keras
import numpy as np
import tensorflow as tf
from stages.jacobian.chain_rule import chain_rule, jacobian_bytes

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

keras.utils.set_random_seed(7)
model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256, activation="relu")])
x = np.random.normal(size=(16, 256)).astype("float32")
loss = lambda y: tf.reduce_mean(y**2)
held = jacobian_bytes([model], x).held
chain_rule([model], x[:1], loss, blocked=True, memory_limit=4 << 20)  # one-off costs of TensorFlow
before = resident("VmRSS")
result = chain_rule([model], x, loss, blocked=True, memory_limit=LIMIT)
grown = resident("VmHWM") - before
with tf.GradientTape() as tape:
    value = loss(model(x))
kernel = tape.gradient(value, model.trainable_variables[0].value).numpy()
off = np.abs(result.segments[0].gradients[model.trainable_variables[0].path] - kernel).max() / np.abs(kernel).max()
print(held, grown, result.segments[0].blocks, off)
"""


@pytest.mark.gate
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's peak memory")
def test_the_process_stays_within_the_limit_where_the_whole_jacobian_would_not() -> None:
    """Resident memory as the kernel counts it, in a process of its own: 1 GiB of Jacobian on a limit of 128 MiB."""
    limit = 128 * MIB
    script = f"LIMIT = {limit}\n{MEASURE}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    held, grown, blocks, off = (float(word) for word in done.stdout.split())
    assert held > 1000 * MIB
    assert blocks >= held / limit
    assert limit / 8 < grown <= limit  # blocks of a sensible size, below the limit
    assert off <= 1e-6


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 42, "20.0 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert readable_bytes(count) == text

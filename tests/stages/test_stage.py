"""The hand-off, held in the hand: stages called one after the other are one tape; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import Stage
from stages.errors import HandoffError
from tests.models import STACKS, Spread, Stack, Unused, cross_entropy, grouped, part
from tests.one_tape import OneTape, assert_same_bits, difference

layers = keras.layers
MODES = pytest.mark.parametrize("run_eagerly", [True, False], ids=["eager", "compiled"])
SIZES = (4, 3, 3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(7)


def dense(run_eagerly: bool = True, **options: Any) -> Stage:
    """A stage from (n, 3) to (n, 2)."""
    return Stage(part((3,), layers.Dense(2, "tanh")), "dense", run_eagerly=run_eagerly, **options)


def values(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def backward_in_turn(stages: list[Stage], gradient: Any, microbatch: int) -> Any:
    for stage in reversed(stages):
        gradient = stage.backward(gradient, microbatch=microbatch)
    return gradient


@pytest.mark.parametrize("chosen", STACKS, ids=str)
def test_a_chain_of_stages_is_one_tape(chosen: Stack) -> None:
    """Three stages, three microbatches all forward before any goes backward: gradients have the bits of one tape."""
    parts = grouped(chosen.build(), 3)
    x, y = chosen.data(sum(SIZES))
    _, expected = OneTape(parts, cross_entropy()).gradients(x, y, len(SIZES))
    stages = [Stage(model, loss=cross_entropy() if model is parts[-1] else None) for model in parts]
    begin = 0
    for k, size in enumerate(SIZES):
        h = x[begin : begin + size]
        for stage in stages[:-1]:
            h = stage.forward(h, microbatch=k)
        share = size / sum(SIZES)
        stages[-1].forward_loss(h, y[begin : begin + size], microbatch=k, weight=share, share=share)
        begin += size
    for k in range(len(SIZES)):
        backward_in_turn(stages, None, k)
    found = [gradient for stage in stages for gradient in stage.gradients().values()]
    assert_same_bits(found, expected, "gradient")


@MODES
def test_the_four_lines(run_eagerly: bool) -> None:
    """forward, backward, gradients, apply: for L = sum(y * y), with dL/dy = 2y, against a tape and an optimizer."""
    stage = dense(run_eagerly)
    kernel, bias = stage.trainable_variables
    x = tf.constant(values((4, 3)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(stage.model(x)))
    expected = [g.numpy() for g in tape.gradient(loss, [kernel.value, bias.value, x])]
    y = stage.forward(x, microbatch=0)
    dx = stage.backward(2 * y, microbatch=0)
    found = stage.gradients()
    assert list(found) == [kernel.path, bias.path]
    assert difference([*found.values(), dx.numpy()], expected) <= 1e-6
    before = kernel.numpy()
    stage.apply(keras.optimizers.SGD(0.5))
    np.testing.assert_allclose(kernel.numpy(), before - 0.5 * expected[0], rtol=1e-5, atol=1e-6)
    assert all(gradient is None or not gradient.any() for gradient in stage.gradients().values())


@MODES
def test_gradients_add_up_until_they_are_applied_or_forgotten(run_eagerly: bool) -> None:
    """Two microbatches sum; zero_gradients forgets sums and open tapes, so their numbers are free again."""
    stage = dense(run_eagerly)
    seen = []
    for microbatches in ((0,), (1,), (0, 1)):
        for k in microbatches:
            stage.forward(values((4, 3), k), microbatch=k)
        for k in microbatches:
            stage.backward(values((4, 2), k), microbatch=k)
        seen.append(list(stage.gradients().values()))
        stage.forward(values((4, 3)), microbatch=0)
        assert stage.open_microbatches() == (0,)
        stage.zero_gradients()
        assert stage.open_microbatches() == ()
    assert difference(seen[2], [a + b for a, b in zip(seen[0], seen[1], strict=True)]) <= 1e-6


def test_the_order_of_backwards_does_not_change_a_bit() -> None:
    """Sums are taken in ascending order of microbatches, whatever order the schedule goes backward in."""
    seen = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        keras.utils.set_random_seed(1)
        stage = dense()
        for k in range(4):
            stage.forward(values((5, 3), k), microbatch=k)
        for k in order:
            stage.backward(values((5, 2), 10 + k), microbatch=k)
        seen.append(list(stage.gradients().values()))
    assert_same_bits(seen[0], seen[1], "gradient")


@MODES
def test_weights_of_the_forward_pass(run_eagerly: bool) -> None:
    """An update between forward and backward: a kept tape differentiates at the old weights."""
    stage = Stage(part((3,), layers.Dense(2, use_bias=False)), run_eagerly=run_eagerly)
    (kernel,) = stage.trainable_variables
    old, dy = kernel.numpy(), values((4, 2))
    stage.forward(values((4, 3)), microbatch=0)
    kernel.assign(old + 1)
    dx = stage.backward(dy, microbatch=0).numpy()
    np.testing.assert_allclose(dx, dy @ old.T, rtol=1e-5, atol=1e-6)


@MODES
@pytest.mark.parametrize("recompute", [False, True])
def test_an_output_that_nobody_differentiates_is_no_target(run_eagerly: bool, recompute: bool) -> None:
    """None among the output gradients: what only that output reaches has no gradient, as under one tape."""
    x = keras.Input((3,))
    model = keras.Model(x, [layers.Dense(2)(x), layers.Dense(4)(x)])
    stage = Stage(model, run_eagerly=run_eagerly, recompute=recompute)
    given, dy = values((5, 3)), values((5, 2))
    stage.forward(given)
    dx = stage.backward([dy, None])
    source = tf.constant(given)
    with tf.GradientTape() as tape:
        tape.watch(source)
        first, _ = model(source)
    expected = tape.gradient(first, [source, *stage.trainable_variables], output_gradients=dy)
    found = [dx, *stage.gradients().values()]
    assert [g is None for g in found] == [g is None for g in expected] == [False, False, False, True, True]
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    stage.forward(given)
    with pytest.raises(HandoffError, match="nothing to go backward from"):
        stage.backward([None, None])


@MODES
def test_integers_have_no_gradient(run_eagerly: bool) -> None:
    """Integer inputs and outputs cross, and give and take None."""
    words = keras.Input((3,), dtype="int32")
    numbers = keras.Input((2,))
    h = layers.Flatten()(layers.Embedding(5, 2)(words))
    stage = Stage(keras.Model([words, numbers], [words + 1, layers.Dense(2)(h) + numbers]), run_eagerly=run_eagerly)
    given = np.array([[0, 1, 1], [4, 4, 4]])
    shifted, y = stage.forward([given, values((2, 2))])
    assert shifted.dtype == tf.int32
    np.testing.assert_array_equal(shifted, given + 1)
    dwords, dnumbers = stage.backward([None, tf.ones_like(y)])
    assert dwords is None
    np.testing.assert_array_equal(dnumbers, np.ones((2, 2)))
    embedding = next(g for name, g in stage.gradients().items() if "embed" in name)
    assert embedding is not None and embedding.shape == (5, 2)
    assert embedding[1].any() and embedding[4].any() and not embedding[2:4].any()


@MODES
def test_what_the_outputs_do_not_depend_on(run_eagerly: bool) -> None:
    """A variable or an input without a way to the outputs has the gradient None."""
    stage = Stage(part((3,), Unused()), run_eagerly=run_eagerly)
    stage.backward(tf.ones_like(stage.forward(values((2, 3)))))
    assert {name.rsplit("/")[-1]: g is None for name, g in stage.gradients().items()} == {"idle": True, "kernel": False}
    stage.apply(keras.optimizers.SGD(0.1))
    a, b = keras.Input((3,)), keras.Input((3,))
    try:
        model = keras.Model([a, b], layers.Dense(2)(a))
    except ValueError as refused:  # by Keras 3.12
        assert "not connected" in str(refused)
        return
    two = Stage(model, run_eagerly=run_eagerly)
    two.forward([values((2, 3)), values((2, 3))])
    da, db = two.backward(values((2, 2)))
    assert da.shape == (2, 3) and db is None


@MODES
def test_own_losses_count_with_the_share(run_eagerly: bool) -> None:
    """The mean square of the input, added by a layer, has the gradient share * rate * 2x/size, whatever comes down."""
    stage = Stage(part((3,), Spread(0.5), layers.Dense(2)), run_eagerly=run_eagerly)
    x = values((4, 3))
    stage.forward(x, share=0.25)
    dx = stage.backward(np.zeros((4, 2), "float32"))
    np.testing.assert_allclose(dx, 0.25 * 0.5 * 2 * x / x.size, rtol=1e-5)


@MODES
def test_recomputing_makes_the_same_pass_again(run_eagerly: bool) -> None:
    """Dropout draws the same masks, statistics move once, and the next pass goes on from there."""
    found = []
    for recompute in (False, True):
        keras.utils.set_random_seed(7)
        model = part((3,), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5))
        stage = Stage(model, run_eagerly=run_eagerly, recompute=recompute)
        for k in range(2):
            stage.forward(values((6, 3), k), microbatch=k)
        back = [stage.backward(values((6, 4), 2 + k), microbatch=k).numpy() for k in (1, 0)]
        stage.forward(values((6, 3), 4), microbatch=2)
        found.append([*back, *stage.gradients().values(), *(v.numpy() for v in model.non_trainable_variables)])
    for kept, again in zip(*found, strict=True):
        np.testing.assert_allclose(again, kept, rtol=0.0 if run_eagerly else 1e-5, atol=0.0 if run_eagerly else 1e-6)


@MODES
def test_evaluation_keeps_nothing(run_eagerly: bool) -> None:
    """`training=False` runs dropout as identity, opens no tape and takes any number again."""
    stage = Stage(part((3,), layers.Dropout(0.9)), run_eagerly=run_eagerly)
    x = values((4, 3))
    for _ in range(2):
        np.testing.assert_array_equal(stage.forward(x, microbatch=0, training=False), x)
    assert stage.open_microbatches() == ()
    assert not np.array_equal(stage.forward(x, microbatch=0), x)


@MODES
def test_inputs_take_the_models_dtype(run_eagerly: bool) -> None:
    """float64 and lists become what the model takes, as Keras does it."""
    stage = dense(run_eagerly)
    x = values((4, 3))
    expected = stage.forward(x, microbatch=0)
    for k, given in enumerate([x.astype("float64"), x.tolist()], 1):
        given = np.asarray(given)
        assert_same_bits([stage.forward(given, microbatch=k).numpy()], [expected.numpy()], "output")


@MODES
def test_another_optimizer_takes_over(run_eagerly: bool) -> None:
    """Each `apply` uses the optimizer that it is given, not the one of the first call."""
    stage = Stage(part((3,), layers.Dense(2, use_bias=False)), run_eagerly=run_eagerly)
    (kernel,) = stage.trainable_variables
    for rate in (0.5, 0.125):
        before = kernel.numpy()
        stage.forward(values((4, 3)))
        stage.backward(values((4, 2)))
        (gradient,) = stage.gradients().values()
        stage.apply(keras.optimizers.SGD(rate))
        np.testing.assert_allclose(kernel.numpy(), before - rate * gradient, rtol=1e-5, atol=1e-6)


def refusals() -> dict[str, Any]:
    """Calls that must not work, each with the words of its error."""
    x, dy = values((4, 3)), values((4, 2))
    return {
        "backward twice": (lambda s: (s.backward(dy), s.backward(dy)), "no forward of microbatch 0 .*waiting: none"),
        "backward of another": (lambda s: s.backward(dy, microbatch=3), r"no forward of microbatch 3 .*waiting: \[0\]"),
        "forward twice": (lambda s: s.forward(x), "microbatch 0 was forwarded already"),
        "shape of the gradient": (lambda s: s.backward(dy[:, :1]), r"float32 \(4, 2\), received float32 \(4, 1\)"),
        "batch of the gradient": (lambda s: s.backward(dy[:1]), r"float32 \(4, 2\), received float32 \(1, 2\)"),
        "dtype of the gradient": (lambda s: s.backward(dy.astype("float64")), "received float64"),
        "count of gradients": (lambda s: s.backward([dy, dy]), "expected 1 output gradient.*received 2"),
        "shape of the input": (
            lambda s: s.forward(values((4, 5)), microbatch=1),
            r"\(None, 3\).*received float32 \(4, 5\)",
        ),
        "count of inputs": (lambda s: s.forward([x, x], microbatch=1), r"takes 1 tensor\(s\), received 2"),
        "text": (lambda s: s.forward(np.array([["a"] * 3]), microbatch=1), "text cannot cross"),
        "loss": (lambda s: s.forward_loss(x, dy, microbatch=1), "has no loss"),
    }


@MODES
@pytest.mark.parametrize("what", refusals())
def test_what_does_not_fit_is_refused_and_changes_nothing(what: str, run_eagerly: bool) -> None:
    """The error names stage, microbatch and both shapes; afterwards the right call works and gives the same."""
    call, words = refusals()[what]
    stage = dense(run_eagerly)
    stage.forward(values((4, 3)))
    with pytest.raises(HandoffError, match=f"'dense'.*{words}" if what != "count of inputs" else words):
        call(stage)
    if what != "backward twice":
        stage.backward(values((4, 2)))
    other = dense(run_eagerly)
    other.model.set_weights(stage.model.get_weights())
    other.forward(values((4, 3)))
    other.backward(values((4, 2)))
    assert_same_bits(list(stage.gradients().values()), list(other.gradients().values()), "gradient")


@MODES
def test_a_stage_with_its_loss_takes_no_gradients(run_eagerly: bool) -> None:
    """The loss is on the tape, so what comes down has no place."""
    stage = dense(run_eagerly, loss="mse")
    stage.forward_loss(values((4, 3)), values((4, 2)))
    with pytest.raises(HandoffError, match="takes no output gradients"):
        stage.backward(values((4, 2)))
    assert stage.backward().shape == (4, 3)


def test_what_is_no_stage() -> None:
    """A function has no variables; an unbuilt model has none yet."""
    with pytest.raises(HandoffError, match="a Keras model or layer, received function"):
        Stage(lambda x: x)
    with pytest.raises(HandoffError, match=r"is not built.*keras.Input"):
        Stage(keras.Sequential([layers.Dense(2)]))


def test_variables_with_one_path_keep_a_gradient_each() -> None:
    """Two layers of one name: neither's gradient may hide the other's."""
    twice = [keras.layers.Dense(2, use_bias=False, name="twin") for _ in range(2)]

    class Twins(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            for layer in twice:
                layer.build(shape)
            self.first, self.second = twice

        def call(self, x: Any) -> Any:
            return self.first(x) + 10.0 * self.second(x)

    layer = Twins(name="sum")
    layer.build((None, 3))
    stage = Stage(layer)
    x = np.arange(6, dtype="float32").reshape(2, 3)
    stage.backward(tf.ones_like(stage.forward(x)))
    found = stage.gradients()
    paths = [variable.path for variable in layer.trainable_variables]
    assert paths[0] == paths[1] and list(found) == [paths[0], f"{paths[0]}#2"]
    np.testing.assert_array_equal(found[f"{paths[0]}#2"], 10.0 * found[paths[0]])

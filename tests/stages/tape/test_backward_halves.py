"""A backward in halves is the whole backward, bit for bit, and holds between the halves what the second one reads."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from stages import HandoffError, Stage
from stages.loss.heads import Objective
from stages.tape.backward_halves import split_in_three
from stages.tape.contract import PassKey
from stages.tape.graph_split import Traced
from tests.one_tape import assert_same_bits

layers, ops = keras.layers, keras.ops
MICROBATCHES = (3, 2)


@keras.saving.register_keras_serializable("tapeline_tests")
class Steep(layers.Layer):
    """A gradient of its own, for its input and for its variable."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        @tf.custom_gradient
        def steep(x: Any, scale: Any) -> Any:
            return x * scale, lambda dy: (3 * dy, tf.reduce_sum(tf.round(dy * 8) * x, 0))

        return steep(x, tf.convert_to_tensor(self.scale))


def dense() -> Any:
    regular = {"kernel_regularizer": "l2", "activity_regularizer": keras.regularizers.L2(0.1)}
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh", **regular), layers.Dropout(0.4, seed=1), layers.Dense(4, "relu")]
    )


def normalised() -> Any:
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(2, 2),
        ]
    )


def attentive() -> Any:
    x = keras.Input((3, 4))
    h = layers.Add()([x, layers.MultiHeadAttention(2, 2)(x, x)])
    return keras.Model(x, layers.LayerNormalization()(layers.Dense(4, "gelu")(h)))


def recurrent() -> Any:
    return keras.Sequential([keras.Input((3, 4)), layers.Masking(), layers.LSTM(3), layers.Dense(2)])


def shared() -> Any:
    """One layer twice, an operation with several outputs, an output that no input reaches, one of integers."""
    x = keras.Input((4,))
    twice = layers.Dense(4, "tanh")
    left, right = ops.split(twice(twice(x)), 2, axis=-1)
    apart = layers.Dense(2)(ops.stop_gradient(x))
    return keras.Model(x, [layers.Multiply()([left, right]), apart, ops.argmax(left, -1)])


def steep() -> Any:
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), Steep(), layers.Dense(3, "tanh")])


def frozen() -> Any:
    model = dense()
    model.trainable = False
    return model


def half_frozen() -> Any:
    model = dense()
    model.layers[0].trainable = False
    return model


def plain() -> Any:
    """Its input gradient is its output gradient."""
    return keras.Sequential([keras.Input((4,)), layers.Activation("linear")])


def words() -> Any:
    """Rows of an embedding, of which no input has a gradient."""
    return keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(7, 3), layers.Dense(2, "tanh")])


def places() -> Any:
    """Rows that are looked up once for all samples, beside an input that has a gradient."""
    x = keras.Input((3, 4))
    table = layers.Embedding(3, 4)
    return keras.Model(x, layers.Dense(2)(x + table(ops.arange(3))))


MODELS = [dense, normalised, attentive, recurrent, shared, steep, frozen, half_frozen, plain, words, places]


def inputs_of(model: Any, samples: int, number: int) -> Any:
    rng, (symbolic,) = np.random.default_rng(number), model.inputs
    shape = (samples, *symbolic.shape[1:])
    if symbolic.dtype == "int32":
        return tf.constant(rng.integers(0, 7, shape).astype("int32"))
    values = rng.normal(size=shape).astype("float32")
    if len(shape) == 3:
        values[0, -1] = 0.0  # masked, where there is a mask
    return tf.constant(values)


def run(make: Any, order: str, **options: Any) -> tuple[list[Any], list[Any]]:
    """dL/dinputs of two microbatches and dL/dvariables, by the actions of `order`: F0 B0, or I0 and W0 for B0."""
    keras.utils.set_random_seed(1)
    model = make()
    loss = options.pop("loss", None)
    stage = Stage(model, loss=loss, **options)
    stage.go_in_halves("I" in order)
    found: dict[int, Any] = {}
    outputs: dict[int, Any] = {}
    for action in order.split():
        kind, k = action[0], int(action[1])
        key = PassKey(k)
        if kind == "F":
            objective = None
            if loss is not None:
                objective = Objective((tf.ones((MICROBATCHES[k], model.outputs[0].shape[-1])),), (None,), (0.3,))
            x = inputs_of(model, MICROBATCHES[k], k)
            outputs[k] = stage.forward_flat([x], key, True, MICROBATCHES[k] / 5, objective).values
            continue
        rng = np.random.default_rng(9 + k)
        seeds: list[Any] = [
            tf.constant(rng.normal(size=y.shape).astype("float32")) if y.dtype.is_floating and k == 0 else None
            for y in outputs[k]
        ]
        if k == 1 and outputs[k]:  # another microbatch has a gradient for its first output only
            seeds[0] = tf.ones_like(outputs[k][0])
        if kind == "B":
            found[k] = stage.backward_flat(seeds, key)
        elif kind == "I":
            found[k] = stage.backward_input_flat(seeds, key)
        else:
            stage.backward_weight_flat(key)
    given = [part for g in stage.as_given() for part in ((g.values, g.indices) if hasattr(g, "indices") else (g,))]
    return [gradient for k in sorted(found) for gradient in found[k]], given


WHOLE, APART = "F0 F1 B0 B1", "F0 F1 I1 I0 W0 W1"
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"run_eagerly": True},
    "eager recomputed": {"run_eagerly": True, "recompute": True},
    "compiled": {"run_eagerly": False},
    "recomputed": {"run_eagerly": False, "recompute": True},
}


@pytest.mark.parametrize("make", MODELS)
def test_two_halves_are_the_whole_bit_for_bit(make: Any) -> None:
    """dL/dinputs and dL/dvariables, in every way of keeping a tape, with input halves in another order."""
    for name, options in WAYS.items():
        inputs, variables = run(make, WHOLE, **options)
        halves, sums = run(make, APART, **options)
        assert_same_bits(halves, inputs, f"{name}: dL/dinput")
        assert_same_bits(sums, variables, f"{name}: dL/dvariable")
        if make is not frozen and make is not plain:
            assert any(np.abs(v).max() > 0 for v in sums if v is not None)


@pytest.mark.parametrize("make", [dense, recurrent, steep])
def test_the_halves_of_a_stage_with_its_loss_are_the_whole(make: Any) -> None:
    """Forward, loss and input gradient are one function there, and the weight gradient comes apart."""
    for eager in (True, False):
        inputs, variables = run(make, WHOLE, loss="mse", run_eagerly=eager)
        halves, sums = run(make, "F0 I0 F1 I1 W0 W1", loss="mse", run_eagerly=eager)
        assert_same_bits(halves, inputs, "dL/dinput")
        assert_same_bits(sums, variables, "dL/dvariable")


def test_whole_backwards_may_stand_beside_halves() -> None:
    """A plan may take some backwards whole; microbatches are still added in ascending order."""
    for options in WAYS.values():
        whole, mixed = run(dense, WHOLE, **options), run(dense, "F0 F1 I0 W0 B1", **options)
        assert_same_bits([*mixed[0], *mixed[1]], [*whole[0], *whole[1]], "gradient")


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_weight_half_comes_once_and_after_its_input_half(options: dict[str, Any]) -> None:
    for order in ("F0 W0", "F0 I0 W0 W0", "F0 F1 I1 W0"):
        with pytest.raises(HandoffError, match="no input gradient of microbatch 0 is waiting for its weight gradient"):
            run(dense, order, **options)
    with pytest.raises(HandoffError, match="microbatch 0 was forwarded already and waits for its backward"):
        run(dense, "F0 I0 F0", **options)


def cut(function: Any, variables: Any) -> Any:
    """The halves of a function of x (n, 3) and its gradient, which adds nothing up but gives dL/dvariables."""

    def joint(x: Any) -> Traced:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        seed = tf.compat.v1.placeholder(y.dtype, y.shape)
        return Traced([y], [seed], tape.gradient(y, [x, *variables], output_gradients=seed), inputs=1)

    return split_in_three(joint, [tf.TensorSpec((None, 3), tf.float32)], list)


def left_behind(function: Any, variables: Any) -> tuple[list[Any], int]:
    """Shapes of what is held between the halves of one pass over four samples, and how many of them are handed over."""
    made = cut(function, variables)
    _, *kept = made.forward(tf.ones((4, 3)))
    _, left = made.halves.run_first([*kept, tf.ones((4, 3))])
    return sorted(tuple(tensor.shape) for tensor in left), len(left) - len(made.halves.leaves)


def test_between_the_halves_is_held_what_the_second_one_reads() -> None:
    """Of tanh(x @ w): the input and the gradient in front of w, neither the value of tanh nor that of w."""
    w = tf.Variable(tf.ones((3, 3)))
    assert left_behind(lambda x: tf.tanh(x @ w), [w]) == ([(4, 3), (4, 3)], 1)


def test_a_gradient_that_falls_out_of_the_first_half_is_handed_over() -> None:
    """A loop gives dL/dx and dL/dw together: the second half has the finished sum to add, and nothing else."""
    w = tf.Variable(tf.ones((3, 3)))

    def function(x: Any) -> Any:
        return tf.while_loop(lambda i, _: i < 3, lambda i, h: (i + 1, tf.tanh(h @ w)), (0, x))[1]

    assert left_behind(function, [w]) == ([(3, 3)], 1)


def test_nothing_is_computed_first_where_no_input_has_a_gradient() -> None:
    w = tf.Variable(tf.ones((3, 3)))
    halves = cut(lambda x: tf.tanh(tf.stop_gradient(x) @ w), [w]).halves
    assert halves.first is None
    assert halves.results == 0


def test_what_a_gradient_does_besides_happens_once() -> None:
    """A custom gradient that counts its calls, though no gradient needs the count."""
    w, calls = tf.Variable(tf.ones((3, 3))), tf.Variable(0.0)

    @tf.custom_gradient
    def counted(x: Any) -> Any:
        def back(dy: Any) -> Any:
            calls.assign_add(tf.reduce_sum(dy))
            return dy

        return x, back

    made = cut(lambda x: counted(x @ w), [w])
    _, *kept = made.forward(tf.ones((4, 3)))
    (dx,), left = made.halves.run_first([*kept, tf.ones((4, 3))])
    (dw,) = made.halves.run_second(left)
    assert float(calls) == 12.0
    np.testing.assert_array_equal(dx, np.full((4, 3), 3.0))
    np.testing.assert_array_equal(dw, np.full((3, 3), 4.0))

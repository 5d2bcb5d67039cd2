"""Models for windows: each computes the same window by window as over the whole length, or does not."""

import keras
import tensorflow as tf

layers, ops = keras.layers, keras.ops
STEPS = 6


def behind(*more, **options):
    """What comes behind an LSTM."""
    first = layers.LSTM(3, return_sequences=True, name="rnn")
    return keras.Sequential([keras.Input((options.get("steps", STEPS), 3), options.get("samples")), first, *more])


def functional(make):
    """A function of a sequence (n, time, 3) that an LSTM gives."""
    x = keras.Input((STEPS, 3))
    return keras.Model(x, make(layers.LSTM(3, return_sequences=True)(x)))


class Centred(layers.Layer):
    """Of one's own: takes the mean over time away."""

    def call(self, x):
        return x - ops.mean(x, axis=1, keepdims=True)


class Scaled(layers.Layer):
    """Of one's own, and every step for itself."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.scale


class MeansAdded(layers.Layer):
    """Adds a mean over steps to the loss."""

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


class SumsAdded(layers.Layer):
    """Adds a sum over steps to the loss."""

    def call(self, x):
        self.add_loss(ops.sum(ops.square(x)))
        return x


class Gate(layers.Layer):
    """A way over time that is closed until it is trained."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return x + self.gate * ops.roll(x, 1, axis=1)


class KeepsTheLast(layers.Layer):
    """Hands its last step on in a variable, as stateful layers do."""

    def build(self, shape):
        self.last = self.add_weight(shape=(4, shape[-1]), initializer="zeros", trainable=False)

    def call(self, x):
        before = ops.concatenate([ops.expand_dims(self.last.value, 1), x], 1)[:, :-1]
        self.last.assign(tf.stop_gradient(x[:, -1]))
        return x + before


class Placed(layers.Layer):
    """Adds a number for the step's place."""

    def build(self, shape):
        self.places = self.add_weight(shape=(STEPS, shape[-1]), initializer="normal")

    def call(self, x):
        return x + self.places[: ops.shape(x)[1]]


class Counted(layers.SimpleRNNCell):
    """A cell of one's own: its second state counts the steps."""

    def __init__(self, units):
        super().__init__(units)
        self.state_size = [units, 1]

    def call(self, x, states, training=False):
        given, _ = super().call(x + 0.1 * states[1], states[0], training)
        return 2.0 * given, [given, states[1] + 1.0]

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, size)) for size in self.state_size]


def pictures(*more):
    """What comes behind a sequence of pictures."""
    return keras.Sequential([keras.Input((STEPS, 4, 4, 1)), *more])


def learned_from_all():
    x = keras.Input((STEPS, 3))
    start = layers.Dense(3)(layers.GlobalAveragePooling1D(name="all_of_x")(x))
    return keras.Model(x, layers.GRU(3, return_sequences=True)(x, initial_state=start))


def last_on_every_step(x):
    last = layers.GRU(3, name="last")(x)
    return layers.Add(name="on_every_step")([x, layers.Reshape((1, 3))(last)])


def masked(*more, **options):
    words = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(5, 3, mask_zero=True)(words)
    for layer in (layers.LSTM(3, return_sequences=True, **options), *more):
        x = layer(x)
    return keras.Model(words, x)


def without_the_mask(x):
    return ops.multiply(x, 2.0)


REFUSED = {
    "softmax": (lambda: behind(layers.Softmax(axis=1, name="over")), "'over' .Softmax."),
    "mean": (lambda: functional(lambda x: x - ops.mean(x, 1, True)), "'mean'"),
    "cumsum": (lambda: functional(lambda x: ops.cumsum(x, axis=1)), "operation 'cumsum"),
    "flip": (lambda: functional(lambda x: ops.flip(x, axis=1)), "operation 'flip"),
    "roll": (lambda: functional(lambda x: ops.roll(x, 1, axis=1)), "operation 'roll"),
    "slice": (lambda: functional(lambda x: x[:, ::2]), "operation 'get_item"),
    "shift": (lambda: functional(lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]), "'pad"),
    "last": (lambda: functional(lambda x: x - x[:, -1:]), "'get_item"),
    "own": (lambda: behind(Centred(name="centred")), "'centred' .Centred."),
    "unit": (lambda: behind(layers.UnitNormalization(axis=1, name="unit")), "'unit'"),
    "group": (lambda: behind(layers.GroupNormalization(1, name="group")), "'group' .GroupNormalization."),
    "layer": (lambda: behind(layers.LayerNormalization(axis=1, name="norm")), "'norm'.*needs the whole length"),
    "batch": (lambda: behind(layers.BatchNormalization(name="norm")), "'norm' .BatchNormalization.*in training"),
    "repeat": (
        lambda: keras.Sequential(
            [keras.Input((STEPS, 3)), layers.LSTM(3), layers.RepeatVector(STEPS, name="again"), layers.LSTM(2)]
        ),
        "'lstm_?\\w*' .LSTM.*what it reads is no part of the sequence that is cut",
    ),
    "start": (learned_from_all, "'all_of_x'"),
    "every": (lambda: functional(last_on_every_step), "'on_every_step' .Add.*only behind the last window"),
    "statistics": (
        lambda: keras.Sequential(
            [keras.Input((STEPS, 3)), layers.GRU(3), layers.BatchNormalization(name="norm"), layers.Dense(1)]
        ),
        "'norm' .BatchNormalization.*every window would change",
    ),
    "added": (lambda: behind(MeansAdded()), "what layers add to the loss themselves"),
    "activity": (
        lambda: keras.Sequential(
            [keras.Input((STEPS, 3)), layers.GRU(3), layers.Dense(2, activity_regularizer="l2", name="quiet")]
        ),
        "what layers add to the loss.*'quiet'",
    ),
    "closed": (lambda: behind(Gate(name="gate")), "'gate' .Gate."),
    "attention": (lambda: functional(lambda x: layers.MultiHeadAttention(1, 2, name="look")(x, x)), "'look'"),
    "convolution": (lambda: behind(layers.Conv1D(2, 3, padding="causal", name="wide")), "'wide' .Conv1D."),
    "bidirectional": (
        lambda: behind(layers.Bidirectional(layers.GRU(2), name="both")),
        "'both' .Bidirectional. cannot be run window by window: it reads the sequence from its end",
    ),
    "position": (lambda: behind(Placed(name="place")), "'place' .Placed.*counts them from the first"),
    "masked mean": (lambda: masked(layers.GlobalAveragePooling1D(name="pool")), "'pool'"),
}

TAKEN = {
    "own step": lambda: behind(Scaled(), layers.Dense(2)),
    "softmax of features": lambda: behind(layers.Softmax(axis=-1)),
    "layer norm": lambda: behind(layers.LayerNormalization(), layers.Dropout(0.5), layers.Dense(2)),
    "there and back": lambda: behind(layers.Permute((2, 1)), layers.Permute((2, 1))),
    "one step wide": lambda: behind(layers.Conv1D(2, 1)),
    "sums added": lambda: behind(SumsAdded()),
    "activity": lambda: behind(layers.Dense(2, activity_regularizer="l1", kernel_regularizer="l2")),
    "long": lambda: behind(layers.Dense(2), steps=400),
    "masked": lambda: masked(layers.GRU(2, return_sequences=True), layers.Dense(2)),
    "mask dropped": lambda: masked(layers.Lambda(without_the_mask), layers.LSTM(2, return_sequences=True)),
    "masked, last": lambda: masked(layers.LSTM(2)),
    "masked, zeros": lambda: masked(layers.Dense(2), zero_output_for_mask=True),
    "convolutional": lambda: keras.Sequential(
        [keras.Input((STEPS, 4, 4, 2)), layers.ConvLSTM2D(2, 2, return_sequences=True), layers.ConvLSTM2D(1, 2)]
    ),
}

ASKED = {
    "time distributed": lambda: behind(layers.TimeDistributed(layers.Dense(2))),
    "pictures": lambda: pictures(
        layers.TimeDistributed(layers.Conv2D(2, 3)), layers.TimeDistributed(layers.Flatten()), layers.LSTM(3)
    ),
    "sequences in sequences": lambda: keras.Sequential(
        [keras.Input((STEPS, 4, 2)), layers.TimeDistributed(layers.LSTM(2)), layers.GRU(3, return_sequences=True)]
    ),
    "a cell that counts": lambda: behind(layers.RNN(Counted(2), return_sequences=True, name="counting")),
    "cells in a stack": lambda: behind(
        layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], return_sequences=True, name="stack"), layers.Dense(1)
    ),
    "unrolled": lambda: behind(layers.GRU(2, unroll=True, reset_after=False, return_sequences=True)),
    "residual": lambda: functional(lambda x: layers.LayerNormalization()(x + layers.Dense(3, "gelu")(x))),
    "the last step": lambda: functional(lambda x: layers.Dense(2)(x[:, -1])),
    "features and their places": lambda: functional(lambda x: layers.Reshape((-1, 3, 1))(x)),
}
"""What people ask to train on long sequences, and windows take."""

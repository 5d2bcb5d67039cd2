"""Programs that learn from series: convolutions over time, recurrent forecasters, frames to come, roads as a graph."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_diabetes, load_digits

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each

STEPS, FEATURES = 8, 3


@functools.cache
def series():
    """(60, 3): three slow waves with measurements of patients as noise."""
    time = np.arange(60)[:, None] / 5
    noise = load_diabetes().data[:60, :FEATURES]
    return (np.sin(time + np.arange(FEATURES)) * 3 + 10 + 5 * noise).astype("float32")


@functools.cache
def windows():
    """(24, 8, 3) and the first feature one step later, (24, 1)."""
    values = series()
    x = np.stack([values[i : i + STEPS] for i in range(24)])
    return x, values[STEPS : STEPS + 24, :1]


# -- a temporal convolutional network ------------------------------------------------------------------------------


class ResidualBlock(layers.Layer):
    def __init__(self, filters, dilation, dropout=0.0):
        super().__init__()
        self.conv1 = layers.Conv1D(filters, 2, dilation_rate=dilation, padding="causal", activation="relu")
        self.conv2 = layers.Conv1D(filters, 2, dilation_rate=dilation, padding="causal", activation="relu")
        self.drop = layers.SpatialDropout1D(dropout)
        self.match = layers.Conv1D(filters, 1)

    def build(self, input_shape):
        self.conv1.build(input_shape)
        shape = self.conv1.compute_output_shape(input_shape)
        self.conv2.build(shape)
        self.match.build(input_shape)

    def call(self, x, training=None):
        y = self.drop(self.conv2(self.conv1(x)), training=training)
        return ops.relu(y + self.match(x))


def temporal_convolution():
    model = keras.Sequential([keras.Input((STEPS, FEATURES))])
    for i in range(3):
        model.add(ResidualBlock(6, 2**i))
    model.add(layers.Lambda(lambda x: x[:, -1]))
    model.add(layers.Dense(1))
    return model


def forecasting():
    return {"optimizer": keras.optimizers.Adam(1e-3, clipnorm=0.5), "loss": keras.losses.LogCosh(), "metrics": ["mape"]}


def fit_windows():
    x, y = windows()
    return {"x": x, "y": y, "batch_size": 8, "validation_data": (x[:5], y[:5])}


# -- a forecaster of gated recurrent units, normalised by what was adapted, on windows cut by Keras ----------------


def recurrent_forecaster():
    normalize = layers.Normalization()
    normalize.adapt(series()[:40])
    return keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            normalize,
            layers.GRU(6, return_sequences=True, recurrent_dropout=0.0),
            layers.GRU(4, kernel_regularizer=keras.regularizers.L1L2(1e-4, 1e-3)),
            layers.Dropout(0.2),
            layers.Dense(2, name="steps_ahead"),
        ]
    )


def quantile_loss(q=0.7):
    def loss(y_true, y_pred):
        error = y_true - y_pred
        return ops.mean(ops.maximum(q * error, (q - 1) * error), axis=-1)

    return loss


def quantiles():
    rate = keras.optimizers.schedules.InverseTimeDecay(0.01, decay_steps=2, decay_rate=1.0)
    return {"optimizer": keras.optimizers.Nadam(rate), "loss": quantile_loss(0.7), "metrics": ["mae"]}


def fit_dataset_of_windows():
    values = series()
    targets = np.stack([values[STEPS:-1, 0], values[STEPS + 1 :, 0]], axis=1)
    make = functools.partial(keras.utils.timeseries_dataset_from_array, sequence_length=STEPS, batch_size=12)
    train = make(values[:-2], targets, end_index=40, shuffle=True, seed=5)
    return {"x": train, "validation_data": make(values[:-2], targets, start_index=40), "shuffle": False}


# -- frames to come: convolutional LSTMs ---------------------------------------------------------------------------


def next_frames():
    inputs = layers.Input(shape=(None, 8, 8, 1))
    x = layers.ConvLSTM2D(filters=3, kernel_size=3, padding="same", return_sequences=True, activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ConvLSTM2D(filters=3, kernel_size=1, padding="same", return_sequences=True, activation="relu")(x)
    x = layers.Conv3D(filters=1, kernel_size=(3, 3, 3), activation="sigmoid", padding="same")(x)
    return keras.models.Model(inputs, x)


def frame_by_frame():
    return {"optimizer": keras.optimizers.Adadelta(1.0), "loss": keras.losses.BinaryCrossentropy(reduction="sum")}


def fit_frames():
    """Digits that move by a pixel a frame, (8, 4, 8, 8, 1)."""
    images = load_digits().images[:8] / 16
    frames = np.stack([np.roll(images, step, axis=2) for step in range(5)], axis=1)[..., None].astype("float32")
    return {"x": frames[:, :-1], "y": frames[:, 1:], "batch_size": 4}


# -- a classifier of series with attention, as a function over layers ----------------------------------------------


def transformer_encoder(inputs, head_size, num_heads, ff_dim, dropout=0):
    x = layers.MultiHeadAttention(key_dim=head_size, num_heads=num_heads, dropout=dropout)(inputs, inputs)
    x = layers.Dropout(dropout)(x)
    res = layers.LayerNormalization(epsilon=1e-6)(x) + inputs
    x = layers.Conv1D(filters=ff_dim, kernel_size=1, activation="relu")(res)
    x = layers.Conv1D(filters=inputs.shape[-1], kernel_size=1)(x)
    return layers.LayerNormalization(epsilon=1e-6)(x) + res


def series_classifier():
    inputs = keras.Input(shape=(STEPS, FEATURES))
    x = layers.Rescaling(0.1, offset=-1)(inputs)
    for _ in range(2):
        x = transformer_encoder(x, 4, 2, 4)
    x = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    x = layers.Dense(6, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def classifying():
    return {
        "optimizer": keras.optimizers.SGD(learning_rate=0.05, momentum=0.5),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["sparse_categorical_accuracy"],
    }


def fit_up_or_down():
    x, y = windows()
    return {"x": x, "y": (y[:, 0] > x[:, -1, 0]).astype("int32"), "batch_size": 8}


# -- traffic on roads: a graph convolution, then an LSTM over time --------------------------------------------------


class GraphConv(layers.Layer):
    def __init__(self, in_feat, out_feat, graph_info, aggregation_type="mean", activation=None, **kwargs):
        super().__init__(**kwargs)
        self.in_feat, self.out_feat = in_feat, out_feat
        self.edges, self.num_nodes = graph_info
        self.aggregation_type = aggregation_type
        self.weight = self.add_weight(
            initializer=keras.initializers.GlorotUniform(), shape=(in_feat, out_feat), dtype="float32", trainable=True
        )
        self.activation = layers.Activation(activation)

    def aggregate(self, neighbours):
        func = {"sum": tf.math.unsorted_segment_sum, "mean": tf.math.unsorted_segment_mean}[self.aggregation_type]
        return func(neighbours, self.edges[0], num_segments=self.num_nodes)

    def call(self, features):
        """(roads, n, steps, in_feat) to (roads, n, steps, 2 * out_feat)."""
        representation = tf.matmul(features, self.weight)
        aggregated = self.aggregate(tf.gather(representation, self.edges[1]))
        return self.activation(tf.concat([representation, aggregated], axis=-1))


class LSTMGC(layers.Layer):
    def __init__(self, out_feat, lstm_units, output_seq_len, graph_info, **kwargs):
        super().__init__(**kwargs)
        self.graph_conv = GraphConv(1, out_feat, graph_info, activation="relu")
        self.lstm = layers.LSTM(lstm_units, activation="relu")
        self.dense = layers.Dense(output_seq_len)
        self.output_seq_len = output_seq_len

    def call(self, inputs):
        out = self.graph_conv(tf.transpose(inputs, [2, 0, 1, 3]))
        roads, n, steps = (tf.shape(out)[i] for i in range(3))
        out = self.lstm(tf.reshape(out, [roads * n, steps, out.shape[-1]]))
        out = tf.reshape(self.dense(out), [roads, n, self.output_seq_len])
        return tf.transpose(out, [1, 2, 0])


def traffic():
    edges = np.array([[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]])
    inputs = layers.Input((STEPS, FEATURES, 1))
    scaled = layers.Rescaling(0.1)(inputs)
    outputs = LSTMGC(2, 4, 2, (edges, FEATURES))(scaled)
    return keras.models.Model(inputs, layers.Rescaling(10.0)(outputs))


def following():
    return {"optimizer": keras.optimizers.RMSprop(learning_rate=0.0002), "loss": keras.losses.MeanSquaredError()}


def fit_roads():
    values = series()
    x = np.stack([values[i : i + STEPS] for i in range(24)])[..., None]
    y = np.stack([values[i + STEPS : i + STEPS + 2] for i in range(24)])
    return {"x": x, "y": y, "batch_size": 8}


PROGRAMS = {
    "temporal convolution": Program(temporal_convolution, forecasting, fit_windows, cuts={"stages": 3}),
    "recurrent forecaster": Program(
        recurrent_forecaster, quantiles, fit_dataset_of_windows, inputs=lambda: windows()[0], microbatches=1
    ),
    "next frames": Program(next_frames, frame_by_frame, fit_frames, cuts={"stages": 3}, microbatches=1),
    "series classifier": Program(series_classifier, classifying, fit_up_or_down, cuts={"stages": 3}),
    "traffic": Program(traffic, following, fit_roads),
}


@each(PROGRAMS, gate=["next frames", "recurrent forecaster", "temporal convolution"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["traffic"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

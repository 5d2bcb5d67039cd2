"""Programs that learn from tables: features prepared in the model, wide and deep, attention, gates, trees, tasks."""

from __future__ import annotations

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each

SAMPLES = 24


@functools.cache
def tumours():
    """Eight measurements (24, 8) as they are, and whether a tumour is benign."""
    x, y = load_breast_cancer(return_X_y=True)
    return x[10 : 10 + SAMPLES, :8].astype("float32"), y[10 : 10 + SAMPLES].astype("float32")


@functools.cache
def progress():
    """Ten measurements (24, 10) of diabetes patients and how the disease went on, 25 to 346."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return x[:SAMPLES].astype("float32"), y[:SAMPLES].astype("float32")


@functools.cache
def wines():
    """Thirteen measurements (24, 13) and three kinds of wine."""
    x, y = load_wine(return_X_y=True)
    return x[::7][:SAMPLES].astype("float32"), y[::7][:SAMPLES]


@functools.cache
def columns():
    """Tumours as a table of columns: four numbers and two categories, made of numbers."""
    x, y = tumours()
    table = {f"number_{i}": x[:, i] for i in range(4)}
    table |= {f"kind_{i}": np.digitize(x[:, i], np.quantile(x[:, i], [0.25, 0.5, 0.75])) + 10 for i in (4, 5)}
    return table, y


# -- wide and deep, features prepared by adapted layers inside the model -------------------------------------------


def numbers_and_kinds():
    """An input a column, numbers normalised, categories looked up."""
    table, _ = columns()
    inputs, numbers, kinds = {}, [], []
    for name, values in table.items():
        if name.startswith("number"):
            inputs[name] = layers.Input(shape=(1,), name=name)
            normalize = layers.Normalization(axis=None)
            normalize.adapt(values)
            numbers.append(normalize(inputs[name]))
        else:
            inputs[name] = layers.Input(shape=(1,), name=name, dtype="int64")
            lookup = layers.IntegerLookup(output_mode="int")
            lookup.adapt(values)
            kinds.append(lookup(inputs[name]))
    return inputs, numbers, kinds


def wide_and_deep():
    inputs, numbers, kinds = numbers_and_kinds()
    wide = layers.concatenate([layers.CategoryEncoding(num_tokens=5, output_mode="one_hot")(kind) for kind in kinds])
    wide = layers.BatchNormalization()(wide)
    deep = layers.concatenate([*numbers, *(layers.Flatten()(layers.Embedding(5, 2)(kind)) for kind in kinds)])
    for units in (8, 8):
        deep = layers.Dense(units)(deep)
        deep = layers.ReLU()(layers.BatchNormalization()(deep))
        deep = layers.Dropout(0.1)(deep)
    merged = layers.concatenate([wide, deep])
    return keras.Model(inputs=inputs, outputs=layers.Dense(1, activation="sigmoid")(merged))


def detection():
    return {
        "optimizer": keras.optimizers.Adam(1e-2),
        "loss": "binary_crossentropy",
        "metrics": [
            keras.metrics.FalseNegatives(name="fn"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
        ],
    }


def fit_table():
    table, y = columns()
    data = tf.data.Dataset.from_tensor_slices((table, y)).batch(8)
    return {"x": data, "shuffle": False, "class_weight": {0: 0.6, 1: 3.0}}


def table_of_columns():
    table, _ = columns()
    return {name: values[:10, None] for name, values in table.items()}


# -- a transformer over the columns --------------------------------------------------------------------------------


class ColumnEmbedding(layers.Layer):
    def __init__(self, number_of_columns, dims):
        super().__init__()
        self.embedding = layers.Embedding(input_dim=number_of_columns, output_dim=dims)
        self.number_of_columns = number_of_columns

    def call(self, x):
        return x + self.embedding(ops.arange(0, self.number_of_columns))


def tab_transformer():
    inputs, numbers, kinds = numbers_and_kinds()
    encoded = [layers.Embedding(5, 4)(kind) for kind in kinds]
    x = ColumnEmbedding(2, 4)(layers.Concatenate(axis=1)(encoded))
    for block in range(2):
        attended = layers.MultiHeadAttention(2, 4, dropout=0.1, name=f"attention_{block}")(x, x)
        x = layers.LayerNormalization(epsilon=1e-6, name=f"norm_{block}")(
            layers.Add(name=f"skip_{block}")([attended, x])
        )
        feedforward = keras.Sequential([layers.Dense(4, activation=keras.activations.gelu), layers.Dropout(0.1)])(x)
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([feedforward, x]))
    features = layers.Concatenate()(
        [layers.Flatten()(x), layers.LayerNormalization(epsilon=1e-6)(layers.concatenate(numbers))]
    )
    for units in (8, 4):
        features = layers.Dense(units, activation=keras.activations.selu)(layers.BatchNormalization()(features))
    return keras.Model(inputs=inputs, outputs=layers.Dense(1, activation="sigmoid", name="sigmoid")(features))


def tabular_adamw():
    return {
        "optimizer": keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4),
        "loss": keras.losses.BinaryCrossentropy(label_smoothing=0.1),
        "metrics": [keras.metrics.BinaryAccuracy(name="accuracy")],
    }


def fit_columns():
    table, y = columns()
    best = keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, min_delta=10.0, restore_best_weights=True)
    return {"x": table, "y": y, "batch_size": 8, "epochs": 3, "validation_split": 0.25, "callbacks": [best]}


# -- gated residual networks and the selection of variables --------------------------------------------------------


class GatedLinearUnit(layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.linear = layers.Dense(units)
        self.sigmoid = layers.Dense(units, activation="sigmoid")

    def call(self, inputs):
        return self.linear(inputs) * self.sigmoid(inputs)

    def build(self, input_shape):
        self.built = True


class GatedResidualNetwork(layers.Layer):
    def __init__(self, units, dropout_rate):
        super().__init__()
        self.units = units
        self.elu_dense = layers.Dense(units, activation="elu")
        self.linear_dense = layers.Dense(units)
        self.dropout = layers.Dropout(dropout_rate)
        self.gated_linear_unit = GatedLinearUnit(units)
        self.layer_norm = layers.LayerNormalization()
        self.project = layers.Dense(units)

    def call(self, inputs):
        x = self.dropout(self.linear_dense(self.elu_dense(inputs)))
        if inputs.shape[-1] != self.units:
            inputs = self.project(inputs)
        return self.layer_norm(inputs + self.gated_linear_unit(x))

    def build(self, input_shape):
        self.built = True


class VariableSelection(layers.Layer):
    def __init__(self, num_features, units, dropout_rate):
        super().__init__()
        self.grns = [GatedResidualNetwork(units, dropout_rate) for _ in range(num_features)]
        self.grn_concat = GatedResidualNetwork(units, dropout_rate)
        self.softmax = layers.Dense(units=num_features, activation="softmax")

    def call(self, inputs):
        v = self.softmax(self.grn_concat(layers.concatenate(inputs)))
        x = ops.stack([grn(one) for grn, one in zip(self.grns, inputs, strict=True)], axis=1)
        return ops.squeeze(ops.matmul(ops.expand_dims(v, axis=1), x), axis=1)

    def build(self, input_shape):
        self.built = True


def variable_selection():
    inputs, numbers, kinds = numbers_and_kinds()
    encoded = [layers.Dense(4)(number) for number in numbers]
    encoded += [layers.Flatten()(layers.Embedding(5, 4)(kind)) for kind in kinds]
    features = VariableSelection(6, 4, 0.0)(encoded)
    features = GatedResidualNetwork(6, 0.0)(features)
    return keras.Model(inputs=inputs, outputs=layers.Dense(units=1, activation="sigmoid")(features))


# -- regression through highways, with a metric that is the root of a mean ------------------------------------------


class Highway(layers.Layer):
    def __init__(self, activation="relu"):
        super().__init__()
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        self.transform = layers.Dense(input_shape[-1], activation=self.activation)
        self.gate = layers.Dense(
            input_shape[-1], activation="sigmoid", bias_initializer=keras.initializers.Constant(-1)
        )
        self.transform.build(input_shape)
        self.gate.build(input_shape)

    def call(self, x):
        t = self.gate(x)
        return t * self.transform(x) + (1 - t) * x


def highways():
    x, y = progress()
    features = layers.Normalization(axis=-1)
    features.adapt(x)
    back = layers.Normalization(axis=None, invert=True)
    back.adapt(y)
    stack = [Highway() for _ in range(3)]
    return keras.Sequential([keras.Input((10,)), features, layers.Dense(8, "relu"), *stack, layers.Dense(1), back])


def rmse(y_true, y_pred):
    return ops.sqrt(ops.mean(ops.square(ops.cast(y_true, "float32") - ops.squeeze(y_pred, -1))))


def regression():
    return {
        "optimizer": keras.optimizers.RMSprop(0.01),
        "loss": keras.losses.Huber(delta=50.0),
        "metrics": ["mae", rmse],
    }


def fit_progress():
    x, y = progress()

    def step_decay(epoch):
        return 0.01 * math.pow(0.5, math.floor((1 + epoch) / 2))

    return {
        "x": x,
        "y": y,
        "batch_size": 8,
        "epochs": 2,
        "callbacks": [keras.callbacks.LearningRateScheduler(step_decay)],
    }


# -- several tasks, weighed --------------------------------------------------------------------------------------


def several_tasks():
    inputs = keras.Input((13,), name="measured")
    trunk = layers.Dense(8, activation="relu", kernel_regularizer="l2")(layers.BatchNormalization()(inputs))
    trunk = layers.Dense(8, activation="relu", activity_regularizer=keras.regularizers.L1(1e-3), name="trunk")(trunk)
    kind = layers.Dense(3, activation="softmax", name="kind")(layers.Dense(6, activation="relu")(trunk))
    alcohol = layers.Dense(1, name="alcohol")(layers.Dense(6, activation="relu")(trunk))
    return keras.Model(inputs, {"kind": kind, "alcohol": alcohol})


def weighed_losses():
    return {
        "optimizer": keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)),
        "loss": {"kind": "sparse_categorical_crossentropy", "alcohol": "mse"},
        "loss_weights": {"kind": 2.0, "alcohol": 0.1},
        "metrics": {"kind": ["accuracy"], "alcohol": ["mae", keras.metrics.RootMeanSquaredError(name="rmse")]},
    }


def fit_wines():
    x, y = wines()
    return {"x": x, "y": {"kind": y, "alcohol": x[:, 0]}, "batch_size": 8, "validation_split": 0.25}


# -- a layer used again and again, as steps of a differential equation ---------------------------------------------


def shared_steps():
    inputs = keras.Input((13,))
    f = keras.Sequential([layers.Dense(6, activation="tanh"), layers.Dense(6)], name="f")
    h = layers.Dense(6, name="lift")(layers.Rescaling(0.01)(inputs))
    for _ in range(4):
        h = h + 0.25 * f(h)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(h))


def plain_sgd():
    return {"optimizer": keras.optimizers.SGD(0.1), "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def fit_kinds():
    x, y = wines()
    return {"x": x, "y": y, "batch_size": 8}


# -- a forest of soft trees: models of a class of their own as layers ----------------------------------------------


class NeuralDecisionTree(keras.Model):
    def __init__(self, depth, num_features, used_features_rate, num_classes):
        super().__init__()
        self.depth = depth
        self.num_leaves = 2**depth
        used = int(num_features * used_features_rate)
        one_hot = np.eye(num_features)
        sampled = np.random.choice(np.arange(num_features), used, replace=False)
        self.used_features_mask = ops.convert_to_tensor(one_hot[sampled], dtype="float32")
        self.pi = self.add_weight(initializer="random_normal", shape=[self.num_leaves, num_classes], trainable=True)
        self.decision_fn = layers.Dense(units=self.num_leaves, activation="sigmoid", name="decision")

    def call(self, features):
        batch_size = ops.shape(features)[0]
        features = ops.matmul(features, ops.transpose(self.used_features_mask))
        decisions = ops.expand_dims(self.decision_fn(features), axis=2)
        decisions = layers.concatenate([decisions, 1 - decisions], axis=2)
        mu = ops.ones([batch_size, 1, 1])
        begin, end = 1, 2
        for level in range(self.depth):
            mu = ops.reshape(mu, [batch_size, -1, 1])
            mu = ops.tile(mu, (1, 1, 2)) * decisions[:, begin:end, :]
            begin, end = end, end + 2 ** (level + 1)
        mu = ops.reshape(mu, [batch_size, self.num_leaves])
        return ops.matmul(mu, ops.softmax(self.pi))


def forest():
    inputs = keras.Input((13,))
    features = layers.BatchNormalization()(inputs)
    trees = [NeuralDecisionTree(2, 13, 0.5, 3)(features) for _ in range(3)]
    return keras.Model(inputs, layers.Average()(trees))


# Keras's own LearningRateScheduler reads the learning rate in a way that NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROGRAMS = {
    "wide and deep": Program(wide_and_deep, detection, fit_table, inputs=table_of_columns, microbatches=1),
    "tab transformer": Program(tab_transformer, tabular_adamw, fit_columns, cuts={"stages": 3}, microbatches=1),
    "variable selection": Program(variable_selection, detection, fit_table, inputs=table_of_columns),
    "highways": Program(highways, regression, fit_progress, cuts={"stages": 3}),
    "several tasks": Program(
        several_tasks, weighed_losses, fit_wines, cuts={"at": ["trunk"]}, microbatches=1, sums_apart=True
    ),
    "shared steps": Program(shared_steps, plain_sgd, fit_kinds, cuts={"stages": 2}),
    "forest": Program(forest, plain_sgd, fit_kinds, microbatches=1, sums_apart=True),
}


@each(PROGRAMS, check=["shared steps"], gate=["variable selection", "several tasks", "forest"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["shared steps"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

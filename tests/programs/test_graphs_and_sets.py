"""Programs that learn from points, graphs, pairs and triples: what is compared, gathered or aligned."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits, load_iris

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each

SAMPLES = 16


# -- clouds of points: aligned by small networks whose matrices are kept orthogonal ----------------------------------


class OrthogonalRegularizer(keras.regularizers.Regularizer):
    def __init__(self, num_features, l2reg=0.001):
        self.num_features = num_features
        self.l2reg = l2reg
        self.eye = ops.eye(num_features)

    def __call__(self, x):
        x = ops.reshape(x, (-1, self.num_features, self.num_features))
        xxt = ops.tensordot(x, x, axes=(2, 2))
        xxt = ops.reshape(xxt, (-1, self.num_features, self.num_features))
        return ops.sum(self.l2reg * ops.square(xxt - self.eye))


def conv_bn(x, filters):
    x = layers.Conv1D(filters, kernel_size=1, padding="valid")(x)
    return layers.Activation("relu")(layers.BatchNormalization(momentum=0.0)(x))


def dense_bn(x, filters):
    x = layers.Dense(filters)(x)
    return layers.Activation("relu")(layers.BatchNormalization(momentum=0.0)(x))


def tnet(inputs, num_features):
    bias = keras.initializers.Constant(np.eye(num_features).flatten())
    x = conv_bn(inputs, 6)
    x = dense_bn(layers.GlobalMaxPooling1D()(conv_bn(x, 8)), 6)
    x = layers.Dense(
        num_features * num_features,
        kernel_initializer="zeros",
        bias_initializer=bias,
        activity_regularizer=OrthogonalRegularizer(num_features),
    )(x)
    transform = layers.Reshape((num_features, num_features))(x)
    return layers.Dot(axes=(2, 1))([inputs, transform])


def pointnet():
    inputs = keras.Input(shape=(20, 3))
    x = conv_bn(tnet(inputs, 3), 4)
    x = conv_bn(tnet(x, 4), 8)
    x = layers.Dropout(0.3)(dense_bn(layers.GlobalMaxPooling1D()(x), 6))
    return keras.Model(inputs=inputs, outputs=layers.Dense(10, activation="softmax")(x), name="pointnet")


def adam_and_accuracy():
    return {
        "optimizer": keras.optimizers.Adam(learning_rate=0.001),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["sparse_categorical_accuracy"],
    }


def augment(points, label):
    points += tf.random.stateless_uniform(points.shape, (1, 2), -0.005, 0.005, dtype=tf.float32)
    return points, label


def clouds():
    """The 20 brightest pixels of digits, as points in space."""
    images, classes = load_digits(return_X_y=True)
    brightest = np.argsort(images[:SAMPLES], axis=1)[:, -20:]
    height = np.take_along_axis(images[:SAMPLES], brightest, 1) / 16
    points = np.stack([brightest // 8 / 8, brightest % 8 / 8, height], axis=2)
    return points.astype("float32"), classes[:SAMPLES]


def fit_clouds():
    return {"x": tf.data.Dataset.from_tensor_slices(clouds()).map(augment).batch(8), "shuffle": False}


# -- a graph of papers: nodes by number, their features and edges inside the layers ----------------------------------


@functools.cache
def flowers():
    """A graph that joins each of 40 flowers to its three nearest: (features, edges (2, 120), kinds)."""
    x, y = load_iris(return_X_y=True)
    x, y = x[::4].astype("float32"), y[::4]
    nearest = np.argsort(((x[:, None] - x) ** 2).sum(2), axis=1)[:, 1:4]
    edges = np.stack([np.repeat(np.arange(len(x)), 3), nearest.ravel()])
    return x, edges, y


def create_ffn(hidden_units, dropout_rate, name=None):
    fnn_layers = []
    for units in hidden_units:
        fnn_layers.append(layers.BatchNormalization())
        fnn_layers.append(layers.Dropout(dropout_rate))
        fnn_layers.append(layers.Dense(units, activation=keras.activations.gelu))
    return keras.Sequential(fnn_layers, name=name)


class GraphConvLayer(layers.Layer):
    def __init__(self, hidden_units, dropout_rate=0.2, aggregation_type="mean", normalize=True, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.aggregation_type = aggregation_type
        self.normalize = normalize
        self.ffn_prepare = create_ffn(hidden_units, dropout_rate)
        self.update_fn = create_ffn(hidden_units, dropout_rate)

    def build(self, input_shape):
        units = input_shape[0][-1]
        self.ffn_prepare.build((None, units))
        self.update_fn.build((None, 2 * units))
        self.built = True

    def call(self, inputs):
        node_representations, edges, edge_weights = inputs
        messages = self.ffn_prepare(ops.take(node_representations, edges[1], axis=0)) * edge_weights[:, None]
        count = node_representations.shape[0]
        aggregated = ops.segment_sum(messages, edges[0], num_segments=count) / 3
        embeddings = self.update_fn(ops.concatenate([node_representations, aggregated], axis=1))
        return ops.normalize(embeddings, axis=-1)


class GNNNodes(layers.Layer):
    """Representations of the nodes asked for, from the whole graph."""

    def __init__(self, graph_info, hidden_units, dropout_rate=0.0, **kwargs):
        super().__init__(**kwargs)
        node_features, edges, edge_weights = graph_info
        self.node_features, self.edges = node_features, edges
        self.edge_weights = ops.ones(edges.shape[1]) if edge_weights is None else edge_weights
        self.edge_weights = self.edge_weights / ops.sum(self.edge_weights) * edges.shape[1]
        self.preprocess = create_ffn(hidden_units, dropout_rate, name="preprocess")
        self.conv1 = GraphConvLayer(hidden_units, dropout_rate, name="graph_conv1")
        self.conv2 = GraphConvLayer(hidden_units, dropout_rate, name="graph_conv2")

    def build(self, input_shape):
        nodes, units = self.node_features.shape[0], self.node_features.shape[1]
        self.preprocess.build((nodes, units))
        shape = (nodes, self.preprocess.layers[-1].units)
        self.conv1.build((shape, None, None))
        self.conv2.build((shape, None, None))

    def call(self, input_node_indices):
        x = self.preprocess(self.node_features)
        x = self.conv1((x, self.edges, self.edge_weights)) + x
        x = self.conv2((x, self.edges, self.edge_weights)) + x
        return ops.take(x, ops.cast(input_node_indices, "int32"), axis=0)


def graph_network():
    features, edges, _ = flowers()
    inputs = keras.Input(shape=(), dtype="int32", name="node")
    x = GNNNodes((features, edges, None), [6], name="graph")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.Dense(6, activation="gelu")(x)))


def logits_of_kinds():
    return {
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="acc")],
    }


def fit_nodes():
    _, _, kinds = flowers()
    nodes = np.arange(0, len(kinds), 2)
    return {"x": nodes, "y": kinds[nodes], "batch_size": 8}


# -- pairs: the same tower twice, contrasted -------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
def euclidean_distance(vects):
    x, y = vects
    return ops.sqrt(ops.maximum(ops.sum(ops.square(x - y), axis=1, keepdims=True), keras.backend.epsilon()))


def siamese():
    inputs = layers.Input((8, 8, 1))
    x = layers.BatchNormalization()(inputs)
    x = layers.AveragePooling2D(pool_size=(2, 2))(layers.Conv2D(4, (3, 3), activation="tanh")(x))
    x = layers.BatchNormalization()(layers.Flatten()(x))
    tower = keras.Model(inputs, layers.Dense(4, activation="tanh")(x), name="tower")
    one, other = layers.Input((8, 8, 1), name="one"), layers.Input((8, 8, 1), name="other")
    distance = layers.Lambda(euclidean_distance, output_shape=(1,))([tower(one), tower(other)])
    outputs = layers.Dense(1, activation="sigmoid")(layers.BatchNormalization()(distance))
    return keras.Model(inputs=[one, other], outputs=outputs)


def contrastive(margin=1):
    def contrastive_loss(y_true, y_pred):
        square_pred = ops.square(y_pred)
        margin_square = ops.square(ops.maximum(margin - y_pred, 0))
        return ops.mean((1 - y_true) * square_pred + y_true * margin_square)

    return contrastive_loss


def contrasting():
    return {"optimizer": "RMSprop", "loss": contrastive(margin=1), "metrics": ["accuracy"]}


def fit_pairs():
    images, classes = load_digits(return_X_y=True)
    one, other = images[:SAMPLES].reshape(-1, 8, 8, 1) / 16, images[10 : 10 + SAMPLES].reshape(-1, 8, 8, 1) / 16
    different = classes[:SAMPLES] != classes[10 : 10 + SAMPLES]
    return {"x": [one, other], "y": different.astype("float32"), "batch_size": 8, "validation_split": 0.25}


# -- triples: a frozen part, distances by a layer, the loss by add_loss ------------------------------------------------


class DistanceLayer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def call(self, anchor, positive, negative):
        ap_distance = ops.sum(ops.square(anchor - positive), -1)
        an_distance = ops.sum(ops.square(anchor - negative), -1)
        return ap_distance, an_distance


class TripletLoss(layers.Layer):
    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def call(self, distances):
        ap_distance, an_distance = distances
        self.add_loss(ops.mean(ops.maximum(ap_distance - an_distance + self.margin, 0.0)))
        return ap_distance


def triplets():
    embedding = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(12, activation="relu", name="frozen"),
            layers.Dense(6),
            layers.UnitNormalization(),
        ],
        name="embedding",
    )
    embedding.get_layer("frozen").trainable = False
    inputs = [keras.Input((64,), name=name) for name in ("anchor", "positive", "negative")]
    distances = DistanceLayer(name="distance")(*(embedding(one) for one in inputs))
    return keras.Model(inputs, TripletLoss(0.5)(distances))


def no_loss_but_its_own():
    return {"optimizer": keras.optimizers.SGD(0.1)}


def fit_triplets():
    images, classes = load_digits(return_X_y=True)
    by_class = [images[classes == k] / 16 for k in range(10)]
    anchor = np.concatenate([some[0:2] for some in by_class])
    positive = np.concatenate([some[2:4] for some in by_class])
    negative = np.concatenate([some[4:6] for some in by_class[1:] + by_class[:1]])
    return {"x": {"anchor": anchor, "positive": positive, "negative": negative}, "batch_size": 8}


# -- users and films: two embeddings and their product ----------------------------------------------------------------


def films():
    users, movies = keras.Input((1,), name="user", dtype="int32"), keras.Input((1,), name="movie", dtype="int32")
    options = {"embeddings_initializer": "he_normal", "embeddings_regularizer": keras.regularizers.l2(1e-6)}
    user = layers.Flatten()(layers.Embedding(12, 4, name="users", **options)(users))
    user_bias = layers.Flatten()(layers.Embedding(12, 1, name="user_bias")(users))
    movie = layers.Flatten()(layers.Embedding(9, 4, name="movies", **options)(movies))
    movie_bias = layers.Flatten()(layers.Embedding(9, 1, name="movie_bias")(movies))
    rating = layers.Dot(axes=1, name="dot")([user, movie]) + user_bias + movie_bias
    return keras.Model([users, movies], layers.Activation("sigmoid")(rating))


def rating():
    return {"optimizer": keras.optimizers.Adam(learning_rate=0.001), "loss": keras.losses.BinaryCrossentropy()}


def fit_ratings():
    random = np.random.default_rng(2)
    x = {"user": random.integers(0, 12, 30), "movie": random.integers(0, 9, 30)}
    return {"x": x, "y": random.uniform(size=30), "batch_size": 10, "epochs": 1, "validation_split": 0.1}


PROGRAMS = {
    "pointnet": Program(
        pointnet, adam_and_accuracy, fit_clouds, inputs=lambda: clouds()[0], cuts={"stages": 3}, microbatches=1
    ),
    "graph network": Program(graph_network, logits_of_kinds, fit_nodes, microbatches=1),
    "siamese": Program(siamese, contrasting, fit_pairs, microbatches=1),
    "triplets": Program(triplets, no_loss_but_its_own, fit_triplets, sums_apart=True),
    "films": Program(films, rating, fit_ratings),
}


@each(PROGRAMS, check=["films"], gate=["siamese", "triplets", "graph network"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["films", "siamese", "triplets"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

"""One small model for every kind of Keras layer, and what can be seen of a model from outside."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

L = keras.layers
SERIES, IMAGE, CUBE = (5, 4), (8, 8, 3), (6, 6, 6, 2)


class Case(NamedTuple):
    name: str
    model: Any
    x: Any


def models() -> Iterator[Case]:
    """The models with an input for each; random numbers are drawn from a fixed seed."""
    rng = np.random.default_rng(3)
    for shape, layers in _layers().items():
        for layer in layers:
            kind, *sizes = shape if isinstance(shape[0], str) else ("floats", *shape)
            copies = 2 if kind in ("list", "arguments") else 1
            dtype = {"words": "int64", "strings": "string"}.get(kind, "float32")
            inputs = [keras.Input(batch_shape=(2, *sizes), dtype=dtype) for _ in range(copies)]
            given = layer(*inputs) if kind == "arguments" or copies == 1 else layer(inputs)
            if kind == "words":
                x: Any = rng.integers(0, 7, (2, *sizes))
            elif kind == "strings":
                x = tf.constant(rng.choice(["a b", "c", "who"], (2, *sizes)).tolist())
            else:
                x = [rng.normal(size=(2, *sizes)).astype("float32") for _ in inputs]
                x = x if copies > 1 else x[0]
            yield Case(type(layer).__name__, keras.Model(inputs if copies > 1 else inputs[0], given), x)


def _layers() -> dict[tuple[Any, ...], list[Any]]:
    dense = {"kernel_regularizer": "l2", "bias_constraint": "non_neg", "activity_regularizer": "l1"}
    rnn = {"dropout": 0.3, "recurrent_dropout": 0.2, "return_sequences": True}
    found = {
        (4,): [L.Dense(3, "gelu", **dense), L.EinsumDense("ab,bc->ac", 5), L.Dropout(0.5), L.GaussianNoise(0.5)],
        SERIES: [L.LSTM(3), L.GRU(3, **rnn), L.SimpleRNN(3, stateful=True), L.RNN([L.GRUCell(3), L.LSTMCell(2)])],
        IMAGE: [L.Conv2D(2, 3), L.SeparableConv2D(2, 3), L.DepthwiseConv2D(3), L.Conv2DTranspose(2, 3)],
        CUBE: [L.Conv3D(2, 3), L.Conv3DTranspose(2, 3), L.SpatialDropout3D(0.5), L.MaxPooling3D(), L.Flatten()],
        (3, *IMAGE): [L.ConvLSTM2D(2, 3), L.TimeDistributed(L.Conv2D(2, 3))],
        ("words", 5): [L.Embedding(7, 3, mask_zero=True), L.CategoryEncoding(7), L.Hashing(5)],
        ("list", 4): [L.Add(), L.Concatenate(), L.Dot(1), L.Multiply(), L.Subtract(), L.Maximum(), L.Minimum()],
        ("list", *SERIES): [L.Attention(use_scale=True), L.AdditiveAttention(), L.Average()],
        ("arguments", *SERIES): [L.MultiHeadAttention(2, 3, dropout=0.1), L.GroupQueryAttention(4, 4, 2)],
    }
    found[4,] += [L.GaussianDropout(0.5), L.AlphaDropout(0.5), L.LayerNormalization(), L.UnitNormalization()]
    found[4,] += [L.SpectralNormalization(L.Dense(3)), L.PReLU(), L.ELU(), L.LeakyReLU(), L.ReLU(6.0), L.Softmax()]
    found[4,] += [L.Activation("silu"), L.Activation(keras.ops.gelu), L.Activation(lambda x: 3 * x), L.Reshape((2, 2))]
    found[4,] += [L.RepeatVector(3), L.ActivityRegularization(0.1), L.Identity(), L.Lambda(lambda x: x * 2 + 1)]
    found[4,] += [L.Rescaling(2.0, 1.0), L.Discretization([-1.0, 0.0, 1.0]), L.Normalization(mean=1.0, variance=2.0)]
    found[SERIES] += [L.Bidirectional(L.LSTM(3)), L.Masking(), L.Permute((2, 1)), L.SpatialDropout1D(0.5)]
    found[SERIES] += [L.Conv1D(2, 3), L.SeparableConv1D(2, 3), L.DepthwiseConv1D(3), L.Conv1DTranspose(2, 3)]
    found[SERIES] += [L.AveragePooling1D(2), L.MaxPooling1D(2), L.GlobalMaxPooling1D(), L.GlobalAveragePooling1D()]
    found[SERIES] += [L.ZeroPadding1D(), L.UpSampling1D(), L.Cropping1D(1), L.TimeDistributed(L.Dense(3))]
    found[IMAGE] += [L.BatchNormalization(), L.GroupNormalization(3), L.SpatialDropout2D(0.5), L.MaxPooling2D()]
    found[IMAGE] += [L.AveragePooling2D(2), L.GlobalAveragePooling2D(), L.ZeroPadding2D(), L.Cropping2D(1)]
    found[IMAGE] += [L.UpSampling2D(), L.Resizing(4, 4), L.CenterCrop(4, 4), L.RandomFlip(), L.RandomRotation(0.2)]
    found[IMAGE] += [L.RandomZoom(0.2), L.RandomTranslation(0.2, 0.2), L.RandomContrast(0.2), L.RandomCrop(4, 4)]
    found["words", 4] = [L.IntegerLookup(vocabulary=[1, 2, 3, 9]), L.IntegerLookup(vocabulary=[5, 6], invert=True)]
    found["strings", 3] = [L.StringLookup(vocabulary=["a b", "c"])]
    found["strings",] = [L.TextVectorization(vocabulary=["a", "b", "c"], output_sequence_length=3)]
    return {shape: layers for shape, layers in found.items() if layers}


def seen(model: Any, x: Any) -> list[Any]:
    """Outputs and losses of three calls, and variables before and behind them, as plain data and arrays."""
    facts = [[v.path, v.name, v.dtype, v.trainable, v.value.trainable, v.numpy()] for v in model.variables]
    facts += [[v.path for v in model.trainable_variables], [v.path for v in model.non_trainable_variables]]
    facts += [[one.name, one.trainable, one.built, type(one).__name__] for one in model._flatten_layers()]
    for training in (True, False, True):
        given = model(x, training=training)
        facts.append([np.asarray(one) for one in keras.tree.flatten(given)])
        facts.append([np.asarray(loss) for loss in model.losses])
    return [*facts, [v.numpy() for v in model.variables]]


def same(one: Any, other: Any) -> bool:
    """Whether two such facts are equal, arrays bit for bit."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        equal = one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes()
        return one.dtype == other.dtype and one.shape == other.shape and equal
    return bool(one == other)

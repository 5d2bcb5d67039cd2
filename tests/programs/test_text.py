"""Programs that learn from text: classes, sentiment, translation, a small GPT, captions, a mixture of experts."""

from __future__ import annotations

import functools
import pydoc_data.topics

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits

from tests.programs.program import Program, assert_compiled_is_keras, assert_eager_is_keras, each

WORDS, LENGTH, SAMPLES = 40, 10, 16


@functools.cache
def sentences():
    """Python's own help as (16, 10) numbers of words below 40, padded with 0 to different lengths."""
    vectorize = layers.TextVectorization(max_tokens=WORDS, output_sequence_length=LENGTH)
    texts = [topic[:600] for topic in list(pydoc_data.topics.topics.values())[:SAMPLES]]
    vectorize.adapt(texts)
    tokens = np.array(vectorize(texts), "int32")
    for i, row in enumerate(tokens):
        row[3 + i % (LENGTH - 2) :] = 0
    return tokens, (np.arange(SAMPLES) % 2).astype("float32")


# -- classification by a block of a transformer -------------------------------------------------------------------


class TransformerBlock(layers.Layer):
    def __init__(self, embed_dim, num_heads, ff_dim, rate=0.1):
        super().__init__()
        self.att = layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim)
        self.ffn = keras.Sequential([layers.Dense(ff_dim, activation="relu"), layers.Dense(embed_dim)])
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, inputs):
        attn_output = self.dropout1(self.att(inputs, inputs))
        out1 = self.layernorm1(inputs + attn_output)
        return self.layernorm2(out1 + self.dropout2(self.ffn(out1)))


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, maxlen, vocab_size, embed_dim):
        super().__init__()
        self.token_emb = layers.Embedding(input_dim=vocab_size, output_dim=embed_dim)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=embed_dim)

    def call(self, x):
        positions = ops.arange(start=0, stop=ops.shape(x)[-1], step=1)
        return self.token_emb(x) + self.pos_emb(positions)


def transformer_classifier():
    inputs = layers.Input(shape=(LENGTH,))
    x = TokenAndPositionEmbedding(LENGTH, WORDS, 8)(inputs)
    x = TransformerBlock(8, 2, 8)(x)
    x = layers.Dropout(0.1)(layers.GlobalAveragePooling1D()(x))
    x = layers.Dropout(0.1)(layers.Dense(6, activation="relu")(x))
    return keras.Model(inputs=inputs, outputs=layers.Dense(2, activation="softmax")(x))


def classification():
    return {"optimizer": "adam", "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def fit_classes():
    x, y = sentences()
    return {"x": x, "y": y, "batch_size": 8, "epochs": 2, "validation_data": (x[:6], y[:6])}


# -- sentiment by two LSTMs, masked, with weights of classes ------------------------------------------------------


def sentiment():
    return keras.Sequential(
        [
            layers.Input(shape=(None,), dtype="int32"),
            layers.Embedding(WORDS, 6, mask_zero=True),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(4)),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


def binary():
    return {
        "optimizer": keras.optimizers.Adam(1e-2, clipnorm=1.0),
        "loss": "binary_crossentropy",
        "metrics": ["accuracy", keras.metrics.AUC(name="auc")],
    }


def fit_sentiment():
    x, y = sentences()
    return {"x": x, "y": y, "batch_size": 8, "class_weight": {0: 0.5, 1: 2.0}}


# -- translation with masks and attention, dictionaries from tf.data ----------------------------------------------


class CrossAttention(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__()
        self.supports_masking = True
        self.mha = layers.MultiHeadAttention(key_dim=units, num_heads=1, **kwargs)
        self.layernorm = layers.LayerNormalization()
        self.add = layers.Add()

    def call(self, x, context):
        attn_output = self.mha(query=x, value=context)
        return self.layernorm(self.add([x, attn_output]))


def translation():
    encoder_inputs = keras.Input((None,), dtype="int64", name="encoder_inputs")
    x = layers.Embedding(WORDS, 6, mask_zero=True, name="source")(encoder_inputs)
    context = layers.Bidirectional(layers.GRU(6, return_sequences=True), merge_mode="sum", name="encoder")(x)
    decoder_inputs = keras.Input((None,), dtype="int64", name="decoder_inputs")
    x = layers.Embedding(WORDS, 6, mask_zero=True, name="target")(decoder_inputs)
    x = layers.GRU(6, return_sequences=True, name="decoder")(x)
    x = CrossAttention(6)(x, context)
    x = layers.GRU(6, return_sequences=True, name="post_attention")(x)
    return keras.Model([encoder_inputs, decoder_inputs], layers.Dense(WORDS, name="words")(x))


def translating():
    """Padding counts in no mean: the mask of the decoder's words reaches the loss."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"optimizer": "rmsprop", "loss": loss, "metrics": ["accuracy"], "weighted_metrics": ["accuracy"]}


def fit_pairs():
    tokens, _ = sentences()
    inputs = {"encoder_inputs": tokens, "decoder_inputs": tokens[:, :-1][::-1].astype("int64")}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:][::-1])).batch(4).take(3).cache()
    return {"x": data, "shuffle": False}


def pairs_to_translate():
    tokens, _ = sentences()
    return {"encoder_inputs": tokens[:6].astype("int64"), "decoder_inputs": tokens[:6, :5].astype("int64")}


# -- a small GPT: causal attention, two outputs of which one has a loss, a callback that writes text ---------------


def causal_attention_mask(n_dest, n_src):
    """(1, n_dest, n_src): each position sees itself and those before it."""
    return (ops.arange(n_dest)[:, None] >= ops.arange(n_src) - n_src + n_dest)[None]


class CausalBlock(layers.Layer):
    def __init__(self, embed_dim, num_heads, ff_dim):
        super().__init__()
        self.att = layers.MultiHeadAttention(num_heads, embed_dim)
        self.ffn = keras.Sequential([layers.Dense(ff_dim, activation="relu"), layers.Dense(embed_dim)])
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)

    def call(self, inputs):
        length = ops.shape(inputs)[1]
        causal_mask = causal_attention_mask(length, length)
        out1 = self.layernorm1(inputs + self.att(inputs, inputs, attention_mask=causal_mask))
        return self.layernorm2(out1 + self.ffn(out1))


def small_gpt():
    inputs = layers.Input(shape=(LENGTH - 1,), dtype="int32")
    x = TokenAndPositionEmbedding(LENGTH - 1, WORDS, 8)(inputs)
    for _ in range(2):
        x = CausalBlock(8, 2, 8)(x)
    return keras.Model(inputs=inputs, outputs=[layers.Dense(WORDS)(x), x])


def masked_loss(y_true, y_pred):
    loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    mask = ops.cast(y_true != 0, loss.dtype)
    return ops.sum(loss * mask) / ops.sum(mask)


def masked_acc(y_true, y_pred):
    match = ops.cast(ops.cast(y_true, "int32") == ops.cast(ops.argmax(y_pred, -1), "int32"), "float32")
    mask = ops.cast(y_true != 0, "float32")
    return ops.sum(match * mask) / ops.sum(mask)


def next_words():
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    return {"optimizer": optimizer, "loss": [masked_loss, None], "metrics": [[masked_acc], None]}


class TextGenerator(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.texts = []

    def on_epoch_end(self, epoch, logs=None):
        tokens = [5]
        for _ in range(2):
            padded = np.array([tokens + [0] * (LENGTH - 1 - len(tokens))])
            y, _ = self.model.predict(padded, verbose=0)
            tokens.append(int(np.argmax(y[0][len(tokens) - 1])))
        self.texts.append(tokens)
        logs["last word"] = float(tokens[-1])


def fit_next_words():
    tokens, _ = sentences()
    data = tf.data.Dataset.from_tensor_slices((tokens[:, :-1], tokens[:, 1:])).batch(6)
    return {"x": data, "epochs": 2, "shuffle": False, "callbacks": [TextGenerator()]}


# -- captions: what an image and the words so far say of the next word --------------------------------------------


def captions():
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(6, 3, activation="relu", name="see")(image)
    features = layers.Dense(8, activation="relu", name="features")(layers.GlobalMaxPooling2D()(x))
    words = keras.Input((None,), name="words", dtype="int32")
    e = layers.Embedding(WORDS, 8, mask_zero=True, name="embed")(words)
    e = layers.Dropout(0.0, name="drop")(e)
    state = layers.LSTM(8, name="read")(e)
    x = layers.Dense(8, activation="relu", name="decode")(layers.add([features, state]))
    return keras.Model({"image": image, "words": words}, layers.Dense(WORDS, activation="softmax", name="next")(x))


def captioning():
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.01])
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, clipvalue=0.5)
    return {"optimizer": optimizer, "loss": "categorical_crossentropy"}


def captioned():
    tokens, _ = sentences()
    return {"words": tokens, "image": load_digits().images[:SAMPLES, ..., None].astype("float32") / 16}


def fit_captions():
    x = captioned()
    y = keras.utils.to_categorical(np.max(x["words"], axis=1), WORDS)
    return {"x": x, "y": y, "batch_size": 6, "sample_weight": np.linspace(0.5, 1.5, SAMPLES)}


# -- a switch transformer: a mixture of experts with a loss that balances them -------------------------------------


class Router(layers.Layer):
    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.route = layers.Dense(units=num_experts)

    def call(self, inputs, training=False):
        probabilities = keras.activations.softmax(self.route(inputs), axis=-1)
        gate, index = ops.top_k(probabilities, k=1)
        mask = ops.one_hot(index[..., 0], self.num_experts)
        density = ops.mean(mask, axis=1)
        density_proxy = ops.mean(probabilities, axis=1)
        self.add_loss(0.01 * ops.mean(density_proxy * density) * self.num_experts**2)
        return mask * gate


class Switch(layers.Layer):
    def __init__(self, num_experts, embed_dim):
        super().__init__()
        self.experts = [layers.Dense(embed_dim, activation="relu") for _ in range(num_experts)]
        self.router = Router(num_experts)

    def call(self, inputs):
        gates = self.router(inputs)
        outputs = ops.stack([expert(inputs) for expert in self.experts], axis=-1)
        return ops.sum(outputs * gates[:, :, None, :], axis=-1)


def switch_transformer():
    inputs = layers.Input(shape=(LENGTH,))
    x = TokenAndPositionEmbedding(LENGTH, WORDS, 8)(inputs)
    attended = layers.MultiHeadAttention(2, 8)(x, x)
    x = layers.LayerNormalization(epsilon=1e-6)(x + attended)
    x = layers.LayerNormalization(epsilon=1e-6)(x + Switch(3, 8)(x))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


PROGRAMS = {
    "transformer classifier": Program(
        transformer_classifier, classification, fit_classes, cuts={"stages": 3}, microbatches=1
    ),
    "bidirectional sentiment": Program(sentiment, binary, fit_sentiment, cuts={"stages": 3}),
    "translation": Program(
        translation,
        translating,
        fit_pairs,
        inputs=pairs_to_translate,
        cuts={"at": ["encoder", "decoder"]},
        rounding=2e-5,  # sums over microbatches, under an optimizer that divides by them
    ),
    "small gpt": Program(
        small_gpt,
        next_words,
        fit_next_words,
        inputs=lambda: sentences()[0][:, 1:],
        options={"schedule": "gpipe"},  # its loss and its metric are numbers of the whole batch
    ),
    "captions": Program(captions, captioning, fit_captions, cuts={"at": ["features", "read"]}),
    "switch transformer": Program(
        switch_transformer, classification, fit_classes, cuts={"at": ["layer_normalization"]}, zeros=("key/bias",)
    ),
}


@each(PROGRAMS, gate=["captions", "switch transformer"])
def test_eager_training_is_keras_bit_for_bit(program):
    assert_eager_is_keras(program)


@each(PROGRAMS, gate=["transformer classifier"])
def test_compiled_training_is_keras_within_rounding(program):
    assert_compiled_is_keras(program)

"""Programs as one script, with every class and function in it, trained over real processes."""

from __future__ import annotations

import textwrap

import pytest

SENTIMENT = '''
    import keras
    import numpy as np
    from keras import layers, ops

    from pipeline import Pipeline

    WORDS, LENGTH = 30, 8


    class Embed(layers.Layer):
        def __init__(self, words, size):
            super().__init__()
            self.tokens = layers.Embedding(words, size, mask_zero=True)
            self.positions = layers.Embedding(LENGTH, size)

        def call(self, x):
            return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))

        def compute_mask(self, inputs, mask=None):
            return self.tokens.compute_mask(inputs)


    class Pool(layers.Layer):
        """The mean of what is not padding."""

        def __init__(self):
            super().__init__()
            self.supports_masking = True

        def call(self, x, mask=None):
            weights = ops.cast(mask, x.dtype)[..., None]
            return ops.sum(x * weights, axis=1) / ops.sum(weights, axis=1)

        def compute_mask(self, inputs, mask=None):
            return None


    class Focal(keras.losses.Loss):
        def __init__(self, gamma):
            super().__init__()
            self.gamma = gamma

        def call(self, y, p):
            right = ops.where(y > 0.5, p, 1 - p)
            return -ops.mean((1 - right) ** self.gamma * ops.log(right + 1e-7), axis=-1)


    class Hits(keras.metrics.Metric):
        def __init__(self, threshold):
            super().__init__(name="hits")
            self.threshold = threshold
            self.count = self.add_weight(name="count", initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.count.assign_add(ops.sum(ops.cast(ops.abs(y_true - y_pred) < self.threshold, "float32")))

        def result(self):
            return ops.convert_to_tensor(self.count)


    def build():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((LENGTH,), dtype="int32")
        x = Embed(WORDS, 6)(inputs)
        x = layers.Dense(6, activation=lambda x: ops.tanh(1.5 * x), name="mixed")(x)
        return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(Pool()(x)))


    def compiled():
        optimizer = keras.optimizers.Adam(0.01)
        return {"optimizer": optimizer, "loss": Focal(2.0), "metrics": [Hits(0.6)], "run_eagerly": True}


    def data():
        random = np.random.default_rng(0)
        x = random.integers(1, WORDS, (24, LENGTH))
        x[::3, 5:] = 0
        return x, random.integers(0, 2, (24, 1)).astype("float32")
'''

REGRESSION = '''
    import keras
    import numpy as np
    from keras import layers, ops
    from sklearn.datasets import load_diabetes

    from pipeline import Pipeline

    SCALE = np.float32(100.0)


    class Attention(layers.Layer):
        """Weighs the features; made of two layers that it holds."""

        def __init__(self, units, activation=layers.LeakyReLU(0.1)):
            super().__init__()
            self.score = layers.Dense(units, activation=activation)
            self.mix = keras.Sequential([layers.Dense(units), layers.Activation(lambda x: ops.softmax(x, axis=-1))])

        def build(self, shape):
            self.score.build(shape)
            self.mix.build((shape[0], self.score.units))
            self.shift = self.add_weight(shape=(shape[-1],), initializer=shifted, constraint=NonNegative())

        def call(self, x):
            return x * self.mix(self.score(x)) + self.shift


    class NonNegative(keras.constraints.Constraint):
        def __call__(self, w):
            return w * ops.cast(w >= 0, w.dtype)


    def shifted(shape, dtype=None):
        return ops.cast(np.linspace(-0.1, 0.1, shape[0]), dtype)


    def scaled_error(power):
        def loss(y, p):
            return ops.mean(ops.abs((y - p) / SCALE) ** power, axis=-1)

        return loss


    def build():
        keras.utils.set_random_seed(3)
        x, _ = data()
        normalize = layers.Normalization()
        normalize.adapt(x)
        steps = [normalize, Attention(10), layers.Dense(8, "relu"), layers.Dense(1), layers.Rescaling(SCALE)]
        return keras.Sequential([keras.Input((10,)), *steps])


    def compiled():
        return {"optimizer": keras.optimizers.SGD(0.05), "loss": scaled_error(1.5), "run_eagerly": True}


    def data():
        x, y = load_diabetes(return_X_y=True, scaled=False)
        return x[:24].astype("float32"), y[:24, None].astype("float32")
'''

COMPARED = """

    if __name__ == "__main__":
        x, y = data()
        model = build()
        model.compile(**compiled())
        theirs = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
        with Pipeline.split(build(), stages=2, microbatches=1) as pipe:
            pipe.compile(**compiled())
            ours = pipe.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
            assert ours == theirs, (ours, theirs)
            merged = pipe.merge()
            for a, b, c in zip(pipe.get_weights(), model.get_weights(), merged.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(pipe.predict(x, verbose=0), model.predict(x, verbose=0))
        print("equal, bit for bit")
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(SENTIMENT, id="sentiment", marks=pytest.mark.gate),
        pytest.param(REGRESSION, id="regression", marks=pytest.mark.soak),
    ],
)
def test_a_script_trains_its_own_classes_as_keras_does(program, tmp_path, warm_interpreter):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program + COMPARED))
    ran = warm_interpreter.run(script, folder=tmp_path, seconds=100)
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert ran.stdout.splitlines()[-1] == "equal, bit for bit"

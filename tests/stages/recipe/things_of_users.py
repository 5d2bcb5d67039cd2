"""What people write that no configuration of Keras's carries, as a notebook has it: in a module without a file."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tests.stages.recipe.layers_of_keras import seen

NOTEBOOK = """
import functools, threading
import keras, numpy as np, tensorflow as tf
from keras import ops

SCALE = 3.0

def gelu(x):
    return SCALE * x

class Bare(keras.layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.units = units
        self.drawn = np.random.default_rng(5).normal(size=(4, units)).astype("float32")
        self.lock = threading.Lock()
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units), name="w")
    def call(self, x):
        self.scores = x @ self.w
        return self.scores + x @ self.drawn * getattr(self, "gain", 1.0)

class Noise(keras.layers.Layer):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed
    def call(self, x, training=False):
        return x + keras.random.normal(ops.shape(x), seed=self.seed) if training else x

class Traced(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = tf.function(lambda x: x * self.factor)
        self.factor, self.parts = 2.0, [keras.layers.Dense(3), {"a": keras.layers.Dense(4)}]
    def build(self, shape):
        self.parts[0].build(shape)
        self.parts[1]["a"].build((None, 3))
    def call(self, x):
        return self.inner(self.parts[1]["a"](self.parts[0](x)))

class Conditional(keras.layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.always, self.training_only, self.never = (keras.layers.Dense(units) for _ in range(3))
    def build(self, shape):
        self.always.build(shape)
    def call(self, x, training=False):
        y = self.always(x)
        if training:
            y = y + self.training_only(x)
        return y if x.shape[-1] == y.shape[-1] else y + self.never(x)

class Doubling(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.steps = functools.partial(ops.multiply, 2.0)
    def call(self, x, training=False):
        return self.steps(self.inner(x, training=training))

class Weighted(keras.losses.Loss):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.beta = weight, keras.Variable(2.0, name="beta")
    def call(self, y_true, y_pred):
        return self.weight * self.beta * ops.mean(ops.square(y_true - y_pred), axis=-1)

def focal(gamma):
    def loss(y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** gamma, axis=-1)
    return loss

class Over(keras.metrics.Metric):
    def __init__(self, threshold):
        super().__init__(name="over")
        self.threshold = threshold
        self.count = self.add_variable((), "zeros")
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(ops.sum(ops.cast(y_pred > self.threshold, "float32")))
    def result(self):
        return self.count

class Tenfold(keras.optimizers.SGD):
    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(10 * g, v) for g, v in grads_and_vars])

class Warm(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, peak):
        self.peak = peak
    def __call__(self, step):
        return self.peak * ops.cast(step + 1, "float32")
"""


class Thing(NamedTuple):
    name: str
    thing: Any
    look: Callable[[Any, Any], Any]
    x: Any


def notebook() -> ModuleType:
    """The module, under a name that no other process can import."""
    made = ModuleType("of_a_notebook")
    sys.modules[made.__name__] = made
    exec(NOTEBOOK, vars(made))
    return made


def valued(loss: Any, x: Any) -> Any:
    return np.asarray(loss(x, 0.5 * x + 1))


def counted(metric: Any, x: Any) -> Any:
    metric.update_state(x > 0, 1 / (1 + np.exp(-x)))
    return [np.asarray(metric.result()), [v.path for v in metric.variables]]


def stepped(optimizer: Any, x: Any) -> Any:
    """Two updates of new variables."""
    variables = [keras.Variable(x, name="a"), keras.Variable(2 * x[0], name="b")]
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply_gradients([(v * 0.5, v) for v in variables])
    return [v.numpy() for v in [*variables, *optimizer.variables]]


def things() -> list[Thing]:
    """Objects with a way to look at them and what to look with."""
    mine, rng = notebook(), np.random.default_rng(4)
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.normal(300, 50, size=(6, 4)).astype("float32")
    words, numbers = tf.constant([["to"], ["be"], ["or"]]), rng.integers(0, 9, (6, 2))
    found = [Thing(name, model, seen, y if "adapted" in name else x) for name, model in _models(mine, y).items()]
    found += [Thing(name, model, seen, numbers) for name, model in _looking_up(numbers).items()]
    found += [Thing("words", _of(_adapted(keras.layers.StringLookup(), words), dtype="string", size=1), seen, words)]
    losses = {"no get_config": mine.Weighted(5.0), "closure": mine.focal(1.5), "huber": keras.losses.Huber(delta=0.2)}
    losses |= {"lambda": lambda a, b: keras.ops.mean((a - b) ** 4, axis=-1)}
    found += [Thing(name, loss, valued, x) for name, loss in losses.items()]
    metrics = {"a metric's argument": mine.Over(0.2), "AUC": keras.metrics.AUC(curve="PR")}
    found += [Thing(name, metric, counted, x) for name, metric in metrics.items()]
    optimizers = {"override": mine.Tenfold(0.1), "schedule": keras.optimizers.Adam(mine.Warm(0.1))}
    optimizers |= {"callable rate": keras.optimizers.SGD(lambda: 0.25, momentum=0.5)}
    optimizers["set later"] = keras.optimizers.SGD(0.1)
    optimizers["set later"].momentum, optimizers["set later"].clipvalue = 0.5, 0.01
    return [*found, *(Thing(name, optimizer, stepped, x) for name, optimizer in optimizers.items())]


def _of(*layers: Any, size: int = 4, dtype: str | None = None) -> Any:
    return keras.Sequential([keras.Input((size,), dtype=dtype), *layers])


def _models(mine: ModuleType, y: Any) -> dict[str, Any]:
    L = keras.layers
    found = {
        "__init__ without **kwargs": _of(mine.Bare(3)),
        "a function that shares a name with Keras's": _of(L.Dense(3, activation=mine.gelu)),
        "layers in a layer": _of(L.Dense(3, activation=L.PReLU()), mine.Traced()),
        "a model that is a layer": _of(mine.Doubling(_of(L.Dense(3), L.Dropout(0.5)))),
        "adapted": _of(_adapted(L.Normalization(), y), L.Dense(2)),
        "adapted bins": _of(_adapted(L.Discretization(num_bins=4), y)),
        "mixed": _of(L.Dense(3, dtype="mixed_bfloat16"), L.Dense(2, dtype="float64")),
    }
    found["an attribute set later"] = _of(mine.Bare(3))
    found["an attribute set later"].layers[0].gain = 5.0
    changed = found["variables changed after build"] = _of(L.Dense(3), L.BatchNormalization(), L.Dropout(0.5))
    changed.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    changed.layers[0].bias.constraint = keras.constraints.MaxNorm(0.3)
    changed.layers[0].bias.trainable = False
    changed.layers[2].rate = 0.0
    seed = keras.random.SeedGenerator(7)
    found["one seed generator for two"] = _of(mine.Noise(seed), L.Dense(4), mine.Noise(seed))
    trained = found["compiled and trained"] = _of(L.Dense(3), L.Dense(1))
    trained.compile("adam", "mse", metrics=["mae"])
    trained.fit(y, y[:, :1], verbose=0)
    whole, shared = keras.Input((4,)), L.Dense(4)
    found["a part of a graph"] = keras.Model(whole, shared(L.Dense(4)(shared(whole))) + keras.ops.flip(whole, 1))
    return found


def _looking_up(numbers: Any) -> dict[str, Any]:
    L = keras.layers
    return {
        "integers looked up": _of(_adapted(L.IntegerLookup(), numbers), size=2, dtype="int64"),
        "counted": _of(_adapted(L.IntegerLookup(output_mode="tf_idf"), numbers), size=2, dtype="int64"),
    }


def _adapted(layer: Any, data: Any) -> Any:
    layer.adapt(data)
    return layer

"""Functional models as plain data, which a strategy can draw and shrink, and what turns them into Keras models.

A sketch is a list of nodes, each of which reads values made before it: branches, joins, skips, shared layers, several
inputs and outputs. Every node has a stage no lower than those it reads from, so that the cuts are any that a model can
have, not only stretches of its order. Values are (n, width) with a width of 2 to 10, or (n, 3, width) with a mask.

A sketch prints as what one needs to build it again. `tests.strategies_graphs` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tests.models import Spread

layers, ops = keras.layers, keras.ops

VOCABULARY = 6
STEPS = 3
SHARED_WIDTH = 3
REGULARISED = 1
"""Which of the two shared layers has a regulariser."""

OUTPUTS = ("first", "second", "third")
"""Names of outputs where they are in a dict; in alphabetical order, as Keras puts them."""
INPUTS = ("floats", "number", "tokens")
"""(n, 3) floats; (n,) integers for an embedding; (n, 3) integers of which 0 is masked."""

LOSSES: dict[str, Callable[[], Any]] = {
    "squares": lambda: keras.losses.MeanSquaredError(),
    "classes": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "huber": lambda: keras.losses.Huber(),
}

# What reads one value of rank 2: (width of the result, or 0 for that of the value) -> layer or function.
# Statistics of few samples amplify rounding; the large epsilons keep that below what a test may call equal.
ONE: dict[str, Callable[[int, int], Any]] = {
    "dense": lambda size, _: layers.Dense(size, "tanh"),
    "gelu": lambda size, _: layers.Dense(size, "gelu"),
    "regularised": lambda size, _: layers.Dense(size, kernel_regularizer="l2", bias_regularizer="l1"),
    "active": lambda size, _: layers.Dense(size, activity_regularizer=keras.regularizers.L2(0.1)),
    "frozen": lambda size, _: layers.Dense(size, "tanh", trainable=False),
    "dropout": lambda _, seed: layers.Dropout(0.4, seed=seed),
    "noise": lambda _, seed: layers.GaussianNoise(0.3, seed=seed),
    "batch": lambda *_: layers.BatchNormalization(epsilon=0.1),
    "layer": lambda *_: layers.LayerNormalization(epsilon=0.1),
    "activity": lambda *_: layers.ActivityRegularization(l2=0.1),
    "spread": lambda *_: Spread(0.2),
    "nested": lambda size, seed: _nested(size, seed),
    "tanh": lambda *_: ops.tanh,
    "shifted": lambda *_: _shifted,
    "stopped": lambda *_: ops.stop_gradient,
}
SIZED = ("dense", "gelu", "regularised", "active", "frozen", "nested", "recurrent")
MASKABLE = ("dense", "gelu", "dropout", "layer", "tanh", "shifted", "stopped")
"""What also reads values of rank 3, and passes their masks on or loses them as Keras does."""
SEVERAL: dict[str, Callable[[Sequence[Any]], Any]] = {
    "add": lambda values: layers.Add()(values),
    "average": lambda values: layers.Average()(values),
    "multiply": lambda values: ops.multiply(values[0], values[1]),
    "subtract": lambda values: values[0] - values[1],
    "concatenate": lambda values: layers.Concatenate()(values),
}
STEPWISE: dict[str, Callable[[int], Any]] = {
    "pool": lambda _: layers.GlobalAveragePooling1D(),
    "recurrent": lambda size: layers.GRU(size),
    "attention": lambda _: _attend,
}
"""What reads only values of rank 3."""
READS = {"batch": 4, "renormalised": 4, "layer": 4, "activity": 2, "spread": 2, "attention": 4, "recurrent": 3}
"""How many operations of a node read its value, where that is more than one; at most, for it only excuses."""


@dataclass(frozen=True)
class Node:
    """One call.

    Attributes:
        kind: A name in the tables above, or ``embed``, ``halves``, ``shared`` (one of two dense layers),
            ``renormalised`` (a shared normalisation).
        reads: Numbers of values; inputs come first.
        size: Width of the result where it is free; for ``shared`` the number of the layer.
        stage: Where it runs, no lower than the stages it reads from.
    """

    kind: str
    reads: tuple[int, ...]
    size: int
    stage: int


@dataclass(frozen=True)
class Sketch:
    """A model, its cuts, its objective and how it is trained.

    Attributes:
        inputs: Kinds of inputs.
        nodes: Calls in an order in which they can run.
        outputs: Numbers of the values that the model gives.
        losses: One name for each output.
        loss_weights: One for each output; () for none.
        schedule: ``gpipe`` or ``1f1b``.
        microbatches: Into how many parts a batch is cut.
        samples: Of the batch.
        weighted: Whether samples have weights.
        eager: Eager tapes or compiled functions.
        recompute: As `Pipeline` takes it.
        named: Whether inputs and outputs are dicts, else lists.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    losses: tuple[str, ...]
    loss_weights: tuple[float, ...] = ()
    schedule: str = "1f1b"
    microbatches: int = 2
    samples: int = 4
    weighted: bool = False
    eager: bool = True
    recompute: bool = False
    named: bool = False

    def build(self) -> tuple[Any, Callable[[Any], list[int]]]:
        """The Keras model, the same each time, and what gives the stage of every call of its graph."""
        keras.utils.set_random_seed(1)
        values: list[Any] = [_input(kind, name) for kind, name in zip(self.inputs, self.input_names, strict=True)]
        given = list(values)
        made_in = [0] * len(values)
        shared: dict[int, Any] = {}
        for number, node in enumerate(self.nodes):
            found = _play(node, [values[i] for i in node.reads], number, shared)
            values += found
            made_in += [node.stage] * len(found)
        model = keras.Model(
            self.pack(given, self.input_names),
            self.pack([values[i] for i in self.outputs], OUTPUTS),
        )
        stages = {id(value): stage for value, stage in zip(values, made_in, strict=True)}
        return model, lambda graph: _stage_of(graph, stages)

    @property
    def input_names(self) -> list[str]:
        """Of the inputs, in their order."""
        return [f"{kind}{number}" for number, kind in enumerate(self.inputs)]

    def pack(self, values: Sequence[Any], names: Sequence[str]) -> Any:
        """What belongs to inputs or outputs, as Keras takes it: one value as it is, several as a list or a dict."""
        if self.named:
            return dict(zip(names, values, strict=False))
        return list(values) if len(values) > 1 else values[0]

    def data(self) -> tuple[list[Any], list[Any], list[Any] | None]:
        """Inputs, targets and sample weights, as lists."""
        rng = np.random.default_rng(5)
        last = self.widths()
        x = [_data(kind, self.samples, rng) for kind in self.inputs]
        y = [_target(loss, self.samples, last[i], rng) for loss, i in zip(self.losses, self.outputs, strict=True)]
        weights = [rng.uniform(0.5, 2, self.samples).astype("float32") for _ in self.outputs] if self.weighted else None
        return x, y, weights

    def widths(self) -> list[int]:
        """Last dimension of every value."""
        found = [STEPS] * len(self.inputs)
        for node in self.nodes:
            found += widths(node, [found[i] for i in node.reads])
        return found

    def places(self) -> list[int]:
        """The stage that makes each value; -1 for inputs."""
        found = [-1] * len(self.inputs)
        for node in self.nodes:
            found += [node.stage] * (2 if node.kind == "halves" else 1)
        return found

    @property
    def sums_alike(self) -> bool:
        """Whether no sum of three or more gradients can have another order in the cut model than in the whole one.

        A value or a layer that several stages read must have at most two terms.
        """
        made_in = self.places()
        terms: list[list[int]] = [[] for _ in made_in]  # for each value the stage of every operation that reads it
        for node in self.nodes:
            for i in node.reads:
                terms[i] += [node.stage] * READS.get(node.kind, 1)
        made = len(self.inputs)
        for node in self.nodes:
            terms[made] += [node.stage] * (2 if node.kind == "active" else 0)
            made += 2 if node.kind == "halves" else 1
        for i in self.outputs:
            terms[i] += [made_in[i]] * 2
        uses: dict[int, list[int]] = {}
        for node in self.nodes:
            if node.kind == "shared":
                uses.setdefault(node.size, []).append(node.stage)
        if REGULARISED in uses:
            uses[REGULARISED].append(min(uses[REGULARISED]))
        return all(len(stages) <= 2 or len(set(stages)) == 1 for stages in [*terms, *uses.values()])


def _stage_of(graph: Any, stages: dict[int, int]) -> list[int]:
    """The stage of every call of a graph, without empty ones.

    Keras adds calls of its own, which make masks, and a nested model's are not nodes; each is where its value is.

    Args:
        graph: What `pipeline.model.call_graph.read_graph` made of the model.
        stages: {id of a symbolic tensor: the stage that makes it}.
    """
    places = dict.fromkeys(graph.inputs, 0)
    for call in graph.calls:
        least = max((places[tensor] for tensor in call.reads), default=0)
        places |= {tensor: stages.get(id(graph.symbols[tensor]), least) for tensor in call.makes}
    found = [places[call.makes[0]] for call in graph.calls]
    order = sorted(set(found))
    return [order.index(stage) for stage in found]


def _shifted(value: Any) -> Any:
    return value + 0.7  # not times: Keras would call the result sparse


def _nested(size: int, seed: int) -> Any:
    """A model inside the model; its calls join those around it."""
    return keras.Sequential([layers.Dense(4, "tanh"), layers.Dropout(0.2, seed=seed), layers.Dense(size)])


def _attend(value: Any) -> Any:
    return layers.MultiHeadAttention(1, 2)(value, value)


def _input(kind: str, name: str) -> Any:
    if kind == "floats":
        return keras.Input((STEPS,), name=name)
    return keras.Input((STEPS,) if kind == "tokens" else (), dtype="int32", name=name)


def _play(node: Node, values: Sequence[Any], number: int, shared: dict[int, Any]) -> list[Any]:
    """The results of one node."""
    if node.kind == "embed":
        return [layers.Embedding(VOCABULARY, node.size, mask_zero=values[0].ndim == 2)(values[0])]
    if node.kind in STEPWISE:
        return [STEPWISE[node.kind](node.size)(values[0])]
    if node.kind == "halves":
        return list(ops.split(values[0], [values[0].shape[-1] // 2], axis=-1))
    if node.kind == "shared":
        regularizer = "l2" if node.size == REGULARISED else None
        layer = layers.Dense(SHARED_WIDTH, "tanh", kernel_regularizer=regularizer)
        return [shared.setdefault(node.size, layer)(values[0])]
    if node.kind == "renormalised":
        return [shared.setdefault(-1, layers.BatchNormalization(epsilon=0.1))(values[0])]
    if node.kind in SEVERAL:
        return [SEVERAL[node.kind](values)]
    return [ONE[node.kind](node.size, number)(values[0])]


def widths(node: Node, reads: Sequence[int]) -> list[int]:
    """Last dimension of each result."""
    if node.kind == "halves":
        return [reads[0] // 2, reads[0] - reads[0] // 2]
    if node.kind == "concatenate":
        return [sum(reads)]
    if node.kind == "shared":
        return [SHARED_WIDTH]
    return [node.size if node.kind in (*SIZED, "embed") else reads[0]]


def _data(kind: str, samples: int, rng: Any) -> Any:
    if kind == "floats":
        return rng.normal(size=(samples, STEPS)).astype("float32")
    if kind == "number":
        return rng.integers(0, VOCABULARY, samples).astype("int32")
    tokens = rng.integers(0, VOCABULARY, (samples, STEPS)).astype("int32")
    tokens[:, 0] = np.maximum(tokens[:, 0], 1)  # a sample without any valid step has no mean
    return tokens


def _target(loss: str, samples: int, width: int, rng: Any) -> Any:
    if loss == "classes":
        return rng.integers(0, width, samples).astype("int32")
    return rng.normal(size=(samples, width)).astype("float32")

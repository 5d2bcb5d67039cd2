"""Language models that nobody here wrote are one tape wherever they are cut: BERT and GPT-2 of KerasHub, in small.

BERT's padding mask is an input that goes to every block. GPT-2 projects its output with the transposed embedding, so
that one weight is used in the first stage and in the last. Both are dissolved into blocks, which draw random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.cutting.splitter import Split, split_model
from pipeline.model.call_graph import CallGraph, read_graph
from tests.levels import in_turn
from tests.natural_tape import natural_tape
from tests.one_tape import assert_same_bits

pytestmark = pytest.mark.gate

VOCABULARY, STEPS, CLASSES = 30, 6, 3
SAMPLES, MICROBATCHES = 5, 2
RANDOM_CUTS = 50
SMALL = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "max_sequence_length": STEPS,
}


@dataclass(frozen=True)
class Task:
    """A model with a batch.

    Attributes:
        name: For the test's name.
        model: Builds it.
        segments: Whether it takes segment numbers too.
        per_token: Whether it predicts a token at every step, else one class.
        blocks: How many calls it has once it is dissolved.
    """

    name: str
    model: Callable[[], Any]
    segments: bool
    per_token: bool
    blocks: int

    def __str__(self) -> str:
        return self.name


def bert() -> Any:
    """A classifier of texts of different lengths."""
    backbone = keras_hub.models.BertBackbone(**SMALL)
    return keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=CLASSES, preprocessor=None)


def gpt2() -> Any:
    """A model of the next token; its projection is the transposed embedding."""
    return keras_hub.models.GPT2CausalLM(backbone=keras_hub.models.GPT2Backbone(**SMALL), preprocessor=None)


TASKS = (Task("bert", bert, True, False, 13), Task("gpt2", gpt2, False, True, 9))


class Case:
    """A built model with a batch of padded texts, and what one tape says about it."""

    def __init__(self, task: Task) -> None:
        keras.utils.set_random_seed(3)
        self.task, self.model = task, task.model()
        self.graph = read_graph(self.model)
        rng = np.random.default_rng(4)
        for variable in self.model.trainable_variables:  # Keras's first weights are so small that blocks hardly matter
            variable.assign(rng.normal(scale=0.3, size=variable.shape))
        valid = np.arange(STEPS) < rng.integers(2, STEPS + 1, (SAMPLES, 1))
        tokens = np.where(valid, rng.integers(1, VOCABULARY, (SAMPLES, STEPS)), 0).astype("int32")
        self.x = {"token_ids": tokens, "padding_mask": valid.astype("int32")}
        if task.segments:
            self.x["segment_ids"] = np.where(np.arange(STEPS) > 2, 1, 0).astype("int32") * valid
        self.y = np.roll(tokens, -1, axis=1) if task.per_token else rng.integers(0, CLASSES, SAMPLES)
        self.weights = valid.astype("float32") if task.per_token else None
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        weights = None if self.weights is None else [self.weights]
        self.expected_loss, self.expected = natural_tape(
            self.model, self.x, [self.y], [self.loss], MICROBATCHES, sample_weights=weights
        )
        assert all(np.abs(gradient).max() > 0 for gradient in self.expected)

    def check(self, split: Split, schedule: str, transport: str = "inproc") -> None:
        """As an eager pipeline: equal bits to its own judge and to one tape over the uncut model."""
        with Pipeline(split, MICROBATCHES, schedule, transport) as pipe:
            pipe.compile("sgd", self.loss, run_eagerly=True)
            report = pipe.verify(self.x, self.y, self.weights)
            found = pipe.gradients(self.x, self.y, self.weights)
        report.raise_if_failed()
        names = {row.name.partition("/")[2] for row in report.gradients}  # a tied one is there once per stage
        assert report.tolerance.relative == 0.0 and len(names) == len(self.expected)
        assert report.loss == pytest.approx(self.expected_loss, rel=1e-6)
        by_path = {name.partition("/")[2]: gradient for name, gradient in found.items()}
        gradients = [by_path[variable.path] for variable in self.model.trainable_variables]
        assert_same_bits(gradients, self.expected, "gradient")


def shared(split: Split) -> set[str]:
    """Paths of the variables that several segments have."""
    paths = [v.path for segment in split.segments for v in segment.model.trainable_variables]
    return {path for path in paths if paths.count(path) > 1}


def random_stages(graph: CallGraph, seed: str) -> list[int]:
    """A stage for each call, 2 to 5 of them and none empty, no lower than those it reads from."""
    rng = random.Random(seed)
    while True:
        stages = rng.randint(2, 5)
        place = dict.fromkeys(graph.inputs, 0)
        found = []
        for i, call in enumerate(graph.calls):
            wish = rng.choice([i * stages // len(graph.calls), rng.randrange(stages)])
            found.append(max([wish, *(place[tensor] for tensor in call.reads)]))
            place |= dict.fromkeys(call.makes, found[-1])
        if set(found) == set(range(stages)):
            return found


@pytest.fixture(scope="module", params=TASKS, ids=str)
def case(request: Any) -> Iterator[Case]:
    """Each model once."""
    yield Case(request.param)


def test_backbones_are_dissolved(case: Case) -> None:
    """Cuts may lie between the blocks of the backbone, though Keras calls it as one model with a dict."""
    assert len(case.graph.calls) == case.task.blocks
    assert not any(isinstance(call.operation, keras.Model) for call in case.graph.calls)


@pytest.mark.parametrize(("stages", "schedule"), in_turn([(3, "gpipe"), (4, "1f1b"), (2, "1f1b")], 2, 2, several=True))
def test_automatic_cuts_are_one_tape(case: Case, stages: int, schedule: str) -> None:
    split = split_model(case.model, stages)
    assert len(split.segments) == stages
    assert shared(split) == ({"token_embedding/embeddings"} if case.task.name == "gpt2" else set())
    case.check(split, schedule)


@pytest.mark.parametrize("seed", in_turn(range(RANDOM_CUTS), 1, 1))
def test_random_cuts_are_one_tape(case: Case, seed: int) -> None:
    split = split_model(case.model, stage_of=random_stages(case.graph, f"{case.task}-{seed}"))
    case.check(split, ("gpipe", "1f1b")[seed % 2])


def test_processes_are_one_tape(case: Case) -> None:
    """Workers import KerasHub by themselves, though nothing but a configuration names its layers."""
    case.check(split_model(case.model, 3), "1f1b", "ipc")


def test_training_is_that_of_the_uncut_model(case: Case) -> None:
    """Three updates by Adam, bit for bit; then merged."""
    weights = None if case.weights is None else [case.weights]
    before = [variable.numpy() for variable in case.model.variables]
    with Pipeline.split(case.model, stages=3, microbatches=MICROBATCHES, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.Adam(0.01), case.loss, run_eagerly=True)
        for _ in range(3):
            pipe.train_on_batch(case.x, case.y, case.weights)
        ours, predicted = pipe.get_weights(), pipe.predict(case.x, verbose=0)
        trained = pipe.merge()
    for variable, value in zip(case.model.variables, before, strict=True):
        variable.assign(value)
    optimizer, variables = keras.optimizers.Adam(0.01), case.model.trainable_variables
    for _ in range(3):
        _, gradients = natural_tape(
            case.model,
            case.x,
            [case.y],
            [case.loss],
            MICROBATCHES,
            sample_weights=weights,
            restore=False,
            dense=False,
        )
        optimizer.apply(gradients, variables)
    theirs = case.model.get_weights()
    for variable, value in zip(case.model.variables, before, strict=True):
        variable.assign(value)
    assert_same_bits(ours, theirs, "weight")
    assert type(trained) is type(case.model)
    assert_same_bits(trained.get_weights(), theirs, "merged weight")
    np.testing.assert_allclose(trained.predict(case.x, verbose=0), predicted, rtol=1e-5, atol=1e-5)

"""Models that nobody here wrote are one tape wherever they are cut: six of `keras.applications`, in small.

Automatic cuts run as pipelines and `Pipeline.verify` judges them. Random cuts are stages in the hand, driven by a loop
below: the same segments and the same hand-off without the cost of building them anew, which leaves time for more cuts.
Two tapes of this file judge those. One goes over the joined segments, with identities where they take and give tensors,
so that its sums have the order of the cut model; it must agree in every bit. The other goes over the model as Keras
made it, which is built once and differentiated once. Its sums have another order: a branch that is cut off adds up by
itself, and even a normalisation reads its input three times. Rounding grows through a hundred normalisations over few
numbers, to at most 1e-5 of the largest |gradient| here. `make soak` draws more cuts, and runs them as pipelines too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from pipeline.cutting.splitter import split_model
from pipeline.model.call_graph import read_graph
from stages import Segment, Stage
from tests.faults.unasked import without_own
from tests.levels import SOAK, in_turn
from tests.one_tape import Gradients, OneTape, assert_same_bits, difference

CLASSES = 4
RANDOM_CUTS = 20


@dataclass(frozen=True)
class Application:
    """One model of the zoo.

    Attributes:
        name: Of the function in `keras.applications`.
        size: Height and width of its images. Not the smallest: statistics over a few numbers make gradients explode.
        samples: How many; unequal microbatches where it costs little.
        options: What else it is built with.
    """

    name: str
    size: int = 48
    samples: int = 7
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self) -> Any:
        """The model, the same each time."""
        keras.utils.set_random_seed(3)
        shape = (self.size, self.size, 3)
        make: Callable[..., Any] = getattr(keras.applications, self.name)
        return make(weights=None, classes=CLASSES, input_shape=shape, **dict(self.options))


APPLICATIONS = (
    Application("MobileNetV2", options=(("alpha", 0.35),)),
    Application("DenseNet121"),
    Application("EfficientNetB0"),
    Application("ResNet50V2"),
    Application("InceptionV3", size=75),
    Application("ConvNeXtTiny", size=32, samples=1),  # seconds a call: Keras traces grouped convolutions anew each time
)


class Case:
    """A model with a batch, and what one tape over it says."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.model = application.build()
        rng = np.random.default_rng(4)
        shape = (application.samples, *self.model.input_shape[1:])
        self.x = rng.uniform(0, 255 if application.name == "ConvNeXtTiny" else 1, shape).astype("float32")
        self.y = rng.integers(0, CLASSES, application.samples).astype("int32")
        self.loss = keras.losses.SparseCategoricalCrossentropy()
        self.natural = OneTape([self.model], self.loss).gradients(self.x, self.y, microbatches=1)
        assert all(gradient is not None for gradient in self.natural[1])

    def names(self) -> list[str]:
        """Of the calls behind which a cut may be, in the model's order."""
        return [call.name for call in read_graph(self.model).calls][:-1]

    def random_names(self, seed: int) -> list[str]:
        """One to six of them."""
        rng = random.Random(f"{self.application}-{seed}")
        names = self.names()
        return [names[i] for i in sorted(rng.sample(range(len(names)), rng.randint(1, 6)))]

    def verify(self, **options: Any) -> None:
        """Run as an eager pipeline of threads; the report must find equal bits for all variables."""
        with Pipeline.split(self.model, microbatches=2, transport="inproc", **options) as pipe:
            pipe.compile("sgd", self.loss, run_eagerly=True)
            with nullcontext() if SOAK else without_own():  # it takes seconds, and agrees to within rounding
                report = pipe.verify(self.x, self.y)
        report.raise_if_failed()
        assert len(report.gradients) == len(self.natural[1])
        assert {row.difference for row in report.rows if row.check != "own"} == {0.0}
        assert report.loss == report.reference_loss


@pytest.fixture(scope="module", params=in_turn(APPLICATIONS, 1, 3), ids=str)
def case(request: Any) -> Iterator[Case]:
    """Each model once; pytest runs all that is about it before it goes to the next."""
    yield Case(request.param)


@contextmanager
def states_kept(model: Any) -> Iterator[None]:
    """Moving statistics and seeds are put back."""
    states = [variable for variable in model.variables if not variable.trainable]
    before = [variable.numpy() for variable in states]
    yield
    for variable, value in zip(states, before, strict=True):
        variable.assign(value)


def input_name(segments: Sequence[Segment]) -> str:
    """The tensor that no segment makes."""
    (name,) = {name for s in segments for name in s.inputs} - {name for s in segments for name in s.outputs}
    return name


def in_hand(segments: Sequence[Segment], case: Case) -> tuple[float, Gradients]:
    """The loss and its gradients by stages without workers: every tensor and gradient goes through this function."""
    stages = [Stage(s.model, s.name, loss=case.loss if s is segments[-1] else None) for s in segments]
    tensors: dict[str, Any] = {input_name(segments): case.x}
    for stage, segment in zip(stages[:-1], segments, strict=False):
        outputs = stage.forward([tensors[name] for name in segment.inputs])
        tensors |= zip(segment.outputs, keras.tree.flatten(outputs), strict=True)
    loss = stages[-1].forward_loss([tensors[name] for name in segments[-1].inputs], case.y)
    gradients: dict[str, Any] = {}
    for stage, segment in zip(reversed(stages), reversed(segments), strict=True):
        found = stage.backward(None if segment is segments[-1] else [gradients[name] for name in segment.outputs])
        for name, gradient in zip(segment.inputs, [found] if len(segment.inputs) == 1 else found, strict=True):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    by_path = {path: gradient for stage in stages for path, gradient in stage.gradients().items()}
    return loss.numpy(), [by_path[variable.path] for variable in case.model.trainable_variables]


def joined(segments: Sequence[Segment], case: Case) -> tuple[float, Gradients]:
    """The same by one tape over all segments: each reads copies of its inputs, and its outputs leave it together."""
    with tf.GradientTape() as tape:
        tensors = {input_name(segments): tf.constant(case.x)}
        for segment in segments:
            outputs = segment.model([tf.identity(tensors[name]) for name in segment.inputs], training=True)
            if segment is not segments[-1]:
                tensors |= zip(segment.outputs, tf.identity_n(keras.tree.flatten(outputs)), strict=True)
        loss = case.loss(case.y, outputs)  # no copy: Keras hides the logits on what a softmax gives
    return loss.numpy(), [gradient.numpy() for gradient in tape.gradient(loss, case.model.trainable_variables)]


@pytest.mark.gate
@pytest.mark.parametrize(("stages", "schedule"), in_turn([(3, "1f1b"), (2, "gpipe"), (4, "1f1b")], 1, 1, several=True))
def test_automatic_cuts_are_verified(case: Case, stages: int, schedule: str) -> None:
    """As pipelines, over both schedules."""
    case.verify(stages=stages, schedule=schedule)


@pytest.mark.parametrize("seed", in_turn(range(RANDOM_CUTS), 1, 2))
def test_random_cuts_are_one_tape(case: Case, seed: int) -> None:
    """Behind any layers, inside blocks and across skip connections too."""
    segments = split_model(case.model, at=case.random_names(seed)).segments
    with states_kept(case.model):
        loss, gradients = in_hand(segments, case)
    with states_kept(case.model):
        expected_loss, expected = joined(segments, case)
    assert loss == expected_loss == case.natural[0]
    assert_same_bits(gradients, expected, "gradient")
    assert difference(gradients, case.natural[1]) <= 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(RANDOM_CUTS))
def test_random_cuts_are_verified(case: Case, seed: int) -> None:
    """The same cuts as pipelines."""
    case.verify(at=case.random_names(seed), schedule=("gpipe", "1f1b")[seed % 2])

"""Random pipelines with nothing wrong in them: whatever `verify` reports of one is a false alarm.

Two kinds of models: graphs with branches, joins, skips, shared layers and several outputs (`tests.random_graphs`), and
stacks of recurrent layers that run window by window. Everything else is drawn too: cuts, microbatches, schedules,
recomputation, optimizers and clipping, dtype policies, sample weights, steps trained before, and the checks asked for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pipeline import Pipeline
from pipeline.cutting.splitter import split_model
from pipeline.model.call_graph import read_graph
from tests.random_graphs import LOSSES, OUTPUTS, Sketch
from tests.strategies_graphs import sketches

layers = keras.layers
RATE = 0.01
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: keras.optimizers.SGD(RATE),
    "nesterov": lambda: keras.optimizers.SGD(RATE, momentum=0.9, nesterov=True, clipvalue=0.1),
    "adam": lambda: keras.optimizers.Adam(RATE),
    "adam, global norm": lambda: keras.optimizers.Adam(RATE, global_clipnorm=0.05),
    "adamw, norms": lambda: keras.optimizers.AdamW(RATE, weight_decay=0.1, clipnorm=0.1),
    "averaged": lambda: keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "schedule": lambda: keras.optimizers.RMSprop(keras.optimizers.schedules.ExponentialDecay(RATE, 2, 0.5)),
    "adagrad": lambda: keras.optimizers.Adagrad(RATE),
    "adadelta": lambda: keras.optimizers.Adadelta(RATE),
    "lion": lambda: keras.optimizers.Lion(RATE, global_clipnorm=0.5),
    "nadam": lambda: keras.optimizers.Nadam(RATE),
    "ftrl": lambda: keras.optimizers.Ftrl(RATE),
}
POLICIES = ("float32", "float32", "float32", "mixed_bfloat16", "mixed_float16")
EXTRA: tuple[tuple[str, ...], ...] = ((), (), (), ("batch",), ("differences",), ("chain",))
EAGER = st.sampled_from([True, True, False])
"""Compiled ones take most of the time."""
FEATURES = 3
METRICS = {"classes": ["accuracy"], "squares": ["mae"], "huber": []}


@dataclass(frozen=True)
class Recurrent:
    """A stack of recurrent layers with an output for every time step.

    Attributes:
        cells: What each layer is, from the input on.
        stages: Into how many stages it is cut.
        samples: Of the batch.
        length: Time steps.
        windows: Into how many windows.
        truncate: How many windows gradients go back through; None: all.
        keep_state: Whether the next batch begins where this one ended.
        schedule: Its name.
        microbatches: Into how many parts a batch is cut.
        weighted: Whether time steps have weights.
        eager: Eager tapes or compiled functions.
        recompute: As `Pipeline` takes it.
    """

    cells: tuple[str, ...]
    stages: int
    samples: int
    length: int
    windows: int
    truncate: int | None
    keep_state: bool
    schedule: str
    microbatches: int
    weighted: bool
    eager: bool
    recompute: bool

    @contextmanager
    def pipeline(self, optimizer: Any) -> Iterator[tuple[Pipeline, tuple[Any, Any, Any]]]:
        """A compiled pipeline and a batch for it."""
        made = [
            getattr(layers, cell)(3 + i, return_sequences=True, name=f"cell{i}") for i, cell in enumerate(self.cells)
        ]
        model = keras.Sequential([keras.Input((self.length, FEATURES)), *made, layers.Dense(2, name="out")])
        options = {
            name: getattr(self, name) for name in ("microbatches", "schedule", "recompute", "windows", "truncate")
        }
        with Pipeline.split(model, stages=self.stages, transport="inproc", threads=1, **options) as pipe:
            pipe.compile(optimizer, "mse", metrics=["mae"], run_eagerly=self.eager)
            rng = np.random.default_rng(3)
            x = rng.normal(size=(self.samples, self.length, FEATURES)).astype("float32")
            y = rng.normal(size=(self.samples, self.length, 2)).astype("float32")
            weights = rng.uniform(0.5, 2, (self.samples, self.length)).astype("float32") if self.weighted else None
            yield pipe, (x, y, weights)


@dataclass(frozen=True)
class Graph:
    """A random graph."""

    sketch: Sketch

    @property
    def eager(self) -> bool:
        """Eager tapes or compiled functions."""
        return self.sketch.eager

    @contextmanager
    def pipeline(self, optimizer: Any) -> Iterator[tuple[Pipeline, tuple[Any, Any, Any]]]:
        """A compiled pipeline and a batch for it."""
        sketch = self.sketch
        model, stage_of = sketch.build()
        split = split_model(model, stage_of=stage_of(read_graph(model)))
        options = {"microbatches": sketch.microbatches, "schedule": sketch.schedule, "recompute": sketch.recompute}
        with Pipeline(split, transport="inproc", threads=1, **options) as pipe:
            pipe.compile(
                optimizer,
                sketch.pack([LOSSES[name]() for name in sketch.losses], OUTPUTS),
                loss_weights=sketch.pack(sketch.loss_weights, OUTPUTS) if sketch.loss_weights else None,
                metrics=sketch.pack(
                    [["mae"] if name != "classes" else ["accuracy"] for name in sketch.losses], OUTPUTS
                ),
                run_eagerly=sketch.eager,
            )
            x, y, weights = sketch.data()
            judged = None if weights is None else sketch.pack(weights, OUTPUTS)
            yield pipe, (sketch.pack(x, sketch.input_names), sketch.pack(y, OUTPUTS), judged)


@dataclass(frozen=True)
class Healthy:
    """One configuration.

    Attributes:
        model: What runs, and how.
        optimizer: Key of `OPTIMIZERS`.
        policy: Of dtypes.
        before: Steps trained before the verification.
        extra: Checks besides "tape" and "steps".
        steps: Updates that are verified.
    """

    model: Graph | Recurrent
    optimizer: str
    policy: str
    before: int
    extra: tuple[str, ...]
    steps: int

    def verify(self) -> Any:
        """Its report."""
        default = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.policy)
        try:
            keras.utils.set_random_seed(1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*does not support masking")  # Keras's, of models that lose one
                return self._report()
        finally:
            keras.config.set_dtype_policy(default)

    def _report(self) -> Any:
        with self.model.pipeline(OPTIMIZERS[self.optimizer]()) as (pipe, batch):
            for _ in range(self.before):
                pipe.train_on_batch(*batch)
            return pipe.verify(*batch, checks=("tape", "steps", *self.extra), steps=self.steps)


@st.composite
def recurrents(draw: Any) -> Recurrent:
    cells = tuple(draw(st.lists(st.sampled_from(["LSTM", "GRU", "SimpleRNN"]), min_size=1, max_size=3)))
    windows = draw(st.integers(1, 3))
    return Recurrent(
        cells=cells,
        stages=draw(st.integers(1, len(cells))),
        samples=draw(st.integers(2, 6)),
        length=draw(st.integers(windows, 6)),
        windows=windows,
        truncate=draw(st.sampled_from([None, 1, 2])) if windows > 1 else None,
        keep_state=windows > 1 and draw(st.booleans()),
        schedule=draw(st.sampled_from(["gpipe", "1f1b"])),
        microbatches=draw(st.integers(1, 3)),
        weighted=draw(st.booleans()),
        eager=draw(EAGER),
        recompute=draw(st.booleans()),
    )


graphs = st.builds(lambda sketch, eager: Graph(replace(sketch, eager=eager)), sketches(), EAGER)
configurations = st.builds(
    Healthy,
    model=st.one_of(graphs, graphs, recurrents()),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    policy=st.sampled_from(POLICIES),
    before=st.integers(0, 2),
    extra=st.sampled_from(EXTRA),
    steps=st.integers(1, 2),
)


@dataclass(frozen=True)
class Alarm:
    """What was said of a healthy configuration."""

    configuration: Healthy
    said: str


@dataclass
class Verdict:
    """What became of many configurations.

    Attributes:
        count: How many were verified.
        alarms: False ones.
        checks: {check: how often it was made}; refused ones do not count.
        compiled: How many had compiled stages.
        seconds: All together.
    """

    count: int
    alarms: list[Alarm]
    checks: dict[str, int]
    compiled: int
    seconds: float


def verify_many(count: int, start: int = 0) -> Verdict:
    """Draw configurations and verify each; the same for the same numbers."""
    alarms: list[Alarm] = []
    checks: dict[str, int] = {}
    made = compiled = 0
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    limits = {"deadline": None, "database": None, "phases": [Phase.generate], "suppress_health_check": suppressed}

    @seed(start)
    @settings(max_examples=count, **limits)
    @given(configurations)
    def every(configuration: Healthy) -> None:
        nonlocal made, compiled
        made += 1
        compiled += not configuration.model.eager
        try:
            report = configuration.verify()
        except Exception as error:
            alarms.append(Alarm(configuration, f"{type(error).__name__}: {error}"))
            return
        for check in report.checks:
            checks[check.name] = checks.get(check.name, 0) + check.ran
        if not report.ok:
            alarms.append(Alarm(configuration, report.summary()))

    begun = time.monotonic()
    every()
    return Verdict(made, alarms, checks, compiled, time.monotonic() - begun)

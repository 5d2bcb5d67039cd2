"""Zero bubble against 1F1B, measured beside the simulator's gain: `python -m benchmarks.zero_bubble`.

Dense layers of one width, cut into equal stages with one thread each, so that a step is arithmetic and not messages.
The rounds alternate, and the median of their ratios counts. What a forward and each half of a backward cost is measured
on a stage of its own first; the simulator takes these costs.

On a machine with other work the cores are never idle, and no schedule gains anything. There `--wait 0.04` takes stages
whose forward and halves compute nothing and last so many seconds each: what is measured is the schedule alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline import Cost, Pipeline, build_plan, simulate
from stages import Stage
from stages.tape.contract import PassKey

LAYERS = 6
"""Of the whole model; a multiple of the stages."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--microbatch", type=int, default=128, help="samples")
    parser.add_argument("--schedule", default="zb-h1", help="what is compared with 1f1b")
    parser.add_argument("--steps", type=int, default=20, help="steps of a schedule in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds that each forward and half waits instead")
    given = parser.parse_args()
    cost = Cost(*[given.wait] * 3) if given.wait else costs(given.width, given.microbatch, LAYERS // given.stages)
    parts = (("forward", cost.forward), ("input half", cost.input_gradient), ("weight half", cost.weight_gradient))
    print("a microbatch of a stage: " + ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in parts))
    first, other = (
        simulate(build_plan(name, given.stages, given.microbatches), cost).step_time
        for name in ("1f1b", given.schedule)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(given.microbatch * given.microbatches, given.width)).astype("float32")
    pipes = [pipeline(name, given) for name in ("1f1b", given.schedule)]
    try:
        for pipe in pipes:
            step_seconds(pipe, x, 3)
        rounds = [[step_seconds(pipe, x, given.steps) for pipe in pipes] for _ in range(given.rounds)]
    finally:
        for pipe in pipes:
            pipe.close()
    gain = statistics.median(whole / halves for whole, halves in rounds)
    for name, column in zip(("1f1b", given.schedule), zip(*rounds, strict=True), strict=True):
        print(f"{name}: {statistics.median(column) * 1e3:.1f} ms a step")
    print(f"gain {gain:.3f}, simulated {first / other:.3f}, share {(gain - 1) / (first / other - 1):.2f}")


def costs(width: int, samples: int, layers: int) -> Cost:
    """What one stage costs, medians of 30 passes."""
    keras.utils.set_random_seed(0)
    stage = Stage(part(width, layers), run_eagerly=False)
    stage.go_in_halves(True)
    x, seed = (tf.random.normal((samples, width)) for _ in range(2))
    found: list[list[float]] = [[], [], []]
    for _ in range(33):
        start = time.perf_counter()
        settled(stage.forward_flat((x,), PassKey(0), True).values)
        forward = time.perf_counter()
        settled(stage.backward_input_flat((seed,), PassKey(0)))
        half = time.perf_counter()
        stage.backward_weight_flat(PassKey(0))
        settled(stage.accumulated())
        end = time.perf_counter()
        for times, seconds in zip(found, (forward - start, half - forward, end - half), strict=True):
            times.append(seconds)
    return Cost(*(statistics.median(times[3:]) for times in found))


def settled(tensors: Any) -> None:
    """Wait until some tensors are computed."""
    for tensor in tensors:
        np.asarray(tensor)


def part(width: int, layers: int) -> Any:
    """Dense layers in a row."""
    return keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width, "relu") for _ in range(layers))])


class Waits(keras.Layer):
    """A product with a weight whose forward, input gradient and weight gradient take so many seconds each."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def build(self, shape: Any) -> None:
        """Make the weight."""
        self.weight = self.add_weight(shape=(shape[-1],), initializer="ones", name="weight")

    def call(self, x: Any) -> Any:
        """Wait, then multiply."""

        @tf.custom_gradient
        def product(x: Any, weight: Any) -> Any:
            def gradients(upstream: Any) -> Any:
                return self.late(upstream * weight), tf.reduce_sum(self.late(upstream * x), axis=0)

            return self.late(x) * weight, gradients

        return product(x, tf.convert_to_tensor(self.weight))

    def late(self, tensor: Any) -> Any:
        """The same tensor, some seconds later."""

        def wait(array: Any) -> Any:
            time.sleep(self.seconds)
            return array

        found = tf.numpy_function(wait, [tensor], tensor.dtype)
        found.set_shape(tensor.shape)
        return found


def pipeline(schedule: str, given: argparse.Namespace) -> Pipeline:
    """The pipeline of one schedule, compiled."""
    parts = [
        keras.Sequential([keras.Input((given.width,)), Waits(given.wait)])
        if given.wait
        else part(given.width, LAYERS // given.stages)
        for _ in range(given.stages)
    ]
    pipe = Pipeline(parts, given.microbatches, schedule, threads=1, check_first_batch=not given.wait)
    pipe.compile(keras.optimizers.SGD(1e-4), "mse")
    return pipe


def step_seconds(pipe: Pipeline, x: Any, steps: int) -> float:
    """The median of some training steps."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        pipe.train_on_batch(x, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    main()

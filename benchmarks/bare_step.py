"""The bare program: a 1F1B step of two processes with nothing between them but sockets, beside a pipeline's step.

    python benchmarks/bare_step.py                     # N = 64, 512, 1024
    python benchmarks/bare_step.py --sizes 64x32 --rounds 9

It is the limit that step times are measured against: two forked processes that call traced functions through the same
direct call as a stage and hand arrays over Unix sockets, the round trip of a driver included. It checks nothing, knows
one model and one schedule, and differentiates by hand:

    6 x Dense(N, relu), mean squared error, SGD, 8 microbatches, one thread a process, stages of three layers

Both sides take the same batches in one run, in rounds that alternate; the ratio is the median of the rounds' ratios.
The least step of either side is printed too: on a machine with other work it is nearer to what the step itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transport.buffers import aligned_empty

Array = np.ndarray[Any, Any]
MICROBATCHES, HALF, RATE = 8, 3, 1e-3
WARM_UP = 10


class Wire:
    """One end of a Unix socket that carries float32 arrays whose shapes both ends know."""

    def __init__(self, end: socket.socket) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self.end = end

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        here, there = socket.socketpair()
        return cls(here), cls(there)

    def give(self, tensor: Any) -> None:
        self.end.sendall(memoryview(np.ascontiguousarray(tensor)).cast("B"))

    def take(self, *shape: int) -> Array:
        raw = aligned_empty(4 * int(np.prod(shape)))
        rest = raw.data
        while rest:
            rest = rest[self.end.recv_into(rest) :]
        return raw.view(np.float32).reshape(shape)


def traced(function: Callable[..., list[Any]], *shapes: tuple[int | None, ...]) -> Callable[..., list[Any]]:
    """A traced function of float32 tensors and its direct call, as `stages.tape.direct_calls` makes one."""
    import tensorflow as tf

    signature = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    concrete = tf.function(function, input_signature=signature, autograph=False).get_concrete_function()
    captured, dtypes = list(concrete.captured_inputs), [output.dtype for output in concrete.outputs]
    return lambda *given: tf.raw_ops.StatefulPartitionedCall(args=[*given, *captured], Tout=dtypes, f=concrete)


def tensor_of(array: Array) -> Any:
    """Large aligned memory is taken over, small or misaligned is copied."""
    import tensorflow as tf

    if array.nbytes > 4096 and array.ctypes.data % 64 == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


class Layers:
    """Three dense layers with their sums of gradients: forward, backward by hand, and an update."""

    def __init__(self, width: int, batch: int, seed: int) -> None:
        import tensorflow as tf

        draw = np.random.default_rng(seed)
        scale = np.sqrt(2 / width)
        self.kernels = [tf.Variable((draw.normal(size=(width, width)) * scale).astype("f4")) for _ in range(HALF)]
        self.biases = [tf.Variable(np.zeros(width, "f4")) for _ in range(HALF)]
        self.variables = [*self.kernels, *self.biases]
        self.sums = [tf.Variable(tf.zeros_like(variable)) for variable in self.variables]
        row = (None, width)
        self.forward = traced(self._forward, row)
        self.backward = traced(self._backward, *(row,) * (HALF + 2))
        self.judge = traced(lambda x, y: self._judge(x, y, batch * width), row, row)
        self.update = traced(self._update)

    def _forward(self, x: Any) -> list[Any]:
        import tensorflow as tf

        kept = [x]
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            kept.append(tf.nn.relu(tf.matmul(kept[-1], kernel) + bias))
        return kept[1:]

    def _backward(self, *given: Any) -> list[Any]:
        import tensorflow as tf

        *kept, gradient = given
        for k in reversed(range(HALF)):
            gradient = tf.where(kept[k + 1] > 0, gradient, 0.0)
            self.sums[k].assign_add(tf.matmul(kept[k], gradient, transpose_a=True))
            self.sums[HALF + k].assign_add(tf.reduce_sum(gradient, 0))
            gradient = tf.matmul(gradient, self.kernels[k], transpose_b=True)
        return [gradient]

    def _judge(self, x: Any, y: Any, elements: int) -> list[Any]:
        import tensorflow as tf

        kept = self._forward(x)
        error = kept[-1] - y
        return [tf.reduce_sum(error * error) / elements, *self._backward(x, *kept, error * (2.0 / elements))]

    def _update(self) -> list[Any]:
        import tensorflow as tf

        for variable, total in zip(self.variables, self.sums, strict=True):
            variable.assign_sub(RATE * total)
            total.assign(tf.zeros_like(total))
        return [tf.constant(True)]


def one_thread() -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def bottom(driver: Wire, above: Wire, width: int, microbatch: int) -> None:
    """The first stage: two forward passes ahead, then one backward and one forward by turns."""
    one_thread()
    layers = Layers(width, MICROBATCHES * microbatch, 0)
    while True:
        batch = driver.take(MICROBATCHES, microbatch, width)
        kept: dict[int, list[Any]] = {}
        for action in range(MICROBATCHES + 2):
            if action >= 2:
                layers.backward(*kept.pop(action - 2), tensor_of(above.take(microbatch, width)))
            if action < MICROBATCHES:
                x = tensor_of(batch[action])
                kept[action] = [x, *layers.forward(x)]
                above.give(kept[action][-1])
        layers.update()
        driver.give(np.zeros(1, "f4"))


def top(driver: Wire, below: Wire, width: int, microbatch: int) -> None:
    """The last stage: forward, loss and backward are one function."""
    one_thread()
    layers = Layers(width, MICROBATCHES * microbatch, 1)
    while True:
        targets = driver.take(MICROBATCHES, microbatch, width)
        total = 0.0
        for k in range(MICROBATCHES):
            loss, gradient = layers.judge(tensor_of(below.take(microbatch, width)), tensor_of(targets[k]))
            below.give(gradient)
            total += float(loss)
        layers.update()
        driver.give(np.array([total], "f4"))


def serve(width: int, microbatch: int) -> None:
    """The driver: runs as many steps as each line on stdin says, and answers with the seconds of each."""
    first, first_there = Wire.pair()
    second, second_there = Wire.pair()
    down, up = Wire.pair()
    children = []
    for part, driver, neighbour in ((bottom, first_there, down), (top, second_there, up)):
        child = os.fork()
        if child == 0:
            try:
                part(driver, neighbour, width, microbatch)
            finally:
                os._exit(1)
        children.append(child)
    x, y = batch_of(width, microbatch)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            first.give(x)
            second.give(y)
            first.take(1)
            second.take(1)
            times.append(time.perf_counter() - begin)
        print(json.dumps(times), flush=True)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)


def batch_of(width: int, microbatch: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(0)
    x, y = (draw.standard_normal((MICROBATCHES * microbatch, width), dtype="float32") for _ in range(2))
    return x, y


class Bare:
    """The bare program, running in processes of its own."""

    def __init__(self, width: int, microbatch: int) -> None:
        command = [sys.executable, __file__, "--serve", f"{width}x{microbatch}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def times(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._process.stdout.readline())
        return found


def processor(pids: list[int]) -> list[float]:
    """Milliseconds of processor time that each process has taken so far, all its threads together."""
    threads = [list(Path(f"/proc/{pid}/task").iterdir()) for pid in pids]
    return [sum(int((one / "schedstat").read_text().split()[0]) for one in some) / 1e6 for some in threads]


def compare(width: int, microbatch: int, rounds: int, steps: int, transport: str = "auto") -> dict[str, float]:
    """Milliseconds of a step, ours and the bare program's, medians and least, and the rounds' median ratio.

    Besides the processor time of a step of ours, the rounds' median: the driver's and the slower worker's.
    """
    import keras

    from pipeline import Pipeline
    from pipeline.commands.bench import make_model

    x, y = batch_of(width, microbatch)
    options: dict[str, Any] = {"stages": 2, "microbatches": MICROBATCHES, "threads": 1, "transport": transport}
    with Bare(width, microbatch) as bare, Pipeline.split(make_model(width), **options) as pipe:
        pipe.compile(optimizer=keras.optimizers.SGD(RATE), loss="mean_squared_error")

        def ours(count: int) -> list[float]:
            found = []
            for _ in range(count):
                begin = time.perf_counter()
                pipe.train_on_batch(x, y)
                found.append(time.perf_counter() - begin)
            return found

        ours(WARM_UP), bare.times(WARM_UP)
        pids = [os.getpid(), *(pid for pid in pipe.session.workers.driver().pids if pid is not None)]
        taken, spent = [], []
        for _ in range(rounds):
            before, mine, after = processor(pids), ours(steps), processor(pids)
            taken.append((mine, bare.times(steps)))
            spent.append([(b - a) / steps for a, b in zip(before, after, strict=True)])
    medians = [(statistics.median(mine), statistics.median(theirs)) for mine, theirs in taken]
    return {
        "least ours": min(min(mine) for mine, _ in taken) * 1e3,
        "least bare": min(min(theirs) for _, theirs in taken) * 1e3,
        "ours": statistics.median(mine for mine, _ in medians) * 1e3,
        "bare": statistics.median(theirs for _, theirs in medians) * 1e3,
        "ratio": statistics.median(mine / theirs for mine, theirs in medians),
        "driver": statistics.median(one[0] for one in spent),
        "worker": statistics.median(max(one[1:], default=0.0) for one in spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures a pipeline's step beside that of a bare program in the same run.",
        epilog="example: python benchmarks/bare_step.py --sizes 64x32 512x64",
    )
    parser.add_argument("--sizes", nargs="+", default=["64x32", "512x64", "1024x128"], help="N x microbatch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of whose ratios the median counts")
    parser.add_argument("--steps", type=int, default=20, help="steps of each side in a round")
    parser.add_argument("--transport", default="auto", help="the pipeline's")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for size in arguments.sizes if arguments.serve is None else [arguments.serve]:
        width, microbatch = map(int, size.split("x"))
        if arguments.serve is not None:
            serve(width, microbatch)
            return
        found = compare(width, microbatch, arguments.rounds, arguments.steps, arguments.transport)
        print(
            f"N = {width}, microbatch {microbatch}: ours {found['ours']:.2f} ms, bare {found['bare']:.2f} ms, "
            f"{found['ratio']:.2f}x; least {found['least ours']:.2f} and {found['least bare']:.2f} ms; of a processor, "
            f"driver {found['driver']:.2f}, worker {found['worker']:.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Parts of models that fail, wait or talk when a test says so; workers import them by name.

A `Trip` is a layer that does nothing until its n-th eager call. Then it does one of these things:

    raise    a ValueError
    say      says on the line (a named pipe) that it is there
    wait     says so, and waits for a byte through the gate (another named pipe)
    print    a sentence on stdout and one on stderr
    nan      turns what passes through it into NaN
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import keras
import tensorflow as tf

from stages.worker.worker import Worker
from stages.worker.worker import main as worker_main
from stages.worker.worker import serve as serve_worker


def say(line, **facts):
    """Tell the test something, with the process and the time."""
    descriptor = os.open(line, os.O_WRONLY)
    os.write(descriptor, (json.dumps({"pid": os.getpid(), "time": time.monotonic(), **facts}) + "\n").encode())
    os.close(descriptor)


def wait_at(gate):
    descriptor = os.open(gate, os.O_RDONLY)
    os.read(descriptor, 1)
    os.close(descriptor)


@keras.saving.register_keras_serializable("tests")
class Trip(keras.layers.Layer):
    """Passes its input on, until its `call_number`-th forward (or backward) call in eager mode."""

    def __init__(self, do="", call_number=1, backward=False, line="", gate="", **kwargs):
        super().__init__(**kwargs)
        self.arguments = {"do": do, "call_number": call_number, "backward": backward, "line": line, "gate": gate}
        self.do, self.call_number, self.backward, self.line, self.gate = self.arguments.values()
        self.calls = 0

    def get_config(self):
        return {**super().get_config(), **self.arguments}

    def call(self, x):
        if not tf.executing_eagerly() or not self.do:
            return x
        if not self.backward:
            return self.trip(x)

        @tf.custom_gradient
        def identity(x):
            return tf.identity(x), self.trip

        return identity(x)

    def trip(self, x):
        self.calls += 1
        if self.calls != self.call_number:
            return x
        if self.do == "nan":
            return x * float("nan")
        if self.do == "print":
            print("said on stdout")
            print("said on stderr", file=sys.stderr)
        if self.do == "raise":
            if self.line:
                say(self.line)
            raise ValueError("the layer tripped")
        if self.do in ("say", "wait"):
            say(self.line, did=self.do)
        if self.do == "wait":
            wait_at(self.gate)
        return x


def part(inputs=4, units=4, **trip):
    """A dense layer with a trip behind it."""
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units), Trip(**trip)])


def raising_builder(line=""):
    if line:
        say(line)
    raise RuntimeError("the builder gave up")


def waiting_builder(line, gate):
    say(line)
    wait_at(gate)
    return part()


def careless_builder():
    return "not a model"


def forgetful(spec, board):
    """Entry of a worker that loses every gradient on its way."""
    serve_worker(_Forgetful, spec, board)


class _Forgetful(Worker):
    def _send(self, message):
        if message.kind != "gradient":
            super()._send(message)


def late(spec, board):
    """Entry of a worker that tells its test before it tells the driver, and waits."""
    say(os.environ["LINE"])
    wait_at(os.environ["GATE"])
    worker_main(spec, board)


LOOKED_OFTEN = threading.Event()
"""Set when the driver has looked at the boards often enough; for threads in one process."""


@keras.saving.register_keras_serializable("tests")
class SlowUpdate(keras.optimizers.SGD):
    """Where a kernel has one row, an update that lasts until the driver has looked for stalled workers often."""

    def apply(self, grads, trainable_variables=None):
        if any(variable.shape[0] == 1 for variable in trainable_variables):
            assert LOOKED_OFTEN.wait(60)
        return super().apply(grads, trainable_variables)

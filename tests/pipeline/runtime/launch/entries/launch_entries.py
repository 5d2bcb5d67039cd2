"""Entries that the tests of launching call in a worker. What a worker has to tell goes through a named pipe."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path


def tell(spec, **facts):
    descriptor = os.open(spec["line"], os.O_WRONLY)
    os.write(descriptor, (json.dumps(facts) + "\n").encode())
    os.close(descriptor)


def returns(spec, board):
    board[:] = spec.get("board", range(8))


def waits(spec, board):
    board[0] = 42
    tell(spec, pid=os.getpid(), parent=os.getppid(), session=os.getsid(0))
    while True:
        signal.pause()


def pauses(spec, board):
    signal.pause()


def waits_for_signal(spec, board):
    """Ends with status 5 at the first SIGUSR1."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(5))
    waits(spec, board)


def raises(spec, board):
    print("on stdout", flush=True)
    raise ValueError("boom" + "x" * spec.get("size", 0))


def exits(spec, board):
    sys.exit(spec["status"])


def leaves(spec, board):
    os._exit(spec["status"])


def signals_itself(spec, board):
    os.kill(os.getpid(), spec["signal"])
    signal.pause()


def prints(spec, board):
    print("a line", end="\n")  # not flushed by us
    sys.stdout.write("the end without a newline")


def describes_itself(spec, board):
    import numpy as np

    tell(
        spec,
        directory=str(Path.cwd()),
        path=sys.path,
        arguments=sys.argv,
        environment=dict(os.environ),
        ignored=signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        descriptors={
            each.name: os.path.realpath(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()
        },
        random=[random.random(), float(np.random.random())],
        modules=sorted({name.partition(".")[0] for name in sys.modules}),
    )


def trains(spec, board):
    import random

    import keras
    import numpy as np
    import tensorflow as tf

    layer = keras.layers.Dense(4)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) ** 2)
        return loss, tape.gradient(loss, layer.trainable_variables)

    loss, gradients = step(tf.ones((2, 3)))
    tell(
        spec,
        loss=float(loss),
        shapes=[list(g.shape) for g in gradients],
        threads=[
            tf.config.threading.get_intra_op_parallelism_threads(),
            tf.config.threading.get_inter_op_parallelism_threads(),
        ],
        random=[
            random.random(),
            float(np.random.random()),
            float(tf.random.uniform(())),
            float(keras.random.uniform(())),
        ],
    )


def imports_optional(spec, board):
    import importlib

    names = ("matplotlib", "sklearn")
    loaded = [name for name in names if name in sys.modules]
    importable = []
    for name in names:
        try:
            importable.append(importlib.import_module(name).__name__)
        except ModuleNotFoundError:
            continue
    tell(spec, loaded=loaded, importable=importable)


def waits_for_event(spec, board):
    spec["event"].wait()

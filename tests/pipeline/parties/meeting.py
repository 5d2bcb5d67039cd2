"""Parties in threads over loopback with keys, and the one tape that they must equal, written from Keras alone."""

from __future__ import annotations

import threading
from dataclasses import replace
from queue import Queue

import keras
import numpy as np
import tensorflow as tf

from pipeline.parties.bound_party import BoundParty
from pipeline.parties.meet import join_party, serve_party
from pipeline.parties.read_plan import plan_of
from tests.one_tape import plus
from transport.key_files import KeyFolder

EDGE = {"tensor": "z", "from": "bottom", "to": "top", "shape": [4], "dtype": "float32"}
VANILLA = {
    "hub": "lab",
    "parties": {"hospital": {}, "lab": {}},
    "stages": {"bottom": {"owner": "hospital", "x": True}, "top": {"owner": "lab", "y": True}},
    "edges": [EDGE],
    "training": {"batch": 8, "microbatches": 3, "epochs": 2, "order_seed": 5},
    "limits": {"patience": 60, "silence": 5},
}


def plan_with_keys(table, folder, revoke=()):
    """The plan with fresh keys, and {party: its key folder} in which all others are trusted."""
    plan = plan_of(table)
    folders = {name: KeyFolder(folder / name) for name in plan.parties}
    keys = {name: folders[name].new(name) for name in plan.parties}
    for name, own in folders.items():
        for other in plan.parties:
            if other != name:
                own.trust(folder / other / f"{other}.pub")
    return replace(plan, parties={name: keys[name].public for name in plan.parties}), folders


def meet(plan, parties, folders, task="train", plans=None, said=None, each=None):
    """Run all parties, each in a thread; `each` has further options by party.

    Returns:
        {party: its result, or the error that it raised}.
    """
    addresses, found = Queue(), {}
    plans = {**dict.fromkeys(parties, plan), **(plans or {})}
    say = (lambda text: None) if said is None else said.append

    def run(name):
        try:
            if name == plan.hub:
                found[name] = serve_party(
                    plans[name], parties[name], name, "tcp://127.0.0.1:0", task=task, keys=folders[name], say=say,
                    listening=lambda address: [addresses.put(address) for _ in parties], **(each or {}).get(name, {}),
                )  # fmt: skip
            else:
                address = addresses.get(timeout=60)
                found[name] = join_party(
                    plans[name], parties[name], name, address, task=task, keys=folders[name], say=say,
                    **(each or {}).get(name, {}),
                )  # fmt: skip
        except BaseException as error:
            found[name] = error
            if name == plan.hub:
                [addresses.put("tcp://127.0.0.1:1") for _ in parties]

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in parties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), found
    return found


def met(plan, parties, folders, task="train", **options):
    """The same where all must go well."""
    found = meet(plan, parties, folders, task, **options)
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return found


def one_tape(call, groups, y, plan, loss):
    """Train everything on one tape.

    Args:
        call: call(rows, training) gives the joined model's output.
        groups: [(models, optimizer)] of the parties.
        y: Targets.
        plan: Batches, microbatches, epochs and order.
        loss: A Keras loss that is a mean over samples.

    Returns:
        The loss of each epoch.
    """
    history = []
    variables = [[v for model in models for v in model.trainable_variables] for models, _ in groups]
    flat = [v for group in variables for v in group]
    for (_, optimizer), group in zip(groups, variables, strict=True):
        optimizer.build(group)
    for epoch in range(plan.epochs):
        order = np.arange(len(y))
        if plan.order_seed is not None:
            order = np.random.default_rng([plan.order_seed, epoch]).permutation(order)
        total = 0.0
        for begin in range(0, len(y), plan.batch):
            batch = order[begin : begin + plan.batch]
            sums = [None] * len(flat)
            for rows in np.array_split(batch, min(plan.microbatches, len(batch))):
                share = np.float32(len(rows) / len(batch))
                with tf.GradientTape() as tape:
                    value = loss(tf.constant(y[rows]), call(rows, True)) * share
                    own = [term for models, _ in groups for model in models for term in model.losses]
                seeds = [tf.ones(()), *(tf.fill((), share) for _ in own)]
                found = tape.gradient([value, *own], flat, output_gradients=seeds)
                sums = [plus(a, b) for a, b in zip(sums, found, strict=True)]
                total += float(value) * len(batch)
            start = 0
            for (_, optimizer), group in zip(groups, variables, strict=True):
                pairs = [(g, v) for g, v in zip(sums[start:], group, strict=False) if g is not None]
                optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])
                start += len(group)
        history.append(total / len(y))
    return history


def bits(*models):
    """All variables of models, seeds and statistics too."""
    return [variable.numpy() for model in models for variable in model.variables]


def data(rows, *widths):
    """Features of several parties, labels, ids."""
    draw = np.random.default_rng(3)
    xs = [draw.normal(size=(rows, width)).astype("float32") for width in widths]
    y = (sum(x.sum(axis=1) for x in xs) > 0).astype("float32")[:, None]
    return (*xs, y, [f"patient {k}" for k in range(rows)])


def bottom(width=5, out=4, seed=0):
    """A feature side with statistics, chance and a regulariser."""
    return keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dense(6, "tanh", kernel_initializer=keras.initializers.GlorotUniform(seed)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3, seed=seed + 1),
            keras.layers.Dense(
                out, kernel_regularizer=keras.regularizers.L2(0.01),
                kernel_initializer=keras.initializers.GlorotUniform(seed + 2),
            ),
        ]
    )  # fmt: skip


def top(width=4, seed=10):
    """A label side."""
    return keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dropout(0.2, seed=seed),
            keras.layers.Dense(5, "relu", kernel_initializer=keras.initializers.GlorotUniform(seed + 1)),
            keras.layers.Dense(1, "sigmoid", kernel_initializer=keras.initializers.GlorotUniform(seed + 2)),
        ]
    )


__all__ = ["VANILLA", "BoundParty", "bits", "bottom", "data", "meet", "met", "one_tape", "plan_with_keys", "top"]

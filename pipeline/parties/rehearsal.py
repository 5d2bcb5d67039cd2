"""The rehearsal: all parties of a plan in this process, over loopback, on synthetic rows, beside one tape.

The sessions are the real ones: keys, encryption, handshake, transcripts, commits. Afterwards the same rows in the same
microbatches go through the same models under one `tf.GradientTape`, every party's optimizer makes its updates, and all
variables are compared bit for bit. Then every value is put back. A party that is not given gets models from the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.batch.microbatch import microbatch_sizes
from pipeline.errors import PartyPlanError
from pipeline.parties.bound_party import BoundParty, LastCommit
from pipeline.parties.party import Party
from pipeline.parties.party_plan import PartyPlan
from pipeline.parties.session import PartyResult, PartySession, batches
from stages.put_back import held_by
from stages.tape.accumulate import OrderedSum
from stages.tape.model_call import packer
from stages.tape.optimizer_update import update
from transport.key_files import PartyKeys
from transport.party_ends import PartyDoor, PartyLine

_WIDTH = 5
"""Features of a stand-in's rows."""


@dataclass(frozen=True)
class Rehearsal:
    """The outcome of a rehearsal.

    Attributes:
        steps: Commits.
        compared: Variables of all parties that were compared with one tape.
        different: ``party: path of the variable (largest difference)`` of those whose bits differ.
        stand_ins: Parties whose models were made from the plan.
    """

    steps: int
    compared: int
    different: tuple[str, ...]
    stand_ins: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all bits are equal."""
        return not self.different

    def __str__(self) -> str:
        lines = [f"{self.steps} steps, the transcripts of each equal at both ends of every connection"]
        if self.ok:
            lines.append(f"{self.compared} variables of all parties equal one tape bit for bit")
        else:
            lines += [f"{len(self.different)} of {self.compared} variables differ from one tape:", *self.different]
        if self.stand_ins:
            lines.append(f"models made from the plan, since none were given: {', '.join(self.stand_ins)}")
        return "\n".join([*lines, "not in it: the real rows, the network between the hosts, what the tensors tell"])


def rehearse(plan: PartyPlan, parties: Mapping[str, Party] | None = None) -> Rehearsal:
    """Rehearse a plan.

    Args:
        plan: With keys or without.
        parties: {name: models, and rows from which only shapes, dtypes and targets are taken}.

    Raises:
        PartyPlanError: A party does not fit the plan.
    """
    given = dict(parties or {})
    if unknown := [name for name in given if name not in plan.parties]:
        raise PartyPlanError(f"the plan has no party {unknown[0]!r}; it has {', '.join(plan.parties)}")
    keys = {name: PartyKeys.new(name) for name in plan.parties}
    plan = replace(plan, parties={name: keys[name].public for name in plan.parties}, epochs=min(plan.epochs, 2))
    rows = 2 * plan.batch + plan.batch // 2 + (plan.batch == 1)  # uneven
    judge_shape = _target_shape(plan, given)
    bound = {
        name: BoundParty(
            plan, name, _synthetic(given[name], rows) if name in given else _stand_in(plan, name, rows, judge_shape)
        )
        for name in plan.parties
    }
    held = {name: LastCommit(party) for name, party in bound.items()}
    try:
        results = _sessions(plan, bound, keys)
        after = {name: _values(party) for name, party in bound.items()}
        for one in held.values():
            one.put_back()
        _one_tape(plan, bound, rows)
        reference = {name: _values(party) for name, party in bound.items()}
    finally:
        for one in held.values():
            one.put_back()
    different = tuple(
        f"{name}: {path} (by up to {np.max(np.abs(ours.astype('float64') - theirs.astype('float64'))):.3g})"
        for name in bound
        for (path, ours), (_, theirs) in zip(after[name], reference[name], strict=True)
        if ours.tobytes() != theirs.tobytes()
    )
    compared = sum(map(len, after.values()))
    return Rehearsal(results[plan.hub].steps, compared, different, tuple(n for n in plan.parties if n not in given))


def _sessions(
    plan: PartyPlan, bound: Mapping[str, BoundParty], keys: Mapping[str, PartyKeys]
) -> dict[str, PartyResult]:
    """All parties, each in a thread; the first error of any of them is raised."""
    results: dict[str, PartyResult] = {}
    errors: list[BaseException] = []
    peers = {name: plan.parties[name] for name in plan.peers(plan.hub)}

    def session(name: str, link: Any) -> None:
        try:
            with link:
                results[name] = PartySession(bound[name], link, lambda peer: True, lambda text: None).run()
        except BaseException as error:
            errors.append(error)

    with ExitStack() as stack:
        door = stack.enter_context(PartyDoor("tcp://127.0.0.1:0", keys[plan.hub], peers, plan.bounds()))
        links: dict[str, Any] = {plan.hub: door}
        for name in peers:
            public = plan.parties[plan.hub]
            links[name] = PartyLine(door.address, keys[name], plan.hub, public, plan.bounds(), plan.patience)
        threads = [threading.Thread(target=session, args=item) for item in links.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def _one_tape(plan: PartyPlan, bound: Mapping[str, BoundParty], rows: int) -> None:
    """The training of a session's rows under one tape a microbatch, with every party's optimizer."""
    judge = bound[plan.judge.owner]
    head, y = judge.head, judge.party.y
    assert head is not None and y is not None
    variables = {name: party.trainable for name, party in bound.items()}
    flat = [variable for group in variables.values() for variable in group]
    for epoch in range(plan.epochs):
        order = np.arange(rows)
        if plan.order_seed is not None:
            order = np.random.default_rng([plan.order_seed, epoch]).permutation(order)
        for batch in batches(rows, plan, drop=True):
            sizes = microbatch_sizes(len(order[batch]), plan.microbatches)
            parts = np.split(order[batch], np.cumsum(sizes)[:-1])
            weights = judge.weights(sizes, [y[part] for part in parts])
            total = OrderedSum(())
            total.widen(len(flat))
            for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                with tf.GradientTape() as tape:
                    output, own = _joined(plan, bound, part)
                    loss = head.value(tf.constant(y[part]), output, None)
                    loss *= tf.constant(weight, loss.dtype)
                seeds = [
                    tf.ones_like(loss),
                    *(tf.fill((), tf.constant(len(part) / sum(sizes), one.dtype)) for one in own),
                ]
                found = tape.gradient([loss, *own], flat, output_gradients=seeds)
                total.add(k, found, True)
            sums = total.total() or [None] * len(flat)
            for name, group in variables.items():
                mine, sums = sums[: len(group)], sums[len(group) :]
                pairs = [
                    (gradient, variable) for gradient, variable in zip(mine, group, strict=True) if gradient is not None
                ]
                if bound[name].optimizer is not None and group:
                    update(bound[name].optimizer, [g for g, _ in pairs], [v for _, v in pairs])


def _joined(plan: PartyPlan, bound: Mapping[str, BoundParty], rows: np.ndarray[Any, Any]) -> tuple[Any, list[Any]]:
    """The output of all stages in the plan's order, and the losses that layers add."""
    tensors: dict[str, Any] = {}
    own: list[Any] = []
    outputs: tuple[Any, ...] = ()
    for name in plan.order():
        party = bound[plan.owner(name)]
        model = party.stages[name].model
        inputs = [*party.inputs(name, rows), *(tensors[edge.tensor] for edge in plan.into(name))]
        outputs = tuple(keras.tree.flatten(model(packer(model)(inputs), training=True)))
        own += [tf.reduce_sum(term) for term in model.losses]
        tensors |= {edge.tensor: value for edge, value in zip(plan.out_of(name), outputs, strict=False)}
        if plan.stage(name).y:
            judged = outputs[0]
    return judged, own


def _values(party: BoundParty) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Weights, statistics, seeds and the optimizer's variables; metrics, which one tape does not count, left out."""
    found = [variable for stage in party.stages.values() for variable in stage.model.variables]
    found += [] if party.optimizer is None else list(party.optimizer.variables)
    return [(str(getattr(one, "path", one.name)), np.array(held_by(one).numpy())) for one in found]


def _synthetic(party: Party, rows: int) -> Party:
    """The party with noise in place of x and a draw from its targets in place of y."""
    draw = np.random.default_rng(11)
    y = None if party.y is None else party.y[draw.integers(len(party.y), size=rows)]
    x = [_noise(one, rows, draw) for one in party.x] or None
    ids = None if x is None and y is None else range(rows)
    return Party(party.model, x, y, ids, party.optimizer, party.loss, party.metrics)


def _noise(like: np.ndarray[Any, Any], rows: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = (rows, *like.shape[1:])
    if like.dtype.kind in "fV":
        return draw.normal(size=shape).astype(like.dtype)
    return draw.choice(like.reshape(-1), size=shape).astype(like.dtype)


def _target_shape(plan: PartyPlan, given: Mapping[str, Party]) -> tuple[int, ...]:
    judge = given.get(plan.judge.owner)
    return (1,) if judge is None or judge.y is None else judge.y.shape[1:]


def _stand_in(plan: PartyPlan, name: str, rows: int, judged: tuple[int, ...]) -> Party:
    """Small dense models that take and give what the plan says."""
    draw, own = np.random.default_rng(12), plan.stages_of(name)
    models = {}
    for place, stage in enumerate(own):
        inputs = [keras.Input((_WIDTH,))] if stage.x else []
        inputs += [keras.Input(edge.shape, dtype=edge.dtype) for edge in plan.into(stage.name)]
        flat = [keras.layers.Flatten()(one) if len(one.shape) != 2 else one for one in inputs]
        joined = keras.layers.Concatenate()(flat) if len(flat) > 1 else flat[0]
        seed = keras.initializers.GlorotUniform(place)
        hidden = keras.layers.Dense(4, "tanh", kernel_initializer=seed)(joined)
        wanted = [(edge.shape, edge.dtype) for edge in plan.out_of(stage.name)] or [(judged, "float32")]
        outputs = []
        for shape, dtype in wanted:
            wide = keras.layers.Dense(int(np.prod(shape)), kernel_initializer=seed, dtype=dtype)(hidden)
            outputs.append(keras.layers.Reshape(shape, dtype=dtype)(wide))
        models[stage.name] = keras.Model(
            inputs if len(inputs) > 1 else inputs[0], outputs if len(outputs) > 1 else outputs[0]
        )
    takes, judges = any(stage.x for stage in own), any(stage.y for stage in own)
    x = draw.normal(size=(rows, _WIDTH)) if takes else None
    y = draw.normal(size=(rows, *judged)) if judges else None
    ids = range(rows) if takes or judges else None
    return Party(models, x, y, ids, "adam", "mean_squared_error" if judges else None)


__all__ = ["Rehearsal", "rehearse"]

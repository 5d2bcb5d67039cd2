"""The plan that parties agree on: who owns which stage, what crosses, in which batches, and who may see what.

It is data: no code, no weights, nothing of anybody's rows. Not files need be equal, but what they mean: the digest is
that of a canonical form. Where x and y sit decides the topology:

    x ─► bottom ─z─► top ◄─ y      vanilla: x at one party, y at the other; vertical: several bottoms into one top
    x ─► bottom ─z─► middle ─h─► head ◄─ y      U: bottom and head at one party, so that its labels never leave
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from pipeline.batch.microbatch import microbatch_sizes
from transport.limits import Limits
from transport.party_links import LinkBounds

PLAN_FORMAT: Final = 1
"""The version of the plan's form."""
GRANTS: Final = ("loss", "metrics", "outputs")
"""What may be granted to parties besides the one that has it: loss and metrics of each epoch, predictions."""
SMALLEST_LIMIT: Final = 1 << 26
"""Bytes that an array may have, even where all tensors of the plan are smaller: orders of rows and predictions."""
_TAG: Final = b"tapeline party plan 1\0"
_HEADER_BYTES: Final = 1 << 18


@dataclass(frozen=True)
class PartyEdge:
    """A tensor that goes from one stage to another, and its gradient the other way.

    Attributes:
        tensor: Its name.
        source: The stage that gives it.
        target: The stage that takes it.
        shape: Without the batch.
        dtype: A float type, by name.
    """

    tensor: str
    source: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PartyStage:
    """A part of the model at one party.

    Attributes:
        name: Of the stage.
        owner: The party.
        x: Whether it takes the owner's own x, before the tensors that arrive.
        y: Whether the owner's y judges its output.
    """

    name: str
    owner: str
    x: bool = False
    y: bool = False


@dataclass(frozen=True)
class PartyPlan:
    """A plan; read one with `read_plan`, which refuses what cannot be.

    Attributes:
        parties: {name: public key, or "" in a plan that can only be rehearsed}.
        hub: The party with the one open port, which leads; every tensor between parties comes from it or goes to it.
        stages: In the order of the file.
        edges: In the order of the file, which is that of a stage's inputs and outputs.
        batch: Rows of a batch; a last one that is smaller is trained on too, unless `drop_last`.
        microbatches: Parts of a batch.
        epochs: Passes over all rows.
        order_seed: Of the order of rows, drawn anew for each epoch; None: as they are.
        drop_last: Whether a last batch that is smaller is left out.
        grants: {what: parties that may see it besides its owner}, of `GRANTS`.
        patience: Seconds for which one party waits for another's next message.
        silence: Seconds without a sign of life after which a party counts as gone.
    """

    parties: Mapping[str, str]
    hub: str
    stages: tuple[PartyStage, ...]
    edges: tuple[PartyEdge, ...]
    batch: int
    microbatches: int = 1
    epochs: int = 1
    order_seed: int | None = None
    drop_last: bool = False
    grants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    patience: float = 600.0
    silence: float = 15.0

    def stage(self, name: str) -> PartyStage:
        """The stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def owner(self, stage: str) -> str:
        """The party that has a stage."""
        return self.stage(stage).owner

    def stages_of(self, party: str) -> tuple[PartyStage, ...]:
        """A party's stages, each behind those that it takes from."""
        return tuple(self.stage(name) for name in self.order() if self.owner(name) == party)

    def into(self, stage: str) -> tuple[PartyEdge, ...]:
        """The tensors that a stage takes, in order."""
        return tuple(edge for edge in self.edges if edge.target == stage)

    def out_of(self, stage: str) -> tuple[PartyEdge, ...]:
        """The tensors that a stage gives, in order."""
        return tuple(edge for edge in self.edges if edge.source == stage)

    def order(self) -> tuple[str, ...]:
        """The stages' names, each behind those that it takes from; fewer than all where there is a circle."""
        found: list[str] = []
        waiting = [stage.name for stage in self.stages]
        while ready := [name for name in waiting if all(edge.source in found for edge in self.into(name))]:
            found.append(ready[0])
            waiting.remove(ready[0])
        return tuple(found)

    @property
    def judge(self) -> PartyStage:
        """The stage whose output the loss judges."""
        return next(stage for stage in self.stages if stage.y)

    def crossing(self, party: str) -> tuple[PartyEdge, ...]:
        """The tensors that a party sends to another one, or gets from it."""
        return tuple(
            edge for edge in self.edges if (self.owner(edge.source) == party) != (self.owner(edge.target) == party)
        )

    def between(self, party: str, other: str) -> tuple[PartyEdge, ...]:
        """The tensors that cross between two parties."""
        pair = {party, other}
        return tuple(edge for edge in self.edges if {self.owner(edge.source), self.owner(edge.target)} == pair)

    def peers(self, party: str) -> tuple[str, ...]:
        """The parties that a party is connected with: the hub with all, the others with the hub."""
        return tuple(name for name in self.parties if name != party and self.hub in (name, party))

    def sees(self, what: str) -> tuple[str, ...]:
        """The parties that see the loss, the metrics or the outputs."""
        return tuple(dict.fromkeys((self.judge.owner, *self.grants.get(what, ()))))

    def bounds(self) -> LinkBounds:
        """Bounds of a connection: nothing larger or more than this plan sends; predictions come in pieces of that."""
        rows = microbatch_sizes(self.batch, self.microbatches)[0]
        largest = max([rows * edge_bytes(edge) for edge in self.edges] + [SMALLEST_LIMIT])
        limits = Limits(max_bytes=largest, max_header_bytes=_HEADER_BYTES, max_rank=16, max_name=128)
        return LinkBounds(limits, 16 + 2 * self.microbatches * len(self.edges), self.silence)

    def bytes_per_step(self, party: str, other: str) -> int:
        """Bytes of tensors that one party sends to another in a whole batch; a gradient is as large as its tensor."""
        return sum(self.batch * edge_bytes(edge) for edge in self.between(party, other))

    def fields(self) -> dict[str, Any]:
        """{dotted name of a field: its value}, all that the plan says."""
        found: dict[str, Any] = {"format": PLAN_FORMAT}
        plain = {
            "parties": dict(self.parties),
            "hub": self.hub,
            "stages": {stage.name: {k: v for k, v in asdict(stage).items() if k != "name"} for stage in self.stages},
            "stages.order": [stage.name for stage in self.stages],
            "edges": {edge.tensor: {k: v for k, v in asdict(edge).items() if k != "tensor"} for edge in self.edges},
            "edges.order": [edge.tensor for edge in self.edges],
            "training": {
                name: getattr(self, name) for name in ("batch", "microbatches", "epochs", "order_seed", "drop_last")
            },
            "grants": {what: sorted(self.grants.get(what, ())) for what in GRANTS},
            "limits": {"patience": self.patience, "silence": self.silence},
        }
        _flatten(plain, "", found)
        return found

    def digest(self) -> str:
        """SHA-256 of the canonical form, 64 hexadecimal digits; equal plans have equal ones."""
        return hashlib.sha256(_TAG + canonical(self.fields())).hexdigest()

    def field_marks(self, key: bytes) -> dict[str, str]:
        """{dotted name: a keyed hash of its value}: tells which fields of two plans differ, and no value."""
        return {
            name: hmac.digest(key, canonical([name, value]), "sha256").hex()[:16]
            for name, value in self.fields().items()
        }


def edge_bytes(edge: PartyEdge) -> int:
    """Bytes of one row of a tensor."""
    from transport.dtypes import DTYPES

    size = int(DTYPES[edge.dtype].itemsize)
    for length in edge.shape:
        size *= length
    return size


def canonical(value: Any) -> bytes:
    """JSON with sorted names and no spaces, in ASCII: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}" if name else key, found)
    else:
        found[name] = list(value) if isinstance(value, tuple) else value


__all__ = ["GRANTS", "PLAN_FORMAT", "SMALLEST_LIMIT", "PartyEdge", "PartyPlan", "PartyStage", "canonical", "edge_bytes"]

"""The data of a verification's report: rows, the checks that made them, the first deviation, the flow.

Plain data, which nothing here computes: `pipeline.verify` makes it, `pipeline.report` holds and shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.timeline import Timeline

__all__ = ["ALWAYS", "CHECKS", "ROW_KINDS", "Check", "Deviation", "Edge", "Flow", "Row"]

CHECKS = {
    "tape": "one tape over the joined model, on the same microbatches",
    "chain": "the Jacobian chain rule, stage by stage",
    "differences": "finite differences in float64 along random directions",
    "batch": "the whole batch under one tape, with Keras's own loss",
    "steps": "updates: weights, optimizer, statistics, seeds, metrics and predictions after each step",
    "own": "your own model, loss and optimizer, the objects themselves, in this process",
}
"""The checks that can be asked for, and what each compares with; "own" is made unasked too, wherever it can be."""


ALWAYS = {
    "hand-off": "what arrived is what was sent, bit for bit",
    "undisturbed": "the pipeline is left as it was, bit for bit",
}
"""The checks that every verification makes."""


ROW_KINDS = (
    "activation",
    "received activation",
    "loss",
    "output gradient",
    "received output gradient",
    "gradient",
    "directional derivative",
    "statistics",
    "seed",
    "weight",
    "optimizer",
    "metric",
    "prediction",
    "left as it was",
)
"""What a row may be about."""


@dataclass(frozen=True)
class Row:
    """One comparison: a tensor or variable, over all microbatches and windows where it has those.

    Attributes:
        check: Key of `CHECKS` or `ALWAYS`.
        kind: One of `ROW_KINDS`.
        stage: The stage that computed it (of something received: that received it); "" for what belongs to none.
        name: The tensor's name, or ``<stage>/<variable path>``.
        shape: Of a tensor at a cut: with the whole batch's samples.
        dtype: Its name.
        norm: L2 norm of what the pipeline has; NaN where there is nothing.
        difference: Largest absolute difference.
        relative: That, as a part of what `why` names (for gradients the largest |gradient| of all variables).
        ulps: Largest distance in units in the last place; see `pipeline.compare.compare.ulp_distance`.
        tolerance: What `relative` may be; 0 demands equal bits.
        why: Why this much.
        ok: Whether it is within the tolerance.
        verdict: In words.
        where: Microbatch, window or step of the first difference beyond the tolerance, else of the largest; or "".
        peer: At a cut the stage at the other end.
    """

    check: str
    kind: str
    stage: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    difference: float
    relative: float
    ulps: int
    tolerance: float
    why: str
    ok: bool
    verdict: str
    where: str = ""
    peer: str = ""


@dataclass(frozen=True)
class Check:
    """One way of checking.

    Attributes:
        name: Key of `CHECKS` or `ALWAYS`.
        ran: Whether it could be made.
        reason: Why not, naming stage and layer, where it could not.
        seconds: What it took.
    """

    name: str
    ran: bool
    reason: str = ""
    seconds: float = 0.0

    @property
    def about(self) -> str:
        """What it compares with."""
        return (CHECKS | ALWAYS)[self.name]


@dataclass(frozen=True)
class Deviation:
    """The first place of the flow that is not as it should be; all after it may only be its consequence.

    Attributes:
        row: The comparison that failed.
        stage: The stage to look at.
        sentence: What is wrong, where, in words.
    """

    row: Row
    stage: str
    sentence: str


@dataclass(frozen=True)
class Edge:
    """A tensor that crosses between two stages.

    Attributes:
        producer: Name of the stage that gives it.
        consumer: Name of the stage that takes it.
        tensor: Its name.
        bytes: Of one batch.
    """

    producer: str
    consumer: str
    tensor: str
    bytes: int


@dataclass(frozen=True)
class Flow:
    """The pipeline that was verified, for its picture.

    Attributes:
        stages: Names, in order.
        edges: What crosses.
        timeline: When each worker did what in the verified step.
    """

    stages: tuple[str, ...] = ()
    edges: tuple[Edge, ...] = ()
    timeline: Timeline | None = None

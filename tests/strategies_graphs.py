"""Hypothesis strategy for the models of `tests.random_graphs`: their nodes, cuts, objectives and schedules.

Sketches shrink to few nodes in a chain of two stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.random_graphs import (
    INPUTS,
    LOSSES,
    MASKABLE,
    ONE,
    SEVERAL,
    SHARED_WIDTH,
    SIZED,
    STEPS,
    STEPWISE,
    Node,
    Sketch,
    widths,
)

WIDEST = 10
KINDS = [*ONE, *SEVERAL, *STEPWISE, "halves", "embed", "shared", "renormalised"]
READABLE = {
    "embed": ("number", "tokens"),
    **dict.fromkeys(STEPWISE, ("steps",)),
    **dict.fromkeys(MASKABLE, ("flat", "steps")),
}
"""Which values a node reads, if not flat ones."""


class _Drawing:
    """A sketch while it is drawn: values with their width, rank and stage."""

    def __init__(self, draw: Any, inputs: Sequence[str], stages: int, planned: int) -> None:
        self.draw, self.inputs = draw, len(inputs)
        self.stages, self.planned = stages, planned
        self.nodes: list[Node] = []
        self.widths: list[int] = []
        self.kinds: list[str] = []  # flat, steps, number, tokens
        self.stage: list[int] = []
        self.read: list[int] = []
        self.home: int | None = None  # of the shared normalisation
        self.choice = [*KINDS, *["shared"] * (draw(st.integers(0, 1)) * len(KINDS))]
        for kind in inputs:
            self.value("flat" if kind == "floats" else kind, STEPS, 0)
        for i, kind in enumerate(inputs):
            if kind != "floats":
                self.node("embed", [i], self.draw(st.integers(2, 5)))

    def _stage(self) -> int:
        """The next node's: so many nodes a stage, or any."""
        even = min(len(self.nodes) * self.stages // self.planned, self.stages - 1)
        return self.draw(st.integers(0, self.stages - 1)) if self.draw(st.booleans()) else even

    def value(self, kind: str, width: int, stage: int) -> None:
        self.kinds.append(kind)
        self.widths.append(width)
        self.stage.append(stage)

    def node(self, kind: str, reads: Sequence[int], size: int = 0, stage: int | None = None) -> None:
        lowest = max(self.stage[i] for i in reads)
        if kind == "nested":
            stage = lowest  # its calls have no stages of their own
        elif stage is None:
            stage = max(lowest, self._stage())
        node = Node(kind, tuple(reads), size, stage)
        self.nodes.append(node)
        self.read += reads
        ranks = "steps" if kind == "embed" and self.kinds[reads[0]] == "tokens" else "flat"
        if kind not in ("pool", "recurrent") and self.kinds[reads[0]] == "steps":
            ranks = "steps"
        for width in widths(node, [self.widths[i] for i in reads]):
            self.value(ranks, width, stage)

    def pick(self, *kinds: str, width: int | None = None, least: int = 1) -> int:
        """A value of these kinds, the latest first; there must be one."""
        found = self._found(kinds, width, least)
        return found[self.draw(st.integers(0, len(found) - 1))]

    def _found(self, kinds: Sequence[str], width: int | None, least: int) -> list[int]:
        return [
            i
            for i in reversed(range(len(self.kinds)))
            if self.kinds[i] in kinds and width in (None, self.widths[i]) and self.widths[i] >= least
        ]

    def sinks(self) -> list[int]:
        return [i for i in range(len(self.kinds)) if i not in self.read]

    def grow(self) -> None:
        """One more node."""
        kind = self.draw(st.sampled_from([kind for kind in self.choice if self._some(kind)]))
        size = self.draw(st.integers(2, 5))
        if kind in ("shared", "renormalised"):
            self._share(kind, size % 2)
        elif kind in SEVERAL:
            self._join(kind)
        else:
            source = self.pick(*READABLE.get(kind, ("flat",)), least=2 if kind == "halves" else 1)
            self.node(kind, [source], size if kind in (*SIZED, "embed") else 0)

    def _some(self, kind: str) -> bool:
        """Whether there is a value that such a node can read."""
        return any(
            found in READABLE.get(kind, ("flat",)) and (kind != "halves" or width > 1)
            for found, width in zip(self.kinds, self.widths, strict=True)
        )

    def _join(self, kind: str) -> None:
        source = self.pick("flat")
        width = None if kind == "concatenate" else self.widths[source]
        count = self.draw(st.integers(2, 3)) if kind in ("add", "average", "concatenate") else 2
        reads = [source, *(self.pick("flat", width=width) for _ in range(count - 1))]
        self.node(kind, reads)
        if self.widths[-1] > WIDEST:
            self.node("dense", [len(self.kinds) - 1], 4)

    def _share(self, kind: str, layer: int) -> None:
        """One more use of a shared layer; of one that changes its own state, all are in one stage."""
        home = None if kind == "shared" else self.home
        fitting = [i for i in self._found(("flat",), SHARED_WIDTH, 1) if home is None or self.stage[i] <= home]
        if not fitting:
            self.node("dense", [self.pick("flat")], SHARED_WIDTH)
            return
        self.node(kind, [fitting[self.draw(st.integers(0, len(fitting) - 1))]], layer, home)
        if kind != "shared":
            self.home = self.nodes[-1].stage

    def end(self, most: int) -> None:
        """Let every value reach an output, at most so many outputs that nobody reads, and something be trained."""
        for i in self.sinks():
            if self.kinds[i] == "steps":
                self.node("pool", [i])
        while len(sinks := self.sinks()) > most:
            self.node("concatenate", sinks[: max(2, min(3, 1 + len(sinks) - most))])
            self.node("dense", [len(self.kinds) - 1], self.draw(st.integers(2, 4)))
        untrained = not any(node.kind in (*SIZED, "embed") and node.kind != "frozen" for node in self.nodes)
        for i in self.sinks():
            if untrained or self.widths[i] < 2 or i < self.inputs:
                self.node("dense", [i], 2)


@st.composite
def sketches(draw: Any) -> Sketch:
    """Sketches of up to four stages and three outputs."""
    inputs = draw(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3))
    planned = draw(st.integers(2, 12))
    drawing = _Drawing(draw, inputs, draw(st.sampled_from([2, 3, 4, 1])), planned)
    for _ in range(planned):
        drawing.grow()
    drawing.end(draw(st.integers(1, 3)))
    outputs = drawing.sinks()
    inside = [
        i
        for i, (kind, width) in enumerate(zip(drawing.kinds, drawing.widths, strict=True))
        if i >= len(inputs) and kind == "flat" and width > 1 and i not in outputs
    ]
    if inside and len(outputs) < 3 and draw(st.booleans()):
        outputs.append(draw(st.sampled_from(inside)))  # one that others read too
    count = len(outputs)
    return Sketch(
        inputs=tuple(inputs),
        nodes=tuple(drawing.nodes),
        outputs=tuple(outputs),
        losses=tuple(draw(st.sampled_from(sorted(LOSSES))) for _ in outputs),
        loss_weights=tuple(draw(st.sampled_from([1.0, 0.5, 2.0])) for _ in outputs) if count > 1 else (),
        schedule=draw(st.sampled_from(["gpipe", "1f1b"])),
        microbatches=draw(st.integers(1, 4)),
        samples=draw(st.integers(1, 7)),
        weighted=draw(st.booleans()),
        eager=draw(st.booleans()),
        recompute=draw(st.booleans()),
        named=draw(st.booleans()),
    )

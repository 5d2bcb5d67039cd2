"""Reports made by hand, for the tests of what shows them: healthy, deviating, long, with skip edges and towers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from pipeline.compare.rows import Check, Deviation, Edge, Flow, Row
from pipeline.compare.tolerance import Tolerance
from pipeline.plan.schedules import build_plan
from pipeline.plan.simulator import Cost, simulate
from pipeline.report.report import Report

STAGES = ("bottom", "middle", "top")
BITS = Tolerance.bits()
FUSED = Tolerance(9.5e-07, "compiled: fused operations round differently, at most 8 eps of float32")
EDGES = (
    Edge("bottom", "middle", "pool1", 1_254_400),
    Edge("middle", "top", "pool2", 627_200),
    Edge("bottom", "top", "skip", 64_000),
)


def row(kind, stage, name, *, check="tape", peer="", tolerance=BITS, relative=0.0, **given):
    """A row that is ok unless `relative` is more than its tolerance."""
    ok = relative <= tolerance.relative
    verdict = "equal bits" if relative == 0 else "within tolerance" if ok else "DIFFERS"
    made = Row(
        check=check,
        kind=kind,
        stage=stage,
        name=name,
        shape=(32, 7),
        dtype="float32",
        norm=3.25,
        difference=relative * 2,
        relative=relative,
        ulps=round(min(relative, 1e3) * 2**24),
        tolerance=tolerance.relative,
        why=tolerance.why,
        ok=ok,
        verdict=verdict,
        where="" if ok else "microbatch 2",
        peer=peer,
    )
    return replace(made, **given)


def rows(stages=STAGES, edges=EDGES, tolerance=FUSED, variables=2):
    """A healthy step's rows in the order of its flow, then what was handed over and left as it was."""
    found = []
    for edge in edges:
        found.append(row("activation", edge.producer, edge.tensor, peer=edge.consumer, tolerance=tolerance))
    found.append(row("loss", stages[-1], "loss", tolerance=tolerance, shape=()))
    for edge in reversed(edges):
        found.append(
            row("output gradient", edge.consumer, edge.tensor, peer=edge.producer, tolerance=tolerance, relative=1e-8)
        )
    for stage in reversed(stages):
        for number in range(variables):
            name = f"{stage}/dense/kernel_{number}"
            found.append(row("gradient", stage, name, tolerance=tolerance, relative=3.1e-8 * (number % 20)))
    for edge in edges:
        for kind, stage, peer in (
            ("received activation", edge.consumer, edge.producer),
            ("received output gradient", edge.producer, edge.consumer),
        ):
            found.append(row(kind, stage, edge.tensor, peer=peer, check="hand-off"))
    found += [row("left as it was", stage, f"{stage}: 4 variables", check="undisturbed") for stage in stages]
    return found


def healthy(**changes):
    """Three stages with a skip edge; all agree; two checks that were asked for could not be made."""
    checks = (
        Check("tape", True, seconds=0.41),
        Check("chain", False, "stage 'middle': layer 'dropout' draws random numbers"),
        Check("batch", False, "stage 'middle': layer 'batch_norm' computes statistics per microbatch"),
        Check("hand-off", True, seconds=0.02),
        Check("undisturbed", True, seconds=0.01),
    )
    flow = Flow(STAGES, EDGES, simulate(build_plan("1f1b", 3, 4), Cost(0.010, 0.018)))
    made = Report(
        rows=tuple(rows()),
        checks=checks,
        loss=0.693147182,
        reference_loss=0.693147182,
        tolerance=FUSED,
        headline="3 stages, 4 microbatches, 1f1b, compiled",
        flow=flow,
        seconds=1.25,
    )
    return replace(made, **changes)


def failing(sentence=None):
    """The gradient that 'middle' gives back is wrong, and so is what comes after it."""
    report = healthy()
    changed = []
    for one in report.rows:
        downstream = one.stage == "bottom" and one.kind == "gradient"
        first = one.kind == "output gradient" and one.stage == "middle"
        if first or downstream:
            one = row(one.kind, one.stage, one.name, peer=one.peer, tolerance=FUSED, relative=0.25)
        changed.append(one)
    culprit = next(one for one in changed if not one.ok)
    said = sentence or "stage 'middle' computes another dL/dOut for 'pool1' (to 'bottom'), first in microbatch 2"
    return replace(report, rows=tuple(changed), first=Deviation(culprit, "middle", said))


def not_finite():
    """A gradient that is missing on one side, with infinities and NaN in its numbers."""
    report = healthy()
    lost = replace(
        row("gradient", "top", "top/dense/lost"),
        norm=math.nan,
        difference=math.inf,
        relative=math.inf,
        ok=False,
        verdict="gradient only in one tape",
    )
    return replace(
        report, rows=(*report.rows, lost), loss=math.nan, first=Deviation(lost, "top", "'lost' has no gradient")
    )


def long(stages=8, variables=40, deviating=0):
    """Hundreds of rows; the first `deviating` gradients are wrong."""
    names = tuple(f"stage_{number}" for number in range(stages))
    edges = tuple(Edge(a, b, f"{a}_out", 4096) for a, b in pairwise(names))
    found = rows(names, edges, variables=variables)
    wrong = [index for index, one in enumerate(found) if one.kind == "gradient"][:deviating]
    for index in wrong:
        found[index] = replace(found[index], relative=0.5, difference=1.0, ok=False, verdict="DIFFERS")
    first = Deviation(found[wrong[0]], found[wrong[0]].stage, "the first of many") if wrong else None
    checks = (Check("tape", True), Check("hand-off", True), Check("undisturbed", True))
    timeline = simulate(build_plan("1f1b", stages, 8), Cost(0.010, 0.018))
    return healthy(rows=tuple(found), checks=checks, flow=Flow(names, edges, timeline), first=first)


def towers():
    """Two bottoms under one top, the left one of two stages; two tensors in one hand-off; a skip edge from below."""
    names = ("left_1", "right", "left_2", "join", "head")
    edges = (
        Edge("left_1", "left_2", "a", 100),
        Edge("left_2", "join", "b", 100),
        Edge("left_2", "join", "c", 5_000_000_000),
        Edge("right", "join", "d", 100),
        Edge("right", "head", "e", 100),
        Edge("left_1", "head", "f", 100),
        Edge("join", "head", "g", 100),
    )
    return healthy(rows=tuple(rows(names, edges)), flow=Flow(names, edges, None))


def hostile():
    """Names and sentences that would break a page or a terminal that believed them."""
    evil = "<script>window.broken=1</script>"
    names = (evil, '"><img src=x onerror="window.broken=2">', "</script><b>[bold red]x[/nope]")
    edges = (Edge(names[0], names[1], "&lt;'\"\u2028", 1), Edge(names[1], names[2], "<!--<script>", 1))
    made = rows(names, edges)
    culprit = row("gradient", names[2], f"{names[2]}/kernel", relative=1.0, why="<i>why</i>", verdict="<u>no</u>")
    timeline = simulate(build_plan("gpipe", 3, 2), Cost(1, 1))
    return healthy(
        rows=(*made, culprit),
        headline="<h1>headline</h1> [red]",
        flow=Flow(names, edges, timeline),
        first=Deviation(culprit, names[2], f"{names[2]} is wrong <script>window.broken=3</script>"),
        checks=(Check("tape", True), Check("chain", False, "<script>window.broken=4</script> [/b]")),
    )

"""The predicted cost of a split, made before it runs and shown beside what is measured then.

    costs of the calls ─► per stage: forward, backward, messages ─► simulator ─► step time, bubble
                                                                                      ║ beside
    Pipeline.timeline(x, y) ══════════════════════════════════════════════════════════╝ measured

Halves of a backward are those of the calls; what a weight half reads is held until then, the rest only until the input
half is done. A prediction knows the model and the plan. It does not know the loss and its metrics (the last stage
computes them too), other programs on the machine, and stages that get in each other's way (memory bandwidth, fewer
cores than stages).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import attrgetter

from rich.table import Table

from pipeline.cutting.costs import CallCost, Costs, Transfer
from pipeline.cutting.optimise import SENDING_SLOTS
from pipeline.cutting.stage_prediction import StagePrediction, peak_bytes
from pipeline.errors import TimelineError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import build_plan
from pipeline.plan.simulator import simulate
from pipeline.plan.timeline import Timeline
from stages.actions import Action, Wiring
from stages.plain_text import harmless, plain_text

__all__ = ["Comparison", "Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a split under a plan.

    Attributes:
        stages: One entry per stage.
        samples: Samples per microbatch that the seconds are of.
        microbatches: Microbatches per step.
        schedule: Name of the schedule, or the function that makes its plans.
        wiring: Stage -> the stages it takes tensors from.
        why: Why the schedule was chosen, in one line; "" where the user named it.
    """

    stages: tuple[StagePrediction, ...]
    samples: int
    microbatches: int
    schedule: str | Callable[..., Plan] = "1f1b"
    wiring: Mapping[int, Sequence[int]] | None = None
    why: str = ""

    @cached_property
    def plan(self) -> Plan:
        """The plan of a step."""
        return build_plan(self.schedule, len(self.stages), self.microbatches, wiring=self.wiring)

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step."""
        simulated = simulate(self.plan, [stage.cost for stage in self.stages], self.wiring)
        return replace(simulated, name=f"{self.plan.headline()}, predicted")

    @property
    def step_time(self) -> float:
        """Seconds of a step, without its update."""
        return self.timeline.step_time

    @property
    def bubble(self) -> float:
        """The share of worker time in which nothing is done."""
        return self.timeline.bubble

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names."""
        return tuple(stage.name for stage in self.stages)

    def peak_memory(self) -> tuple[int, ...]:
        """For each stage the bytes that it has at most at once.

        Variables, their gradients and slots, what its open microbatches keep, the microbatch at work, and messages.
        """
        own: list[list[Action]] = [[] for _ in self.stages]
        for _, action in self.plan.actions():
            own[action.stage].append(action)
        return tuple(
            stage.memory + stage.under_way + peak_bytes(self.stages, program)
            for stage, program in zip(self.stages, own, strict=True)
        )

    def of(self, microbatches: int | None = None, samples: int | None = None) -> Prediction:
        """The same split of another batch.

        Args:
            microbatches: Into how many; None: as many as here.
            samples: In each; times change in proportion. None: as many as here.
        """
        factor = 1.0 if samples is None else samples / self.samples
        return replace(
            self,
            stages=tuple(
                replace(
                    stage,
                    forward=stage.forward * factor,
                    backward=stage.backward * factor,
                    transfer=stage.transfer * factor,
                    sent=stage.sent * factor,
                    activations=round(stage.activations * factor),
                    weight_half=stage.weight_half * factor,
                    left=round(stage.left * factor),
                    returned=round(stage.returned * factor),
                    at_work=round(stage.at_work * factor),
                    under_way=round(stage.under_way * factor),
                )
                for stage in self.stages
            ),
            samples=self.samples if samples is None else samples,
            microbatches=self.microbatches if microbatches is None else microbatches,
        )

    def beside(self, measured: Timeline, samples: int | None = None) -> Comparison:
        """This prediction beside what happened.

        Args:
            measured: What `Pipeline.timeline(x, y)` gave. Its number of microbatches is taken for the prediction too.
            samples: Samples per microbatch of the measured step, where they are not those of the sample: predicted
                times are taken in proportion.

        Raises:
            TimelineError: The timeline is of another number of stages.
        """
        stages = {span.action.stage for span in measured.spans}
        if stages != set(range(len(self.stages))):
            raise TimelineError(
                f"the prediction is for {len(self.stages)} stage(s), the measured timeline has the stages "
                f"{sorted(stages)}; take the timeline of the pipeline that this prediction was made for"
            )
        count = 1 + max(span.action.microbatch for span in measured.spans)
        ours = self.of(count, samples)
        predicted, real = _busy(ours.timeline), _busy(measured)
        rows = tuple(ComparisonRow(name, predicted[i], real[i]) for i, name in enumerate(self.names))
        step = ComparisonRow("step", ours.step_time, measured.step_time)
        bubble = ComparisonRow("bubble", ours.bubble, measured.bubble)
        return Comparison(rows, step, bubble, ours.plan.headline(), ours.samples)

    def to_json(self) -> str:
        """The prediction as JSON."""
        found = {
            "plan": self.plan.headline(),
            "why": self.why,
            "samples": self.samples,
            "step_time": self.step_time,
            "bubble": self.bubble,
            "stages": [
                asdict(stage) | {"peak_memory": peak}
                for stage, peak in zip(self.stages, self.peak_memory(), strict=True)
            ],
        }
        return json.dumps(found, indent=2)

    def table(self) -> Table:
        """The prediction as a rich table."""
        table = Table()
        table.add_column("stage")
        for name in ("forward ms", "backward ms", "transfer ms", "sent KiB", "parameters", "peak MiB"):
            table.add_column(name, justify="right")
        for stage, peak in zip(self.stages, self.peak_memory(), strict=True):
            table.add_row(
                harmless(stage.name),
                _ms(stage.forward),
                _ms(stage.backward),
                _ms(stage.transfer),
                f"{stage.sent / 1024:.1f}",
                f"{stage.parameters:,}",
                f"{peak / 2**20:.1f}",
            )
        return table

    def __str__(self) -> str:
        headline = (
            f"Predicted, {self.plan.headline()} of {self.samples} sample(s): step {_ms(self.step_time)} ms, "
            f"bubble {self.bubble:.1%}"
        )
        why = f"\nSchedule {self.why}" if self.why else ""
        return f"{headline}{why}\n{plain_text(self.table())}"


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One figure, predicted and measured.

    Attributes:
        name: Of what.
        predicted: Seconds, or a share.
        measured: The same, as it happened.
    """

    name: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; NaN where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class Comparison:
    """A prediction beside a measurement.

    Attributes:
        rows: For each stage the seconds in which it is busy within a step.
        step: The step's seconds.
        bubble: The share of worker time in which nothing is done.
        plan: What was run, in words.
        samples: Samples per microbatch that were predicted for.
    """

    rows: tuple[ComparisonRow, ...]
    step: ComparisonRow
    bubble: ComparisonRow
    plan: str
    samples: int

    def to_json(self) -> str:
        """The comparison as JSON."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> Table:
        """The comparison as a rich table."""
        table = Table()
        table.add_column("busy in a step")
        for name in ("predicted ms", "measured ms", "measured / predicted"):
            table.add_column(name, justify="right")
        for row in (*self.rows, self.step):
            ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
            table.add_row(harmless(row.name), _ms(row.predicted), _ms(row.measured), ratio)
        table.add_row(self.bubble.name, f"{self.bubble.predicted:.1%}", f"{self.bubble.measured:.1%}", "")
        return table

    def __str__(self) -> str:
        headline = f"Predicted and measured: {self.plan} of {self.samples} sample(s)"
        return f"{headline}\n{plain_text(self.table())}"


def predict(
    costs: Costs,
    stage_of: Sequence[int],
    *,
    schedule: str | Callable[..., Plan] = "1f1b",
    microbatches: int = 8,
    transfer: Transfer | None = None,
    names: Sequence[str] = (),
    slots: int = SENDING_SLOTS,
    recompute: bool | Sequence[bool] = False,
) -> Prediction:
    """What a split should cost.

    Args:
        costs: What the calls cost.
        stage_of: The stage of every call; `pipeline.cutting.costs.assignment` makes it of cuts.
        schedule: As `Pipeline` takes it.
        microbatches: Microbatches per step.
        transfer: What messages take. Default: `Transfer()`.
        names: The stages' names; default stage0, stage1 ...
        slots: Values that the optimizer keeps beside each trainable one.
        recompute: As `Pipeline` takes it. A stage with an output of the model has a loss there and goes forward and
            backward in one, so it has nothing to compute again.

    Raises:
        TimelineError: There is not one stage for each call, a stage has none, or there is not one name, or one value of
            `recompute`, a stage.
    """
    count = 1 + max(stage_of, default=-1)
    if len(stage_of) != len(costs.calls) or set(stage_of) != set(range(count)):
        raise TimelineError(
            f"expected one stage for each of {len(costs.calls)} calls and no empty stage, received {list(stage_of)}"
        )
    titles = tuple(names) or tuple(f"stage{i}" for i in range(count))
    if len(titles) != count:
        raise TimelineError(f"expected one name for each of {count} stages, received {list(titles)}")
    again = (recompute,) * count if isinstance(recompute, bool) else tuple(recompute)
    if len(again) != count:
        raise TimelineError(f"expected one value of `recompute` for each of {count} stages, received {list(again)}")
    sent = _messages(costs, stage_of)
    transfer = transfer or Transfer()
    stages = []
    for i, name in enumerate(titles):
        calls = [call for call, stage in zip(costs.calls, stage_of, strict=True) if stage == i]
        sizes = [size for (source, _), each in sent.items() if source == i for size in each]
        way = StagePrediction(name, 0.0, 0.0, transfer.seconds(sizes), math.fsum(sizes), 0, 0, 0)
        stages.append(_with_calls(way, costs, calls, slots, again[i]))
    upstream = Wiring({i: sorted({a for a, b in sent if b == i}) for i in range(count)})
    return Prediction(tuple(stages), costs.samples, microbatches, schedule, upstream)


def _with_calls(
    stage: StagePrediction, costs: Costs, calls: Sequence[CallCost], slots: int, again: bool
) -> StagePrediction:
    """The stage with what its calls need; `again`: it computes its forward again in backward."""
    weights = {weight.key: weight for call in calls for weight in call.weights}.values()
    forward, backward = math.fsum(call.forward for call in calls), math.fsum(call.backward for call in calls)
    kept, left = (dict(pair for call in calls for pair in of(call)) for of in (_KEPT, _LEFT))
    made = {tensor for call in calls for tensor in call.makes}
    taken = {tensor for call in calls for tensor in call.reads} - made
    at_once = bool(made & set(costs.outputs)) and not stage.sent
    away = {tensor for call in costs.calls if call not in calls for tensor in call.reads} | set(costs.outputs)
    under_way = 2 * sum(costs.memory(taken | (made & away)).values())
    at_work = {name: size for name, size in left.items() if name not in kept} | (kept if again or at_once else {})
    if not at_once:
        if again:
            backward, kept = backward + forward, costs.memory(taken)
        kept = kept | costs.memory(made & away)
    returned = costs.memory(tensor for tensor in taken - set(costs.inputs) if costs.tensors[tensor].differentiable)
    return replace(
        stage,
        forward=forward,
        backward=backward,
        parameters=sum(weight.count for weight in weights),
        memory=sum(weight.bytes * (2 + slots if weight.trainable else 1) for weight in weights),
        activations=sum(kept.values()),
        weight_half=math.fsum(call.weight_half for call in calls),
        left=sum(left.values()),
        at_once=at_once,
        returned=sum(returned.values()),
        at_work=sum(at_work.values()),
        under_way=under_way,
    )


_KEPT, _LEFT = attrgetter("kept"), attrgetter("left")


def _messages(costs: Costs, stage_of: Sequence[int]) -> dict[tuple[int, int], list[float]]:
    """{(from, to): bytes of each message of one microbatch}: a tensor goes to every stage that reads it, once each."""
    makers, found = costs.makers(), dict[tuple[int, int], list[float]]()
    for tensor, positions in costs.readers().items():
        if tensor in makers:
            home = stage_of[makers[tensor]]
            for target in dict.fromkeys(stage_of[position] for position in positions):
                if target != home:
                    found.setdefault((home, target), []).append(costs.tensors[tensor].bytes * costs.samples)
    return found


def _busy(timeline: Timeline) -> dict[int, float]:
    """Seconds in which each stage does something."""
    found: dict[int, list[float]] = {}
    for span in timeline.spans:
        found.setdefault(span.action.stage, []).append(span.duration)
    return {stage: math.fsum(durations) for stage, durations in found.items()}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"

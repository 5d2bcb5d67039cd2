"""From a model and a sample to cuts and what they should cost: measure, balance, predict.

graph, sample ─► costs ─► cuts ─► prediction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cutting.costs import Costs, Transfer, assignment
from pipeline.cutting.optimise import BALANCES, balanced_cuts
from pipeline.cutting.prediction import Prediction, predict
from pipeline.cutting.transfer import measure_transfer
from pipeline.errors import SplitError
from pipeline.model.call_graph import CallGraph
from pipeline.plan.plan import Plan
from transport.registry import AUTO

__all__ = ["Balanced", "balance", "predicted"]


@dataclass(frozen=True)
class Balanced:
    """Chosen cuts, and their predicted cost.

    Attributes:
        cuts: Before which calls of the model's order the stages after the first begin.
        prediction: What the split should cost; None without a sample.
    """

    cuts: tuple[int, ...]
    prediction: Prediction | None


def balance(
    graph: CallGraph,
    stages: int,
    by: str,
    sample: Any = None,
    *,
    microbatches: int = 8,
    schedule: str | Callable[..., Plan] = "1f1b",
    transport: str = AUTO,
    threads: int | None = None,
    recompute: bool | Sequence[bool] = False,
    allowed: Sequence[bool] | None = None,
) -> Balanced:
    """Cut a model so that the slowest (or largest) stage is as fast (or small) as possible.

    Args:
        graph: The model.
        stages: How many stages.
        by: ``"time"``, ``"parameters"`` or ``"memory"``; see `pipeline.cutting.optimise`.
        sample: One microbatch as `fit` takes it, (n, ...). Only ``"parameters"`` can do without.
        microbatches: Microbatches per step.
        schedule: As `Pipeline` takes it; for the prediction.
        transport: As `Pipeline` takes it; what its messages cost is measured.
        threads: TensorFlow's threads per worker. Default: all cores that this process has.
        recompute: As `Pipeline` takes it; for the prediction. Balanced is the model that keeps its tapes.
        allowed: For each position, 0 to the number of calls, whether a stage may begin there; default: everywhere.

    Raises:
        SplitError: The model cannot be measured or cut so.
        DataError: The sample does not fit the model.
    """
    if by not in BALANCES:
        raise SplitError(f"balance must be one of {', '.join(map(repr, BALANCES))}, received {by!r}")
    from pipeline.cutting.measure import weigh  # what only balancing takes is imported with the first

    if sample is None:
        if by != "parameters":
            raise SplitError(
                f"balance={by!r} measures the model, for which it needs data: give one microbatch, sample=x[:32]"
            )
        return Balanced(balanced_cuts(weigh(graph), stages, by, allowed=allowed), None)
    costs, messages = _measured(graph, sample, transport, threads)
    cuts = balanced_cuts(costs, stages, by, microbatches=microbatches, transfer=messages, allowed=allowed)
    stage_of = assignment(cuts, len(costs.calls))
    return Balanced(
        cuts,
        predict(costs, stage_of, schedule=schedule, microbatches=microbatches, transfer=messages, recompute=recompute),
    )


def predicted(
    graph: CallGraph,
    stage_of: Sequence[int],
    sample: Any,
    *,
    microbatches: int = 8,
    schedule: str | Callable[..., Plan] = "1f1b",
    transport: str = AUTO,
    threads: int | None = None,
    recompute: bool | Sequence[bool] = False,
) -> Prediction:
    """What given stages should cost; arguments as `balance` has them, `stage_of` as `predict`.

    Raises:
        SplitError: The model cannot be measured.
        DataError: The sample does not fit the model.
    """
    costs, messages = _measured(graph, sample, transport, threads)
    return predict(
        costs, stage_of, schedule=schedule, microbatches=microbatches, transfer=messages, recompute=recompute
    )


def _measured(graph: CallGraph, sample: Any, transport: str, threads: int | None) -> tuple[Costs, Transfer]:
    from pipeline.cutting.measure import measure

    inside = transport.startswith("inproc")  # then the stages are threads that share this process's cores
    costs = measure(graph, sample, threads=None if inside else threads)
    return costs, measure_transfer(transport.partition("://")[0])
